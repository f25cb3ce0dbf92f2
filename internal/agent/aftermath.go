package agent

import (
	"fmt"
	"strings"

	"farside/internal/blockdev"
)

// aftermath is what an agent can tell of the time before it.
type aftermath struct {
	reason Reason
	text   string // for people
}

// explain tells it from what the agent before left, nil if that is unknown, and from what there is now: the rows of
// docs/agent.md ("What an agent leaves"). The gravest reason is the one that counts, the text has all. It decides nothing: whatever is not
// known to be equal is compared.
func explain(last *left, boot string, m *blockdev.Machine, written func(path string) (uint64, bool)) aftermath {
	if last == nil || last.Boot == "" || boot == "" {
		return aftermath{ReasonUnknown, "nothing is known of an agent before this one"}
	}
	same := last.Boot == boot
	out := aftermath{}
	switch {
	case same && last.Ended:
		out = aftermath{ReasonRestart, "the agent before this one was stopped in order"}
	case same:
		out = aftermath{ReasonRestart, "the agent before this one was killed, or crashed; the machine ran on"}
	case last.Ended:
		out = aftermath{ReasonReboot, "the machine was shut down in order, and booted"}
	default:
		out = aftermath{ReasonUnclean, "the machine stopped without warning, and was booted"}
	}
	if len(m.Devices) == 0 {
		return out // a system that does not tell
	}
	var all []string
	for _, d := range last.Disks {
		reason, text := d.now(m, same, written)
		if text != "" {
			all = append(all, text)
		}
		if graver(reason) > graver(out.reason) {
			out.reason = reason
		}
	}
	if len(all) > 0 {
		out.text += "; " + strings.Join(all, "; ")
	}
	return out
}

// graver orders the reasons: of several the highest is the one that is told.
func graver(r Reason) int {
	switch r {
	case ReasonExchanged:
		return 4
	case ReasonResized:
		return 3
	case ReasonReboot, ReasonUnclean:
		return 2
	case ReasonWritten:
		return 1
	}
	return 0
}

// now says what became of a disk since: what is not known to have changed gives no reason.
func (d *leftDisk) now(m *blockdev.Machine, sameBoot bool, written func(path string) (uint64, bool)) (Reason, string) {
	at, ok := d.find(m)
	switch {
	case !ok:
		return "", "" // a file, a guest's disk, or one that is missing: the watch of the disks says so
	case d.Identity != "" && at.Stable() != "" && at.Stable() != d.Identity:
		return ReasonExchanged, fmt.Sprintf("%s is another disk (%s, not %s)", d.Path, at.Stable(), d.Identity)
	case sameBoot && d.Seq != 0 && at.DiskSeq != 0 && at.DiskSeq != d.Seq:
		return ReasonExchanged, fmt.Sprintf("%s was taken out and came anew", at.Path)
	case d.Size != 0 && at.Size != d.Size:
		return ReasonResized, fmt.Sprintf("%s has %d bytes, it had %d", at.Path, at.Size, d.Size)
	case !sameBoot || d.Written == nil:
		return "", ""
	}
	n, ok := written(at.Path)
	switch {
	case !ok || n < *d.Written:
		return "", fmt.Sprintf("what was written to %s meanwhile is not known", at.Path)
	case n == *d.Written:
		return "", fmt.Sprintf("nothing was written to %s meanwhile", at.Path)
	}
	return ReasonWritten, fmt.Sprintf("%d bytes (%d sectors) were written to %s meanwhile", n-*d.Written, (n-*d.Written)/512, at.Path)
}

// find returns the device where the disk is now: by its identity, else by its path.
func (d *leftDisk) find(m *blockdev.Machine) (blockdev.Device, bool) {
	if d.Identity != "" {
		for i := range m.Devices {
			if m.Devices[i].Stable() == d.Identity {
				return m.Devices[i], true
			}
		}
	}
	return m.Find(canonical(d.Path))
}
