package ocispec

import (
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestUser(t *testing.T) {
	strict := runtimeapi.SupplementalGroupsPolicy_Strict
	for _, tc := range []struct {
		name   string
		image  string
		set    func(*runtimeapi.LinuxContainerSecurityContext)
		uid    int64
		gid    int64
		groups []int64
		err    string
	}{
		{name: "nobody asked for", uid: 0, gid: 0, groups: []int64{0, 10}},
		{name: "image by name", image: "app", uid: 1000, gid: 1001, groups: []int64{1001, 12, 10}},
		{name: "image by number", image: "1000", uid: 1000, gid: 1001, groups: []int64{1001, 12, 10}},
		{name: "image by unknown number", image: "77", uid: 77, gid: 0, groups: []int64{0}},
		{name: "image numbers", image: "77:88", uid: 77, gid: 88, groups: []int64{88}},
		{name: "image name and group", image: "app:docker", uid: 1000, gid: 999, groups: []int64{999, 12, 10}},
		{name: "image number and group", image: "77:docker", uid: 77, gid: 999, groups: []int64{999}},
		{name: "image unknown name", image: "ghost", err: `user of image "docker.io/library/web:1": user "ghost" is not in the image's /etc/passwd`},
		{name: "image unknown group", image: "app:ghosts", err: `group "ghosts" is not in the image's /etc/group`},
		{name: "image number too large", image: "4294967295", err: "must be from 0 to 2147483647"},
		{name: "image group too large", image: "0:99999999999999999999", err: "must be from 0 to 2147483647"},
		{name: "uid over image", image: "app", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser = value(8) }, uid: 8, gid: 12, groups: []int64{12, 999}},
		{name: "uid 0 over image", image: "app", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser = value(0) }, groups: []int64{0, 10}},
		{name: "negative uid", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser = value(-1) }, err: "run_as_user: user \"-1\" must be from 0"},
		{name: "name", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUsername = "mail" }, uid: 8, gid: 12, groups: []int64{12, 999}},
		{name: "unknown name", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUsername = "ghost" }, err: "run_as_username: user \"ghost\" is not in"},
		{name: "name and group", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUsername, sc.RunAsGroup = "mail", value(5) }, uid: 8, gid: 5, groups: []int64{5, 999}},
		{name: "negative group", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser, sc.RunAsGroup = value(8), value(-5) }, err: "group \"-5\" must be from 0"},
		{name: "merge", image: "app", set: func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SupplementalGroups = []int64{10, 50, 50} }, uid: 1000, gid: 1001, groups: []int64{1001, 12, 10, 50}},
		{name: "strict", image: "app", set: func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.SupplementalGroups, sc.SupplementalGroupsPolicy = []int64{50}, strict
		}, uid: 1000, gid: 1001, groups: []int64{1001, 50}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := input()
			in.Image.Config.User = tc.image
			if tc.set != nil {
				tc.set(in.Config.Linux.SecurityContext)
			}
			spec, err := Build(in)
			if tc.err != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := ContainerUser(spec).GetLinux()
			if got.GetUid() != tc.uid || got.GetGid() != tc.gid || !slices.Equal(got.GetSupplementalGroups(), tc.groups) {
				t.Errorf("user %v, want %d:%d %v", got, tc.uid, tc.gid, tc.groups)
			}
		})
	}
}

func TestUserFiles(t *testing.T) {
	link := func(target string) *fstest.MapFile {
		return &fstest.MapFile{Data: []byte(target), Mode: fs.ModeSymlink | 0o777}
	}
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	for _, tc := range []struct {
		name string
		root fs.FS
		ok   bool
	}{
		{"plain", rootFS(), true},
		{"relative link", fstest.MapFS{"etc/passwd": link("../usr/lib/passwd"), "usr/lib/passwd": file(passwd)}, true},
		{"absolute link", fstest.MapFS{"etc/passwd": link("/nix/passwd"), "nix/passwd": file(passwd)}, true},
		{"link that would leave", fstest.MapFS{"etc/passwd": link("../../../up"), "up": file(passwd)}, true},
		{"directory link", fstest.MapFS{"etc": link("config"), "config/passwd": file(passwd)}, true},
		{"chain", fstest.MapFS{"etc/passwd": link("a"), "etc/a": link("/b"), "b": file(passwd)}, true},
		{"loop", fstest.MapFS{"etc/passwd": link("passwd")}, false},
		{"dangling", fstest.MapFS{"etc/passwd": link("/gone")}, false},
		{"none", fstest.MapFS{}, false},
		{"no image", nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := input()
			in.RootFS = tc.root
			in.Image.Config.User = "app"
			spec, err := Build(in)
			if tc.ok != (err == nil) {
				t.Fatalf("error %v", err)
			}
			if tc.ok && spec.Process.User.UID != 1000 {
				t.Errorf("uid %d", spec.Process.User.UID)
			}
		})
	}
	in := input()
	in.RootFS = fstest.MapFS{}
	in.Config.Linux.SecurityContext.RunAsUser = value(5)
	if _, err := Build(in); err != nil {
		t.Errorf("a number needs no /etc/passwd: %v", err)
	}
}
