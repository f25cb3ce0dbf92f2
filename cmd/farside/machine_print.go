package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// machineInfo is a machine as --json prints it.
type machineInfo struct {
	ID            string          `json:"id"`
	Name          string          `json:"name"`
	Node          string          `json:"node"`
	State         string          `json:"state"`
	Reason        string          `json:"reason,omitempty"`
	RPO           *rpoInfo        `json:"rpo_ms,omitempty"`
	Disks         []diskInfo      `json:"disks"`
	Discovered    []discovered    `json:"discovered,omitempty"`
	Progress      *progressInfo   `json:"progress,omitempty"`
	Background    *backgroundInfo `json:"background_compare,omitempty"`
	Counters      countersInfo    `json:"counters"`
	Capture       string          `json:"capture,omitempty"` // driver
	Mode          string          `json:"mode,omitempty"`    // of the driver
	ProcessServer string          `json:"process_server,omitempty"`
	MasterTarget  string          `json:"master_target,omitempty"`
	Newest        *pointInfo      `json:"newest,omitempty"`
	Head          *dr.Position    `json:"head,omitempty"`
	HeadTime      *time.Time      `json:"head_time,omitempty"`
	Horizon       *dr.Position    `json:"horizon,omitempty"`
	HorizonTime   *time.Time      `json:"horizon_time,omitempty"`
	History       int64           `json:"history_s,omitempty"`
	Points        *scheduleInfo   `json:"points,omitempty"`
	Used          int64           `json:"used_bytes"`
	Backlog       int64           `json:"backlog_bytes"`
	Stream        *streamInfo     `json:"stream,omitempty"` // at the process server
	LastSeen      time.Time       `json:"last_seen"`
	Warnings      []notice        `json:"warnings,omitempty"`
	Events        []notice        `json:"events,omitempty"`
}

// scheduleInfo says how often points are made, in milliseconds; 0 = never, and for the limit the default.
type scheduleInfo struct {
	FileSystem  int64 `json:"filesystem_every_ms"`
	Application int64 `json:"application_every_ms"`
	Limit       int64 `json:"freeze_limit_ms"`
}

func (s *scheduleInfo) human() string {
	var all []string
	for _, p := range []struct {
		kind string
		ms   int64
	}{{"filesystem", s.FileSystem}, {"application", s.Application}} {
		if p.ms > 0 {
			all = append(all, fmt.Sprintf("%s every %s", p.kind, time.Duration(p.ms)*time.Millisecond))
		}
	}
	return cmp.Or(strings.Join(all, ", "), "none on a schedule")
}

type rpoInfo struct {
	Now int64 `json:"now"`
	P50 int64 `json:"p50"`
	P99 int64 `json:"p99"`
	Max int64 `json:"max"`
}

type diskInfo struct {
	ID    uint32 `json:"id"`
	Path  string `json:"path"`
	Size  int64  `json:"size"`
	State string `json:"state,omitempty"`
	Error string `json:"error,omitempty"`
	Lag   int64  `json:"lag_ms"`
	Dirty int64  `json:"dirty_bytes"`
}

// streamInfo is how the way to the master target keeps up.
type streamInfo struct {
	Behind      bool   `json:"behind"` // the link has been slower than the changes
	Backlog     int64  `json:"backlog_bytes"`
	BacklogAge  int64  `json:"backlog_age_ms"`
	Compression string `json:"compression"`
	LinkRate    int64  `json:"link_bytes_per_second"`
	Folds       int64  `json:"folds"`
	FoldBefore  int64  `json:"fold_bytes_before"`
	FoldAfter   int64  `json:"fold_bytes_after"`
}

type discovered struct {
	Path        string   `json:"path"`
	Size        int64    `json:"size"`
	Kind        string   `json:"kind"`
	Mounts      []string `json:"mountpoints,omitempty"`
	Protectable bool     `json:"protectable"`
	Reason      string   `json:"reason,omitempty"`
	Identity    string   `json:"identity,omitempty"`
	Notes       []string `json:"notes,omitempty"`
}

type progressInfo struct {
	Done    int64     `json:"done_bytes"`
	Total   int64     `json:"total_bytes"`
	Started time.Time `json:"started"`
	Reason  string    `json:"reason"`
}

type countersInfo struct {
	Writes    int64 `json:"writes"`
	Bytes     int64 `json:"bytes"`
	Sent      int64 `json:"sent_bytes"`
	Overflows int64 `json:"overflows"`
	Resyncs   int64 `json:"resyncs"`
	Missed    int64 `json:"missed"`
	Read      int64 `json:"read_bytes"` // of the disks, for the first copy and syncs
}

type pointInfo struct {
	Position dr.Position `json:"position"`
	Time     time.Time   `json:"time"`
	Accuracy string      `json:"accuracy"`
}

func describeMachine(m *farsidev1.Machine) machineInfo {
	n := m.GetCounters()
	info := machineInfo{
		ID: m.GetId(), Name: m.GetName(), Node: m.GetNodeId(),
		State: lowerName(m.GetState(), "MACHINE_STATE_"), Reason: m.GetReason(),
		Counters: countersInfo{
			Writes: n.GetWrites(), Bytes: n.GetBytesCaptured(), Sent: n.GetBytesSent(),
			Overflows: n.GetOverflows(), Resyncs: n.GetResyncs(), Missed: n.GetMissed(), Read: n.GetBytesRead(),
		},
		Capture: m.GetCapture().GetDriver(), Mode: m.GetCapture().GetMode(),
		ProcessServer: m.GetProcessServerId(), MasterTarget: m.GetMasterTargetId(),
		Head: positionOrNil(m.GetHead()), HeadTime: timeOrNil(m.GetHeadTimeNs()),
		Horizon: positionOrNil(m.GetHorizon()), HorizonTime: timeOrNil(m.GetHorizonTimeNs()),
		History: m.GetHistoryWindowSeconds(), Used: m.GetUsedBytes(), Backlog: m.GetStream().GetBacklogBytes(),
		LastSeen: utc(m.GetLastSeenNs()), Warnings: notices(m.GetWarnings()), Events: notices(m.GetEvents()),
		Disks: describeDisks(m), Discovered: describeDiscovered(m), Newest: describePoint(m.GetNewest()),
	}
	if r := m.GetRpo(); r.GetKnown() {
		info.RPO = &rpoInfo{Now: r.GetNowMs(), P50: r.GetP50Ms(), P99: r.GetP99Ms(), Max: r.GetMaxMs()}
	}
	if s := m.GetStream(); s != nil {
		info.Stream = &streamInfo{
			Behind: s.GetBehind(), Backlog: s.GetBacklogBytes(), BacklogAge: s.GetBacklogAgeMs(), Compression: s.GetCompression(),
			LinkRate: s.GetLinkBytesPerSecond(), Folds: s.GetFolds(), FoldBefore: s.GetFoldBytesBefore(), FoldAfter: s.GetFoldBytesAfter(),
		}
	}
	if p := m.GetSettings().GetPoints(); p != nil {
		info.Points = &scheduleInfo{p.GetFilesystemEveryMs(), p.GetApplicationEveryMs(), p.GetFreezeLimitMs()}
	}
	info.Background = describeBackground(m.GetBackground())
	if p := m.GetProgress(); p != nil {
		info.Progress = &progressInfo{Done: p.GetBytesDone(), Total: p.GetBytesTotal(), Started: utc(p.GetStartedNs()), Reason: p.GetReason()}
	}
	return info
}

func describeDisks(m *farsidev1.Machine) []diskInfo {
	list := []diskInfo{}
	for _, d := range m.GetDisks() {
		list = append(list, diskInfo{
			ID: d.GetId(), Path: d.GetPath(), Size: d.GetSize(), State: d.GetState(), Error: d.GetError(),
			Lag: d.GetLagMs(), Dirty: d.GetDirtyBytes(),
		})
	}
	return list
}

func describeDiscovered(m *farsidev1.Machine) []discovered {
	var list []discovered
	for _, d := range m.GetDiscovered() {
		list = append(list, discovered{
			Path: d.GetPath(), Size: d.GetSize(), Kind: d.GetKind(), Mounts: d.GetMountpoints(),
			Protectable: d.GetProtectable(), Reason: d.GetReason(), Identity: d.GetIdentity(), Notes: d.GetNotes(),
		})
	}
	return list
}

func describePoint(p *farsidev1.Point) *pointInfo {
	if p == nil {
		return nil
	}
	return &pointInfo{Position: position(p.GetPosition()), Time: utc(p.GetTimeNs()), Accuracy: lowerName(p.GetAccuracy(), "ACCURACY_")}
}

func positionOrNil(p *farsidev1.Position) *dr.Position {
	if p == nil {
		return nil
	}
	at := position(p)
	return &at
}

func timeOrNil(ns int64) *time.Time {
	if ns == 0 {
		return nil
	}
	t := utc(ns)
	return &t
}

func printMachines(w io.Writer, list []machineInfo) {
	table(w, "NAME\tSTATE\tRPO\tDISKS\tNEWEST POINT\tID", func(row func(string, ...any)) {
		for _, m := range list {
			row("%s\t%s\t%s\t%d\t%s\t%s", m.Name, m.State, m.rpoText(), len(m.Disks), m.newestText(), m.ID)
		}
	})
}

func (m *machineInfo) rpoText() string {
	if m.RPO == nil {
		return "-"
	}
	return (time.Duration(m.RPO.Now) * time.Millisecond).String()
}

func (m *machineInfo) newestText() string {
	if m.Newest == nil {
		return "-"
	}
	return fmt.Sprintf("%v at %s", m.Newest.Position, m.Newest.Time.Format(time.RFC3339Nano))
}

// human tells how the link keeps up.
func (s *streamInfo) human() string {
	text := fmt.Sprintf("keeps up, %s on the way, by %s", size(s.Backlog), s.Compression)
	if s.Behind {
		text = fmt.Sprintf("slower than the changes: %s wait, the oldest for %v; %s a second, by %s",
			size(s.Backlog), (time.Duration(s.BacklogAge) * time.Millisecond).Round(time.Second), size(s.LinkRate), s.Compression)
	}
	if s.Folds > 0 && s.FoldAfter > 0 {
		text += fmt.Sprintf("; folded %s to %s", size(s.FoldBefore), size(s.FoldAfter))
	}
	return text
}

// human shows one machine.
func (m *machineInfo) human(w io.Writer) {
	table(w, m.Name+"\t"+m.ID, func(row func(string, ...any)) {
		state := m.State
		if m.Reason != "" {
			state += ": " + m.Reason
		}
		row("state\t%s", state)
		if p := m.Progress; p != nil && p.Total > 0 {
			row("progress\t%s of %s (%d %%), %s", size(p.Done), size(p.Total), 100*p.Done/p.Total, p.Reason)
		}
		if m.RPO != nil {
			row("RPO\t%d ms now, half the time at most %d ms, 99 %% at most %d ms", m.RPO.Now, m.RPO.P50, m.RPO.P99)
		}
		if m.Stream != nil {
			row("link\t%s", m.Stream.human())
		}
		row("newest point\t%s", m.newestText())
		if m.Horizon != nil && m.HorizonTime != nil {
			row("oldest point\t%v at %s", *m.Horizon, m.HorizonTime.Format(time.RFC3339Nano))
		}
		if b := m.Background; b != nil {
			row("compared\t%s", b.human())
		}
		row("captured\t%d writes, %s, by %s %s", m.Counters.Writes, size(m.Counters.Bytes), m.Capture, m.Mode)
		if m.Points != nil {
			row("points\t%s", m.Points.human())
		}
		row("history\t%s, holds %s", time.Duration(m.History)*time.Second, size(m.Used))
	})
	for _, d := range m.Disks {
		fmt.Fprintf(w, "disk %d  %s  %s  %s %s\n", d.ID, d.Path, size(d.Size), d.State, d.Error)
	}
	for _, d := range m.Discovered {
		what := "can be protected"
		if !d.Protectable {
			what = d.Reason
		}
		fmt.Fprintf(w, "seen  %s  %s  %s  %s  %s\n", d.Path, size(d.Size), d.Kind, strings.Join(d.Mounts, " "), what)
		for _, n := range d.Notes {
			fmt.Fprintf(w, "      %s\n", n)
		}
	}
	printNotices(w, m.Warnings)
	printNotices(w, m.Events)
}

func printNotices(w io.Writer, list []notice) {
	for _, n := range list {
		fmt.Fprintf(w, "%s  %s  %s: %s\n", n.Time.Format(time.DateTime), n.Severity, n.Code, n.Text)
	}
}

// size writes bytes in binary units.
func size(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), -1
	for f >= 1024 && unit < 4 {
		f /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTP"[unit])
}
