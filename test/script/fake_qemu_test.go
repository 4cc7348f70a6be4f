package script

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fakeQEMU is this test's program in the role of QEMU: the launcher has confined it and handed it the descriptors of the
// real command line. It speaks QMP on the real monitor socket and, instead of running a kernel, serves the agent's
// service on the agent's socket. The file that it is given as kernel holds the faults it is to have. As a machine it has no
// agent: it writes to its console, and obeys the power button.
type fakeQEMU struct {
	args   []string
	faults *faults
	trace  func(kind, text string) // takes note of what is asked
	port   *fakePort
	pipe   *os.File // a machine's console
	guest  *fakeGuest
	loaded chan struct{} // closed when the guest is what it was told to be

	mu       sync.Mutex
	conn     *net.UnixConn // the monitor's client
	state    string
	resumed  chan struct{} // closed and replaced when state changes
	saved    string        // how the last migration went
	console  string
	devices  []string
	nodes    []string
	chardevs []string
	ports    map[string]string // root port to what is plugged in
	fdsets   map[int]string    // number to what it is for
	passed   map[string]int    // descriptors by getfd
	cpus     int               // all that are plugged
	memory   int64             // what the guest has taken beside what it began with
}

// isFakeQEMU tells whether this process was started as QEMU: no other program has QEMU's first options.
func isFakeQEMU(args []string) bool {
	return len(args) > 1 && (args[1] == "-no-user-config" || args[1] == "--version")
}

// runFakeQEMU is the fake's main function. It returns the exit status.
func runFakeQEMU(args []string) int {
	if args[1] == "--version" {
		fmt.Println("QEMU emulator version 7.2.0 (fake)")
		return 0
	}
	signal.Ignore(syscall.SIGPIPE) // as QEMU does: nobody may read its error output any more
	if err := newFakeQEMU(args).run(); err != nil {
		fmt.Fprintln(os.Stderr, "fake qemu:", err)
		return 1
	}
	return 0
}

func newFakeQEMU(args []string) *fakeQEMU {
	q := &fakeQEMU{
		args: args, state: "running", resumed: make(chan struct{}), loaded: make(chan struct{}),
		ports: make(map[string]string), fdsets: make(map[int]string), passed: make(map[string]int),
	}
	q.cpus, _, _ = q.size()
	return q
}

// size is what the machine begins with, memory in MiB.
func (q *fakeQEMU) size() (cpus, maxCPUs, memory int) {
	_, _ = fmt.Sscanf(q.option("-smp"), "cpus=%d,maxcpus=%d", &cpus, &maxCPUs) // there may be no more than at the start
	_, _ = fmt.Sscanf(q.option("-m"), "%dM", &memory)
	return cpus, max(cpus, maxCPUs), memory
}

func (q *fakeQEMU) run() error {
	text, err := os.ReadFile(q.option("-kernel"))
	if err != nil {
		return err
	}
	if q.faults, err = parseFaults(string(text), q.isClone()); err != nil {
		return err
	}
	if q.faults.dies != "" {
		return errors.New(q.faults.dies)
	}
	monitor, err := q.listener("qmp")
	if err != nil {
		return err
	}
	agentSocket, err := q.listener("agent")
	if err != nil {
		return err
	}
	if err := q.inventory(); err != nil {
		return err
	}
	q.port = &fakePort{listener: agentSocket, faults: q.faults}
	control, err := dialControl(q.option("-name"), q.faults.step, q.command)
	if err != nil {
		return err
	}
	q.trace = control.trace
	q.trace("args", strings.Join(q.args[1:], "\n"))
	if path := q.consolePipe(); path != "" {
		if q.pipe, err = os.OpenFile(path+".out", os.O_RDWR, 0); err != nil {
			return err
		}
		go q.bootMachine()
	} else {
		q.guest = &fakeGuest{faults: q.faults, trace: q.trace, off: func() { q.guestEnds("guest-shutdown", "") }, stands: q.standStill}
		if q.option("-incoming") == "" {
			close(q.loaded)
		} else {
			q.state = "inmigrate"
		}
		go q.bootGuest()
	}
	for {
		conn, err := monitor.AcceptUnix()
		if err != nil {
			return err
		}
		q.serveMonitor(conn)
	}
}

func (q *fakeQEMU) bootGuest() {
	if q.faults.silent {
		return
	}
	<-time.After(q.faults.boot) // the time that the guest takes
	<-q.loaded
	if err := q.guest.serve(q.port); err != nil && !errors.Is(err, net.ErrClosed) {
		fmt.Fprintln(os.Stderr, "fake guest:", err)
	}
}

// consolePipe is the path of a machine's console, without its ending; empty in a guest of ours.
func (q *fakeQEMU) consolePipe() string {
	for _, a := range q.args {
		if path, ok := strings.CutPrefix(a, "pipe,id=console,path="); ok {
			return path
		}
	}
	return ""
}

// machineLines is what a machine writes to its console, as the statement lines does.
const machineLines = 60

// machineMemory is what a machine has, as its balloon tells, and machineFree what it does not use of it.
const (
	machineMemory = 320 << 20
	machineFree   = 100 << 20
)

func (q *fakeQEMU) bootMachine() {
	for i := range machineLines {
		q.say(lineText(i))
		<-time.After(4 * time.Millisecond) // the time that it takes
	}
	q.say("up")
}

// say writes a line to a machine's console, and waits while nobody reads there.
func (q *fakeQEMU) say(line string) {
	if _, err := io.WriteString(q.pipe, line+"\n"); err != nil {
		fmt.Fprintln(os.Stderr, "fake machine:", err)
	}
}

// powerOff is what the power button does to a machine's system.
func (q *fakeQEMU) powerOff() {
	if q.pipe != nil {
		q.say("bye")
	}
	q.guestEnds("guest-shutdown", "")
}

// option is the value of an option that is given once.
func (q *fakeQEMU) option(name string) string {
	if i := slices.Index(q.args, name); i >= 0 && i+1 < len(q.args) {
		return q.args[i+1]
	}
	return ""
}

var chardevRE = regexp.MustCompile(`^socket,id=([a-z]+),fd=(\d+),server=on,wait=off$`)

// listener is the listening socket that a chardev was given.
func (q *fakeQEMU) listener(id string) (*net.UnixListener, error) {
	for _, a := range q.args {
		m := chardevRE.FindStringSubmatch(a)
		if m == nil || m[1] != id {
			continue
		}
		fd, err := strconv.Atoi(m[2])
		if err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(fd), id)
		l, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("chardev %s: descriptor %d: %w", id, fd, err)
		}
		return l.(*net.UnixListener), f.Close()
	}
	return nil, fmt.Errorf("no chardev %s in the arguments", id)
}

// inventory learns from the command line what is plugged in from the start, and holds that its descriptors are there.
func (q *fakeQEMU) inventory() error {
	for i, a := range q.args[:len(q.args)-1] {
		value := q.args[i+1]
		switch a {
		case "-device":
			var d struct{ Driver, ID string }
			if err := json.Unmarshal([]byte(value), &d); err != nil {
				return fmt.Errorf("-device %s: %w", value, err)
			}
			q.devices = append(q.devices, d.ID)
			if d.Driver == "pcie-root-port" {
				q.ports[d.ID] = ""
			}
		case "-blockdev":
			var b struct {
				Node string `json:"node-name"`
			}
			if err := json.Unmarshal([]byte(value), &b); err != nil {
				return fmt.Errorf("-blockdev %s: %w", value, err)
			}
			q.nodes = append(q.nodes, b.Node)
		case "-add-fd":
			var fd, set int
			var opaque string
			if _, err := fmt.Sscanf(value, "fd=%d,set=%d,opaque=%s", &fd, &set, &opaque); err != nil {
				return fmt.Errorf("-add-fd %s: %w", value, err)
			}
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
				return fmt.Errorf("-add-fd %s: %w", value, err)
			}
			q.fdsets[set] = opaque
		}
	}
	return nil
}

// isClone tells whether a pod's VM begins as a template. The copy that proves a new template does not count.
func (q *fakeQEMU) isClone() bool {
	return q.option("-incoming") != "" && q.option("-name") != "vmruntime-template"
}

// enter changes the run state.
func (q *fakeQEMU) enter(state string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.setState(state)
}

// setState is enter for who holds mu.
func (q *fakeQEMU) setState(state string) {
	q.state = state
	close(q.resumed)
	q.resumed = make(chan struct{})
}

// standStill waits while the processors are stopped.
func (q *fakeQEMU) standStill() {
	for {
		q.mu.Lock()
		state, resumed := q.state, q.resumed
		q.mu.Unlock()
		if state == "running" || state == "shutdown" {
			return
		}
		<-resumed
	}
}

// memory is what a saved state has beside the guest, more than a pipe takes at once.
const memory = 300 << 10

// migrate writes the guest's state, or reads it, and tells how it went. The test sees when it is half done.
func (q *fakeQEMU) migrate(fd int, work func(*os.File) error, from, to string) {
	q.setState(from)
	was := map[bool]string{true: "inmigrate", false: "paused"}[from == "inmigrate"]
	go func() {
		f := os.NewFile(uintptr(fd), "state")
		err := errors.Join(work(f), f.Close())
		status := "completed"
		if err != nil {
			fmt.Fprintln(os.Stderr, "fake qemu: migrate:", err)
			status, to = "failed", was
		}
		q.mu.Lock()
		q.saved = status
		q.setState(to)
		q.mu.Unlock()
		q.event("MIGRATION", map[string]any{"status": status})
	}()
}

func (q *fakeQEMU) saveState(to *os.File) error {
	if _, err := to.Write(make([]byte, memory/2)); err != nil {
		return err
	}
	q.trace("state", "half written")
	const pieces = 300
	for range pieces {
		if _, err := to.Write(make([]byte, memory/2/pieces)); err != nil {
			return err
		}
		<-time.After(q.faults.saving / pieces) // the fault itself
	}
	data, err := q.guest.save()
	if err != nil {
		return err
	}
	_, err = to.Write(data)
	return err
}

func (q *fakeQEMU) loadState(from *os.File) error {
	if _, err := io.ReadFull(from, make([]byte, memory/2)); err != nil {
		return err
	}
	q.trace("state", "half read")
	if _, err := io.ReadFull(from, make([]byte, memory/2)); err != nil {
		return err
	}
	data, err := io.ReadAll(from)
	if err != nil {
		return err
	}
	if err := q.guest.load(data); err != nil {
		return err
	}
	close(q.loaded)
	return nil
}

// guestEnds is what QEMU does with -action reboot=shutdown,shutdown=pause.
func (q *fakeQEMU) guestEnds(reason, console string) {
	q.faults.hang()
	q.mu.Lock()
	q.setState("shutdown")
	q.console += console
	q.mu.Unlock()
	q.event("SHUTDOWN", map[string]any{"guest": true, "reason": reason})
}

// command is what a script asks of a VM that runs.
func (q *fakeQEMU) command(line string) {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "panic":
		q.guestEnds("guest-reset", "Kernel panic - not syncing: "+rest+"\n")
	case "poweroff":
		q.powerOff()
	case "hang":
		q.faults.hang()
	case "drop":
		q.port.hangUp()
	case "damage":
		q.faults.damage()
	case "stand":
		q.enter(rest)
		q.trace("state", rest)
	case "exit":
		os.Exit(3)
	default:
		fmt.Fprintf(os.Stderr, "fake qemu: unknown command %q\n", line)
		os.Exit(1)
	}
}

type qmpCommand struct {
	Execute   string          `json:"execute"`
	ID        string          `json:"id"`
	Arguments json.RawMessage `json:"arguments"`
	files     []int
}

// serveMonitor speaks QMP with one client until it goes.
func (q *fakeQEMU) serveMonitor(conn *net.UnixConn) {
	defer conn.Close()
	q.mu.Lock()
	q.conn = conn
	q.mu.Unlock()
	q.send(map[string]any{"QMP": map[string]any{
		"version":      map[string]any{"qemu": map[string]int{"major": 7, "minor": 2, "micro": 0}, "package": "fake"},
		"capabilities": []string{"oob"},
	}})
	in := &rightsReader{conn: conn}
	lines := json.NewDecoder(bufio.NewReader(in))
	for {
		var c qmpCommand
		if err := lines.Decode(&c); err != nil {
			break
		}
		c.files = in.take()
		q.answer(c)
	}
	q.mu.Lock()
	q.conn = nil
	q.mu.Unlock()
}

// rightsReader reads a connection and keeps the descriptors that come along.
type rightsReader struct {
	conn  *net.UnixConn
	mu    sync.Mutex
	files []int
}

func (r *rightsReader) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*8))
	n, oobn, _, _, err := r.conn.ReadMsgUnix(b, oob)
	if oobn > 0 {
		msgs, perr := unix.ParseSocketControlMessage(oob[:oobn])
		err = errors.Join(err, perr)
		for _, m := range msgs {
			fds, perr := unix.ParseUnixRights(&m)
			err = errors.Join(err, perr)
			r.mu.Lock()
			r.files = append(r.files, fds...)
			r.mu.Unlock()
		}
	}
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return max(n, 0), err // negative when the client was killed with answers unread
}

func (r *rightsReader) take() []int {
	r.mu.Lock()
	defer r.mu.Unlock()
	files := r.files
	r.files = nil
	return files
}

func (q *fakeQEMU) send(v any) {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.conn != nil {
		_, _ = q.conn.Write(append(data, '\r', '\n')) // a client that has gone misses it
	}
}

func (q *fakeQEMU) event(name string, data map[string]any) {
	now := time.Now()
	q.send(map[string]any{
		"event": name, "data": data,
		"timestamp": map[string]int64{"seconds": now.Unix(), "microseconds": int64(now.Nanosecond() / 1000)},
	})
}

func (q *fakeQEMU) answer(c qmpCommand) {
	args := string(c.Arguments)
	if args != "" {
		args = " " + args
	}
	q.trace("qmp", c.Execute+args)
	result, err := q.execute(c)
	if err != nil {
		q.send(map[string]any{"id": c.ID, "error": map[string]string{"class": "GenericError", "desc": err.Error()}})
		return
	}
	if result == nil {
		result = map[string]any{}
	}
	q.send(map[string]any{"id": c.ID, "return": result})
	if c.Execute == "device_del" {
		var device struct{ ID string }
		_ = json.Unmarshal(c.Arguments, &device) // it was read before
		q.event("DEVICE_DELETED", map[string]any{"device": device.ID})
	}
	if c.Execute == "quit" {
		_ = q.port.Close() // the process ends
		os.Exit(0)
	}
}

func (q *fakeQEMU) execute(c qmpCommand) (any, error) {
	if err := q.faults.refusal(c.Execute); err != nil {
		return nil, err
	}
	var a struct {
		ID, Driver, Drive, Chardev, Bus, Opaque, Fdname, Property string
		NodeName                                                  string `json:"node-name"`
		FdsetID                                                   int    `json:"fdset-id"`
		Requested                                                 int64  `json:"requested-size"`
		File                                                      struct{ Filename string }
	}
	if len(c.Arguments) > 0 {
		if err := json.Unmarshal(c.Arguments, &a); err != nil {
			return nil, err
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	switch c.Execute {
	case "qmp_capabilities", "quit":
		return nil, nil
	case "system_powerdown":
		time.AfterFunc(20*time.Millisecond, q.powerOff)
		return nil, nil
	case "qom-set", "object-add": // how often the balloon tells its statistics; what is behind memory that is plugged
		return nil, nil
	case "query-kvm":
		return map[string]any{"enabled": strings.HasPrefix(q.option("-accel"), "kvm"), "present": true}, nil
	case "query-version":
		return map[string]any{"qemu": map[string]int{"major": 7, "minor": 2, "micro": 0}}, nil
	case "stop":
		q.setState("paused")
		return nil, nil
	case "cont":
		q.setState("running")
		return nil, nil
	case "migrate-set-capabilities", "migrate-set-parameters", "migrate_cancel":
		return nil, nil
	case "query-migrate":
		return map[string]any{"status": q.saved}, nil
	case "migrate", "migrate-incoming":
		fd, ok := q.passed["state"]
		if !ok {
			return nil, errors.New("file descriptor named 'state' has not been found")
		}
		delete(q.passed, "state")
		q.saved = "active"
		if c.Execute == "migrate" {
			then := "postmigrate"
			if q.faults.restless {
				then = "running"
			}
			q.migrate(fd, q.saveState, "finish-migrate", then)
		} else {
			q.migrate(fd, q.loadState, "inmigrate", "paused")
		}
		return nil, nil
	case "query-status":
		return map[string]any{"status": q.state, "running": q.state == "running"}, nil
	case "ringbuf-read":
		text := q.console
		q.console = ""
		return base64.StdEncoding.EncodeToString([]byte(text)), nil
	case "query-balloon":
		return map[string]int{"actual": machineMemory}, nil
	case "qom-get": // of the balloon; of the machine: what it began with
		if a.Property == "guest-stats" {
			return map[string]any{"last-update": time.Now().Unix(), "stats": map[string]int{
				"stat-total-memory": machineMemory, "stat-free-memory": machineFree, "stat-available-memory": machineFree,
			}}, nil
		}
		cpus, maxCPUs, memory := q.size()
		return map[string]int{"cpus": cpus, "maxcpus": maxCPUs, "size": memory << 20}, nil
	case "query-cpus-fast":
		return make([]struct{}, q.cpus), nil
	case "query-hotpluggable-cpus":
		return q.listProcessors(), nil
	case "query-memory-devices":
		if q.memory == 0 {
			return []any{}, nil
		}
		return []any{map[string]any{"data": map[string]any{"id": "memory1", "size": q.memory, "requested-size": q.memory}}}, nil
	case "qom-list":
		return named("name", q.devices), nil
	case "query-named-block-nodes":
		return named("node-name", q.nodes), nil
	case "query-chardev":
		return named("label", q.chardevs), nil
	case "query-fdsets":
		return q.listSets(), nil
	case "query-pci":
		return q.listPorts(), nil
	case "add-fd":
		return q.addFD(a.Opaque, c.files)
	case "remove-fd":
		delete(q.fdsets, a.FdsetID)
		return nil, nil
	case "getfd":
		if len(c.files) != 1 {
			return nil, fmt.Errorf("no file descriptor supplied via SCM_RIGHTS")
		}
		q.passed[a.Fdname] = c.files[0]
		return nil, nil
	case "closefd":
		fd := q.passed[a.Fdname]
		delete(q.passed, a.Fdname)
		return nil, syscall.Close(fd)
	case "chardev-add":
		if _, ok := q.passed[a.ID]; !ok {
			return nil, fmt.Errorf("file descriptor named '%s' has not been found", a.ID)
		}
		q.chardevs = append(q.chardevs, a.ID)
		return nil, nil
	case "chardev-remove":
		q.chardevs = without(q.chardevs, a.ID)
		return nil, nil
	case "blockdev-add":
		var set int
		if _, err := fmt.Sscanf(a.File.Filename, "/dev/fdset/%d", &set); err != nil || q.fdsets[set] == "" {
			return nil, fmt.Errorf("could not open '%s': no such file descriptor set", a.File.Filename)
		}
		q.nodes = append(q.nodes, a.NodeName)
		return nil, nil
	case "blockdev-del":
		q.nodes = without(q.nodes, a.NodeName)
		return nil, nil
	case "device_add":
		if a.Drive != "" && !slices.Contains(q.nodes, a.Drive) || a.Chardev != "" && !slices.Contains(q.chardevs, a.Chardev) {
			return nil, fmt.Errorf("device '%s' has no backend '%s%s'", a.ID, a.Drive, a.Chardev)
		}
		q.devices = append(q.devices, a.ID)
		q.memory += a.Requested
		if a.Driver == fakeProcessor {
			q.cpus++
		}
		if _, ok := q.ports[a.Bus]; ok {
			q.ports[a.Bus] = a.ID
		}
		return nil, nil
	case "device_del":
		q.devices = without(q.devices, a.ID)
		return nil, nil
	}
	return nil, fmt.Errorf("the command %s has not been found", c.Execute)
}

func (q *fakeQEMU) addFD(opaque string, files []int) (any, error) {
	if len(files) != 1 {
		return nil, fmt.Errorf("no file descriptor supplied via SCM_RIGHTS")
	}
	set := 1
	for q.fdsets[set] != "" {
		set++
	}
	q.fdsets[set] = opaque
	return map[string]int{"fdset-id": set, "fd": files[0]}, nil
}

func (q *fakeQEMU) listSets() any {
	list := []any{}
	for set, opaque := range q.fdsets {
		list = append(list, map[string]any{"fdset-id": set, "fds": []any{map[string]any{"fd": 0, "opaque": opaque}}})
	}
	return list
}

// fakeProcessor is the kind of device that a processor is.
const fakeProcessor = "max-x86_64-cpu"

func (q *fakeQEMU) listProcessors() any {
	_, most, _ := q.size()
	list := []any{}
	for i := range most {
		slot := map[string]any{"type": fakeProcessor, "props": map[string]int{"core-id": i}}
		if i < q.cpus {
			slot["qom-path"] = fmt.Sprintf("/machine/unattached/device[%d]", i)
		}
		list = append(list, slot)
	}
	return list
}

func (q *fakeQEMU) listPorts() any {
	devices := []any{}
	for i := range len(q.ports) {
		id := "hotplug" + strconv.Itoa(i)
		behind := []any{}
		if plugged := q.ports[id]; plugged != "" {
			behind = append(behind, map[string]string{"qdev_id": plugged})
		}
		devices = append(devices, map[string]any{"qdev_id": id, "pci_bridge": map[string]any{"devices": behind}})
	}
	return []any{map[string]any{"bus": 0, "devices": devices}}
}

func named(key string, names []string) any {
	list := []any{}
	for _, n := range names {
		list = append(list, map[string]string{key: n})
	}
	return list
}

func without(list []string, name string) []string {
	return slices.DeleteFunc(list, func(s string) bool { return s == name })
}

// controlPath is where the test listens for the fakes whose program is the given one. The launcher shows QEMU this
// directory because its firmware would be there.
func controlPath(program string) string {
	return filepath.Join(filepath.Dir(filepath.Dir(program)), "share", "qemu", "control.sock")
}
