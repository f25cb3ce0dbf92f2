package dr

import (
	"fmt"
	"strconv"
	"strings"
)

// Size is a number of bytes, written as 4096, 64KiB, 64MiB, 1GiB or 2TiB.
type Size int64

var sizeUnits = [...]string{"KiB", "MiB", "GiB", "TiB"}

// UnmarshalText implements encoding.TextUnmarshaler. Errors wrap ErrInvalid.
func (s *Size) UnmarshalText(text []byte) error {
	digits, shift := strings.TrimSpace(string(text)), 0
	for i, unit := range sizeUnits {
		if d, ok := strings.CutSuffix(digits, unit); ok {
			digits, shift = strings.TrimSpace(d), 10*(i+1)
			break
		}
	}
	v, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || v < 0 || v > 1<<62>>shift {
		return fmt.Errorf("parse size %q: want a number of bytes, or with KiB, MiB, GiB, TiB: %w", text, ErrInvalid)
	}
	*s = Size(v << shift)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String returns the shortest exact form.
func (s Size) String() string {
	unit := ""
	for _, u := range sizeUnits {
		if s == 0 || s%1024 != 0 {
			break
		}
		s, unit = s/1024, u
	}
	return strconv.FormatInt(int64(s), 10) + unit
}
