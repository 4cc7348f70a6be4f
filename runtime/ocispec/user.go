package ocispec

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxID is the largest user or group ID; runtimes take no more.
const maxID = math.MaxInt32

// ContainerUser is the user that a specification runs as, for ContainerStatus.
func ContainerUser(spec *specs.Spec) *runtimeapi.ContainerUser {
	u := spec.Process.User
	out := &runtimeapi.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.AdditionalGids {
		out.SupplementalGroups = append(out.SupplementalGroups, int64(g))
	}
	return &runtimeapi.ContainerUser{Linux: out}
}

// wanted is who a container is to run as: user and group by name or by number, and where that was said.
type wanted struct {
	field       string
	user, group string
}

func wantedUser(in Input) wanted {
	const prefix = "linux.security_context."
	sc := security(in.Config)
	w := wanted{field: fmt.Sprintf("user of image %q", in.ImageName)}
	switch {
	case sc.GetRunAsUsername() != "":
		w.field, w.user = prefix+"run_as_username", sc.GetRunAsUsername()
	case sc.GetRunAsUser() != nil:
		w.field, w.user = prefix+"run_as_user", strconv.FormatInt(sc.GetRunAsUser().GetValue(), 10)
	default:
		w.user, w.group, _ = strings.Cut(in.Image.Config.User, ":")
		return w
	}
	if g := sc.GetRunAsGroup(); g != nil {
		w.group = strconv.FormatInt(g.GetValue(), 10)
	}
	return w
}

// buildUser looks up who the process is. A user that is given by number need not exist in the image; one by name must.
// The primary group is the first of the supplemental ones, as with containerd.
func buildUser(in Input) (specs.User, error) {
	w := wantedUser(in)
	entry, err := w.lookup(in.RootFS)
	if err != nil {
		return specs.User{}, err
	}
	out := specs.User{UID: uint32(entry.Uid), GID: uint32(entry.Gid)}
	if w.group != "" {
		if out.GID, err = w.lookupGroup(in.RootFS); err != nil {
			return specs.User{}, err
		}
	}
	groups := []uint32{out.GID}
	sc := security(in.Config)
	if sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge && entry.Name != "" {
		member, err := groupsOf(in.RootFS, entry.Name)
		if err != nil {
			return specs.User{}, fmt.Errorf("groups of user %q: %w", entry.Name, err)
		}
		groups = append(groups, member...)
	}
	for _, g := range sc.GetSupplementalGroups() {
		groups = append(groups, uint32(g)) // validated
	}
	for _, g := range groups {
		if !slices.Contains(out.AdditionalGids, g) {
			out.AdditionalGids = append(out.AdditionalGids, g)
		}
	}
	return out, nil
}

// lookup finds the user's entry in the image's /etc/passwd. One that is not there and is given by number has no
// name, and group 0.
func (w wanted) lookup(root fs.FS) (user.User, error) {
	id, isNumber, err := number(w.user)
	if err != nil {
		return user.User{}, invalid("%s: user %q must be from 0 to %d", w.field, w.user, maxID)
	}
	if w.user == "" {
		isNumber = true // nobody is asked for: root
	}
	users, err := parse(root, "etc/passwd", user.ParsePasswdFilter, func(u user.User) bool {
		return isNumber && u.Uid == id || !isNumber && u.Name == w.user
	})
	if err != nil {
		return user.User{}, fmt.Errorf("%s: %w", w.field, err)
	}
	switch {
	case len(users) > 0:
		return users[0], nil
	case isNumber:
		return user.User{Uid: id}, nil
	}
	return user.User{}, invalid("%s: user %q is not in the image's /etc/passwd; it must be there, or be a number", w.field, w.user)
}

func (w wanted) lookupGroup(root fs.FS) (uint32, error) {
	id, isNumber, err := number(w.group)
	if err != nil {
		return 0, invalid("%s: group %q must be from 0 to %d", w.field, w.group, maxID)
	}
	if isNumber {
		return uint32(id), nil
	}
	groups, err := parse(root, "etc/group", user.ParseGroupFilter, func(g user.Group) bool { return g.Name == w.group })
	if err != nil {
		return 0, fmt.Errorf("%s: %w", w.field, err)
	}
	if len(groups) == 0 {
		return 0, invalid("%s: group %q is not in the image's /etc/group; it must be there, or be a number", w.field, w.group)
	}
	return uint32(groups[0].Gid), nil
}

// number reads an ID. The error is that of a number out of range; a name is none.
func number(s string) (id int, isNumber bool, err error) {
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrSyntax):
		return 0, false, nil
	case err != nil || n < 0 || n > maxID:
		return 0, false, strconv.ErrRange
	}
	return int(n), true, nil
}

// groupsOf are the groups that list a user, other than the one of the same name.
func groupsOf(root fs.FS, name string) ([]uint32, error) {
	groups, err := parse(root, "etc/group", user.ParseGroupFilter, func(g user.Group) bool {
		return g.Name != name && slices.Contains(g.List, name)
	})
	var out []uint32
	for _, g := range groups {
		out = append(out, uint32(g.Gid))
	}
	return out, err
}
