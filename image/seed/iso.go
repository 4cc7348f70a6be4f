package seed

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
)

const (
	sector = 2048
	// Where the volume descriptors begin, and in each of them its four times (ECMA-119, 8.4.26 to 8.4.29).
	firstDescriptor, descriptorTimes, timeLength = 16, 813, 17
)

// fixedTime stands for all times of the disk.
var fixedTime = time.Date(2000, time.January, 1, 0, 0, 0, 0, time.UTC)

// WriteISO writes the disk: ISO 9660 with Joliet, which has the long names that cloud-init looks for. The same seed gives the same bytes. The
// file has mode 0600, since there are secrets in it, and replaces one that is there only when it is whole.
func (s *Seed) WriteISO(path string) error {
	if s.Label == "" {
		return fmt.Errorf("write %s: the seed has no files, it is for Ignition: %w", path, errdefs.ErrFailedPrecondition)
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".seed-")
	if err != nil {
		return fmt.Errorf("write the seed: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := s.build(dir); err != nil {
		return fmt.Errorf("write the seed %s: %w", path, err)
	}
	if err := os.Rename(filepath.Join(dir, "iso"), path); err != nil {
		return fmt.Errorf("write the seed: %w", err)
	}
	return nil
}

// build makes dir/iso from a tree in dir/tree.
func (s *Seed) build(dir string) error {
	tree := filepath.Join(dir, "tree")
	if err := s.writeTree(tree); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, "iso"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	iso, err := iso9660.Create(file.New(f, false), 0, 0, sector, tree)
	if err != nil {
		return err
	}
	if err := iso.Finalize(iso9660.FinalizeOptions{Joliet: true, VolumeIdentifier: s.Label}); err != nil {
		return err
	}
	if err := fixDescriptors(f); err != nil {
		return err
	}
	return f.Close()
}

func (s *Seed) writeTree(tree string) error {
	for _, name := range slices.Sorted(maps.Keys(s.Files)) {
		path := filepath.Join(tree, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, s.Files[name], 0o600); err != nil {
			return err
		}
	}
	return filepath.WalkDir(tree, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, fixedTime, fixedTime)
	})
}

// What is needed of the structures of ECMA-119: offsets in a volume descriptor (8.4) and in a directory record (9.1).
const (
	descriptorPrimary, descriptorSupplementary, descriptorEnd = 1, 2, 255
	volumeName, volumeSize, tableSize, tableLocation          = 40, 80, 132, 140
	recordLocation, recordSize, recordFlags, recordName       = 2, 10, 25, 32
)

// fixDescriptors mends what the library writes: in all volume descriptors the times, which it takes from the clock, and the padding of the label; the file's
// end; and Joliet's directories.
func fixDescriptors(f *os.File) error {
	made := append([]byte(fixedTime.Format("20060102150405")+"00"), 0)
	never := append([]byte("0000000000000000"), 0)
	tables := map[byte][]uint32{}
	for n := int64(firstDescriptor); ; n++ {
		d := make([]byte, sector)
		if _, err := f.ReadAt(d, n*sector); err != nil {
			return err
		}
		kind := d[0]
		if kind == descriptorEnd {
			return fixDirectories(f, tables[descriptorPrimary], tables[descriptorSupplementary])
		}
		if err := f.Truncate(int64(binary.LittleEndian.Uint32(d[volumeSize:])) * sector); err != nil {
			return err
		}
		for i := volumeName; i < volumeName+32; i += 2 { // padded with spaces, which in Joliet have two bytes
			switch {
			case d[i] == 0 && d[i+1] == 0 && kind == descriptorSupplementary:
				d[i+1] = ' '
			case kind == descriptorPrimary:
				copy(d[i:], bytes.ReplaceAll(d[i:i+2], []byte{0}, []byte{' '}))
			}
		}
		for i, text := range [][]byte{made, made, never, never} {
			copy(d[descriptorTimes+i*timeLength:], text)
		}
		if _, err := f.WriteAt(d, n*sector); err != nil {
			return err
		}
		table := make([]byte, binary.LittleEndian.Uint32(d[tableSize:]))
		if _, err := f.ReadAt(table, int64(binary.LittleEndian.Uint32(d[tableLocation:]))*sector); err != nil {
			return err
		}
		tables[kind] = pathTable(table)
	}
}

// pathTable lists where the directories are (ECMA-119, 9.4).
func pathTable(table []byte) []uint32 {
	var locations []uint32
	for len(table) >= 8 {
		locations = append(locations, binary.LittleEndian.Uint32(table[2:]))
		table = table[min(len(table), 8+int(table[0])+int(table[0])%2):]
	}
	return locations
}

// fixDirectories has Joliet's directories lead to Joliet's, not to those of plain ISO 9660 as go-diskfs 1.9 writes them. Both path tables have the same directories in the
// same order.
func fixDirectories(f *os.File, plain, joliet []uint32) error {
	if len(plain) != len(joliet) || len(joliet) == 0 {
		return fmt.Errorf("%d directories in ISO 9660, %d in Joliet", len(plain), len(joliet))
	}
	for _, location := range joliet {
		dir := make([]byte, sector) // the few names there are fit into one
		if _, err := f.ReadAt(dir, int64(location)*sector); err != nil {
			return err
		}
		for at := 0; at < sector && dir[at] != 0; at += int(dir[at]) {
			record := dir[at:]
			special := record[recordName] == 1 && record[recordName+1] <= 1 // the directory itself and its parent
			if record[recordFlags]&2 == 0 || special {
				continue
			}
			i := slices.Index(plain, binary.LittleEndian.Uint32(record[recordLocation:]))
			if i < 0 {
				continue // right already
			}
			child := make([]byte, recordName)
			if _, err := f.ReadAt(child, int64(joliet[i])*sector); err != nil {
				return err
			}
			copy(record[recordLocation:recordSize+8], child[recordLocation:])
		}
		if _, err := f.WriteAt(dir, int64(location)*sector); err != nil {
			return err
		}
	}
	return nil
}
