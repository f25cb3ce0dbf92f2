package mastertarget

import (
	"fmt"
	"net"
	"path/filepath"
	"time"

	"farside/internal/dr"
	"farside/internal/rolefile"
)

// Config is the master target's configuration file. Which machines it keeps is
// not in it: the configuration server says that.
type Config struct {
	// Data is the directory of the identity.
	Data string `yaml:"data"`
	// Vaults is the directory of the replicated data. Default: vaults in Data.
	Vaults string `yaml:"vaults"`
	// Listen is host:port for the streams of process servers. Port 0 chooses one.
	Listen string `yaml:"listen"`
	// Advertise is host:port at which process servers reach Listen. Default: the
	// address listened on.
	Advertise string `yaml:"advertise"`
	// Cache bounds the memory for reading views and indexes; at least 16 MiB.
	// Default 256 MiB.
	Cache dr.Size `yaml:"cache"`
	// History is how far back a machine can be opened if its assignment does not
	// say. Default 24h.
	History time.Duration `yaml:"history"`
	// NBD says where views are exported.
	NBD NBDConfig `yaml:"nbd"`
	// Version is the program's, for reports; the program sets it.
	Version string `yaml:"-"`
}

// NBDConfig says where views are exported.
type NBDConfig struct {
	// Socket is a Unix socket for clients on this machine, in the clear. Default:
	// nbd.sock in Data.
	Socket string `yaml:"socket"`
	// Listen is host:port for clients with a certificate, over TLS. Empty: none.
	Listen string `yaml:"listen"`
	// Plaintext makes Listen speak in the clear, to everyone who reaches it: only
	// for a storage network that nobody else is on.
	Plaintext bool `yaml:"plaintext"`
	// Host stands in the URIs of Listen. Default: the host listened on.
	Host string `yaml:"host"`
}

const (
	minCache     = 16 << 20
	defaultCache = 256 << 20

	defaultHistory = 24 * time.Hour
	maxSocketPath  = 107 // bytes; what Linux allows
)

// LoadConfig reads the configuration file. Errors wrap dr.ErrInvalid or are those
// of reading the file.
func LoadConfig(path string) (Config, error) { return rolefile.Load(path, ParseConfig) }

// ParseConfig reads a configuration and fills the defaults in. Errors wrap
// dr.ErrInvalid.
func ParseConfig(b []byte) (Config, error) {
	c := Config{Cache: defaultCache, History: defaultHistory}
	if err := rolefile.Decode(b, &c); err != nil {
		return Config{}, err
	}
	if c.Vaults == "" {
		c.Vaults = filepath.Join(c.Data, "vaults")
	}
	if c.NBD.Socket == "" {
		c.NBD.Socket = filepath.Join(c.Data, "nbd.sock")
	}
	return c, c.check()
}

func (c *Config) check() error {
	if c.Data == "" {
		return fmt.Errorf("data: a directory is missing: %w", dr.ErrInvalid)
	}
	for _, a := range []struct {
		key, addr string
		optional  bool
	}{{"listen", c.Listen, false}, {"advertise", c.Advertise, true}, {"nbd.listen", c.NBD.Listen, true}} {
		if a.optional && a.addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(a.addr); err != nil {
			return fmt.Errorf("%s: want host:port, not %q: %w", a.key, a.addr, dr.ErrInvalid)
		}
	}
	if c.Cache < minCache {
		return fmt.Errorf("cache: %v is less than %v: %w", c.Cache, dr.Size(minCache), dr.ErrInvalid)
	}
	if c.History <= 0 {
		return fmt.Errorf("history: %v is no time: %w", c.History, dr.ErrInvalid)
	}
	if c.NBD.Plaintext && c.NBD.Listen == "" {
		return fmt.Errorf("nbd.plaintext: there is no nbd.listen that it could be about: %w", dr.ErrInvalid)
	}
	if len(c.NBD.Socket) > maxSocketPath {
		return fmt.Errorf("nbd.socket: %s is longer than the %d bytes that a socket's path may have: %w",
			c.NBD.Socket, maxSocketPath, dr.ErrInvalid)
	}
	return nil
}
