package network

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Annotations by which Kubernetes bounds a pod's traffic, in bits per second. The directions are the pod's.
const (
	ingressBandwidth = "kubernetes.io/ingress-bandwidth"
	egressBandwidth  = "kubernetes.io/egress-bandwidth"
)

// Request is what a pod asks of its network.
type Request struct {
	// ID of the pod: letters, digits, '.', '_' and '-', as CNI has it. All names derive from it.
	ID string
	// Name, Namespace and UID as Kubernetes has them, for plugins.
	Name, Namespace, UID string
	PortMappings         []PortMapping
	// Annotations are handed to plugins; kubernetes.io/ingress-bandwidth and egress-bandwidth bound the traffic.
	Annotations map[string]string
	// CgroupParent is handed to plugins; empty if there is none.
	CgroupParent string
	DNS          DNS
	// Prepared says that Prepare has made the pod's network namespace.
	Prepared bool
}

// PortMapping forwards a port of the node to one of the pod.
type PortMapping struct {
	// Protocol is tcp, udp or sctp, in any case; empty means tcp.
	Protocol                string
	ContainerPort, HostPort int32
	// HostIP limits the mapping to one address of the node; empty means all.
	HostIP string
}

// DNS is the pod's resolver configuration, as in resolv.conf(5).
type DNS struct {
	Servers, Searches, Options []string
}

var containerID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

func validateID(id string) error {
	if containerID.MatchString(id) {
		return nil
	}
	return invalid("pod ID", id, "1 to 128 of letters, digits, '.', '_' and '-', beginning with a letter or digit")
}

func invalid(field string, value any, want string) error {
	return fmt.Errorf("%s is %q; it must be %s: %w", field, fmt.Sprint(value), want, errdefs.ErrInvalidArgument)
}

func (r *Request) validate() error {
	errs := []error{validateID(r.ID), r.DNS.validate()}
	for field, v := range map[string]string{"pod name": r.Name, "pod namespace": r.Namespace, "pod UID": r.UID} {
		if strings.ContainsAny(v, ";=\x00\n") {
			errs = append(errs, invalid(field, v, "free of ';', '=' and line breaks, which separate CNI arguments"))
		}
	}
	for i, p := range r.PortMappings {
		errs = append(errs, p.validate(fmt.Sprintf("port mapping %d", i)))
	}
	_, _, err := r.bandwidth()
	return errors.Join(append(errs, err)...)
}

func (p PortMapping) validate(name string) error {
	var errs []error
	for field, port := range map[string]int32{"container port": p.ContainerPort, "host port": p.HostPort} {
		if port < 1 || port > math.MaxUint16 {
			errs = append(errs, invalid(name+": "+field, port, "between 1 and 65535"))
		}
	}
	switch p.protocol() {
	case "tcp", "udp", "sctp":
	default:
		errs = append(errs, invalid(name+": protocol", p.Protocol, "tcp, udp or sctp"))
	}
	if _, err := netip.ParseAddr(p.HostIP); p.HostIP != "" && err != nil {
		errs = append(errs, invalid(name+": host IP", p.HostIP, "an IPv4 or IPv6 address, or empty"))
	}
	return errors.Join(errs...)
}

func (p PortMapping) protocol() string {
	if p.Protocol == "" {
		return "tcp"
	}
	return strings.ToLower(p.Protocol)
}

func (d DNS) validate() error {
	var errs []error
	for _, s := range d.Servers {
		if _, err := netip.ParseAddr(s); err != nil {
			errs = append(errs, invalid("DNS server", s, "an IPv4 or IPv6 address"))
		}
	}
	for field, list := range map[string][]string{"DNS search domain": d.Searches, "DNS option": d.Options} {
		for _, s := range list {
			if s == "" || strings.ContainsAny(s, " \t\r\n\x00") {
				errs = append(errs, invalid(field, s, "one word"))
			}
		}
	}
	return errors.Join(errs...)
}

// bandwidth reads the pod's bounds in bits per second; 0 means none.
func (r *Request) bandwidth() (ingress, egress uint64, err error) {
	ingress, errIn := rate(r.Annotations, ingressBandwidth)
	egress, errOut := rate(r.Annotations, egressBandwidth)
	return ingress, egress, errors.Join(errIn, errOut)
}

// rate accepts what the kubelet's validation does: 1k to 1P.
func rate(annotations map[string]string, key string) (uint64, error) {
	v, ok := annotations[key]
	if !ok {
		return 0, nil
	}
	q, err := resource.ParseQuantity(v)
	if err != nil || q.Value() < 1000 || q.Value() > 1e15 {
		return 0, invalid("annotation "+key, v, "a quantity of bits per second between 1k and 1P, like 10M")
	}
	return uint64(q.Value()), nil
}

// burst is what may pass at once, in bits, before a rate is felt: a quarter of a second, and at least 256 KiB, so that
// segments of 64 KiB pass the token bucket whole.
func burst(rate uint64) uint64 {
	if rate == 0 {
		return 0
	}
	return min(max(rate/4, 256<<10*8), math.MaxUint32)
}

// cniOptions are the arguments and capabilities that containerd too gives to plugins.
func (r *Request) cniOptions() ([]gocni.NamespaceOpts, error) {
	opts := []gocni.NamespaceOpts{
		gocni.WithLabels(map[string]string{
			"IgnoreUnknown":              "1",
			"K8S_POD_NAMESPACE":          r.Namespace,
			"K8S_POD_NAME":               r.Name,
			"K8S_POD_INFRA_CONTAINER_ID": r.ID,
			"K8S_POD_UID":                r.UID,
		}),
		gocni.WithCapability("io.kubernetes.cri.pod-annotations", r.Annotations),
	}
	if len(r.PortMappings) > 0 {
		opts = append(opts, gocni.WithCapabilityPortMap(r.cniPorts()))
	}
	in, out, err := r.bandwidth()
	if err != nil {
		return nil, err
	}
	if in > 0 || out > 0 {
		opts = append(opts, gocni.WithCapabilityBandWidth(gocni.BandWidth{
			IngressRate: in, IngressBurst: burst(in), EgressRate: out, EgressBurst: burst(out),
		}))
	}
	if d := r.DNS; len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		opts = append(opts, gocni.WithCapabilityDNS(gocni.DNS{Servers: d.Servers, Searches: d.Searches, Options: d.Options}))
	}
	if r.CgroupParent != "" {
		opts = append(opts, gocni.WithCapabilityCgroupPath(r.CgroupParent))
	}
	return opts, nil
}

func (r *Request) cniPorts() []gocni.PortMapping {
	var out []gocni.PortMapping
	for _, p := range r.PortMappings {
		out = append(out, gocni.PortMapping{
			HostPort: p.HostPort, ContainerPort: p.ContainerPort, Protocol: p.protocol(), HostIP: p.HostIP,
		})
	}
	return out
}
