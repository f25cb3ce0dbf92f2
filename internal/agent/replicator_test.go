package agent

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

func drawOptions(t *rapid.T) simOptions {
	return simOptions{
		seed:      rapid.Uint64().Draw(t, "seed"),
		steps:     rapid.IntRange(10, 800).Draw(t, "steps"),
		disks:     rapid.IntRange(1, 3).Draw(t, "disks"),
		written:   rapid.SampledFrom([]int{3, 20, 1000}).Draw(t, "written"),
		room:      rapid.SampledFrom([]int64{40 << 10, 200 << 10, 8 << 20}).Draw(t, "room"),
		overflows: rapid.Bool().Draw(t, "overflows"),
		breaks:    rapid.Bool().Draw(t, "breaks"),
		losses:    rapid.Bool().Draw(t, "losses"),
		plain:     rapid.IntRange(0, 3).Draw(t, "plain") == 0,
		empty:     rapid.Bool().Draw(t, "empty"),
		marks:     rapid.Bool().Draw(t, "marks"),
		badReads:  rapid.IntRange(0, 3).Draw(t, "badReads") == 0,
		kills:     rapid.Bool().Draw(t, "kills"),
		reboots:   rapid.IntRange(0, 2).Draw(t, "reboots") == 0,
		gen:       rapid.SampledFrom([]int{0, 1, 2, 7}).Draw(t, "gen"),
	}
}

// Whatever the order of writes, landings, reads, overflows and losses of the
// receiver: every point that the stream offers is a state that the disks were
// in, and when all is quiet the far side holds what the disks hold.
func TestReplicatorAgainstOracle(t *testing.T) {
	folds, epochs := uint64(0), 0
	rapid.Check(t, func(t *rapid.T) {
		sim := newSim(drawOptions(t))
		if err := sim.run(); err != nil {
			t.Fatal(err)
		}
		folds += sim.rep.stats.folds
		epochs += sim.far.folded
	})
	t.Logf("%d folds, %d epochs whose end was a point", folds, epochs)
}

// So has the check of restarts: an agent that does not note what it takes of the dirty
// set loses it when it is killed.
func TestOracleFindsForgetfulReplicator(t *testing.T) {
	found := 0
	for seed := range uint64(60) {
		err := newSim(simOptions{seed: seed, steps: 800, disks: 2, written: 1000, room: 40 << 10, overflows: true, kills: true, forgetful: true}).run()
		if errors.Is(err, errMismatch) {
			found++
		} else if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	if found < 4 {
		t.Errorf("%d of 60 histories show the fault; want at least 4", found)
	}
	t.Logf("%d of 60 histories show the fault", found)
}

// An agent that goes on exactly behind any frame that it knows offers positions in
// the middle of a sync.
func TestOracleFindsRecklessReplicator(t *testing.T) {
	found := 0
	for seed := range uint64(60) {
		err := newSim(simOptions{seed: seed, steps: 800, disks: 2, written: 1000, room: 8 << 20, overflows: true, kills: true, reckless: true}).run()
		if errors.Is(err, errMismatch) {
			found++
		}
	}
	if found < 4 {
		t.Errorf("%d of 60 histories show the fault; want at least 4", found)
	}
	t.Logf("%d of 60 histories show the fault", found)
}

// The check above has power: a replicator that lets bulk reads overwrite newer
// captured writes is found out soon.
func TestOracleFindsBlindReplicator(t *testing.T) {
	found := 0
	for seed := range uint64(40) {
		err := newSim(simOptions{seed: seed, steps: 600, disks: 2, written: 1000, room: 8 << 20, blind: true}).run()
		if errors.Is(err, errMismatch) {
			found++
		} else if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	if found < 4 {
		t.Errorf("%d of 40 histories show the fault; want at least 4", found)
	}
	t.Logf("%d of 40 histories show the fault", found)
}
