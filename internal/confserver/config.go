package confserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"go.yaml.in/yaml/v3"

	"farside/internal/dr"
)

// Config is the YAML file of a configuration server.
type Config struct {
	// DataDir holds the catalog, the CA and admin.json.
	DataDir string `yaml:"data"`
	// Listen is where nodes and people are served, host:port.
	Listen string `yaml:"listen"`
	// Advertise lists where they find it, host:port, in the order to try. It may be
	// left out if Listen names one address.
	Advertise []string `yaml:"advertise"`
	// ReportEvery is how often nodes report; 2s if it is left out.
	ReportEvery time.Duration `yaml:"report_every"`
}

const (
	defaultReportEvery = 2 * time.Second
	leastReportEvery   = 100 * time.Millisecond
)

// LoadConfig reads a configuration file.
func LoadConfig(name string) (Config, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return Config{}, fmt.Errorf("load configuration: %w", err)
	}
	c, err := ParseConfig(text)
	if err != nil {
		return Config{}, fmt.Errorf("load configuration %s: %w", name, err)
	}
	return c, nil
}

// ParseConfig reads the text of a configuration file. Keys that it does not know
// are refused. Errors wrap dr.ErrInvalid.
func ParseConfig(text []byte) (Config, error) {
	var c Config
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		return Config{}, fmt.Errorf("%w: %w", dr.ErrInvalid, err)
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return Config{}, fmt.Errorf("more than one YAML document: %w", dr.ErrInvalid)
	}
	return c, c.check()
}

func (c Config) check() error {
	if c.DataDir == "" {
		return fmt.Errorf("data is missing: %w", dr.ErrInvalid)
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil || port == "" {
		return fmt.Errorf("listen %q: want host:port: %w", c.Listen, dr.ErrInvalid)
	}
	if ip := net.ParseIP(host); len(c.Advertise) == 0 && (host == "" || ip != nil && ip.IsUnspecified()) {
		return fmt.Errorf("advertise is missing: listen %q does not say how to reach this server: %w", c.Listen, dr.ErrInvalid)
	}
	for _, a := range c.Advertise {
		host, port, err := net.SplitHostPort(a)
		if err != nil || host == "" || port == "" || len(a) > 255 {
			return fmt.Errorf("advertise %q: want host:port: %w", a, dr.ErrInvalid)
		}
	}
	if len(c.Advertise) > 15 {
		return fmt.Errorf("advertise lists %d addresses, at most 15: %w", len(c.Advertise), dr.ErrInvalid)
	}
	if c.ReportEvery != 0 && c.ReportEvery < leastReportEvery {
		return fmt.Errorf("report_every %s is less than %s: %w", c.ReportEvery, leastReportEvery, dr.ErrInvalid)
	}
	return nil
}
