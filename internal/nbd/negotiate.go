package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	// maxOption is the longest option that is looked at: a name and a page
	// of queries fit well. Longer ones are skipped, up to maxSkip.
	maxOption = 64 << 10
	maxSkip   = 1 << 20
	// maxOptions ends a negotiation that leads nowhere.
	maxOptions = 256

	contextID = 1 // the number that base:allocation gets in replies
)

// haggle is the state of one negotiation.
type haggle struct {
	ss       *session
	noZeroes bool
	fixed    bool
	tls      bool

	structured bool
	// contextFor is the export for which base:allocation was chosen.
	contextFor *string
}

// negotiate runs the handshake until the client chose an export, which is
// then set in the session.
//
//	S: "NBDMAGIC" "IHAVEOPT" flags u16      C: flags u32
//	C: "IHAVEOPT" option u32 | length u32 | data
//	S: magic u64 | option u32 | reply u32 | length u32 | data
func (ss *session) negotiate() error {
	ss.readWithin(ss.srv.cfg.Handshake)
	_ = ss.raw.SetWriteDeadline(time.Now().Add(ss.srv.cfg.Handshake)) // an error shows in the write
	hello := binary.BigEndian.AppendUint64(nil, magicInit)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := ss.conn.Write(hello); err != nil {
		return fmt.Errorf("greet: %w", err)
	}
	var b [4]byte
	if _, err := io.ReadFull(ss.r, b[:]); err != nil {
		if err == io.EOF {
			return errDone // a port check
		}
		return fmt.Errorf("read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("negotiate: unknown client flags %#x", flags)
	}
	h := &haggle{ss: ss, noZeroes: flags&flagNoZeroes != 0, fixed: flags&flagFixedNewstyle != 0}
	for range maxOptions {
		chosen, err := h.option()
		if err != nil {
			return fmt.Errorf("negotiate: %w", err)
		}
		if chosen {
			_ = ss.raw.SetWriteDeadline(time.Time{}) // an error shows in the write
			return nil
		}
	}
	return errors.New("negotiate: too many options")
}

// option reads one option and answers it.
func (h *haggle) option() (chosen bool, err error) {
	var head [16]byte
	if _, err := io.ReadFull(h.ss.r, head[:]); err != nil {
		if err == io.EOF {
			return false, errDone
		}
		return false, fmt.Errorf("read option: %w", err)
	}
	opt, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
	if magic := binary.BigEndian.Uint64(head[:]); magic != magicOption {
		return false, fmt.Errorf("read option: bad magic %#x", magic)
	}
	if n > maxOption {
		return false, h.skip(opt, n)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(h.ss.r, data); err != nil {
		return false, fmt.Errorf("read option %d: %w", opt, err)
	}
	if opt == optExportName {
		return true, h.exportName(string(data))
	}
	if !h.fixed {
		return false, fmt.Errorf("option %d from a client that knows no replies", opt)
	}
	return h.answer(opt, data)
}

func (h *haggle) skip(opt, n uint32) error {
	if n > maxSkip || opt == optExportName || !h.fixed {
		return fmt.Errorf("option %d of %d bytes", opt, n)
	}
	if _, err := h.ss.r.Discard(int(n)); err != nil {
		return fmt.Errorf("skip option %d: %w", opt, err)
	}
	return h.reply(opt, repErrTooBig, nil)
}

func (h *haggle) answer(opt uint32, data []byte) (chosen bool, err error) {
	if opt == optAbort {
		_ = h.reply(opt, repAck, nil) // the client needs not wait for it
		return false, errDone
	}
	if h.ss.srv.cfg.Mode == TLSRequired && !h.tls && opt != optStartTLS {
		return false, h.refuse(opt, repErrTLSReqd, "TLS is required")
	}
	switch opt {
	case optStartTLS:
		return false, h.startTLS(data)
	case optList:
		return false, h.list(data)
	case optStructuredReply:
		if len(data) > 0 {
			return false, h.refuse(opt, repErrInvalid, "option with data")
		}
		h.structured = true
		return false, h.reply(opt, repAck, nil)
	case optListMeta, optSetMeta:
		return false, h.metaContext(opt, data)
	case optInfo, optGo:
		return h.info(opt, data)
	}
	return false, h.refuse(opt, repErrUnsup, "unknown option")
}

// reply sends one reply to an option.
func (h *haggle) reply(opt, typ uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := h.ss.conn.Write(append(b, data...)); err != nil {
		return fmt.Errorf("reply to option %d: %w", opt, err)
	}
	return nil
}

// refuse answers an option with an error that has a text for people.
func (h *haggle) refuse(opt, typ uint32, why string) error {
	return h.reply(opt, typ, []byte(why))
}

func (h *haggle) startTLS(data []byte) error {
	switch {
	case h.ss.srv.cfg.Mode == TLSOff:
		return h.refuse(optStartTLS, repErrPolicy, "this server has no TLS")
	case h.tls || len(data) > 0:
		return h.refuse(optStartTLS, repErrInvalid, "already in TLS, or option with data")
	}
	if err := h.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	if err := h.ss.startTLS(); err != nil {
		return err
	}
	// What was said in the clear may have been forged.
	*h = haggle{ss: h.ss, noZeroes: h.noZeroes, fixed: h.fixed, tls: true}
	return nil
}

func (h *haggle) list(data []byte) error {
	if len(data) > 0 {
		return h.refuse(optList, repErrInvalid, "option with data")
	}
	if h.ss.srv.cfg.List == nil {
		return h.refuse(optList, repErrPolicy, "exports are not listed here")
	}
	for _, name := range h.ss.srv.cfg.List() {
		if len(name) > MaxName {
			continue
		}
		b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		if err := h.reply(optList, repServer, append(b, name...)); err != nil {
			return err
		}
	}
	return h.reply(optList, repAck, nil)
}

// find looks an export up. The caller releases it unless it is used.
func (h *haggle) find(name string) (*Export, error) {
	if len(name) > MaxName {
		return nil, fmt.Errorf("export name of %d bytes: %w", len(name), EINVAL)
	}
	e, err := h.ss.srv.cfg.Lookup(name)
	if err != nil {
		return nil, err
	}
	if err = e.check(); err == nil && e.gone() {
		err = ErrUnknownExport
	}
	if err != nil {
		e.release()
		return nil, err
	}
	return e, nil
}

// use fixes the export for the transmission phase.
func (h *haggle) use(e *Export, name string) {
	ss := h.ss
	ss.export, ss.structured = e, h.structured
	ss.allocation = h.structured && h.contextFor != nil && *h.contextFor == name
	ss.size, ss.flags = uint64(e.Device.Size()), h.flags(e)
}

func (h *haggle) flags(e *Export) uint16 {
	f := e.flags()
	if h.structured {
		f |= txSendDF
	}
	return f
}

// exportName chooses an export the old way: there is no reply but size and
// flags, and no way to say no but to hang up.
func (h *haggle) exportName(name string) error {
	if h.ss.srv.cfg.Mode == TLSRequired && !h.tls {
		return errors.New("export chosen without the TLS that is required")
	}
	e, err := h.find(name)
	if err != nil {
		return fmt.Errorf("open export %q: %w", name, err)
	}
	h.use(e, name)
	b := binary.BigEndian.AppendUint64(nil, h.ss.size)
	b = binary.BigEndian.AppendUint16(b, h.ss.flags)
	if !h.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	if _, err := h.ss.conn.Write(b); err != nil {
		e.release()
		return fmt.Errorf("answer export name: %w", err)
	}
	return nil
}

// info answers INFO and GO:
//
//	name length u32 | name | count u16 | (information u16)...
func (h *haggle) info(opt uint32, data []byte) (chosen bool, err error) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return false, h.refuse(opt, repErrInvalid, "malformed option")
	}
	e, err := h.find(name)
	if err != nil {
		return false, h.refuse(opt, lookupReply(err), limitText(err.Error()))
	}
	if err = h.describe(opt, e, name, rest[2:]); err == nil {
		if opt == optGo {
			h.use(e, name)
		}
		err = h.reply(opt, repAck, nil)
	}
	if opt == optGo && err == nil {
		return true, nil
	}
	e.release()
	return false, err
}

func lookupReply(err error) uint32 {
	switch {
	case errors.Is(err, EPERM):
		return repErrPolicy
	case errors.Is(err, ESHUTDOWN):
		return repErrShutdown
	}
	return repErrUnknown
}

// describe sends what a client asked to know, and always the size. Block
// sizes go to everyone: those who can't use them ignore them.
func (h *haggle) describe(opt uint32, e *Export, name string, wanted []byte) error {
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Device.Size()))
	b = binary.BigEndian.AppendUint16(b, h.flags(e))
	if err := h.reply(opt, repInfo, b); err != nil {
		return err
	}
	lo, preferred, hi := e.blockSizes()
	b = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	b = binary.BigEndian.AppendUint32(b, lo)
	b = binary.BigEndian.AppendUint32(b, preferred)
	b = binary.BigEndian.AppendUint32(b, hi)
	if err := h.reply(opt, repInfo, b); err != nil {
		return err
	}
	for kind, text := range map[uint16]string{infoName: name, infoDescription: limitText(e.Description)} {
		if text == "" || !wants(wanted, kind) {
			continue
		}
		b = binary.BigEndian.AppendUint16(nil, kind)
		if err := h.reply(opt, repInfo, append(b, text...)); err != nil {
			return err
		}
	}
	return nil
}

func wants(wanted []byte, kind uint16) bool {
	for ; len(wanted) >= 2; wanted = wanted[2:] {
		if binary.BigEndian.Uint16(wanted) == kind {
			return true
		}
	}
	return false
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT:
//
//	name length u32 | name | count u32 | (query length u32 | query)...
func (h *haggle) metaContext(opt uint32, data []byte) error {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return h.refuse(opt, repErrInvalid, "malformed option")
	}
	count := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	match := count == 0 && opt == optListMeta
	for range count {
		var q string
		if q, rest, ok = cutString(rest); !ok {
			return h.refuse(opt, repErrInvalid, "malformed query")
		}
		match = match || q == contextAllocation || q == "base:" && opt == optListMeta
	}
	if len(rest) > 0 || opt == optSetMeta && !h.structured {
		return h.refuse(opt, repErrInvalid, "trailing data, or no structured replies")
	}
	if opt == optSetMeta {
		h.contextFor = nil
	}
	e, err := h.find(name)
	if err != nil {
		return h.refuse(opt, lookupReply(err), limitText(err.Error()))
	}
	e.release()
	if match {
		id := uint32(0)
		if opt == optSetMeta {
			id, h.contextFor = contextID, &name
		}
		b := binary.BigEndian.AppendUint32(nil, id)
		if err := h.reply(opt, repMetaContext, append(b, contextAllocation...)); err != nil {
			return err
		}
	}
	return h.reply(opt, repAck, nil)
}

// cutString takes a string with its length (u32) in front off b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return "", nil, false
	}
	return string(b[4 : 4+n]), b[4+n:], true
}

func limitText(s string) string { return s[:min(len(s), maxString)] }
