package vault

import (
	"context"
	"errors"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"farside/internal/dr"
	"farside/internal/vfs"
)

// filled makes a closed vault with a folded part, several segments, a branch
// and tags.
func filled(t *testing.T, seed uint64) *model {
	t.Helper()
	m := newModel(t, seed)
	for range 12 {
		m.append(t, 5)
		m.sync(t)
	}
	m.stepUntilBranch(t)
	if _, err := m.v.FoldTo(context.Background(), m.src.now/2+5e8); err != nil {
		t.Fatal(err)
	}
	m.branch.b.Close()
	m.close(t)
	return m
}

// stepUntilBranch makes a branch at the newest point.
func (m *model) stepUntilBranch(t fataler) {
	for seq := m.synced; m.branch == nil && seq > 0; seq-- {
		m.stepBranch(t, seq)
	}
	m.stepBranch(t, 0)
}

func walk(t *testing.T, fsys vfs.FS, dir string) (files []string) {
	t.Helper()
	names, err := fsys.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		full := path.Join(dir, n)
		info, err := fsys.Stat(full)
		if err != nil {
			t.Fatal(err)
		}
		if info.Dir {
			files = append(files, walk(t, fsys, full)...)
		} else if info.Size > 0 {
			files = append(files, full)
		}
	}
	return files
}

func mustCheck(t *testing.T, fsys vfs.FS) *Report {
	t.Helper()
	r, err := Check(context.Background(), fsys, "/vaults/m", nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// flip inverts a bit of a file and returns how to undo it.
func flip(t *testing.T, fsys vfs.FS, name string, off int64, bit byte) {
	t.Helper()
	f, err := fsys.OpenFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	err = readFull(f, b, off)
	if err == nil {
		b[0] ^= bit
		_, err = f.WriteAt(b, off)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestCheckFlips flips single bits in every file outside the index: each must
// be found, in that file.
func TestCheckFlips(t *testing.T) {
	t.Parallel()
	m := filled(t, 1)
	if r := mustCheck(t, m.mem); r.Findings != nil || r.Segments < 3 || r.Keys == 0 {
		t.Fatalf("report of a whole vault: %+v", r)
	}
	rng := rand.New(rand.NewPCG(5, 5))
	for _, name := range walk(t, m.mem, "/vaults/m") {
		if strings.Contains(name, "/index/") {
			continue
		}
		info, _ := m.mem.Stat(name)
		offsets := []int64{0, info.Size - 1}
		for range effort(20, 2, 0) {
			offsets = append(offsets, rng.Int64N(info.Size))
		}
		for _, off := range offsets {
			bit := byte(1) << rng.IntN(8)
			flip(t, m.mem, name, off, bit)
			r := mustCheck(t, m.mem)
			rel := strings.TrimPrefix(name, "/vaults/m/")
			image := strings.TrimSuffix(rel, ".sum") + ".img" // a wrong checksum shows as a wrong block
			if !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.File == rel || f.File == image && image != rel+".img" }) {
				t.Errorf("%s: bit %#x at %d: findings %v", rel, bit, off, r.Findings)
			}
			flip(t, m.mem, name, off, bit)
		}
	}
	if r := mustCheck(t, m.mem); r.Findings != nil {
		t.Fatalf("after undoing all: %v", r.Findings)
	}
}

// TestCheckIndexFlips flips bits in the index: each is found, or does no harm
// because what the index answers is still right or it is rebuilt.
func TestCheckIndexFlips(t *testing.T) {
	t.Parallel()
	m := filled(t, 2)
	rng := rand.New(rand.NewPCG(6, 6))
	found := 0
	for _, name := range walk(t, m.mem, "/vaults/m/index") {
		info, _ := m.mem.Stat(name)
		for range 4 {
			off, bit := rng.Int64N(info.Size), byte(1)<<rng.IntN(8)
			flip(t, m.mem, name, off, bit)
			if r := mustCheck(t, m.mem); r.Findings != nil {
				found++
			}
			flip(t, m.mem, name, off, bit)
		}
	}
	if found == 0 {
		t.Error("no flip in the index was found")
	}
	if r := mustCheck(t, m.mem); r.Findings != nil {
		t.Fatalf("after undoing all: %v", r.Findings)
	}
}

func TestCheckDamage(t *testing.T) {
	t.Parallel()
	var log []string
	truncate := func(name string, size int64) func(*testing.T, *vfs.Mem) {
		return func(t *testing.T, fsys *vfs.Mem) {
			f, err := fsys.OpenFile(name)
			if err != nil {
				t.Fatal(err)
			}
			info, _ := fsys.Stat(name)
			if err := f.Truncate(info.Size + size); err != nil {
				t.Fatal(err)
			}
		}
	}
	m := filled(t, 3)
	log = append(log, walk(t, m.mem, "/vaults/m/log")...)
	first, second, last := log[0], log[1], log[len(log)-1]
	image, sums := "/vaults/m/"+imageName(3), "/vaults/m/"+sumsName(3)
	remove := func(name string) func(*testing.T, *vfs.Mem) {
		return func(t *testing.T, fsys *vfs.Mem) {
			if err := fsys.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	create := func(name string) func(*testing.T, *vfs.Mem) {
		return func(t *testing.T, fsys *vfs.Mem) {
			if f, err := fsys.Create(name); err != nil || f.Close() != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		damage func(*testing.T, *vfs.Mem)
		file   string
		opens  error // what Open says; nil: it can do without
	}{
		"missing segment":      {remove(second), second, dr.ErrCorrupt},
		"missing last segment": {remove(last), last, dr.ErrCorrupt},
		"truncated segment":    {truncate(first, -1), first, dr.ErrCorrupt},
		"longer segment":       {truncate(first, 1), first, dr.ErrCorrupt},
		"truncated log":        {truncate(last, -40), last, dr.ErrCorrupt},
		"torn tail":            {truncate(last, 40), last, nil},
		"extra file":           {create("/vaults/m/base/x"), "base/x", nil},
		"extra segment":        {create("/vaults/m/log/00000001-00000000000fffff.seg"), "log/00000001-00000000000fffff.seg", nil},
		"extra branch":         {create("/vaults/m/branch/00000009"), "branch/00000009", nil},
		"missing image":        {remove(image), image, dr.ErrCorrupt},
		"truncated image":      {truncate(image, -512), image, dr.ErrCorrupt},
		"missing sums":         {remove(sums), sums, dr.ErrCorrupt},
		"truncated sums":       {truncate(sums, -1), sums, dr.ErrCorrupt},
		"lost index":           {remove("/vaults/m/index"), "index", nil},
		"truncated manifest":   {truncate("/vaults/m/MANIFEST", -3), "MANIFEST", dr.ErrCorrupt},
		"empty manifest":       {create("/vaults/m/MANIFEST"), "MANIFEST", dr.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := m.mem.Crash(1) // a copy: all of a closed vault is durable
			tc.damage(t, fsys)
			want := strings.TrimPrefix(tc.file, "/vaults/m/")
			r := mustCheck(t, fsys)
			if !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.File == want || name == "truncated log" && f.File == "log" }) {
				t.Errorf("findings %v, want one in %s", r.Findings, want)
			}
			v, err := Open(context.Background(), fsys, "/vaults/m", Options{})
			if !errors.Is(err, tc.opens) {
				t.Errorf("open: %v, want %v", err, tc.opens)
			}
			if err == nil {
				v.Close()
			}
		})
	}
}

func TestCheckRefuses(t *testing.T) {
	t.Parallel()
	m := newModel(t, 4)
	if _, err := Check(context.Background(), m.mem, "/vaults/m", nil); err == nil {
		t.Error("a vault that is open was checked")
	}
	if _, err := Check(context.Background(), m.mem, "/vaults/none", nil); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("no vault: %v", err)
	}
	m.append(t, 20)
	m.sync(t)
	m.close(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Check(ctx, m.mem, "/vaults/m", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	var done, total int64
	if _, err := Check(context.Background(), m.mem, "/vaults/m", func(d, n int64) { done, total = d, n }); err != nil || done == 0 || done != total {
		t.Errorf("progress ended at %d of %d: %v", done, total, err)
	}
}
