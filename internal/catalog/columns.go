package catalog

import (
	"fmt"

	"farside/internal/dr"
)

// textOf returns an id as it is stored: "" for none.
func textOf(id interface {
	IsZero() bool
	String() string
},
) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

// idColumn reads an id that is stored as text; "" is none.
type idColumn[T any] struct {
	to    *T
	parse func(string) (T, error)
}

func (c idColumn[T]) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("id is a %T: %w", v, dr.ErrCorrupt)
	}
	if s == "" {
		var none T
		*c.to = none
		return nil
	}
	id, err := c.parse(s)
	if err != nil {
		return fmt.Errorf("%w: %w", dr.ErrCorrupt, err)
	}
	*c.to = id
	return nil
}

func nodeColumn(to *dr.NodeID) idColumn[dr.NodeID] { return idColumn[dr.NodeID]{to, dr.ParseNodeID} }

func machineColumn(to *dr.MachineID) idColumn[dr.MachineID] {
	return idColumn[dr.MachineID]{to, dr.ParseMachineID}
}

// seqColumn reads a sequence number, which SQL stores as a signed integer.
type seqColumn struct{ to *dr.Seq }

func (c seqColumn) Scan(v any) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("sequence is a %T: %w", v, dr.ErrCorrupt)
	}
	*c.to = dr.Seq(n)
	return nil
}
