package main

// containerModules are what container VMs need. What a kernel has built in is left out by itself.
func containerModules() moduleSet {
	return moduleSet{
		Boot: []string{
			"virtio_pci", "virtio_console", "virtio_scsi", "sd_mod", "virtio_net", "erofs", "overlay", "ext4", "virtio_rng",
		},
		Lazy: map[string][]string{"virtiofs": {"virtiofs"}},
		Auto: autoModules(),
	}
}

// autoModules are what pods make use of without saying so: they add a device, a rule or a mount, and the
// kernel asks for the module. All of them together stay in the guest's memory, packed, so what few pods
// use is not here: file systems of disks, ebtables, most classifiers and IP set types.
func autoModules() []string {
	return []string{
		// Memory that comes and goes; the agent asks for these.
		"virtio_mem", "virtio_balloon",
		// Network devices.
		"bridge", "br_netfilter", "8021q", "dummy", "geneve", "ifb", "ipvlan", "ipvtap", "macvlan", "macvtap",
		"tun", "veth", "vrf", "vxlan", "wireguard", "ipip", "ip_gre", "ip6_gre", "ip6_tunnel", "sit", "fou", "fou6",
		// IPsec.
		"af_key", "xfrm_user", "xfrm_interface", "esp4", "esp6", "authenc", "echainiv", "seqiv", "ctr", "gcm", "ccm",
		// Firewalls: nftables, iptables and ip6tables of both kinds, IP sets, IPVS.
		"net/netfilter/*", "net/ipv4/netfilter/*", "net/ipv6/netfilter/*",
		"ip_set", "ip_set_bitmap_port", "ip_set_hash_ip", "ip_set_hash_ipport", "ip_set_hash_net", "ip_set_hash_netport",
		"ip_set_list_set", "ip_vs", "ip_vs_rr", "ip_vs_wrr", "ip_vs_lc", "ip_vs_sh",
		// Traffic control.
		"sch_cake", "sch_fq", "sch_htb", "sch_ingress", "sch_netem", "sch_prio", "sch_sfq", "sch_tbf",
		"cls_basic", "cls_bpf", "cls_flower", "cls_fw", "cls_matchall", "cls_u32",
		"act_bpf", "act_gact", "act_mirred", "act_pedit", "act_police", "act_skbedit",
		// Protocols, and what ss asks for.
		"sctp", "tcp_bbr", "tls", "inet_diag", "netlink_diag", "af_packet_diag", "raw_diag", "tcp_diag", "udp_diag", "unix_diag",
		// Files.
		"fuse", "loop", "binfmt_misc", "squashfs", "vfat", "nls_ascii", "nls_cp437", "nls_utf8",
	}
}
