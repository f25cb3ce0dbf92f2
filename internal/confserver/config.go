package confserver

import (
	"fmt"
	"net"
	"time"

	"farside/internal/dr"
	"farside/internal/rolefile"
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

// LoadConfig reads the configuration file. Errors wrap dr.ErrInvalid or are those
// of reading the file.
func LoadConfig(path string) (Config, error) { return rolefile.Load(path, ParseConfig) }

// ParseConfig reads the text of a configuration file. Keys that it does not know
// are refused. Errors wrap dr.ErrInvalid.
func ParseConfig(text []byte) (Config, error) {
	var c Config
	if err := rolefile.Decode(text, &c); err != nil {
		return Config{}, err
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
