// Package bench holds the benchmarks of `make bench`: each compares Farside with
// a peer, or with the machine's own limit, in one run, in turns, over several
// rounds. They are tests that only run with FARSIDE_BENCH=1 and print a line
// "BENCH {...}" per figure for scripts/bench.sh. They judge no result.
package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
)

// Figure is one result: medians of all rounds.
type Figure struct {
	Name   string  `json:"name"`
	Ours   float64 `json:"ours"`
	Peer   float64 `json:"peer"` // 0: there is none
	Ratio  float64 `json:"ratio"`
	Unit   string  `json:"unit"`
	Rounds int     `json:"rounds"`
}

// Print writes the figure for scripts/bench.sh.
func (f Figure) Print() {
	f.Ours, f.Peer, f.Ratio = round(f.Ours), round(f.Peer), round(f.Ratio)
	line, err := json.Marshal(f)
	if err != nil {
		panic(err) // numbers and strings
	}
	fmt.Printf("BENCH %s\n", line)
}

// Rounds returns how many rounds each comparison has: FARSIDE_BENCH_ROUNDS, or 5.
func Rounds() int {
	if n, err := strconv.Atoi(os.Getenv("FARSIDE_BENCH_ROUNDS")); err == nil && n > 0 {
		return n
	}
	return 5
}

// Median returns the median of v, which it sorts.
func Median(v []float64) float64 { return Percentile(v, 0.5) }

// Percentile returns the value at share p of v, which it sorts, between its
// neighbours.
func Percentile(v []float64, p float64) float64 {
	slices.Sort(v)
	at := p * float64(len(v)-1)
	i := int(at)
	if i+1 >= len(v) {
		return v[len(v)-1]
	}
	return v[i] + (at-float64(i))*(v[i+1]-v[i])
}

func round(v float64) float64 { return float64(int64(v*1000+0.5)) / 1000 }
