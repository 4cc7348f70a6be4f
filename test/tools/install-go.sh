#!/bin/sh
# Makes sure that there is a Go that can build this module. Any Go from 1.21 on
# will do: it fetches the version that go.mod names by itself. Without one,
# Debian's Go, which is too old for that, fetches the toolchain's module
# through the Go module proxy, verified by the checksum database, and it becomes
# /usr/local/go.
set -eu

version=$(sed -n 's/^go //p' "$(dirname "$0")/../../go.mod")
PATH=/usr/local/go/bin:$PATH
if command -v go >/dev/null && GOTOOLCHAIN=local go version | grep -Eq 'go1\.(2[1-9]|[3-9][0-9])'; then
	exit 0
fi
apt-get install -qy --no-install-recommends golang-go ca-certificates
tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT
module=golang.org/toolchain@v0.0.1-go$version.linux-$(dpkg --print-architecture)
(cd "$tmp" && GOPATH="$tmp/go" GO111MODULE=on GOFLAGS= go mod download "$module")
dir=$tmp/go/pkg/mod/$module
chmod -R u+w "$dir"
# Old versions of Go unpack modules without execute permission.
chmod +x "$dir"/bin/* "$dir"/pkg/tool/*/*
rm -rf /usr/local/go
cp -R "$dir" /usr/local/go
GOTOOLCHAIN=local /usr/local/go/bin/go version
