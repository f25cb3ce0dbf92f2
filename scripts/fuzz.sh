#!/usr/bin/env bash
# fuzz.sh TIME: runs every fuzz target of the module for TIME (e.g. 10s) each.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: fuzz.sh TIME}
grep -rhoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' -H . | sed 's/:func /|/' | while IFS='|' read -r file target; do
	echo "fuzz $(dirname "$file") $target $time"
	go test -run '^$' -fuzz "^$target\$" -fuzzminimizetime 1x -fuzztime "$time" "$(dirname "$file")" </dev/null
done
