package frame

import (
	"fmt"
	"unicode/utf8"

	"farside/internal/dr"
)

// tagFixed is the length of a tag's payload without its name.
const tagFixed = 16 + 16 + 1 + 1

// Tag returns the tag that the frame carries.
func (f *Frame) Tag() (dr.Tag, error) {
	if f.Kind != TagKind {
		return dr.Tag{}, fmt.Errorf("read tag of a %v frame: %w", f.Kind, dr.ErrInvalid)
	}
	b, err := f.Payload(nil)
	if err != nil {
		return dr.Tag{}, err
	}
	t := dr.Tag{ID: [16]byte(b), Group: [16]byte(b[16:]), Consistency: dr.Consistency(b[32]), Name: string(b[tagFixed:])}
	if len(t.Name) != int(b[33]) || checkTag(t) != nil {
		return dr.Tag{}, fmt.Errorf("tag at %d:%d is malformed: %w", f.Timeline, f.Last, dr.ErrCorrupt)
	}
	return t, nil
}

func checkTag(t dr.Tag) error {
	if len(t.Name) > dr.MaxTagName || !utf8.ValidString(t.Name) {
		return fmt.Errorf("tag name %q: want UTF-8 of at most %d bytes: %w", t.Name, dr.MaxTagName, dr.ErrInvalid)
	}
	if (t.Consistency < dr.Crash || t.Consistency > dr.Application) && t.Consistency != dr.Revoked {
		return fmt.Errorf("tag %q: %v: %w", t.Name, t.Consistency, dr.ErrInvalid)
	}
	return nil
}

func tagPayload(t dr.Tag) []byte {
	b := make([]byte, 0, tagFixed+len(t.Name))
	b = append(b, t.ID[:]...)
	b = append(b, t.Group[:]...)
	b = append(b, byte(t.Consistency), byte(len(t.Name)))
	return append(b, t.Name...)
}
