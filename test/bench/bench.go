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
	"strings"
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

// aims are what is wanted of figures, by how their names begin: of the ratio if there is
// a peer and the aim doesn't say otherwise, else of our figure. The longest beginning counts.
var aims = map[string]string{
	"capture 4k randwrite qd16":                                   ">= 0.80",
	"capture 4k randwrite qd16, on disk":                          ">= 0.95",
	"capture 1M write qd4":                                        ">= 0.60",
	"capture 1M write qd4, on disk":                               ">= 0.95",
	"durable end to end, 512 MiB incompressible":                  ">= 0.6",
	"durable end to end, 512 MiB database-like":                   ">= 0.5",
	"RPO at 54 MB/s of random 4 to 64 KiB, roles on 2 cores, p99": "< 1000",
	"churn that keeps the RPO's p99 below 5 s":                    ">= 250",
	"agent at 54 MB/s, processor":                                 "<= 15",
	"compare an unchanged disk":                                   ">= 1.5",
	"open a position of 1 TB":                                     "< 50",
	"bytes on the WAN of a comparison":                            "< 0.1",
	"WAN bytes per changed byte, pgbench, exact":                  "Farside <= 0.5",
	"WAN bytes per changed byte, pgbench, folded":                 "Farside <= 0.25",
	"nbd ":                          ">= 0.9",
	"view over NBD, 4k random read": ">= 0.5",
}

// aim returns what is wanted of the figure of a name, or "".
func aim(name string) string {
	longest := ""
	for begin := range aims {
		if strings.HasPrefix(name, begin) && len(begin) > len(longest) {
			longest = begin
		}
	}
	if strings.Contains(name, "share of writes") {
		return ""
	}
	return aims[longest]
}

// Print writes the figure for scripts/bench.sh, with what is wanted of it.
func (f Figure) Print() {
	f.Ours, f.Peer, f.Ratio = round(f.Ours), round(f.Peer), round(f.Ratio)
	line, err := json.Marshal(struct {
		Figure
		Aim string `json:"aim"`
	}{f, aim(f.Name)})
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
