package network

import (
	"net"
	"slices"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"golang.org/x/sys/unix"
)

const portDHCP6Server, portDHCP6Client = 547, 546

// serverDUID is the same for ever, so that a client finds its server again.
var serverDUID = &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: serverMAC}

// dhcp6 answers a DHCPv6 message (RFC 8415), or not.
func (l *lease) dhcp6(p packet) []byte {
	if len(l.addresses6) == 0 || !p.from.IsLinkLocalUnicast() {
		return nil
	}
	req, err := dhcpv6.MessageFromBytes(p.payload)
	if err != nil {
		return nil
	}
	reply := l.reply6(req)
	if reply == nil {
		return nil
	}
	return packet{
		fromMAC: serverMAC, toMAC: l.mac, from: routerAddr(0), to: p.from, hopLimit: 64,
		protocol: unix.IPPROTO_UDP, fromPort: portDHCP6Server, toPort: portDHCP6Client, payload: reply.ToBytes(),
	}.frame()
}

// valid6 is RFC 8415, section 16: what must name the server, must not, and may.
func valid6(req *dhcpv6.Message) bool {
	server := req.Options.ServerID()
	mine := server != nil && server.Equal(serverDUID)
	known := req.Options.ClientID() != nil
	switch req.MessageType {
	case dhcpv6.MessageTypeSolicit, dhcpv6.MessageTypeConfirm, dhcpv6.MessageTypeRebind:
		return known && server == nil
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		return known && mine
	case dhcpv6.MessageTypeInformationRequest:
		return server == nil || mine
	}
	return false
}

func (l *lease) reply6(req *dhcpv6.Message) *dhcpv6.Message {
	if !valid6(req) {
		return nil
	}
	reply := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply, TransactionID: req.TransactionID}
	if id := req.Options.ClientID(); id != nil {
		reply.AddOption(dhcpv6.OptClientID(id))
	}
	reply.AddOption(dhcpv6.OptServerID(serverDUID))
	switch req.MessageType {
	case dhcpv6.MessageTypeSolicit:
		if req.GetOneOption(dhcpv6.OptionRapidCommit) != nil {
			reply.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit})
		} else {
			reply.MessageType = dhcpv6.MessageTypeAdvertise
			reply.AddOption(dhcpv6.OptPreference(255)) // the client need not wait for others
		}
		l.associate(req, reply)
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRebind:
		l.associate(req, reply)
	case dhcpv6.MessageTypeConfirm:
		code, ok := l.confirm(req)
		if !ok {
			return nil
		}
		reply.AddOption(&dhcpv6.OptStatusCode{StatusCode: code})
		return reply
	case dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline: // nothing is given back: the addresses are the pod's
		reply.AddOption(&dhcpv6.OptStatusCode{StatusCode: iana.StatusSuccess})
		return reply
	}
	if len(l.dns6) > 0 {
		reply.AddOption(dhcpv6.OptDNS(netIPs(l.dns6)...))
	}
	if len(l.searches) > 0 {
		reply.AddOption(dhcpv6.OptDomainSearchList(&rfc1035label.Labels{Labels: l.searches}))
	}
	return reply
}

// associate gives all addresses to the first identity association and none to others.
func (l *lease) associate(req, reply *dhcpv6.Message) {
	for n, ia := range req.Options.IANA() {
		out := &dhcpv6.OptIANA{IaId: ia.IaId, T1: infinite, T2: infinite}
		if n == 0 {
			out.Options = l.identity(ia)
		} else {
			out.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail})
		}
		reply.AddOption(out)
	}
	for _, ia := range req.Options.IATA() {
		out := &dhcpv6.OptIATA{IaId: ia.IaId}
		out.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail})
		reply.AddOption(out)
	}
	for _, ia := range req.Options.IAPD() {
		out := &dhcpv6.OptIAPD{IaId: ia.IaId}
		out.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoPrefixAvail})
		reply.AddOption(out)
	}
}

// identity has the pod's addresses for ever, and ends at once whatever else the client holds.
func (l *lease) identity(asked *dhcpv6.OptIANA) dhcpv6.IdentityOptions {
	var out dhcpv6.IdentityOptions
	for _, a := range l.addresses6 {
		out.Add(&dhcpv6.OptIAAddress{IPv6Addr: a.AsSlice(), PreferredLifetime: infinite, ValidLifetime: infinite})
	}
	const enough = 8 // a client that claims more is not told about the rest
	for n, a := range asked.Options.Addresses() {
		if n < enough && !l.has(a.IPv6Addr) {
			out.Add(&dhcpv6.OptIAAddress{IPv6Addr: a.IPv6Addr})
		}
	}
	return out
}

func (l *lease) has(ip net.IP) bool { return slices.Contains(l.addresses6, addrOf(ip)) }

// confirm tells whether all of the client's addresses are right here; without any there is nothing to say.
func (l *lease) confirm(req *dhcpv6.Message) (code iana.StatusCode, ok bool) {
	code = iana.StatusSuccess
	for _, ia := range req.Options.IANA() {
		for _, a := range ia.Options.Addresses() {
			ok = true
			if !l.has(a.IPv6Addr) {
				code = iana.StatusNotOnLink
			}
		}
	}
	return code, ok
}
