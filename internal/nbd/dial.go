package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// maxOptReply is the longest reply to an option that a client takes.
const maxOptReply = 64 << 10

// Dial connects to the export that a URI names. conf is needed for the nbds
// schemes only; without a ServerName in it, the host of the URI is expected.
// ctx bounds the handshake, not the life of the client.
func Dial(ctx context.Context, uri string, conf *tls.Config) (*Client, error) {
	h, u, err := dial(ctx, uri, conf)
	if err != nil {
		return nil, err
	}
	return h.open(ctx, u.Name)
}

// NewClient negotiates for the export name over a connection that is there
// already. It owns c from then on, also when it fails.
func NewClient(ctx context.Context, c net.Conn, name string) (*Client, error) {
	h := &helloer{conn: c, r: bufio.NewReaderSize(c, readAhead)}
	if err := h.within(ctx, h.greet); err != nil {
		c.Close()
		return nil, err
	}
	return h.open(ctx, name)
}

// List asks the server of a URI for the names of its exports; the URI's own
// name is ignored. A server may refuse.
func List(ctx context.Context, uri string, conf *tls.Config) ([]string, error) {
	h, _, err := dial(ctx, uri, conf)
	if err != nil {
		return nil, err
	}
	defer h.conn.Close()
	var names []string
	err = h.within(ctx, func() error {
		return h.ask(optList, nil, func(typ uint32, data []byte) error {
			name, _, ok := cutString(data)
			if typ != repServer || !ok || len(names) >= 1<<16 {
				return errors.New("malformed list")
			}
			names = append(names, name)
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list exports: %w", err)
	}
	return names, nil
}

func dial(ctx context.Context, uri string, conf *tls.Config) (*helloer, URI, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, u, err
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, u.Network, u.Address)
	if err != nil {
		return nil, u, fmt.Errorf("dial %s: %w", uri, err)
	}
	h := &helloer{conn: c, r: bufio.NewReaderSize(c, readAhead)}
	err = h.within(ctx, func() error {
		if err := h.greet(); err != nil || !u.TLS {
			return err
		}
		return h.startTLS(ctx, u, conf)
	})
	if err != nil {
		c.Close()
		return nil, u, fmt.Errorf("dial %s: %w", uri, err)
	}
	return h, u, nil
}

// helloer is the client's side of a negotiation.
type helloer struct {
	conn net.Conn
	r    *bufio.Reader
}

// within runs f so that the end of ctx interrupts it.
func (h *helloer) within(ctx context.Context, f func() error) error {
	conn := h.conn
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetDeadline(longAgo) // an error shows in f
		close(done)
	})
	err := f()
	if !stop() {
		<-done
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// greet reads the greeting and answers it.
func (h *helloer) greet() error {
	var b [18]byte
	if _, err := io.ReadFull(h.r, b[:]); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	be := binary.BigEndian
	flags := be.Uint16(b[16:])
	if be.Uint64(b[:]) != magicInit || be.Uint64(b[8:]) != magicOption || flags&flagFixedNewstyle == 0 {
		return errors.New("read greeting: not an NBD server that negotiates")
	}
	answer := uint32(flags) & (flagFixedNewstyle | flagNoZeroes)
	_, err := h.conn.Write(be.AppendUint32(nil, answer))
	return err
}

func (h *helloer) startTLS(ctx context.Context, u URI, conf *tls.Config) error {
	if conf == nil {
		return errors.New("start TLS: no configuration")
	}
	if err := h.ask(optStartTLS, nil, nil); err != nil {
		return fmt.Errorf("start TLS: %w", err)
	}
	if h.r.Buffered() > 0 {
		return errors.New("start TLS: data before the handshake")
	}
	if conf.ServerName == "" && !conf.InsecureSkipVerify {
		conf = conf.Clone()
		conf.ServerName = "localhost"
		if host, _, err := net.SplitHostPort(u.Address); err == nil && u.Network == "tcp" {
			conf.ServerName = host
		}
	}
	t := tls.Client(h.conn, conf)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("start TLS: %w", err)
	}
	h.conn, h.r = t, bufio.NewReaderSize(t, readAhead)
	return nil
}

// errOption is an option that the server refused.
type errOption struct {
	typ  uint32
	text string
}

func (e *errOption) Error() string {
	return fmt.Sprintf("refused by the server (reply %#x): %q", e.typ, e.text)
}

// Is tells the unknown export from other refusals.
func (e *errOption) Is(target error) bool {
	return e.typ == repErrUnknown && target == ErrUnknownExport
}

// ask sends an option and gives each reply before the acknowledgement to fn.
// Without fn there must be none.
func (h *helloer) ask(opt uint32, data []byte, fn func(typ uint32, data []byte) error) error {
	be := binary.BigEndian
	b := be.AppendUint64(nil, magicOption)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, uint32(len(data)))
	if _, err := h.conn.Write(append(b, data...)); err != nil {
		return err
	}
	for range 1 << 17 {
		typ, data, err := h.reply(opt)
		switch {
		case err != nil:
			return err
		case typ == repAck:
			return nil
		case typ&repErr != 0:
			return &errOption{typ, string(data)}
		case fn == nil:
			return fmt.Errorf("unexpected reply %d to option %d", typ, opt)
		}
		if err := fn(typ, data); err != nil {
			return err
		}
	}
	return fmt.Errorf("too many replies to option %d", opt)
}

func (h *helloer) reply(opt uint32) (typ uint32, data []byte, err error) {
	var b [20]byte
	if _, err := io.ReadFull(h.r, b[:]); err != nil {
		return 0, nil, fmt.Errorf("read reply: %w", err)
	}
	be := binary.BigEndian
	n := be.Uint32(b[16:])
	if be.Uint64(b[:]) != magicOptReply || be.Uint32(b[8:]) != opt || n > maxOptReply {
		return 0, nil, fmt.Errorf("read reply to option %d: malformed", opt)
	}
	data = make([]byte, n)
	if _, err = io.ReadFull(h.r, data); err != nil {
		return 0, nil, fmt.Errorf("read reply: %w", err)
	}
	return be.Uint32(b[12:]), data, nil
}

// open chooses the export and makes the client.
func (h *helloer) open(ctx context.Context, name string) (*Client, error) {
	c := &Client{conn: h.conn, r: h.r, maxBlock: MaxRequest, minBlock: 1}
	err := h.within(ctx, func() error { return h.choose(c, name) })
	if err != nil {
		h.conn.Close()
		return nil, fmt.Errorf("open export %q: %w", name, err)
	}
	_ = h.conn.SetDeadline(time.Time{}) // an error shows in the first call
	c.start()
	return c, nil
}

func (h *helloer) choose(c *Client, name string) error {
	var refused *errOption
	err := h.ask(optStructuredReply, nil, nil)
	if err != nil && !errors.As(err, &refused) {
		return err
	}
	be := binary.BigEndian
	named := append(be.AppendUint32(nil, uint32(len(name))), name...)
	if c.structured = err == nil; c.structured {
		q := append(be.AppendUint32(named[:len(named):len(named)], 1), 0, 0, 0, byte(len(contextAllocation)))
		err = h.ask(optSetMeta, append(q, contextAllocation...), c.takeContext)
		if err != nil && !errors.As(err, &refused) {
			return err
		}
	}
	known := false
	err = h.ask(optGo, append(named, 0, 1, 0, infoBlockSize), func(typ uint32, data []byte) error {
		if typ != repInfo || len(data) < 2 {
			return errors.New("malformed information")
		}
		known = known || be.Uint16(data) == infoExport
		return c.takeInfo(data)
	})
	if err == nil && !known {
		err = errors.New("server did not tell the size")
	}
	return err
}
