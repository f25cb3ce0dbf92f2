package confserver

import (
	"encoding/base64"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"

	farsidev1 "farside/internal/api/farside/v1"
)

// maxName is the longest name of a node, machine or view, in characters.
const maxName = 512

// checkName refuses what can't be shown or found again.
func checkName(what, s string) error {
	switch {
	case !utf8.ValidString(s):
		return fmt.Errorf("%s is not UTF-8: %w", what, dr.ErrInvalid)
	case utf8.RuneCountInString(s) > maxName:
		return fmt.Errorf("%s is longer than %d characters: %w", what, maxName, dr.ErrInvalid)
	case strings.ContainsFunc(s, unicode.IsControl):
		return fmt.Errorf("%s contains control characters: %w", what, dr.ErrInvalid)
	case strings.TrimSpace(s) != s:
		return fmt.Errorf("%s begins or ends with a space: %w", what, dr.ErrInvalid)
	}
	return nil
}

func roleNumber(role string) farsidev1.Role {
	switch role {
	case transport.RoleAgent:
		return farsidev1.Role_ROLE_AGENT
	case transport.RoleProcessServer:
		return farsidev1.Role_ROLE_PROCESS_SERVER
	case transport.RoleMasterTarget:
		return farsidev1.Role_ROLE_MASTER_TARGET
	case transport.RoleConfigServer:
		return farsidev1.Role_ROLE_CONFIG_SERVER
	case transport.RoleClient:
		return farsidev1.Role_ROLE_CLIENT
	}
	return farsidev1.Role_ROLE_UNSPECIFIED
}

// roleName is the opposite of roleNumber; "" for unspecified, an error for unknown.
func roleName(n farsidev1.Role) (string, error) {
	if n == farsidev1.Role_ROLE_UNSPECIFIED {
		return "", nil
	}
	for _, role := range transport.Roles() {
		if roleNumber(role) == n {
			return role, nil
		}
	}
	return "", fmt.Errorf("role %d: %w", n, dr.ErrInvalid)
}

func codecNumber(name string) farsidev1.Codec {
	return farsidev1.Codec(farsidev1.Codec_value["CODEC_"+strings.ToUpper(name)])
}

// codecName is the opposite of codecNumber; "" for unspecified.
func codecName(c farsidev1.Codec) (string, error) {
	name, ok := farsidev1.Codec_name[int32(c)]
	if !ok {
		return "", fmt.Errorf("codec %d: %w", c, dr.ErrInvalid)
	}
	if c == farsidev1.Codec_CODEC_UNSPECIFIED {
		return "", nil
	}
	return strings.ToLower(strings.TrimPrefix(name, "CODEC_")), nil
}

func settingsOf(m catalog.Machine) *farsidev1.AgentSettings {
	return &farsidev1.AgentSettings{
		Codec: codecNumber(m.Codec), RingBytes: m.RingBytes, MemoryBytes: m.MemoryBytes, CaptureDriver: m.CaptureDriver,
		Points: pointsOf(m.Points),
	}
}

// pointsOf returns nil for a schedule that says nothing.
func pointsOf(p catalog.PointSchedule) *farsidev1.PointSchedule {
	if p == (catalog.PointSchedule{}) {
		return nil
	}
	return &farsidev1.PointSchedule{
		FilesystemEveryMs: &p.FileSystemEvery, ApplicationEveryMs: &p.ApplicationEvery, FreezeLimitMs: &p.FreezeLimit,
	}
}

// The bounds of a point schedule.
const (
	minPointInterval = 10 * time.Second
	maxPointInterval = 30 * 24 * time.Hour
	minFreezeLimit   = 100 * time.Millisecond
	maxFreezeLimit   = time.Minute
)

// applyPoints changes those fields of a machine's schedule that s has.
func applyPoints(m *catalog.Machine, s *farsidev1.PointSchedule) error {
	if s == nil {
		return nil
	}
	for _, f := range []struct {
		what        string
		to          *int64
		from        *int64
		least, most time.Duration
	}{
		{"interval of file-system points", &m.Points.FileSystemEvery, s.FilesystemEveryMs, minPointInterval, maxPointInterval},
		{"interval of application points", &m.Points.ApplicationEvery, s.ApplicationEveryMs, minPointInterval, maxPointInterval},
		{"limit of a freeze", &m.Points.FreezeLimit, s.FreezeLimitMs, minFreezeLimit, maxFreezeLimit},
	} {
		if f.from == nil {
			continue
		}
		if ms := *f.from; ms != 0 && (ms < f.least.Milliseconds() || ms > f.most.Milliseconds()) {
			return fmt.Errorf("%s of %d ms: want 0, or %s to %s: %w", f.what, ms, f.least, f.most, dr.ErrInvalid)
		}
		*f.to = *f.from
	}
	return nil
}

// apply changes a machine's settings to what was asked for.
func applySettings(m *catalog.Machine, s *farsidev1.AgentSettings) error {
	if s == nil {
		return nil
	}
	codec, err := codecName(s.GetCodec())
	if err != nil {
		return err
	}
	if s.GetRingBytes() < 0 || s.GetMemoryBytes() < 0 || len(s.GetCaptureDriver()) > 64 {
		return fmt.Errorf("settings of the agent out of range: %w", dr.ErrInvalid)
	}
	m.Codec, m.RingBytes, m.MemoryBytes, m.CaptureDriver = codec, s.GetRingBytes(), s.GetMemoryBytes(), s.GetCaptureDriver()
	return nil
}

func positionMessage(p dr.Position) *farsidev1.Position {
	return &farsidev1.Position{Timeline: uint32(p.Timeline), Seq: uint64(p.Seq)}
}

func positionOf(p *farsidev1.Position) dr.Position {
	return dr.Position{Timeline: dr.Timeline(p.GetTimeline()), Seq: dr.Seq(p.GetSeq())}
}

func selectorMessage(s catalog.Selector) *farsidev1.Selector {
	switch s.Kind {
	case catalog.SelectPosition:
		return &farsidev1.Selector{Point: &farsidev1.Selector_Position{Position: positionMessage(s.Position)}}
	case catalog.SelectTime:
		return &farsidev1.Selector{Point: &farsidev1.Selector_TimeNs{TimeNs: s.Time}}
	case catalog.SelectTag:
		return &farsidev1.Selector{Point: &farsidev1.Selector_Tag{Tag: s.Tag}}
	}
	return &farsidev1.Selector{Point: &farsidev1.Selector_Latest{Latest: true}}
}

func selectorOf(m *farsidev1.Selector) (catalog.Selector, error) {
	switch p := m.GetPoint().(type) {
	case nil, *farsidev1.Selector_Latest:
		return catalog.Selector{Kind: catalog.SelectLatest}, nil
	case *farsidev1.Selector_Position:
		if p.Position.GetTimeline() == 0 {
			return catalog.Selector{}, fmt.Errorf("position without timeline: %w", dr.ErrInvalid)
		}
		return catalog.Selector{Kind: catalog.SelectPosition, Position: positionOf(p.Position)}, nil
	case *farsidev1.Selector_TimeNs:
		if p.TimeNs <= 0 {
			return catalog.Selector{}, fmt.Errorf("time %d: %w", p.TimeNs, dr.ErrInvalid)
		}
		return catalog.Selector{Kind: catalog.SelectTime, Time: p.TimeNs}, nil
	case *farsidev1.Selector_Tag:
		if p.Tag == "" {
			return catalog.Selector{}, fmt.Errorf("tag without name: %w", dr.ErrInvalid)
		}
		return catalog.Selector{Kind: catalog.SelectTag, Tag: p.Tag}, checkName("name of tag", p.Tag)
	}
	return catalog.Selector{}, fmt.Errorf("selector: %w", dr.ErrInvalid)
}

// defaultPage and maxPage bound how many rows a listing returns at a time.
const (
	defaultPage = 1000
	maxPage     = 10_000
)

// page returns the limit and start of a listing.
func page(size int32, token string) (int, catalog.Cursor, error) {
	var after catalog.Cursor
	if token != "" {
		b, err := base64.RawURLEncoding.DecodeString(token)
		name, id, ok := strings.Cut(string(b), "\x00")
		if err != nil || !ok {
			return 0, after, fmt.Errorf("page token: %w", dr.ErrInvalid)
		}
		after = catalog.Cursor{Name: name, ID: id}
	}
	switch {
	case size < 0:
		return 0, after, fmt.Errorf("page size %d: %w", size, dr.ErrInvalid)
	case size == 0:
		return defaultPage, after, nil
	}
	return min(int(size), maxPage), after, nil
}

func pageToken(c catalog.Cursor) string {
	return base64.RawURLEncoding.EncodeToString([]byte(c.Name + "\x00" + c.ID))
}
