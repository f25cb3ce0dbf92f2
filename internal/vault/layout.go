package vault

import (
	"fmt"
	"path"

	"farside/internal/dr"
)

// The names within a vault's directory. See docs/format/vault.md.
const (
	lockName     = "LOCK"
	manifestName = "MANIFEST"
	manifestTemp = "MANIFEST.new"
	baseDir      = "base"
	logDir       = "log"
	branchDir    = "branch"
	indexDir     = "index"

	firstTimeline = dr.Timeline(1)
)

func imageName(disk dr.DiskID) string { return path.Join(baseDir, fmt.Sprintf("%04x.img", disk)) }

func sumsName(disk dr.DiskID) string { return path.Join(baseDir, fmt.Sprintf("%04x.sum", disk)) }

// segmentDir is where the segments of a timeline lie.
func segmentDir(tl dr.Timeline) string {
	if tl == firstTimeline {
		return logDir
	}
	return path.Join(branchDir, fmt.Sprintf("%08x", tl))
}
