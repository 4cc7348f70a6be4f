package network

import (
	"fmt"
	"net/netip"
	"strings"
)

// ResolvConf renders a resolv.conf(5). It is empty when nothing is asked for: then the node's own file serves, as the CRI has it.
func ResolvConf(servers, searches, options []string) string {
	var b strings.Builder
	if len(searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(searches, " "))
	}
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(options, " "))
	}
	return b.String()
}

// Hosts renders the hosts(5) file of a pod that was given none: the names of the loopback addresses and the pod's own.
func Hosts(hostname string, addrs []netip.Addr) string {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"ff02::1\tip6-allnodes\n" +
		"ff02::2\tip6-allrouters\n")
	if hostname == "" {
		return b.String()
	}
	for _, a := range addrs {
		fmt.Fprintf(&b, "%s\t%s\n", a, hostname)
	}
	return b.String()
}
