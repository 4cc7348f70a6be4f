package images

import (
	"crypto/ed25519"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/vmruntime/vmruntime/test/tools"
)

// Agnhost is Kubernetes' own test program. Its version, and those of the other images here, are constants of the
// Kubernetes that test/tools pins.
const Agnhost = e2ePrefix + "agnhost:2.63.0"

// agnhostPackages are the packages from which the image of agnhost takes files besides.
func agnhostPackages() []string {
	return []string{
		"bash", "libtinfo6",
		"curl", "libcurl4", "libbrotli1", "libcom-err2", "libffi8", "libgmp10", "libgnutls30", "libgssapi-krb5-2", "libhogweed6",
		"libidn2-0", "libk5crypto3", "libkeyutils1", "libkrb5-3", "libkrb5support0", "libldap-2.5-0", "libnettle8", "libnghttp2-14",
		"libp11-kit0", "libpsl5", "librtmp1", "libsasl2-2", "libssh2-1", "libtasn1-6", "libunistring2",
	}
}

// KubernetesHandler is Handler with what Kubernetes' end-to-end tests pull. It needs the tool set "kubernetes".
func KubernetesHandler() (http.Handler, error) {
	all, err := Build()
	if err != nil {
		return nil, err
	}
	d, err := openDebs(append(packages(), agnhostPackages()...)...)
	if err != nil {
		return nil, err
	}
	more := map[string]v1.Image{}
	if err := addKubernetes(d, more); err != nil {
		return nil, err
	}
	maps.Copy(all, more)
	return handlerOf(all)
}

func addKubernetes(d *debs, all map[string]v1.Image) error {
	base, err := d.base()
	if err != nil {
		return err
	}
	shell := v1.Config{Cmd: []string{"sh"}}
	return buildAll(map[string]func() (v1.Image, error){
		Agnhost:                        func() (v1.Image, error) { return d.agnhost(base) },
		e2ePrefix + "agnhost:2.55":     func() (v1.Image, error) { return d.agnhost(base) },
		e2ePrefix + "busybox:1.37.0-1": func() (v1.Image, error) { return d.e2eBusybox(base) },
		e2ePrefix + "nginx:1.15-4":     func() (v1.Image, error) { return d.nginx(base, 80) },
		e2ePrefix + "nginx:1.27-0":     func() (v1.Image, error) { return d.nginx(base, 80) },
		e2ePrefix + "nonewprivs:1.4":   func() (v1.Image, error) { return goImage("euid", "/euid", 0o4755, v1.Config{}) },
		e2ePrefix + "nonroot:1.5":      func() (v1.Image, error) { return image(v1.Config{User: "1234", Cmd: shell.Cmd}, base) },
		"registry.k8s.io/pause:3.10.2": func() (v1.Image, error) { return goImage("pause", "/pause", 0o755, v1.Config{}) },
	}, all)
}

// e2eBusybox is as Kubernetes' image of busybox where its tests notice: all programs are in /bin, and sh keeps names in
// the environment that a shell cannot assign to, such as "data-1", which Debian's busybox drops and bash does not.
func (d *debs) e2eBusybox(base v1.Layer) (v1.Image, error) {
	fs := tree{}
	if err := d.copyTo(fs, "bin/bash"); err != nil {
		return nil, err
	}
	applets, err := appletNames(d.files["bin/busybox"].data)
	if err != nil {
		return nil, err
	}
	for _, applet := range applets {
		if path.Dir(applet) != "bin" {
			fs.link("bin/"+path.Base(applet), "busybox")
		}
	}
	fs.link("bin/sh", "bash")
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Cmd: []string{"sh"}}, base, layer)
}

// agnhost is the program with what its tests run beside it.
func (d *debs) agnhost(base v1.Layer) (v1.Image, error) {
	dir, err := tools.Dir("kubernetes")
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(filepath.Join(dir, "agnhost"))
	if err != nil {
		return nil, fmt.Errorf("read agnhost: %w", err)
	}
	fs := tree{}
	for _, name := range []string{"bin/bash", "usr/bin/curl"} {
		if err := d.copyTo(fs, name); err != nil {
			return nil, err
		}
	}
	fs.file("agnhost", 0o755, string(program))
	fs.hardlink("agnhost-2", "agnhost")
	cert, key, err := localhostCertificate()
	if err != nil {
		return nil, err
	}
	fs.file("localhost.crt", 0o644, cert)
	fs.file("localhost.key", 0o644, key)
	fs.dir("uploads", 0o755)
	fs.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
	fs.file("etc/group", 0o644, "root:x:0:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\nnogroup:x:65534:\n")
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}, base, layer)
}

// localhostCertificate is for servers whose clients verify nothing. It is the same each time.
func localhostCertificate() (cert, key string, err error) {
	private := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	certDER, err := x509.CreateCertificate(nil, template, template, private.Public(), private)
	if err != nil {
		return "", "", err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", "", err
	}
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return encode("CERTIFICATE", certDER), encode("PRIVATE KEY", keyDER), nil
}
