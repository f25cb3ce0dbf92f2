package agent

// Phase is what the stream of a machine is doing.
type Phase uint8

// The phases. Exact and Syncing alternate as overflows come and go.
const (
	Waiting Phase = iota // for the receiver to say where the stream stands
	Syncing              // the dirty set is being read and sent: no recovery points
	Exact                // every captured write is a recovery point
	Fenced               // another timeline is current: this machine stood down
)

// String returns the name of p.
func (p Phase) String() string {
	switch p {
	case Syncing:
		return "syncing"
	case Exact:
		return "exact"
	case Fenced:
		return "fenced"
	}
	return "waiting"
}

// Reason says why a stream had to sync.
type Reason string

// The reasons. They go into reports and events; don't change what they say.
const (
	ReasonInitial    Reason = "initial"            // the far side holds nothing of this machine
	ReasonRestart    Reason = "agent-restart"      // the agent was not running: anything may have been written
	ReasonReboot     Reason = "reboot"             // the machine was shut down and booted: nothing captured what was written late and early
	ReasonUnclean    Reason = "unclean-stop"       // the machine stopped without telling the agent, and was booted
	ReasonExchanged  Reason = "disk-replaced"      // another disk is there than the one that the agent before this one captured
	ReasonResized    Reason = "disk-resized"       // a disk has another size than when the agent before this one ended
	ReasonWritten    Reason = "disk-written"       // the agent was not running, and the kernel counted writes meanwhile
	ReasonUnknown    Reason = "unknown"            // nothing is known of an agent before this one
	ReasonReopened   Reason = "capture-restart"    // the capture was opened anew: disks or settings changed, or it failed
	ReasonDisks      Reason = "disks-changed"      // a disk was taken out, came back or is another one: the capture was opened anew
	ReasonOverflow   Reason = "overflow"           // changes came faster than they could be taken over
	ReasonGap        Reason = "receiver-gap"       // the receiver lost frames that were freed here
	ReasonAhead      Reason = "receiver-ahead"     // the receiver holds frames that this agent did not build
	ReasonMarked     Reason = "marked"             // something was marked dirty while the stream was exact
	ReasonScan       Reason = "scan"               // the source finds changes by comparing, pass by pass
	ReasonAccounting Reason = "accounting"         // the kernel wrote more than was captured
	ReasonMissed     Reason = "missed-events"      // the kernel did not run the capture for some writes
	ReasonBackground Reason = "background-compare" // blocks differed though nothing seemed to write them
	ReasonAsked      Reason = "asked"              // somebody asked for a comparison
)

// text says for people what r means.
func (r Reason) text() string {
	switch r {
	case ReasonInitial:
		return "initial replication"
	case ReasonRestart:
		return "the agent was not running"
	case ReasonReboot:
		return "the machine was booted again: writes after the agent's end and before its start were not captured"
	case ReasonUnclean:
		return "the machine stopped without warning and was booted again"
	case ReasonExchanged:
		return "another disk is where the captured one was"
	case ReasonResized:
		return "a disk has another size than when the agent ended"
	case ReasonWritten:
		return "the agent was not running, and something was written"
	case ReasonUnknown:
		return "nothing is known of an agent before this one"
	case ReasonReopened:
		return "the capture was opened anew"
	case ReasonDisks:
		return "a disk was taken out, came back or is another one"
	case ReasonOverflow:
		return "writes came faster than they could be taken over"
	case ReasonGap:
		return "the receiver lost frames that it had stored"
	case ReasonAhead:
		return "the receiver holds frames of another run of the agent"
	case ReasonBackground:
		return "the background comparison found blocks that differ from the copy"
	case ReasonMarked:
		return "ranges were marked to be read again"
	case ReasonAccounting:
		return "the kernel wrote more than was captured"
	case ReasonMissed:
		return "the kernel did not run the capture for some writes"
	case ReasonAsked:
		return "a comparison was asked for"
	case ReasonScan:
		return "scans look for changes"
	}
	return string(r)
}
