package sshexec

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/pem"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"
)

// Keys are what lets the host into one pod's guest, and the guest prove that it is that one. Private keys are OpenSSH
// PEM; public ones are lines of "ssh-ed25519 BASE64 COMMENT".
type Keys struct {
	// PrivateKey is the host's; AuthorizedKey belongs into the user's authorized_keys.
	PrivateKey, AuthorizedKey string
	// HostPrivateKey and HostPublicKey belong into the guest (ssh_keys of cloud-init: ed25519_private, ed25519_public).
	HostPrivateKey, HostPublicKey string
}

// NewKeys makes keys of a guest out of chance.
func NewKeys(comment string) (*Keys, error) {
	secret := make([]byte, ed25519.SeedSize)
	if _, err := rand.Read(secret); err != nil {
		return nil, err
	}
	return DeriveKeys(secret, "", comment)
}

// DeriveKeys makes the keys of one guest from a secret of the node and the guest's ID, always the same: a guest whose disk outlives
// a container, or the record of it, is still known. comment is one line, at the end of the public keys.
func DeriveKeys(secret []byte, id, comment string) (*Keys, error) {
	if len(secret) < ed25519.SeedSize {
		return nil, fmt.Errorf("the secret has %d bytes; it has to have at least %d", len(secret), ed25519.SeedSize)
	}
	var k Keys
	var err error
	if k.PrivateKey, k.AuthorizedKey, err = derivePair(secret, "ssh login "+id, comment); err != nil {
		return nil, err
	}
	if k.HostPrivateKey, k.HostPublicKey, err = derivePair(secret, "ssh host "+id, comment); err != nil {
		return nil, err
	}
	return &k, nil
}

func derivePair(secret []byte, use, comment string) (private, public string, err error) {
	if strings.ContainsAny(comment, "\r\n") {
		return "", "", fmt.Errorf("comment %q: must be one line", comment)
	}
	seed, err := hkdf.Key(sha256.New, secret, nil, use, ed25519.SeedSize)
	if err != nil {
		return "", "", err
	}
	priv := ed25519.NewKeyFromSeed(seed)
	block, err := ssh.MarshalPrivateKey(priv, comment)
	if err != nil {
		return "", "", err
	}
	key, err := ssh.NewPublicKey(priv.Public())
	if err != nil {
		return "", "", err
	}
	return string(pem.EncodeToMemory(block)), keyLine(key) + " " + comment, nil
}

func keyLine(k ssh.PublicKey) string { return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k))) }
