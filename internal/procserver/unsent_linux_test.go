package procserver

import (
	"net"
	"testing"
	"time"
)

// A peer that does not read holds the writer up after little more than maxUnsent and
// the peer's own buffer; without the bound the kernel takes megabytes.
func TestLimitUnsent(t *testing.T) {
	accepts := func(limit bool) (n int) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		peer, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		if err := peer.(*net.TCPConn).SetReadBuffer(16 << 10); err != nil {
			t.Fatal(err)
		}
		if limit {
			limitUnsent(conn)
		}
		piece := make([]byte, 16<<10)
		for {
			if err := conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			k, err := conn.Write(piece)
			n += k
			if err != nil {
				return n
			}
		}
	}
	with, without := accepts(true), accepts(false)
	t.Logf("%d bytes with a bound, %d without", with, without)
	if with > maxUnsent+(256<<10) || without < 2*with {
		t.Errorf("%d bytes with a bound, %d without", with, without)
	}
}
