package vault

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"path"
	"slices"
	"unicode/utf8"

	"farside/internal/dr"
	"farside/internal/vfs"
)

const (
	manifestVersion = 1
	manifestHeader  = 128
	timelineSize    = 24
	segmentSize     = 88
	diskFixed       = 12
	maxDiskName     = 1024
	maxManifest     = 1 << 30

	flagHorizonPoint = 1
	flagSealed       = 1
	flagEndPoint     = 1
)

var (
	manifestMagic = [4]byte{'F', 'S', 'V', 'M'}
	le            = binary.LittleEndian
	castagnoli    = crc32.MakeTable(crc32.Castagnoli)
)

// manifest is what a vault consists of. A value is never changed once it is
// the vault's current one; changes are made on a clone.
type manifest struct {
	Machine      dr.MachineID
	Current      dr.Timeline // on which the machine's stream is received
	Next         dr.Timeline // number of the next branch
	BaseTimeline dr.Timeline
	Base         dr.Seq // what the images hold
	BaseTime     int64
	BaseChain    [32]byte
	Horizon      dr.Seq // ≥ Base; > Base while a fold is under way
	HorizonTime  int64
	HorizonPoint bool           // the horizon is a recovery point
	Disks        []dr.Disk      // by rising id
	Timelines    []timelineInfo // by rising number; the first has no parent
	Segments     []segmentInfo  // by rising timeline and first
}

// timelineInfo says where a timeline begins.
type timelineInfo struct {
	ID       dr.Timeline
	Parent   dr.Timeline // 0: none
	Fork     dr.Seq      // in the parent
	ForkTime int64
}

// segmentInfo describes a segment; the fields behind First count once Sealed.
type segmentInfo struct {
	Timeline            dr.Timeline
	Sealed              bool
	EndPoint            bool // its end is a recovery point
	First, Last         dr.Seq
	FirstTime, LastTime int64
	Size                int64
	Chain               [32]byte
}

func (s segmentInfo) key() segmentKey { return segmentKey{s.Timeline, s.First} }

func compareSegments(a, b segmentInfo) int { return a.key().compare(b.key()) }

func (m *manifest) clone() *manifest {
	c := *m
	c.Disks = slices.Clone(m.Disks)
	c.Timelines = slices.Clone(m.Timelines)
	c.Segments = slices.Clone(m.Segments)
	return &c
}

// timeline returns a timeline of the vault.
func (m *manifest) timeline(id dr.Timeline) (timelineInfo, bool) {
	i, ok := slices.BinarySearchFunc(m.Timelines, id, func(t timelineInfo, id dr.Timeline) int { return int(int64(t.ID) - int64(id)) })
	if !ok {
		return timelineInfo{}, false
	}
	return m.Timelines[i], true
}

// segments returns the segments of a timeline in order, not to be changed.
func (m *manifest) segments(tl dr.Timeline) []segmentInfo {
	from, _ := slices.BinarySearchFunc(m.Segments, segmentInfo{Timeline: tl}, compareSegments)
	to, _ := slices.BinarySearchFunc(m.Segments, segmentInfo{Timeline: tl, First: math.MaxUint64}, compareSegments)
	return m.Segments[from:to:to]
}

// addSegment inserts a segment, or replaces the one of the same name.
func (m *manifest) addSegment(s segmentInfo) {
	i, ok := slices.BinarySearchFunc(m.Segments, s, compareSegments)
	if ok {
		m.Segments[i] = s
		return
	}
	m.Segments = slices.Insert(m.Segments, i, s)
}

// disk returns a disk of the vault.
func (m *manifest) disk(id dr.DiskID) (dr.Disk, bool) {
	for _, d := range m.Disks {
		if d.ID == id {
			return d, true
		}
	}
	return dr.Disk{}, false
}

// encode lays the manifest out as docs/format/vault.md says.
func (m *manifest) encode() []byte {
	n := manifestHeader + timelineSize*len(m.Timelines) + segmentSize*len(m.Segments) + 4
	for _, d := range m.Disks {
		n += diskFixed + len(d.Name)
	}
	b := make([]byte, manifestHeader, n)
	copy(b, manifestMagic[:])
	le.PutUint16(b[4:], manifestVersion)
	le.PutUint16(b[6:], manifestHeader)
	le.PutUint32(b[8:], uint32(n))
	le.PutUint32(b[12:], uint32(m.Current))
	copy(b[16:], m.Machine[:])
	le.PutUint32(b[32:], uint32(m.Next))
	le.PutUint32(b[36:], uint32(m.BaseTimeline))
	for i, v := range [...]uint64{uint64(m.Base), uint64(m.BaseTime), uint64(m.Horizon), uint64(m.HorizonTime)} {
		le.PutUint64(b[40+8*i:], v)
	}
	copy(b[72:], m.BaseChain[:])
	le.PutUint32(b[104:], bit(m.HorizonPoint, flagHorizonPoint))
	for i, v := range [...]int{len(m.Disks), len(m.Timelines), len(m.Segments)} {
		le.PutUint32(b[108+4*i:], uint32(v))
	}
	for _, d := range m.Disks {
		b = le.AppendUint16(b, uint16(d.ID))
		b = le.AppendUint16(b, uint16(len(d.Name)))
		b = le.AppendUint64(b, uint64(d.Size))
		b = append(b, d.Name...)
	}
	for _, t := range m.Timelines {
		b = le.AppendUint32(b, uint32(t.ID))
		b = le.AppendUint32(b, uint32(t.Parent))
		b = le.AppendUint64(b, uint64(t.Fork))
		b = le.AppendUint64(b, uint64(t.ForkTime))
	}
	for _, s := range m.Segments {
		b = s.append(b)
	}
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func (s *segmentInfo) append(b []byte) []byte {
	b = le.AppendUint32(b, uint32(s.Timeline))
	b = le.AppendUint32(b, bit(s.Sealed, flagSealed))
	for _, v := range [...]uint64{
		uint64(s.First), uint64(s.Last), uint64(s.FirstTime), uint64(s.LastTime), uint64(s.Size),
	} {
		b = le.AppendUint64(b, v)
	}
	b = append(b, s.Chain[:]...)
	return le.AppendUint64(b, uint64(bit(s.EndPoint, flagEndPoint)))
}

func bit(set bool, flag uint32) uint32 {
	if set {
		return flag
	}
	return 0
}

// decodeManifest reads what encode wrote. Errors wrap dr.ErrCorrupt or
// dr.ErrVersion.
func decodeManifest(b []byte) (*manifest, error) {
	if len(b) < manifestHeader+4 || [4]byte(b) != manifestMagic {
		return nil, fmt.Errorf("manifest of %d bytes: no manifest: %w", len(b), dr.ErrCorrupt)
	}
	if v := le.Uint16(b[4:]); v != manifestVersion {
		return nil, fmt.Errorf("manifest version %d, this program knows %d: %w", v, manifestVersion, dr.ErrVersion)
	}
	end := len(b) - 4
	if crc32.Checksum(b[:end], castagnoli) != le.Uint32(b[end:]) {
		return nil, fmt.Errorf("manifest checksum: %w", dr.ErrCorrupt)
	}
	m := &manifest{
		Machine: dr.MachineID(b[16:32]), Current: dr.Timeline(le.Uint32(b[12:])), Next: dr.Timeline(le.Uint32(b[32:])),
		BaseTimeline: dr.Timeline(le.Uint32(b[36:])),
		Base:         dr.Seq(le.Uint64(b[40:])), BaseTime: int64(le.Uint64(b[48:])), BaseChain: [32]byte(b[72:]),
		Horizon: dr.Seq(le.Uint64(b[56:])), HorizonTime: int64(le.Uint64(b[64:])),
		HorizonPoint: le.Uint32(b[104:])&flagHorizonPoint != 0,
	}
	m.decodeLists(b[manifestHeader:end], le.Uint32(b[108:]), le.Uint32(b[112:]), le.Uint32(b[116:]))
	// What encode would write is the only form that counts: lengths, counts and reserved bytes included.
	if string(m.encode()) != string(b) {
		return nil, fmt.Errorf("manifest does not add up: %w", dr.ErrCorrupt)
	}
	if what := m.fault(); what != "" {
		return nil, fmt.Errorf("manifest: %s: %w", what, dr.ErrCorrupt)
	}
	return m, nil
}

// decodeLists reads as much of the lists as b holds; what is missing shows
// when the manifest is encoded again.
func (m *manifest) decodeLists(b []byte, disks, timelines, segments uint32) {
	for ; disks > 0 && len(b) >= diskFixed; disks-- {
		n := diskFixed + int(le.Uint16(b[2:]))
		if len(b) < n {
			return
		}
		m.Disks = append(m.Disks, dr.Disk{
			ID: dr.DiskID(le.Uint16(b)), Size: int64(le.Uint64(b[4:])), Name: string(b[diskFixed:n]),
		})
		b = b[n:]
	}
	for ; timelines > 0 && len(b) >= timelineSize; timelines-- {
		m.Timelines = append(m.Timelines, timelineInfo{
			ID: dr.Timeline(le.Uint32(b)), Parent: dr.Timeline(le.Uint32(b[4:])),
			Fork: dr.Seq(le.Uint64(b[8:])), ForkTime: int64(le.Uint64(b[16:])),
		})
		b = b[timelineSize:]
	}
	for ; segments > 0 && len(b) >= segmentSize; segments-- {
		m.Segments = append(m.Segments, segmentInfo{
			Timeline: dr.Timeline(le.Uint32(b)), Sealed: le.Uint32(b[4:])&flagSealed != 0,
			First: dr.Seq(le.Uint64(b[8:])), Last: dr.Seq(le.Uint64(b[16:])),
			FirstTime: int64(le.Uint64(b[24:])), LastTime: int64(le.Uint64(b[32:])),
			Size: int64(le.Uint64(b[40:])), Chain: [32]byte(b[48:]), EndPoint: le.Uint64(b[80:])&flagEndPoint != 0,
		})
		b = b[segmentSize:]
	}
}

// fault names the first rule that m breaks, or is empty.
func (m *manifest) fault() string {
	if m.Machine.IsZero() {
		return "no machine"
	}
	if m.Horizon < m.Base || m.HorizonTime < m.BaseTime || m.BaseTime < 0 {
		return "the horizon is before the base"
	}
	for i, d := range m.Disks {
		if d.Size <= 0 || d.Size%dr.SectorSize != 0 || len(d.Name) > maxDiskName || !utf8.ValidString(d.Name) ||
			i > 0 && d.ID <= m.Disks[i-1].ID {
			return fmt.Sprintf("disk %d", d.ID)
		}
	}
	if what := m.timelineFault(); what != "" {
		return what
	}
	return m.segmentFault()
}

func (m *manifest) timelineFault() string {
	for i, t := range m.Timelines {
		_, known := m.timeline(t.Parent)
		switch {
		case i == 0 && (t.ID != firstTimeline || t.Parent != 0 || t.Fork != 0),
			i > 0 && (t.ID <= m.Timelines[i-1].ID || t.Parent >= t.ID || !known),
			t.ID >= m.Next, t.ForkTime < 0:
			return fmt.Sprintf("timeline %d", t.ID)
		}
	}
	_, current := m.timeline(m.Current)
	if _, base := m.timeline(m.BaseTimeline); !base || !current {
		return "the current or the base timeline is unknown"
	}
	return ""
}

func (m *manifest) segmentFault() string {
	for i, s := range m.Segments {
		fault := fmt.Sprintf("segment %d:%d", s.Timeline, s.First)
		if _, ok := m.timeline(s.Timeline); !ok || s.First == 0 {
			return fault
		}
		if s.Sealed && (s.Last < s.First || s.LastTime < s.FirstTime || s.FirstTime < 0 || s.Size <= 0) {
			return fault
		}
		if i == 0 || m.Segments[i-1].Timeline != s.Timeline {
			if i > 0 && s.Timeline < m.Segments[i-1].Timeline {
				return fault
			}
			continue
		}
		if before := m.Segments[i-1]; !before.Sealed || s.First != before.Last+1 {
			return fault + " does not follow the one before"
		}
	}
	return ""
}

// loadManifest reads the manifest of the vault at dir. Errors wrap
// dr.ErrNotFound, dr.ErrCorrupt or dr.ErrVersion.
func loadManifest(fsys vfs.FS, dir string) (*manifest, error) {
	b, err := vfs.ReadFile(fsys, path.Join(dir, manifestName), maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read %s: no vault there: %w", path.Join(dir, manifestName), dr.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	m, err := decodeManifest(b)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path.Join(dir, manifestName), err)
	}
	return m, nil
}

// storeManifest replaces the manifest of the vault at dir, durably.
func storeManifest(fsys vfs.FS, dir string, m *manifest) error {
	if what := m.fault(); what != "" {
		panic("vault: refusing to write a manifest that breaks a rule: " + what)
	}
	return vfs.ReplaceFile(fsys, dir, path.Join(dir, manifestName), m.encode())
}
