//go:build !linux

package mastertarget

// diskSpace returns zero: unknown.
func diskSpace(string) (total, free int64) { return 0, 0 }
