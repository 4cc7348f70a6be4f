// Command guest is PID 1 of the tests' guests: it does what the lines on the agent's port say.
package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("guest:", err)
		time.Sleep(time.Hour)
	}
}

func run() error {
	for _, m := range []struct{ fs, dir string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fs, m.dir, m.fs, 0, ""); err != nil && err != unix.EBUSY {
			return err
		}
	}
	var modules struct {
		Boot []string            `json:"boot"`
		Lazy map[string][]string `json:"lazy"`
	}
	data, err := os.ReadFile("/etc/vmagent/modules.json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &modules); err != nil {
		return err
	}
	for _, m := range append(modules.Boot, modules.Lazy["virtiofs"]...) {
		if err := load(m); err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
	}
	var port *os.File
	for port == nil {
		if ports, _ := filepath.Glob("/dev/vport*"); len(ports) > 0 {
			port, err = os.OpenFile(ports[0], os.O_RDWR, 0)
		}
		time.Sleep(10 * time.Millisecond)
	}
	fmt.Println("guest: ready")
	return serve(port)
}

func load(name string) error {
	f, err := os.Open("/lib/modules/" + name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

func serve(port *os.File) error {
	in := bufio.NewReader(port)
	for {
		line, err := in.ReadString('\n')
		if err != nil && line == "" {
			time.Sleep(10 * time.Millisecond) // nobody is connected
			continue
		}
		answer, err := do(strings.Fields(line))
		if err != nil {
			answer = "error: " + err.Error()
		}
		if _, err := fmt.Fprintf(port, "%q\n", answer); err != nil {
			return err
		}
	}
}

func do(words []string) (string, error) {
	switch words[0] {
	case "head": // head FILE
		f, err := os.Open(words[1])
		if err != nil {
			return "", err
		}
		defer f.Close()
		data := make([]byte, 64)
		n, err := f.Read(data)
		return string(data[:n]), err
	case "write": // write FILE TEXT
		return "", os.WriteFile(words[1], []byte(words[2]), 0o644)
	case "mount": // mount TAG DIR
		if err := os.MkdirAll(words[2], 0o755); err != nil {
			return "", err
		}
		return "", unix.Mount(words[1], words[2], "virtiofs", 0, "")
	case "own": // own FILE UID GID MODE
		return "", own(words[1], words[2:])
	case "as": // as UID GID FILE
		return "", createAs(words[1], words[2], words[3])
	case "tpm": // tpm COMMAND
		return tpm(words[1])
	case "disks":
		return disks()
	case "scan": // looks for the disk of LUN 0
		hosts, err := filepath.Glob("/sys/class/scsi_host/host*/scan")
		for _, h := range hosts {
			err = errors.Join(err, os.WriteFile(h, []byte("0 0 0"), 0))
		}
		return "", err
	case "flood":
		for range 20000 {
			fmt.Println(strings.Repeat("x", 70))
		}
		return "", nil
	case "poweroff":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "panic":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return "", fmt.Errorf("unknown command %q", words)
}

// own makes a file and gives it to somebody.
func own(path string, owner []string) error {
	var uid, gid int
	var mode uint32
	if _, err := fmt.Sscanf(strings.Join(owner, " "), "%d %d %o", &uid, &gid, &mode); err != nil {
		return err
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return errors.Join(unix.Chown(path, uid, gid), unix.Chmod(path, mode))
}

// createAs makes a file as another user.
func createAs(uid, gid, path string) error {
	var u, g int
	if _, err := fmt.Sscan(uid+" "+gid, &u, &g); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, err := unix.SetfsgidRetGid(g); err != nil {
		return err
	}
	if _, err := unix.SetfsuidRetUid(u); err != nil {
		return err
	}
	defer func() {
		_, _ = unix.SetfsuidRetUid(0)
		_, _ = unix.SetfsgidRetGid(0)
	}()
	return os.WriteFile(path, nil, 0o644)
}

// tpm gives the TPM a command and returns its answer, both in hexadecimal.
func tpm(command string) (string, error) {
	data, err := hex.DecodeString(command)
	if err != nil {
		return "", err
	}
	// Not by os.OpenFile, which makes it non-blocking: a read is then an end of file until there is an answer.
	fd, err := unix.Open("/dev/tpm0", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), "tpm0")
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return "", err
	}
	answer := make([]byte, 4096)
	n, err := f.Read(answer)
	return hex.EncodeToString(answer[:n]), err
}

// disks tells name, serial and the read-only flag of each SCSI disk.
func disks() (string, error) {
	pages, err := filepath.Glob("/sys/block/sd*/device/vpd_pg80")
	if err != nil {
		return "", err
	}
	var out []string
	for _, p := range pages {
		page, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		dir := filepath.Dir(filepath.Dir(p))
		ro, err := os.ReadFile(filepath.Join(dir, "ro"))
		if err != nil {
			return "", err
		}
		out = append(out, fmt.Sprintf("%s=%s,ro=%s", page[4:], filepath.Base(dir), strings.TrimSpace(string(ro))))
	}
	return strings.Join(out, " "), nil
}
