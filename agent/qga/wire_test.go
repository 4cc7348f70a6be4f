package qga

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReaderSynced(t *testing.T) {
	for name, stream := range map[string]string{
		"plain":                   "\xff{\"return\": 7}\n",
		"stale answers":           "{\"return\": {}}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"x\"}}\n\xff{\"return\": 7}\n",
		"stale sync":              "\xff{\"return\": 6}\n\xff{\"return\": 7}\n",
		"cut stale answer":        "{\"return\": \"abc\xff{\"return\": 7}\n",
		"cut stale sync":          "\xff{\"retu\xff{\"return\": 7}\n",
		"stale sync of no number": "\xff{\"return\": {}}\n\xff[]\n\xff\n\xff{\"return\": null}\n\xff{\"return\": 7}\n",
		"noise":                   "\x00\x01\xfe\n\n\n\xff\xff\xff{\"return\": 7}\n",
		"long noise":              strings.Repeat("x", 2*maxMessage) + "\xff" + strings.Repeat("y", 2*maxMessage) + "\xff{\"return\": 7}\n",
	} {
		t.Run(name, func(t *testing.T) {
			r := newReader(iotest.HalfReader(strings.NewReader(stream + "{\"return\": \"next\"}\n")))
			if err := r.synced(7); err != nil {
				t.Fatal(err)
			}
			a, err := r.answer(100)
			if err != nil || string(a.Return) != `"next"` {
				t.Errorf("then %s, %v", a.Return, err)
			}
		})
	}
	if err := newReader(strings.NewReader("\xff{\"return\": 8}\n")).synced(7); !errors.Is(err, io.EOF) {
		t.Errorf("without the answer: %v", err)
	}
}

func TestReaderAnswer(t *testing.T) {
	for _, test := range []struct {
		stream string
		want   error
	}{
		{`{"return": {}}` + "\n", nil},
		{`{"error": {"class": "a", "desc": "b"}}` + "\r\n", nil},
		{`{"return": null}` + "\n", errMalformed},
		{`{}` + "\n", errMalformed},
		{"\n", errMalformed},
		{`{"return": 1, "error": {}}` + "\n", errMalformed},
		{"[]\n", errMalformed},
		{"{\"return\": \"\xff\"}\n", errMalformed},
		{"\xff{\"return\": 7}\n\xff{\"return\": 8}\n{\"return\": {}}\n", nil},
		{strings.Repeat("[", 2000) + "\n", errMalformed},
		{strings.Repeat(" ", 3000) + "\n", errTooLong},
		{`{"return": {}}`, io.EOF},
	} {
		if _, err := newReader(strings.NewReader(test.stream)).answer(2000); !errors.Is(err, test.want) {
			t.Errorf("answer of %.40q: %v, want %v", test.stream, err, test.want)
		}
	}
}

// A hostile guest sends anything: no panic, and never more memory than the bounds.
func FuzzReader(f *testing.F) {
	f.Add([]byte("\xff{\"return\": 7}\n{\"return\": {}}\n"), uint8(3))
	f.Add([]byte("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"frozen\"}}\n\xff{}\xff\n"), uint8(1))
	f.Add([]byte("\xff{\"return\": 7e0}\n{\"return\": [[[[[[1]]]]]]}\n{\"return\": {\"pid\": -1}}\n"), uint8(255))
	f.Fuzz(func(t *testing.T, data []byte, chunk uint8) {
		r := newReader(&chunks{data, int(chunk)%64 + 1})
		if r.synced(7) == nil && !bytes.ContainsRune(data, '7') {
			t.Error("synchronised without the number")
		}
		r = newReader(&chunks{data, int(chunk)%64 + 1})
		for {
			a, err := r.answer(1000)
			if errors.Is(err, io.EOF) || errors.Is(err, errTooLong) {
				return
			}
			if err != nil {
				continue
			}
			if a.Error != nil {
				if e := commandError("x", a.Error.Class, a.Error.Desc); len(e.Error()) > 3000 {
					t.Errorf("an error of %d bytes", len(e.Error()))
				}
			}
		}
	})
}

// chunks reads n bytes at a time.
type chunks struct {
	data []byte
	n    int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(c.n, len(p))], c.data)
	c.data = c.data[n:]
	return n, nil
}
