package main

import (
	"fmt"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
)

// backgroundInfo is the background comparison of a machine.
type backgroundInfo struct {
	Rate      int64      `json:"bytes_per_second"`
	Total     int64      `json:"total_bytes"`
	Done      int64      `json:"done_bytes"`
	Began     *time.Time `json:"began,omitempty"`
	Found     int64      `json:"found_blocks"`
	LastBegan *time.Time `json:"last_began,omitempty"`
	LastEnded *time.Time `json:"last_ended,omitempty"`
	LastFound int64      `json:"last_found_blocks"`
}

func describeBackground(b *farsidev1.BackgroundCompare) *backgroundInfo {
	if b == nil {
		return nil
	}
	return &backgroundInfo{
		Rate: b.GetBytesPerSecond(), Total: b.GetBytesTotal(), Done: b.GetBytesDone(), Began: timeOrNil(b.GetBeganNs()), Found: b.GetFound(),
		LastBegan: timeOrNil(b.GetLastBeganNs()), LastEnded: timeOrNil(b.GetLastEndedNs()), LastFound: b.GetLastFound(),
	}
}

func (b *backgroundInfo) human() string {
	if b.Rate == 0 {
		return "not in the background"
	}
	text := "no full pass yet"
	if b.LastEnded != nil {
		text = fmt.Sprintf("last full pass ended %s, %d blocks differed", b.LastEnded.Format(time.DateTime), b.LastFound)
	}
	if b.Began != nil && b.Total > 0 {
		text += fmt.Sprintf("; %d %% of the next, %d blocks differed", 100*b.Done/b.Total, b.Found)
	}
	return text + fmt.Sprintf("; %s/s", size(b.Rate))
}
