package cluster

import (
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

// identities are the API's clients and servers: the name of the certificate's file, and who that is to the API.
func identities() map[string]pkix.Name {
	return map[string]pkix.Name{
		"admin":              {CommonName: "admin", Organization: []string{"system:masters"}},
		"apiserver":          {CommonName: "apiserver", Organization: []string{"system:masters"}}, // also to kubelets
		"front-proxy":        {CommonName: "front-proxy"},
		"metrics-server":     {CommonName: "metrics-server"},
		"service-account":    {CommonName: "service-account"},
		"controller-manager": {CommonName: "system:kube-controller-manager"},
		"scheduler":          {CommonName: "system:kube-scheduler"},
		"proxy":              {CommonName: "system:kube-proxy"},
		"kubelet":            {CommonName: "system:node:" + NodeName, Organization: []string{"system:nodes"}},
	}
}

// writeFiles makes certificates and writes the configuration of everything that runs.
func (c *Cluster) writeFiles() error {
	for _, dir := range []string{"pki", "etcd"} {
		if err := os.MkdirAll(c.path(dir), 0o700); err != nil {
			return err
		}
	}
	for _, dir := range []string{c.path("manifests"), c.kubeletRoot(), c.podLogs()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := c.writeIdentities(); err != nil {
		return err
	}
	ca, err := os.ReadFile(c.path("pki", "ca.crt"))
	if err != nil {
		return err
	}
	values := map[string]string{
		"Dir": c.path(), "Kubelet": c.kubeletRoot(), "Logs": c.podLogs(), "Socket": c.node.Socket(), "Cgroup": c.node.CgroupParent(),
		"NodeName": NodeName, "NodeIPv4": nodeIPv4, "NodeIPv6": nodeIPv6, "DNSIPv4": dnsIPv4, "DNSIPv6": dnsIPv6, "PodCIDRs": podCIDRs,
		"CA": base64.StdEncoding.EncodeToString(ca), "MetricsPort": metricsPort,
	}
	return errors.Join(
		writeTemplate(c.path("kubelet.yaml"), kubeletConfig, values),
		writeTemplate(c.path("proxy.yaml"), proxyConfig, values),
		writeTemplate(c.path("Corefile"), corefile, values),
		writeTemplate(c.path("dns.yaml"), dnsService, values),
		writeTemplate(c.path("metrics.yaml"), metricsService, values),
	)
}

// writeIdentities makes the certificates, and for each client a configuration file.
func (c *Cluster) writeIdentities() error {
	ca, err := newAuthority(c.path("pki"))
	if err != nil {
		return err
	}
	for name, subject := range identities() {
		err := ca.issue(name, subject, NodeName, nodeIPv4, nodeIPv6, serviceIPv4, "127.0.0.1", "kubernetes.default.svc", metricsHost)
		if err != nil {
			return fmt.Errorf("issue certificate %s: %w", name, err)
		}
		if err := c.writeKubeconfig(name+".conf", name, apiAddress); err != nil {
			return err
		}
	}
	return errors.Join(
		c.writeKubeconfig("node-admin.conf", "admin", apiAddress), c.writeKubeconfig("admin.conf", "admin", c.proxy.address()))
}

func (c *Cluster) writeKubeconfig(file, identity, server string) error {
	return writeTemplate(c.path(file), kubeconfig, map[string]string{"PKI": c.path("pki"), "Name": identity, "Server": server})
}

// kubeletRoot is the kubelet's root directory; mounts of volumes are below it.
func (c *Cluster) kubeletRoot() string { return filepath.Join(c.node.Root, "kubelet") }

// podLogs is the directory of the containers' logs.
func (c *Cluster) podLogs() string { return filepath.Join(c.node.Root, "pods") }

// ManifestDir is where the kubelet looks for static pods.
func (c *Cluster) ManifestDir() string { return c.path("manifests") }

func writeTemplate(file, text string, values map[string]string) error {
	t, err := template.New(filepath.Base(file)).Option("missingkey=error").Parse(text)
	if err != nil {
		return err
	}
	var out strings.Builder
	if err := t.Execute(&out, values); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(out.String()), 0o600)
}

const kubeconfig = `apiVersion: v1
kind: Config
clusters:
- name: cluster
  cluster:
    server: https://{{.Server}}
    certificate-authority: {{.PKI}}/ca.crt
users:
- name: {{.Name}}
  user:
    client-certificate: {{.PKI}}/{{.Name}}.crt
    client-key: {{.PKI}}/{{.Name}}.key
contexts:
- name: cluster
  context: {cluster: cluster, user: {{.Name}}}
current-context: cluster
`

// The kubelet's own cgroups are the node's; it evicts nothing for how full the machine's disk is, and waits for guests that
// a busy machine emulates.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://{{.Socket}}
address: {{.NodeIPv4}}
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: {{.Dir}}/pki/ca.crt}
authorization: {mode: Webhook}
tlsCertFile: {{.Dir}}/pki/kubelet.crt
tlsPrivateKeyFile: {{.Dir}}/pki/kubelet.key
clusterDomain: cluster.local
clusterDNS: [{{.DNSIPv4}}, "{{.DNSIPv6}}"]
cgroupDriver: cgroupfs
cgroupRoot: {{.Cgroup}}
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
podLogsDir: {{.Logs}}
staticPodPath: {{.Dir}}/manifests
fileCheckFrequency: 2s
volumePluginDir: {{.Kubelet}}/volumeplugins
registerNode: true
serializeImagePulls: false
registryPullQPS: 0
maxPods: 250
podPidsLimit: -1
syncFrequency: 10s
runtimeRequestTimeout: 8m
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
`

const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: {{.Dir}}/proxy.conf}
mode: iptables
clusterCIDR: {{.PodCIDRs}}
hostnameOverride: {{.NodeName}}
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0}
`

const corefile = `.:53 {
	bind {{.NodeIPv4}} {{.NodeIPv6}}
	errors
	ready 127.0.0.1:8181
	kubernetes cluster.local in-addr.arpa ip6.arpa {
		kubeconfig {{.Dir}}/node-admin.conf
		pods insecure
		fallthrough in-addr.arpa ip6.arpa
		ttl 5
	}
	cache 5
	loadbalance
}
`

// CoreDNS runs on the node itself, so its Service has no selector.
const dnsService = `apiVersion: v1
kind: Service
metadata:
  name: kube-dns
  namespace: kube-system
  labels: {k8s-app: kube-dns, kubernetes.io/name: CoreDNS}
spec:
  clusterIP: {{.DNSIPv4}}
  clusterIPs: [{{.DNSIPv4}}, "{{.DNSIPv6}}"]
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: dns, protocol: UDP, port: 53}
  - {name: dns-tcp, protocol: TCP, port: 53}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kube-dns-ipv4
  namespace: kube-system
  labels: {kubernetes.io/service-name: kube-dns}
addressType: IPv4
ports:
- {name: dns, protocol: UDP, port: 53}
- {name: dns-tcp, protocol: TCP, port: 53}
endpoints: [{addresses: [{{.NodeIPv4}}]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kube-dns-ipv6
  namespace: kube-system
  labels: {kubernetes.io/service-name: kube-dns}
addressType: IPv6
ports:
- {name: dns, protocol: UDP, port: 53}
- {name: dns-tcp, protocol: TCP, port: 53}
endpoints: [{addresses: ["{{.NodeIPv6}}"]}]
`

// metricsHost is what the API server expects the metrics server's certificate to be for.
const metricsHost = "metrics-server.kube-system.svc"

// The API server passes on what is asked of metrics.k8s.io, to a metrics server that runs on the node itself too.
const metricsService = `apiVersion: v1
kind: Service
metadata: {name: metrics-server, namespace: kube-system}
spec:
  ports: [{name: https, port: 443, targetPort: {{.MetricsPort}}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: metrics-server
  namespace: kube-system
  labels: {kubernetes.io/service-name: metrics-server}
addressType: IPv4
ports: [{name: https, port: {{.MetricsPort}}}]
endpoints: [{addresses: [{{.NodeIPv4}}]}]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  group: metrics.k8s.io
  version: v1beta1
  groupPriorityMinimum: 100
  versionPriority: 100
  service: {name: metrics-server, namespace: kube-system}
  caBundle: {{.CA}}
`
