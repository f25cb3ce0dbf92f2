package control

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestKeeper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &keeper{failed: func(string, error) { t.Error("nobody was to be told") }}
		k.close() // nothing was ever written
		var order []int
		for i := range 5 {
			if err := k.keep("a", func() error { order = append(order, i); return nil }); err != nil {
				t.Fatal(err)
			}
		}
		if bad := errors.New("no space left"); !errors.Is(k.keep("a", func() error { return bad }), bad) {
			t.Error("the error is lost")
		}
		if k.close(); !slices.Equal(order, []int{0, 1, 2, 3, 4}) {
			t.Errorf("written %v", order)
		}
	})
}

// TestKeeperOnFrozenDisk: nobody waits longer than the grace; what comes behind a write that
// hangs is written later, the newest of each name only.
func TestKeeperOnFrozenDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var told, written []string
		k := &keeper{failed: func(name string, err error) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, name+": "+err.Error())
		}}
		thawed := make(chan struct{})
		put := func(name, value string, err error) {
			before := time.Now()
			got := k.keep(name, func() error {
				<-thawed
				mu.Lock()
				defer mu.Unlock()
				written = append(written, value)
				return err
			})
			if got != nil || time.Since(before) != keepGrace {
				t.Errorf("%s: %v after %s", value, got, time.Since(before))
			}
		}
		put("a", "a1", nil)
		put("a", "a2", nil)
		put("b", "b1", errors.New("full"))
		put("a", "a3", nil)
		began := time.Now()
		if k.close(); time.Since(began) != closeGrace {
			t.Errorf("the end waited %s", time.Since(began))
		}
		close(thawed)
		k.close()
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(written)
		if !slices.Equal(written, []string{"a1", "a3", "b1"}) || !slices.Equal(told, []string{"b: full"}) {
			t.Errorf("written %v, told %v", written, told)
		}
	})
}
