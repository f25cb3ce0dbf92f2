package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"farside/internal/dr"
)

// maxLine is the longest message of QMP that is taken, in bytes.
const maxLine = 16 << 20

// greetTimeout is how long QEMU may take to greet. A monitor serves one client at a time,
// so a second one waits for ever.
const greetTimeout = 5 * time.Second

// Monitor is a connection to the QMP monitor of a QEMU. Make it with DialMonitor.
// It is safe for concurrent use.
type Monitor struct {
	conn   net.Conn
	events func(Event)
	done   chan struct{} // closed when the connection has ended

	mu struct {
		sync.Mutex
		next    uint64
		waiting map[uint64]chan answer
		err     error
	}
}

// Event is something that QEMU tells without being asked.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// CommandError is QEMU's answer to a command that it could not do.
type CommandError struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *CommandError) Error() string { return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc) }

// message is anything that QEMU sends.
type message struct {
	Event
	Greeting json.RawMessage `json:"QMP"`
	ID       *uint64         `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *CommandError   `json:"error"`
}

type answer struct {
	value json.RawMessage
	err   *CommandError
}

// DialMonitor connects to the monitor behind a Unix socket and waits until it takes
// commands. events is called for each event, by one goroutine, and must not run
// commands; it may be nil. Errors wrap dr.ErrUnavailable.
func DialMonitor(ctx context.Context, socket string, events func(Event)) (*Monitor, error) {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("dial qemu: %w", errors.Join(err, dr.ErrUnavailable))
	}
	m, err := newMonitor(ctx, conn, events)
	if err != nil {
		return nil, fmt.Errorf("greet qemu at %s: %w", socket, err)
	}
	return m, nil
}

// newMonitor greets; it owns conn from then on.
func newMonitor(ctx context.Context, conn net.Conn, events func(Event)) (*Monitor, error) {
	if events == nil {
		events = func(Event) {}
	}
	m := &Monitor{conn: conn, events: events, done: make(chan struct{})}
	m.mu.waiting = make(map[uint64]chan answer)
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)
	if err := m.greet(ctx, lines); err != nil {
		conn.Close()
		return nil, errors.Join(err, dr.ErrUnavailable)
	}
	go m.read(lines) // until Close, which waits for done
	if err := m.Run(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (m *Monitor) greet(ctx context.Context, lines *bufio.Scanner) error {
	deadline, _ := ctx.Deadline() // none is the zero time: for ever
	if err := m.conn.SetReadDeadline(deadline); err != nil {
		return err
	}
	if !lines.Scan() {
		if err := lines.Err(); err != nil {
			return fmt.Errorf("no greeting (a monitor serves one client at a time): %w", err)
		}
		return errors.New("no greeting: connection closed")
	}
	var g message
	if err := json.Unmarshal(lines.Bytes(), &g); err != nil || g.Greeting == nil {
		return errors.New("this is no QMP monitor")
	}
	return m.conn.SetReadDeadline(time.Time{})
}

// read takes messages until the connection ends.
func (m *Monitor) read(lines *bufio.Scanner) {
	defer close(m.done)
	var err error
	for err == nil && lines.Scan() {
		var msg message
		if err = json.Unmarshal(lines.Bytes(), &msg); err == nil {
			m.take(&msg)
		}
	}
	if err == nil {
		err = lines.Err()
	}
	if err == nil {
		err = errors.New("connection closed")
	}
	m.conn.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.err = fmt.Errorf("qemu monitor: %w", errors.Join(err, dr.ErrUnavailable))
	for _, w := range m.mu.waiting {
		close(w)
	}
	m.mu.waiting = nil
}

func (m *Monitor) take(msg *message) {
	if msg.Name != "" {
		m.events(msg.Event)
		return
	}
	if msg.ID == nil {
		return // nothing that was asked for
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if w := m.mu.waiting[*msg.ID]; w != nil {
		delete(m.mu.waiting, *msg.ID)
		w <- answer{msg.Return, msg.Error} // has room for one
	}
}

// Run runs a command. What it returns goes to out unless that is nil. Errors are a
// *CommandError or wrap dr.ErrUnavailable.
func (m *Monitor) Run(ctx context.Context, command string, args, out any) error {
	id, reply, err := m.ask(ctx, command, args)
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case a, ok := <-reply:
		switch {
		case !ok:
			return fmt.Errorf("qmp %s: %w", command, m.Err())
		case a.err != nil:
			a.err.Command = command
			return a.err
		case out == nil:
			return nil
		}
		if err := json.Unmarshal(a.value, out); err != nil {
			return fmt.Errorf("qmp %s: read answer: %w", command, err)
		}
		return nil
	case <-ctx.Done():
		m.mu.Lock()
		delete(m.mu.waiting, id)
		m.mu.Unlock()
		return fmt.Errorf("qmp %s: %w", command, errors.Join(ctx.Err(), dr.ErrUnavailable))
	}
}

// ask sends a command and returns where its answer will come. The channel is closed if the
// connection ends before.
func (m *Monitor) ask(ctx context.Context, command string, args any) (uint64, <-chan answer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.err != nil {
		return 0, nil, m.mu.err
	}
	m.mu.next++
	id, reply := m.mu.next, make(chan answer, 1)
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return 0, nil, err
	}
	if d, ok := ctx.Deadline(); ok {
		_ = m.conn.SetWriteDeadline(d) // an error shows in the write
	} else {
		_ = m.conn.SetWriteDeadline(time.Time{})
	}
	if _, err := m.conn.Write(append(b, '\n')); err != nil {
		m.conn.Close() // half a command may be there: nothing can follow it
		return 0, nil, errors.Join(err, dr.ErrUnavailable)
	}
	m.mu.waiting[id] = reply
	return id, reply, nil
}

// Done is closed when the connection has ended.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// Err says why the connection ended; nil while it stands. It wraps dr.ErrUnavailable.
func (m *Monitor) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.err
}

// Close ends the connection.
func (m *Monitor) Close() error {
	err := m.conn.Close()
	<-m.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
