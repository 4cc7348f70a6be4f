package images

import (
	"crypto/tls"
	"testing"

	"github.com/vmruntime/vmruntime/test/tools"
)

// The digest is compiled into critest: a change here needs a new build there.
func TestDigestImage(t *testing.T) {
	img, err := digestImage()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if digest.String() != tools.DigestImage {
		t.Errorf("the image has digest %s, tools.DigestImage says %s", digest, tools.DigestImage)
	}
}

// The same packages must give the same images, or every run would pull anew.
func TestBuildTwice(t *testing.T) {
	if testing.Short() {
		t.Skip("reads Debian packages and builds programs: run by make test")
	}
	first, err := Build()
	if err != nil {
		t.Fatal(err)
	}
	second, err := Build()
	if err != nil {
		t.Fatal(err)
	}
	for ref, img := range first {
		a, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		b, err := second[ref].Digest()
		if err != nil {
			t.Fatal(err)
		}
		if a != b {
			t.Errorf("image %s: digest %s, then %s", ref, a, b)
		}
	}
}

func TestLocalhostCertificate(t *testing.T) {
	cert, key, err := localhostCertificate()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tls.X509KeyPair([]byte(cert), []byte(key)); err != nil {
		t.Error(err)
	}
	if again, _, err := localhostCertificate(); err != nil || again != cert {
		t.Errorf("a second certificate differs from the first (error %v)", err)
	}
}
