package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"farside/internal/dr"
	"farside/internal/vault"
	"farside/internal/vfs"
)

// checked is what check says of one vault.
type checked struct {
	Dir string `json:"dir"`
	*vault.Report
}

func newCheck(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check DIR",
		Short: "Prove a vault whole: every frame, checksum, chain link, index entry and base block",
		Long: `Check reads all of a vault, or of every vault below DIR, and changes nothing. The vaults
must not be in use: stop the master target, or check a copy. The exit code is 5 if anything is
wrong.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := a.checkAll(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := a.print(list, func(w io.Writer) { printChecked(w, list) }); err != nil {
				return err
			}
			return verdict(list)
		},
	}
}

// checkAll checks every vault at or below dir.
func (a *app) checkAll(ctx context.Context, dir string) ([]checked, error) {
	dirs, err := vaultsBelow(dir)
	if err != nil {
		return nil, err
	}
	if len(dirs) == 0 {
		return nil, fmt.Errorf("check %s: there is no vault: %w", dir, dr.ErrNotFound)
	}
	var list []checked
	for _, d := range dirs {
		bar := a.newBar("check " + filepath.Base(d))
		r, err := vault.Check(ctx, vfs.OS(), d, bar.set)
		bar.end(err == nil)
		if err != nil {
			return nil, err
		}
		list = append(list, checked{d, r})
	}
	return list, nil
}

// vaultsBelow finds the directories with a manifest.
func vaultsBelow(dir string) ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() {
			return nil
		}
		if _, err := os.Stat(filepath.Join(path, "MANIFEST")); err == nil {
			dirs = append(dirs, path)
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for vaults: %w", err)
	}
	return dirs, nil
}

func printChecked(w io.Writer, list []checked) {
	for _, c := range list {
		fmt.Fprintf(w, "%s: machine %v, %d segments, %d frames, %d keys, %s read\n",
			c.Dir, c.Machine, c.Segments, c.Frames, c.Keys, size(c.Bytes))
		for _, f := range c.Findings {
			fmt.Fprintf(w, "  %v\n", f)
		}
		if len(c.Findings) == 0 {
			fmt.Fprintln(w, "  whole")
		}
	}
}

// verdict is an error if anything was found.
func verdict(list []checked) error {
	n := 0
	for _, c := range list {
		n += len(c.Findings)
	}
	if n > 0 {
		return fmt.Errorf("check: %d findings: %w", n, dr.ErrCorrupt)
	}
	return nil
}
