package seed

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// networkConfig is version 2 of cloud-init's network configuration, which is netplan's.
type networkConfig struct {
	Version   int                 `yaml:"version"`
	Ethernets map[string]ethernet `yaml:"ethernets"`
}

type ethernet struct {
	Match       map[string]string `yaml:"match"`
	SetName     string            `yaml:"set-name"`
	DHCP4       bool              `yaml:"dhcp4"`
	DHCP6       bool              `yaml:"dhcp6"`
	AcceptRA    bool              `yaml:"accept-ra"`
	MTU         int               `yaml:"mtu,omitempty"`
	Addresses   []string          `yaml:"addresses,omitempty"`
	Routes      []route           `yaml:"routes,omitempty"`
	Nameservers *nameservers      `yaml:"nameservers,omitempty"`
}

type route struct {
	To     string `yaml:"to"`
	Via    string `yaml:"via"`
	OnLink bool   `yaml:"on-link,omitempty"`
}

type nameservers struct {
	Addresses []string `yaml:"addresses,omitempty"`
	Search    []string `yaml:"search,omitempty"`
}

// networkV2 gives every interface exactly what the pod has: the guest asks nobody.
func (in Input) networkV2() networkConfig {
	c := networkConfig{Version: 2, Ethernets: map[string]ethernet{}}
	for i, f := range in.Interfaces {
		e := ethernet{Match: map[string]string{"macaddress": f.MAC}, SetName: f.Name, MTU: f.MTU, Addresses: texts(f.Addresses)}
		for _, r := range f.allRoutes() {
			e.Routes = append(e.Routes, r.v2(f))
		}
		if i == 0 && len(in.DNS.Servers)+len(in.DNS.Search) > 0 {
			e.Nameservers = &nameservers{texts(in.DNS.Servers), in.DNS.Search}
		}
		c.Ethernets[f.Name] = e
	}
	return c
}

func texts[T interface{ String() string }](list []T) []string {
	var out []string
	for _, v := range list {
		out = append(out, v.String())
	}
	return out
}

// v2 writes a route without gateway as one with a gateway of zeros, which is the same: without any, cloud-init 22.4 fails where it writes for ifupdown or ifcfg.
func (r Route) v2(f Interface) route {
	via := r.Via
	if !via.IsValid() {
		via = unspecified(r.To)
	}
	return route{To: r.To.Masked().String(), Via: via.String(), OnLink: r.Via.IsValid() && !f.reaches(r.Via)}
}

func unspecified(p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// reaches tells whether an address lies in a subnet of the interface.
func (f Interface) reaches(a netip.Addr) bool {
	return slices.ContainsFunc(f.Addresses, func(p netip.Prefix) bool { return p.Contains(a) }) || a.IsLinkLocalUnicast() && a.Is6()
}

// allRoutes puts a route to every gateway that no subnet reaches before the others. netplan does not need it, since it knows on-link, but what else
// renders the configuration in a guest does not know that.
func (f Interface) allRoutes() []Route {
	var links []Route
	for _, r := range f.Routes {
		if !r.Via.IsValid() || f.reaches(r.Via) {
			continue
		}
		link := Route{To: netip.PrefixFrom(r.Via, r.Via.BitLen())}
		if !slices.Contains(f.Routes, link) && !slices.Contains(links, link) {
			links = append(links, link)
		}
	}
	return append(links, f.Routes...)
}

// routeScript adds the routes that are missing when the guest's own network is up: on-link gateways are lost wherever cloud-init does not write for netplan, and
// its version 22.4 writes ::/64 for ::/0.
func (in Input) routeScript() string {
	if len(in.NetworkConfig) > 0 {
		return ""
	}
	var b strings.Builder
	for _, f := range in.Interfaces {
		for _, r := range f.allRoutes() {
			family := map[bool]string{true: "-4", false: "-6"}[r.To.Addr().Is4()]
			via := ""
			if r.Via.IsValid() {
				via = " via " + r.Via.String() + map[bool]string{false: " onlink"}[f.reaches(r.Via)]
			}
			fmt.Fprintf(&b, "route %s %s %s%s\n", family, r.To.Masked(), f.Name, via)
		}
	}
	return b.String()
}

// networkData is OpenStack's network_data.json, as far as cloud-init reads it. It has no search domains.
func (in Input) networkData() any {
	links, networks, services := []any{}, []any{}, []any{}
	for _, f := range in.Interfaces {
		link := map[string]any{"id": f.Name, "name": f.Name, "type": "phy", "ethernet_mac_address": f.MAC}
		if f.MTU > 0 {
			link["mtu"] = f.MTU
		}
		links = append(links, link)
		for i, a := range f.Addresses {
			networks = append(networks, f.openStackNetwork(i, a))
		}
	}
	for _, s := range in.DNS.Servers {
		services = append(services, map[string]string{"type": "dns", "address": s.String()})
	}
	return map[string]any{"links": links, "networks": networks, "services": services}
}

// openStackNetwork is one address, with all routes of its family if it is the first of that.
func (f Interface) openStackNetwork(i int, a netip.Prefix) any {
	family := map[bool]string{true: "ipv4", false: "ipv6"}[a.Addr().Is4()]
	routes := []any{}
	first := !slices.ContainsFunc(f.Addresses[:i], func(p netip.Prefix) bool { return p.Addr().Is4() == a.Addr().Is4() })
	for _, r := range f.allRoutes() {
		if !first || r.To.Addr().Is4() != a.Addr().Is4() {
			continue
		}
		routes = append(routes, map[string]string{
			"network": r.To.Masked().Addr().String(), "netmask": netmask(r.To), "gateway": r.v2(f).Via,
		})
	}
	return map[string]any{
		"id": f.Name + "-" + a.Addr().String(), "link": f.Name, "type": family,
		"ip_address": a.Addr().String(), "netmask": netmask(a), "routes": routes,
	}
}

// netmask is written out, for both families, as OpenStack does.
func netmask(p netip.Prefix) string {
	bytes := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		bytes[i/8] |= 0x80 >> (i % 8)
	}
	mask, _ := netip.AddrFromSlice(bytes)
	return mask.String()
}
