package main

import (
	"fmt"
	"strings"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// selectorHelp says what --at takes.
const selectorHelp = `"latest", a position such as "1:4711", a time in RFC 3339, or "tag:NAME"`

// parseSelector reads what selectorHelp says.
func parseSelector(s string) (*farsidev1.Selector, error) {
	if s == "latest" {
		return &farsidev1.Selector{Point: &farsidev1.Selector_Latest{Latest: true}}, nil
	}
	if name, ok := strings.CutPrefix(s, "tag:"); ok && name != "" {
		return &farsidev1.Selector{Point: &farsidev1.Selector_Tag{Tag: name}}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return &farsidev1.Selector{Point: &farsidev1.Selector_TimeNs{TimeNs: t.UnixNano()}}, nil
	}
	if p, err := dr.ParsePosition(s); err == nil {
		return &farsidev1.Selector{Point: &farsidev1.Selector_Position{Position: &farsidev1.Position{
			Timeline: uint32(p.Timeline), Seq: uint64(p.Seq),
		}}}, nil
	}
	return nil, fmt.Errorf("point %q: want %s: %w", s, selectorHelp, dr.ErrInvalid)
}

func position(p *farsidev1.Position) dr.Position {
	return dr.Position{Timeline: dr.Timeline(p.GetTimeline()), Seq: dr.Seq(p.GetSeq())}
}
