package bench

import (
	"context"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/ebpf"
	"farside/internal/testenv"
	"farside/test/load"
)

// fioLoads are the worst case for capture: direct writes to a device in memory.
var fioLoads = []struct{ name, rw, bs, depth, unit string }{
	{"capture 4k randwrite qd16", "randwrite", "4k", "16", "IOPS"},
	{"capture 1M write qd4", "write", "1M", "4", "MB/s"},
}

// TestCaptureOverhead compares writes to a captured device with writes to the
// same device without capture: only marking, and exact with a reader.
func TestCaptureOverhead(t *testing.T) {
	testenv.NeedBench(t)
	testenv.NeedEBPF(t)
	testenv.NeedTool(t, "fio")
	t.Run("memory", func(t *testing.T) { captureOverhead(t, memoryDir(t), "") })
	t.Run("disk", func(t *testing.T) { captureOverhead(t, t.TempDir(), ", on disk") })
}

func captureOverhead(t *testing.T, dir, where string) {
	const size = 512 << 20
	l, err := load.NewLoop(filepath.Join(dir, "disk"), size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	for _, fl := range fioLoads {
		got := map[string][]float64{}
		var shares []float64
		for range Rounds() {
			for _, mode := range []string{"none", "bitmap", "exact"} {
				stop := startCapture(t, mode, l.Device, size)
				got[mode] = append(got[mode], fioWrite(t, l.Device, fl.rw, fl.bs, fl.depth, fl.unit))
				if share := stop(); mode == "exact" {
					shares = append(shares, share)
				}
			}
		}
		none := Median(got["none"])
		for _, mode := range []string{"bitmap", "exact"} {
			v := Median(got[mode])
			Figure{fl.name + where + ": " + mode + " vs none", v, none, v / none, fl.unit, Rounds()}.Print()
		}
		Figure{Name: fl.name + where + ": exact, share of writes captured with data", Ours: Median(shares), Unit: "of 1", Rounds: Rounds()}.Print()
	}
}

// startCapture attaches the driver and reads its events until stop is called,
// which returns the share of writes that were captured with their data: the
// rest came while the ring was full, and was only marked.
func startCapture(t *testing.T, mode, device string, size int64) (stop func() float64) {
	if mode == "none" {
		return func() float64 { return 0 }
	}
	src, err := ebpf.Open([]capture.Disk{{ID: 1, Path: device, Size: size}}, ebpf.Options{BitmapOnly: mode == "bitmap"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	readers.Go(func() { // back to data mode after an overflow, as the agent does
		for mode == "exact" && ctx.Err() == nil {
			_ = src.Resume(ctx) // fails when ctx ends
			time.Sleep(time.Millisecond)
		}
	})
	readers.Go(func() {
		buf := make([]byte, 0, 8<<20)
		for ctx.Err() == nil {
			buf = buf[:0]
			_, err := src.Next(ctx, 10*time.Millisecond, func(e capture.Event) error {
				if e.Kind == capture.Change { // copied once, as the agent does
					buf = append(buf, e.Data...)
				}
				return nil
			})
			if err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	return func() float64 {
		cancel()
		readers.Wait()
		s := src.Stats()
		if err := src.Close(); err != nil {
			t.Error(err)
		}
		return float64(s.Writes) / float64(max(1, s.Writes+s.Marked))
	}
}

func fioWrite(t *testing.T, device, rw, bs, depth, unit string) float64 {
	out, err := exec.CommandContext(t.Context(), "fio", "--name=x", "--output-format=json", "--ioengine=io_uring", "--direct=1",
		"--filename="+device, "--rw="+rw, "--bs="+bs, "--iodepth="+depth, "--time_based", "--runtime=2", "--ramp_time=0.3").Output()
	if err != nil {
		t.Fatalf("fio: %v\n%s", err, out)
	}
	iops, bw := fioResult(t, out)
	if unit == "IOPS" {
		return iops
	}
	return bw / 1e6
}
