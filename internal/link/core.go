package link

import (
	"fmt"

	"farside/internal/dr"
	"farside/internal/frame"
)

// sender is the protocol of the sending side, without I/O. Its owner guards it.
type sender struct {
	machine   dr.MachineID
	streaming bool
	at        frame.Cursor // after the last frame sent
	ack       Ack
}

// receive takes a message of the receiver. It returns the welcome or the ack
// that it was, if any; the error ends the connection.
func (s *sender) receive(t msgType, body []byte) (welcome *frame.Cursor, acked bool, err error) {
	switch {
	case t == msgPing:
		return nil, false, nil
	case t == msgRefuse:
		r, err := parseRefuse(body)
		if err == nil {
			err = r
		}
		return nil, false, err
	case t == msgWelcome && !s.streaming:
		c, durable, err := parseWelcome(body)
		if err == nil && c.Machine != s.machine {
			err = fmt.Errorf("welcome for machine %v instead of %v: %w", c.Machine, s.machine, dr.ErrCorrupt)
		}
		if err != nil {
			return nil, false, err
		}
		s.streaming, s.at, s.ack = true, c, Ack{c.Position.Seq, durable}
		return &c, true, nil
	case t == msgAck && s.streaming:
		a, err := parseAck(body)
		switch {
		case err != nil:
			return nil, false, err
		case a.Stored < s.ack.Stored || a.Durable < s.ack.Durable || a.Stored > s.at.Position.Seq || a.Durable > s.at.Position.Seq:
			return nil, false, fmt.Errorf("ack %+v after %+v with %v sent: %w", a, s.ack, s.at.Position, dr.ErrCorrupt)
		}
		s.ack = a
		return nil, true, nil
	}
	return nil, false, fmt.Errorf("link message %d out of turn: %w", t, dr.ErrCorrupt)
}

// send notes that a frame is about to be sent.
func (s *sender) send(h *frame.Header) error {
	if !s.streaming {
		return fmt.Errorf("send before the welcome: %w", dr.ErrInvalid)
	}
	if err := h.Check(s.at); err != nil {
		return fmt.Errorf("source does not continue the receiver: %w", err)
	}
	s.at = h.End()
	return nil
}

// receiver is the protocol of the receiving side, without I/O.
type receiver struct {
	at frame.Cursor // after the last frame taken
}

// take verifies a frame. It returns nil for one that is there already; the
// error is a refusal.
func (r *receiver) take(body []byte) (*frame.Frame, error) {
	f, err := frame.Parse(body)
	if err != nil {
		return nil, err
	}
	if err := f.Verify(); err != nil {
		return nil, err
	}
	if err := f.Check(r.at); err != nil {
		if f.Machine == r.at.Machine && f.Timeline == r.at.Position.Timeline && f.Last <= r.at.Position.Seq {
			return nil, nil //nolint:nilnil // a repeated frame is neither an error nor a frame
		}
		return nil, err
	}
	r.at = f.End()
	return f, nil
}
