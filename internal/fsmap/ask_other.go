//go:build !linux

package fsmap

import (
	"fmt"

	"farside/internal/dr"
	"farside/internal/extent"
)

// ask can ask nothing here.
func ask(v *volume) ([]extent.Range, error) {
	return nil, fmt.Errorf("ask %s what is free: needs Linux: %w", v.Device, dr.ErrUnsupported)
}
