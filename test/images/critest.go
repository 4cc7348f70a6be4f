package images

import (
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// addCritest makes what critest pulls. Its names are constants of critest.
func addCritest(d *debs, all map[string]v1.Image) error {
	base, err := d.base()
	if err != nil {
		return err
	}
	shell := v1.Config{Cmd: []string{"sh"}}
	builders := map[string]func() (v1.Image, error){
		e2ePrefix + "busybox:1.29-2":                         func() (v1.Image, error) { return image(shell, base) },
		e2ePrefix + "nginx:1.14-2":                           func() (v1.Image, error) { return d.nginx(base, 80) },
		e2ePrefix + "httpd:2.4.39-4":                         func() (v1.Image, error) { return httpdImage(base) },
		e2ePrefix + "nonewprivs:1.3":                         func() (v1.Image, error) { return goImage("euid", "/euid", 0o4755, v1.Config{}) },
		"registry.k8s.io/pause:3.9":                          func() (v1.Image, error) { return pauseImage() },
		critestPrefix + "hostnet-nginx-" + arch():            func() (v1.Image, error) { return d.nginx(base, 12003) },
		critestPrefix + "test-image-predefined-group:latest": func() (v1.Image, error) { return groupImage(base) },
		digestRepo + ":latest":                               digestImage,
	}
	users := map[string]string{"uid": "1002", "username": "www-data", "uid-group": "1003:users", "username-group": "www-data:100"}
	for suffix, user := range users {
		builders[critestPrefix+"test-image-user-"+suffix+":latest"] = func() (v1.Image, error) {
			return image(v1.Config{User: user, Cmd: shell.Cmd}, base)
		}
	}
	for _, ref := range []string{"latest:latest", "tag:test", "tag:all", "1:latest", "2:latest", "3:latest"} {
		builders[critestPrefix+"test-image-"+ref] = func() (v1.Image, error) { return markedImage(base, ref) }
	}
	if err := buildAll(builders, all); err != nil {
		return err
	}
	tags, err := markedImage(base, "tags")
	if err != nil {
		return err
	}
	for _, tag := range []string{"1", "2", "3"} {
		all[critestPrefix+"test-image-tags:"+tag] = tags
	}
	return nil
}

// markedImage differs from every other by one file.
func markedImage(base v1.Layer, mark string) (v1.Image, error) {
	fs := tree{}
	fs.file("mark", 0o644, mark+"\n")
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Cmd: []string{"sh"}}, base, layer)
}

// pauseImage is another image than the one that holds sandboxes: critest
// removes it.
func pauseImage() (v1.Image, error) {
	return goImage("pause", "/pause", 0o755, v1.Config{Labels: map[string]string{"for": "critest"}})
}

func groupImage(base v1.Layer) (v1.Image, error) {
	fs := tree{}
	fs.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home:/bin/sh\n")
	fs.file("etc/group", 0o644, "root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{User: "1000", Cmd: []string{"sh"}}, base, layer)
}

func httpdImage(base v1.Layer) (v1.Image, error) {
	fs := tree{}
	fs.file("www/index.html", 0o644, "httpd\n")
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Cmd: []string{"sh", "-c", "echo httpd starts; exec httpd -f -p 80 -h /www"}}, base, layer)
}

// digestImage has nothing in it that comes from outside this function, so its
// digest is a constant (tools.DigestImage, the same on every architecture).
func digestImage() (v1.Image, error) {
	fs := tree{}
	fs.file("mark", 0o644, "digest\n")
	layer, err := fs.layer()
	if err != nil {
		return nil, err
	}
	return platformImage("amd64", v1.Config{Cmd: []string{"/mark"}}, layer)
}
