package nbd

import (
	"net"
	"testing"

	"farside/internal/nbd/nbdtest"
)

// TestJudges lets the tools of others judge the server, over everything that
// it can be reached by.
func TestJudges(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	const size = 64 << 20
	certs := nbdtest.NewCerts(t)
	disk := func() *Export {
		d := newTestDevice(size)
		d.multi = true
		return &Export{Device: d, MinBlock: 512, Description: "the disk of a judge"}
	}
	old := newTestDevice(size)
	copy(old.data[unit:], noise(1, size/2))
	for u := range old.hole[:size/unit/2+1] {
		old.hole[u] = u == 0
	}
	for name, test := range map[string]struct {
		network string
		conf    Config
		export  *Export
		opts    nbdtest.Options
	}{
		"unix":      {"unix", Config{List: func() []string { return []string{"x"} }}, disk(), nbdtest.Options{Listed: true, MinBlock: 512}},
		"plain":     {"tcp", Config{}, &Export{Device: plain{newTestDevice(size)}}, nbdtest.Options{}},
		"tls":       {"tcp", Config{TLS: certs.Server, Mode: TLSRequired}, disk(), nbdtest.Options{CertDir: certs.Dir, MinBlock: 512}},
		"tls unix":  {"unix", Config{TLS: certs.Server, Mode: TLSAllowed}, disk(), nbdtest.Options{CertDir: certs.Dir, MinBlock: 512}},
		"read-only": {"unix", Config{}, &Export{Device: old, ReadOnly: true}, nbdtest.Options{ReadOnly: true}},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, test.conf, map[string]*Export{"x": test.export})
			u := URI{Network: "unix", Address: s.path, Name: "x", TLS: test.opts.CertDir != ""}
			if test.network == "tcp" {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				go s.Serve(l) // ends with s
				u.Network, u.Address = "tcp", l.Addr().String()
			}
			nbdtest.Judge(t, u.String(), size, test.opts)
			for _, err := range s.logged() {
				t.Errorf("the server says: %v", err)
			}
		})
	}
}
