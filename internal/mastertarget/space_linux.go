package mastertarget

import "golang.org/x/sys/unix"

// diskSpace returns size and free bytes of the file system of dir, zero if
// unknown.
func diskSpace(dir string) (total, free int64) {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0, 0
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize
}
