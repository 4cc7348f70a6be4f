package runtime

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/vmruntime/vmruntime/agent/sshexec"
)

// secretBytes is the length of the node's secret.
const secretBytes = 32

// loadSecret reads the secret of this node that the keys of machines derive from, or makes it.
func loadSecret(root string) ([]byte, error) {
	path := filepath.Join(root, "secret")
	secret, err := os.ReadFile(path)
	if err == nil && len(secret) != secretBytes {
		return nil, fmt.Errorf("%s has %d bytes, not %d; remove it, and machines whose disks are older get a new key at their next start", path, len(secret), secretBytes)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return secret, err
	}
	secret = make([]byte, secretBytes)
	if _, err := rand.Read(secret); err != nil {
		return nil, err
	}
	return secret, renameio.WriteFile(path, secret, 0o600)
}

// podKeys are the SSH keys between the node and the pod's machine.
func (rt *Runtime) podKeys(p *pod) (*sshexec.Keys, error) {
	id := p.config().GetMetadata().GetUid()
	if id == "" {
		id = p.id
	}
	return sshexec.DeriveKeys(rt.secret, id, "vmruntime-exec")
}
