// Package rolefile reads the configuration file of a role: one YAML document,
// strictly. Keys that nobody knows, keys that stand twice and a second document
// are errors, so that a slip of the pen is not silently a default.
//
// It has no types of its own and knows no role: each role owns its Config, fills
// its defaults in and checks it. Safe for concurrent use.
package rolefile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"go.yaml.in/yaml/v3"

	"farside/internal/dr"
)

// Load reads the file at path and gives its text to parse. Errors are those of
// parse, with the path, or of reading the file.
func Load[C any](path string, parse func(text []byte) (C, error)) (c C, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if c, err = parse(text); err != nil {
		return c, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// Decode reads text into c, a pointer to a struct that holds the defaults. An
// empty text changes nothing. Errors wrap dr.ErrInvalid.
func Decode(text []byte, c any) error {
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(c); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%w: %w", dr.ErrInvalid, err)
	}
	if err := d.Decode(new(any)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("more than one YAML document: %w", dr.ErrInvalid)
	}
	return nil
}
