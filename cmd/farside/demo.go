package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"farside/internal/demo"
	"farside/internal/dr"
)

// demoOptions are the flags of `demo`.
type demoOptions struct {
	demo.Options
	size    string
	once    bool
	keep    bool
	kernels string
}

func newDemo(a *app) *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See it all on this machine: a disk under load is replicated, destroyed, and brought back",
		Long: `Demo starts the four roles as processes, puts a database under load on a disk, replicates
it, overwrites the disk with garbage, opens the last point before that, proves what came
back, and boots a Linux guest from it. It takes less than two minutes and leaves nothing
behind. As root on Linux writes are captured by eBPF; elsewhere by a tap.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context(), a) },
	}
	f := cmd.Flags()
	f.StringVar(&o.size, "disk-size", "512MiB", "size of the protected disk")
	f.DurationVar(&o.Duration, "duration", 20*time.Second, "how long to replicate before the disaster")
	f.IntVar(&o.Rate, "rate", 200, "commits a second; 0: as many as go")
	f.BoolVar(&o.once, "once", false, "end at once when done, also on a terminal")
	f.BoolVar(&o.keep, "keep", false, "keep the work directory")
	f.StringVar(&o.Capture, "capture", "auto", "how writes are captured: auto, ebpf, tap")
	f.BoolVar(&o.NoBoot, "no-boot", false, "boot no guest")
	f.StringVar(&o.WorkDir, "work-dir", "", "directory for everything that the demo writes (default a new one in /var/tmp)")
	f.StringVar(&o.kernels, "guest-kernel", os.Getenv("FARSIDE_GUEST_KERNEL"), "directory with boot/vmlinuz-VERSION and lib/modules/VERSION of the guest (default what make demo fetched, else the machine's own)")
	cmd.AddCommand(newDemoLoad(), newDemoWatchdog())
	return cmd
}

func (o *demoOptions) run(ctx context.Context, a *app) (err error) {
	var disk dr.Size
	if err := disk.UnmarshalText([]byte(o.size)); err != nil {
		return fmt.Errorf("--disk-size: %w", err)
	}
	o.DiskSize = int64(disk)
	if err := o.Check(); err != nil {
		return err
	}
	if code, done, err := demo.Isolate(ctx, os.Stdout, os.Stderr); done || err != nil {
		if err == nil && code != exitOK {
			err = exitCode(code)
		}
		return err
	}
	cleanUp, err := o.makeWorkDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanUp()) }()
	o.Kernels = guestKernels(o.kernels)
	if o.Out = a.out; a.json {
		o.Out = a.err
	}
	if !o.once && !a.json && isTerminal(a.out) {
		o.Hold = func(ctx context.Context, uri string) { hold(ctx, a.out, uri) }
	}
	result, err := demo.Run(ctx, o.Options)
	if err == nil {
		err = result.Bad()
	}
	if !o.keep {
		err = withHint(err, "with --keep the work directory stays, with the logs of all roles")
	}
	if a.json {
		b, e := json.Marshal(result) // one line, the last
		if e != nil {
			return errors.Join(err, e)
		}
		fmt.Fprintf(a.out, "%s\n", b)
	}
	return err
}

// makeWorkDir makes the work directory and returns what removes it.
func (o *demoOptions) makeWorkDir() (cleanUp func() error, err error) {
	parent := o.WorkDir
	if parent == "" {
		parent = os.TempDir()
		if info, err := os.Stat("/var/tmp"); err == nil && info.IsDir() {
			parent = "/var/tmp" // on disk where /tmp may be memory
		}
	} else if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("make the work directory: %w", err)
	}
	if o.WorkDir, err = os.MkdirTemp(parent, "farside-demo-"); err != nil {
		return nil, fmt.Errorf("make the work directory: %w", err)
	}
	if o.keep {
		return func() error { return nil }, nil
	}
	return func() error { return os.RemoveAll(o.WorkDir) }, nil
}

// guestKernels are the roots below which a kernel is looked for.
func guestKernels(wanted string) []string {
	if wanted != "" {
		return []string{wanted}
	}
	roots := []string{filepath.Join(".cache", "guest-kernel")}
	if self, err := os.Executable(); err == nil { // bin/farside in the source tree
		roots = append(roots, filepath.Join(filepath.Dir(self), "..", ".cache", "guest-kernel"))
	}
	return append(roots, "/")
}

// holdTime is how long the demo waits for somebody to look around.
const holdTime = 15 * time.Second

func hold(ctx context.Context, w io.Writer, uri string) {
	fmt.Fprintf(w, "\n   The recovered disk is served for %v more, e.g. to: nbdinfo '%s'\n   (end it with Ctrl-C)\n", holdTime, uri)
	select {
	case <-ctx.Done():
	case <-time.After(holdTime):
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// newDemoLoad is the load's own process.
func newDemoLoad() *cobra.Command {
	var o demo.LoadOptions
	cmd := &cobra.Command{
		Use: "load DIR LOG", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Dir, o.Log = args[0], args[1]
			return demo.Load(cmd.Context(), o, os.Stdin)
		},
	}
	cmd.Flags().IntVar(&o.Rate, "rate", 0, "commits a second")
	return cmd
}

// newDemoWatchdog is the process that thaws a file system if nobody else does.
func newDemoWatchdog() *cobra.Command {
	return &cobra.Command{
		Use: "watchdog DIR LIMIT", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			limit, err := time.ParseDuration(args[1])
			if err != nil {
				return fmt.Errorf("limit: %w: %w", err, dr.ErrInvalid)
			}
			return demo.Watchdog(args[0], limit, os.Stdin, os.Stdout)
		},
	}
}
