package guest

import (
	"errors"
	"io/fs"
	"os"
)

// enterSubmounts makes the kernel mount what virtiofs announces at these paths. One that is gone on the node is no error:
// the container will not find it either.
func enterSubmounts(paths []string) error {
	var errs []error
	for _, path := range paths {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = f.Close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
