package powercut

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"farside/internal/vault"
	"farside/internal/vfs"
)

// TestVault: whenever the power goes, the master target's vault opens, is whole, and holds what it had called durable.
func TestVault(t *testing.T) {
	c := deploy(t, "master-target", false)
	c.tags(images(5))
	for _, err := range c.judge(images(30), c.vault) {
		t.Error(err)
	}
}

// TestVaultUnsynced: with a master target whose fsync does nothing the same judgement finds losses.
func TestVaultUnsynced(t *testing.T) {
	c := deploy(t, "master-target", true)
	c.tags(5)
	bad := c.judge(10, c.vault)
	if len(bad) == 0 {
		t.Fatal("nobody noticed that fsync does nothing")
	}
	t.Logf("%d of 10 power cuts are found to lose something, as %v", len(bad), bad[0])
}

// tags writes, and marks the moment n times; when a mark is durable all that was written before is.
func (c *cut) tags(n int) {
	c.t.Helper()
	for i := range n {
		c.write(20 + c.rng.IntN(100))
		done, name := len(c.written), fmt.Sprintf("tag %d", i)
		if _, err := c.stage.Far.Tag(c.t.Context(), name); err != nil {
			c.t.Fatal(err)
		}
		c.told(done, name)
	}
	c.write(200)
}

// vault judges a master target's directory as it does itself when it starts.
func (c *cut) vault(dir string, seen []ack) (err error) {
	// A process that another test starts holds the vault's lock until it has become its program.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	found, err := filepath.Glob(filepath.Join(dir, "vaults", "*", "MANIFEST"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("%d vaults: %w", len(found), errors.Join(err, errors.New("there must be one")))
	}
	at := filepath.Dir(found[0])
	if err := c.open(at, seen); err != nil {
		return err
	}
	r, err := vault.Check(c.t.Context(), vfs.OS(), at, func(int64, int64) {})
	if err != nil {
		return err
	}
	for _, f := range r.Findings {
		err = errors.Join(err, fmt.Errorf("check: %v", f))
	}
	return err
}

// open opens a vault and compares its newest state, and each tag that was acknowledged, with what was written.
func (c *cut) open(at string, seen []ack) (err error) {
	v, err := vault.Open(c.t.Context(), vfs.OS(), at, vault.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if lost := errors.Join(v.Lost()...); lost != nil {
		return lost
	}
	s, err := v.Newest()
	if err != nil {
		return err
	}
	n, err := c.holds(v, s)
	if err != nil {
		return fmt.Errorf("the newest state: %w", err)
	}
	if want := seen[len(seen)-1].writes; n < want {
		return fmt.Errorf("holds %d writes, %d were durable", n, want)
	}
	tags, err := v.Tags()
	if err != nil {
		return err
	}
	for _, a := range seen {
		i := slices.IndexFunc(tags, func(x vault.Tagged) bool { return x.Tag.Name == a.name })
		if i < 0 {
			return fmt.Errorf("%s was durable and is not there", a.name)
		}
		s, err := v.At(tags[i].Position)
		if err != nil {
			return err
		}
		if n, err := c.holds(v, s); err != nil || n != a.writes {
			return fmt.Errorf("%s holds %d writes, want %d: %w", a.name, n, a.writes, err)
		}
	}
	return nil
}

func (c *cut) holds(v *vault.Vault, s *vault.State) (uint64, error) {
	defer s.Close()
	disk := v.Disks()[0].ID
	return c.prefix(func(p []byte, off int64) error { return s.ReadAt(p, disk, off) })
}
