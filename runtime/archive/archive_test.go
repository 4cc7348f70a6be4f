package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

type content struct{ Name string }

// fileSize is that of the sparse file in the archives of these tests.
const fileSize = 1 << 20

// sparse makes a file with data at its beginning and in its middle.
func sparse(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	for _, at := range []int64{0, fileSize / 2} {
		if _, err := f.WriteAt([]byte("data"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(fileSize); err != nil {
		t.Fatal(err)
	}
	return f
}

// write makes an archive of two streams: a text and a sparse file.
func write(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	w, err := Create("out", dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, disk := context.Background(), sparse(t)
	if err := errors.Join(
		w.Stream(ctx, "text", func(to io.Writer) error { _, err := io.WriteString(to, strings.Repeat("text", 1000)); return err }),
		w.Stream(ctx, "disk", func(to io.Writer) error { return WriteSparse(to, disk) }),
		w.Finish(content{"it"}), w.Close(),
	); err != nil {
		t.Fatal(err)
	}
	return dir
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func open(dir string) (*Reader, content, error) {
	var c content
	r, err := Open(context.Background(), "in", dir, &c)
	return r, c, err
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	dir := write(t)
	if got, want := names(t, dir), []string{"disk.zst", manifestFile, sumFile, "text.zst"}; !slices.Equal(got, want) {
		t.Errorf("the archive has %q, want %q", got, want)
	}
	r, c, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if c.Name != "it" {
		t.Errorf("the content is %+v", c)
	}
	for range 2 { // a stream can be read more than once
		var text []byte
		if err := r.Stream("text", func(from io.Reader) error { text, err = io.ReadAll(from); return err }); err != nil {
			t.Fatal(err)
		}
		if string(text) != strings.Repeat("text", 1000) {
			t.Errorf("the text has %d bytes", len(text))
		}
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := out.WriteAt([]byte("of before"), 2*fileSize); err != nil {
		t.Fatal(err)
	}
	if err := r.Stream("disk", func(from io.Reader) error { return ReadSparse(out, from, fileSize) }); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, fileSize)
	copy(want, "data")
	copy(want[fileSize/2:], "data")
	if !bytes.Equal(got, want) {
		t.Errorf("the file of %d bytes is another one", len(got))
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(out.Fd()), &st); err != nil || st.Blocks*512 > fileSize/2 {
		t.Errorf("the file takes %d bytes (%v); its holes are not there", st.Blocks*512, err)
	}
	if err := r.Stream("none", func(io.Reader) error { return nil }); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "none.zst") {
		t.Errorf("a stream that is not there: %v", err)
	}
}

func TestSparseFiles(t *testing.T) {
	for _, size := range []int64{0, 1, 4096, 1 << 40} {
		in, err := os.Create(filepath.Join(t.TempDir(), "in"))
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if err := in.Truncate(size); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := WriteSparse(&b, in); err != nil {
			t.Fatal(err)
		}
		if b.Len() > 64 {
			t.Errorf("%d empty bytes take %d", size, b.Len())
		}
		out := sparse(t)
		if err := ReadSparse(out, &b, size); err != nil {
			t.Fatal(err)
		}
		if info, err := out.Stat(); err != nil || info.Size() != size {
			t.Errorf("read, %d bytes are %d (%v)", size, info.Size(), err)
		}
	}
}

// pieces is a stream of WriteSparse; each piece has its data unless it is to be cut.
func pieces(list ...extent) []byte {
	var b bytes.Buffer
	for _, e := range list {
		_ = binary.Write(&b, binary.LittleEndian, e) // a buffer takes all
		if e.Length > 0 && e.Length < 1<<20 {
			b.Write(make([]byte, e.Length))
		}
	}
	return b.Bytes()
}

func TestSparseDamaged(t *testing.T) {
	for name, data := range map[string][]byte{
		"empty":             nil,
		"no end":            pieces(extent{0, 10}),
		"half a head":       pieces(extent{0, 10}, extent{100, 0})[:30],
		"half a piece":      pieces(extent{0, 10})[:20],
		"before the file":   pieces(extent{-10, 5}, extent{100, 0}),
		"negative length":   pieces(extent{0, -5}, extent{100, 0}),
		"behind the end":    pieces(extent{95, 10}, extent{100, 0}),
		"far behind":        pieces(extent{1 << 62, 1 << 62}),
		"sum is negative":   pieces(extent{10, 1<<63 - 1}),
		"backwards":         pieces(extent{50, 10}, extent{0, 10}, extent{100, 0}),
		"another size":      pieces(extent{0, 10}, extent{99, 0}),
		"no size":           pieces(extent{0, 10}, extent{-1, 0}),
		"more after it all": append(pieces(extent{0, 10}, extent{100, 0}), 1),
	} {
		t.Run(name, func(t *testing.T) {
			out := sparse(t)
			if err := ReadSparse(out, bytes.NewReader(data), 100); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "damaged") {
				t.Errorf("read with %v, want damaged", err)
			}
			if info, err := out.Stat(); err != nil || info.Size() > 100 {
				t.Errorf("it made a file of %d bytes (%v)", info.Size(), err)
			}
		})
	}
}

// Any bit that is turned and any byte that is missing or too many, in any file, is noticed before anything is read.
func TestDamageIsNoticed(t *testing.T) {
	dir := write(t)
	for _, name := range []string{"text.zst", "disk.zst", manifestFile, sumFile} {
		path := filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		refused := func(what string, bad []byte) {
			t.Helper()
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			r, _, err := open(dir)
			if err == nil {
				_ = r.Close()
			}
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "damaged") || !strings.Contains(err.Error(), dir) {
				t.Errorf("%s with %s: %v, want damaged", name, what, err)
			}
		}
		for i := range min(len(data), 2000) {
			if name == sumFile && i == len(data)-1 {
				continue // a line feed
			}
			bad := slices.Clone(data)
			bad[i] ^= 1
			refused(fmt.Sprintf("byte %d turned", i), bad)
		}
		for _, n := range []int{0, 1, len(data) / 2, len(data) - 2} {
			refused(fmt.Sprintf("%d bytes", n), data[:n])
		}
		refused("a byte too many", append(slices.Clone(data), 'x'))
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if r, _, err := open(dir); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", name, err)
			if err == nil {
				_ = r.Close()
			}
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, _, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// forge writes a manifest with the hash that belongs to it.
func forge(t testing.TB, dir string, data []byte) {
	t.Helper()
	sum := sha256.Sum256(data)
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, manifestFile), data, 0o600),
		os.WriteFile(filepath.Join(dir, sumFile), []byte(hex.EncodeToString(sum[:])), 0o600),
	); err != nil {
		t.Fatal(err)
	}
}

func TestForgedManifests(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside.zst")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("secret"))
	listed := func(names ...string) manifest {
		m := manifest{Format: format, Content: json.RawMessage(`{}`)}
		for _, n := range names {
			m.Files = append(m.Files, file{Name: n, Size: 6, SHA256: hex.EncodeToString(sum[:])})
		}
		return m
	}
	for _, tc := range []struct {
		name string
		m    any
		is   func(error) bool
		word string
	}{
		{"a later format", manifest{Format: 2, Content: json.RawMessage(`{}`)}, errdefs.IsFailedPrecondition, "format 2"},
		{"no format", map[string]any{}, errdefs.IsFailedPrecondition, "format 0"},
		{"no object", 5, errdefs.IsInvalidArgument, "damaged"},
		{"no content", map[string]any{"format": format}, errdefs.IsInvalidArgument, "manifest"},
		{"another content", map[string]any{"format": format, "content": map[string]any{"Name": 5}}, errdefs.IsInvalidArgument, "manifest"},
		{"upwards", listed("../" + filepath.Base(filepath.Dir(outside)) + "/outside.zst"), errdefs.IsInvalidArgument, "escapes"},
		{"absolute", listed(outside), errdefs.IsInvalidArgument, "escapes"},
		{"a link", listed("link.zst"), errdefs.IsInvalidArgument, "link.zst"},
		{"below a link", listed("links/outside.zst"), errdefs.IsInvalidArgument, "escapes"},
		{"a FIFO", listed("fifo.zst"), errdefs.IsInvalidArgument, "no regular file"},
		{"the directory", listed("."), errdefs.IsInvalidArgument, "no regular file"},
		{"nameless", listed(""), errdefs.IsInvalidArgument, "damaged"},
		{"twice", listed("good.zst", "good.zst"), errdefs.IsInvalidArgument, "twice"},
		{"not there", listed("gone.zst"), errdefs.IsInvalidArgument, "gone.zst"},
		{"good", listed("good.zst"), func(err error) bool { return err == nil }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			data, err := json.Marshal(tc.m)
			if err != nil {
				t.Fatal(err)
			}
			forge(t, dir, data)
			if err := errors.Join(
				os.Symlink(outside, filepath.Join(dir, "link.zst")),
				os.Symlink(filepath.Dir(outside), filepath.Join(dir, "links")),
				unix.Mkfifo(filepath.Join(dir, "fifo.zst"), 0o600),
				os.WriteFile(filepath.Join(dir, "good.zst"), []byte("secret"), 0o600),
			); err != nil {
				t.Fatal(err)
			}
			r, _, err := open(dir)
			if err == nil {
				defer r.Close()
			}
			if !tc.is(err) || err != nil && !strings.Contains(err.Error(), tc.word) {
				t.Errorf("opened with %v, want %q", err, tc.word)
			}
		})
	}
}

func TestDirectories(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := errors.Join(os.WriteFile(plain, nil, 0o600), os.Symlink(dir, filepath.Join(dir, "link")), os.Mkdir(filepath.Join(dir, "empty"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for path, is := range map[string]func(error) bool{
		"relative":                       errdefs.IsInvalidArgument,
		"":                               errdefs.IsInvalidArgument,
		plain:                            errdefs.IsInvalidArgument,
		filepath.Join(dir, "gone"):       errdefs.IsInvalidArgument,
		filepath.Join(dir, "link/empty"): errdefs.IsInvalidArgument,
		dir:                              errdefs.IsFailedPrecondition, // not empty
	} {
		if w, err := Create("out", path); !is(err) || !strings.HasPrefix(err.Error(), "out ") {
			t.Errorf("created in %q: %v", path, err)
			if err == nil {
				_ = w.Close()
			}
		}
		if r, _, err := open(path); !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), "in ") {
			t.Errorf("opened %q: %v", path, err)
			if err == nil {
				_ = r.Close()
			}
		}
	}
}

// What is not finished is not there afterwards, and the directory can be used again.
func TestUnfinishedLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	broken := errors.New("broken")
	ended, end := context.WithCancel(context.Background())
	end()
	for name, use := range map[string]func(w *Writer) error{
		"failing": func(w *Writer) error {
			return w.Stream(context.Background(), "a", func(to io.Writer) error {
				_, err := to.Write(make([]byte, 1<<20))
				return errors.Join(err, broken)
			})
		},
		"cancelled": func(w *Writer) error {
			return w.Stream(ended, "a", func(to io.Writer) error { _, err := to.Write(make([]byte, 1<<20)); return err })
		},
		"unfinished": func(w *Writer) error {
			return errors.Join(w.Stream(context.Background(), "a", func(io.Writer) error { return nil }), broken)
		},
		"twice": func(w *Writer) error {
			none := func(io.Writer) error { return nil }
			return errors.Join(w.Stream(context.Background(), "a", none), w.Stream(context.Background(), "a", none))
		},
		"content": func(w *Writer) error { return w.Finish(func() {}) },
	} {
		t.Run(name, func(t *testing.T) {
			w, err := Create("out", dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := use(w); err == nil {
				t.Error("it succeeds")
			}
			if err := w.Close(); err != nil {
				t.Error(err)
			}
			if left := names(t, dir); len(left) > 0 {
				t.Errorf("left are %q", left)
			}
		})
	}
}

// An archive that is one file is a tar archive of the same files.
func TestTar(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "it.tar")
	w, err := CreateTar("location", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := errors.Join(
		w.Stream(ctx, "text", func(to io.Writer) error { _, err := io.WriteString(to, strings.Repeat("text", 1000)); return err }),
		w.Stream(ctx, "empty", func(io.Writer) error { return nil }),
		w.Finish(content{"it"}), w.Close(),
	); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || info.Size()%block != 0 {
		t.Errorf("the file is %v (%v), want mode 0600 and whole blocks", info, err)
	}
	to := t.TempDir()
	if out, err := exec.Command("tar", "-xf", path, "-C", to).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	r, c, err := open(to)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if c.Name != "it" {
		t.Errorf("the content is %+v", c)
	}
	if err := r.Stream("text", func(from io.Reader) error {
		text, err := io.ReadAll(from)
		if len(text) != 4000 {
			t.Errorf("the text has %d bytes", len(text))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if _, err := CreateTar("location", path); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "exists") {
		t.Errorf("once more in the same place: %v", err)
	}
	for _, bad := range []string{"", "it.tar", filepath.Join(dir, "gone", "it.tar"), dir + "/"} {
		if w, err := CreateTar("location", bad); err == nil {
			t.Errorf("%q was made", bad)
			_ = w.Close()
		}
	}
	w, err = CreateTar("location", filepath.Join(dir, "unfinished"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Stream(ctx, "empty", func(io.Writer) error { return nil }), w.Close()); err != nil {
		t.Fatal(err)
	}
	if left := names(t, dir); !slices.Equal(left, []string{"it.tar"}) {
		t.Errorf("left are %q", left)
	}
}

// What was checked is what is read, also when the files are replaced in the meantime.
func TestReplacedAfterTheCheck(t *testing.T) {
	dir := write(t)
	r, _, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	path := filepath.Join(dir, "text.zst")
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte("other"), 0o600)); err != nil {
		t.Fatal(err)
	}
	err = r.Stream("text", func(from io.Reader) error {
		text, err := io.ReadAll(from)
		if len(text) != 4000 {
			t.Errorf("read are %d bytes", len(text))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Whatever is in an archive whose hashes are right: it is read or refused, and nothing grows beyond what the caller expects.
func FuzzReader(f *testing.F) {
	dir := write(f)
	m, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		f.Fatal(err)
	}
	good := pieces(extent{0, 10}, extent{50, 10}, extent{100, 0})
	for _, stream := range [][]byte{good, good[:20], pieces(extent{-1, 5}), pieces(extent{1 << 62, 1 << 62}), nil} {
		var z bytes.Buffer
		if err := compressed(&z, func(w io.Writer) error { _, err := w.Write(stream); return err }); err != nil {
			f.Fatal(err)
		}
		f.Add(m, z.Bytes())
		f.Add([]byte(`{"format":1,"files":[{"name":"disk.zst"}],"content":{"Name":"a"}}`), stream)
	}
	f.Fuzz(func(t *testing.T, manifestData, stream []byte) {
		dir := t.TempDir()
		// The hashes are no obstacle for who makes an archive.
		var m manifest
		if json.Unmarshal(manifestData, &m) == nil {
			sum := sha256.Sum256(stream)
			for i := range m.Files {
				m.Files[i].Size, m.Files[i].SHA256 = int64(len(stream)), hex.EncodeToString(sum[:])
			}
			if data, err := json.Marshal(m); err == nil {
				manifestData = data
			}
		}
		forge(t, dir, manifestData)
		if err := os.WriteFile(filepath.Join(dir, "disk"+suffix), stream, 0o600); err != nil {
			t.Fatal(err)
		}
		r, _, err := open(dir)
		if err != nil {
			return
		}
		defer r.Close()
		out := sparse(t)
		err = r.Stream("disk", func(from io.Reader) error { return ReadSparse(out, from, 100) })
		info, statErr := out.Stat()
		if statErr != nil || info.Size() > 100 || err == nil && info.Size() != 100 {
			t.Errorf("a file of %d bytes (%v) was made with %v", info.Size(), statErr, err)
		}
	})
}

// A stream whose reading would take much memory is refused.
func TestWindow(t *testing.T) {
	dir := t.TempDir()
	var z bytes.Buffer
	w, err := zstd.NewWriter(&z, zstd.WithWindowSize(2*maxWindow))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 * maxWindow >> 20 {
		if _, err := w.Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(z.Bytes())
	data, err := json.Marshal(manifest{Format: format, Content: json.RawMessage(`{}`), Files: []file{{Name: "a.zst", Size: int64(z.Len()), SHA256: hex.EncodeToString(sum[:])}}})
	if err != nil {
		t.Fatal(err)
	}
	forge(t, dir, data)
	if err := os.WriteFile(filepath.Join(dir, "a.zst"), z.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	r, _, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Stream("a", func(from io.Reader) error { _, err := io.Copy(io.Discard, from); return err }); !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		t.Errorf("a window of %d bytes: %v", 2*maxWindow, err)
	}
}
