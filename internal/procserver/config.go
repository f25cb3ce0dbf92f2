package procserver

import (
	"fmt"
	"net"
	"path/filepath"

	"farside/internal/dr"
	"farside/internal/rolefile"
)

// Config is the process server's configuration file. Which machines it serves
// is not in it: the configuration server says that.
type Config struct {
	// Data is the directory of identity and spool.
	Data string `yaml:"data"`
	// Listen is host:port for the streams of agents. Port 0 chooses one.
	Listen string `yaml:"listen"`
	// Advertise is host:port at which agents reach Listen. Default: the address
	// listened on; needed when that is all addresses.
	Advertise string `yaml:"advertise"`
	// Spool is the directory of the frames on their way. Default: spool in Data.
	Spool string `yaml:"spool"`
	// SpoolLimit bounds the spool of each machine; at least 256 MiB. Default 8 GiB.
	SpoolLimit dr.Size `yaml:"spool_limit"`
	// SpoolTotal bounds all spools together. Default: no bound but SpoolReserve.
	SpoolTotal dr.Size `yaml:"spool_total"`
	// SpoolReserve is what stays free on the disk of the spool. Default: a
	// twentieth of the disk, at most 1 GiB; 0 keeps nothing free.
	SpoolReserve *dr.Size `yaml:"spool_reserve"`
	// Version is the program's, for reports; the program sets it.
	Version string `yaml:"-"`
}

const (
	minSpoolLimit     = 256 << 20
	defaultSpoolLimit = 8 << 30
)

// LoadConfig reads the configuration file. Errors wrap dr.ErrInvalid or are those
// of reading the file.
func LoadConfig(path string) (Config, error) { return rolefile.Load(path, ParseConfig) }

// ParseConfig reads a configuration and fills the defaults in. Errors wrap
// dr.ErrInvalid.
func ParseConfig(b []byte) (Config, error) {
	c := Config{SpoolLimit: defaultSpoolLimit}
	if err := rolefile.Decode(b, &c); err != nil {
		return Config{}, err
	}
	if c.Spool == "" {
		c.Spool = filepath.Join(c.Data, "spool")
	}
	return c, c.check()
}

func (c *Config) check() error {
	if c.Data == "" {
		return fmt.Errorf("data: a directory is missing: %w", dr.ErrInvalid)
	}
	for key, addr := range map[string]string{"listen": c.Listen, "advertise": c.Advertise} {
		if key == "advertise" && addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("%s: want host:port, not %q: %w", key, addr, dr.ErrInvalid)
		}
	}
	if host, _, _ := net.SplitHostPort(c.Listen); c.Advertise == "" && (host == "" || net.ParseIP(host).IsUnspecified()) {
		return fmt.Errorf("advertise: needed, because listen is on all addresses: %w", dr.ErrInvalid)
	}
	if c.SpoolLimit < minSpoolLimit {
		return fmt.Errorf("spool_limit: %v is less than %v: %w", c.SpoolLimit, dr.Size(minSpoolLimit), dr.ErrInvalid)
	}
	if c.SpoolTotal != 0 && c.SpoolTotal < minSpoolLimit {
		return fmt.Errorf("spool_total: %v is less than %v: %w", c.SpoolTotal, dr.Size(minSpoolLimit), dr.ErrInvalid)
	}
	return nil
}

// reserve returns the bytes to be kept free on a disk of so many.
func (c *Config) reserve(disk int64) int64 {
	if c.SpoolReserve != nil {
		return int64(*c.SpoolReserve)
	}
	return min(disk/20, 1<<30)
}
