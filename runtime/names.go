package runtime

import (
	"crypto/rand"
	"encoding/hex"
	"os"
	"strings"

	"github.com/google/uuid"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/agent/agentpb"
	"github.com/vmruntime/vmruntime/network"
)

// newID is 64 random hexadecimal digits, the form of containerd's IDs.
func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// uuidOf is a UUID (RFC 9562, version 8) that derives from a pod's ID.
func uuidOf(id string) string {
	return id[0:8] + "-" + id[8:12] + "-8" + id[13:16] + "-8" + id[17:20] + "-" + id[20:32]
}

// machineUUID is a machine's SMBIOS UUID: the pod's own, so that it stays over sandboxes of one pod.
func machineUUID(podUID, podID string) string {
	if u, err := uuid.Parse(podUID); err == nil {
		return u.String()
	}
	return uuidOf(podID)
}

// resolvConf is what the pod's resolv.conf says: what the kubelet asks, or the node's own.
func (p *pod) resolvConf() (string, error) {
	dns := p.config().GetDnsConfig()
	if len(dns.GetServers())+len(dns.GetSearches())+len(dns.GetOptions()) > 0 {
		return network.ResolvConf(dns.GetServers(), dns.GetSearches(), dns.GetOptions()), nil
	}
	b, err := os.ReadFile("/etc/resolv.conf")
	if os.IsNotExist(err) {
		return "", nil
	}
	return string(b), err
}

// resolver are the name servers and search domains that resolv.conf names.
func (p *pod) resolver() (servers, searches []string, err error) {
	dns := p.config().GetDnsConfig()
	if len(dns.GetServers())+len(dns.GetSearches())+len(dns.GetOptions()) > 0 {
		return dns.GetServers(), dns.GetSearches(), nil
	}
	text, err := p.resolvConf()
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		switch {
		case len(fields) < 2:
		case fields[0] == "nameserver":
			servers = append(servers, fields[1])
		case fields[0] == "search":
			searches = fields[1:]
		}
	}
	return servers, searches, err
}

// hosts is the /etc/hosts of containers that are not given one by the kubelet.
func (p *pod) hosts(att *network.Attachment) string {
	return network.Hosts(p.hostname(), att.Addresses())
}

// networkStatus tells the pod's addresses, the first of which is the one.
func networkStatus(att *network.Attachment) *runtimeapi.PodSandboxNetworkStatus {
	out := &runtimeapi.PodSandboxNetworkStatus{}
	for i, a := range att.Addresses() {
		if i == 0 {
			out.Ip = a.String()
		} else {
			out.AdditionalIps = append(out.AdditionalIps, &runtimeapi.PodIP{Ip: a.String()})
		}
	}
	return out
}

func routeOf(r network.Route) *agentpb.Route {
	out := &agentpb.Route{
		Destination: r.Destination.String(),
		Interface:   r.Interface,
		Mtu:         int32(r.MTU),
		Scope:       int32(r.Scope),
		Priority:    int32(r.Priority),
		Table:       int32(r.Table),
		OnLink:      r.OnLink,
	}
	if r.Gateway.IsValid() {
		out.Gateway = r.Gateway.String()
	}
	if r.Source.IsValid() {
		out.Source = r.Source.String()
	}
	return out
}
