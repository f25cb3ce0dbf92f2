#!/usr/bin/env bash
# fuzz.sh TIME: runs every fuzz target of the module for TIME (e.g. 10s) each.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: fuzz.sh TIME}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# fuzz DIR TARGET. When the time is up while a worker is busy, the go command may say that the target failed,
# with nothing but "context deadline exceeded" and no failing input: then it is run again.
fuzz() {
	local try
	for try in 1 2 3; do
		if go test -run '^$' -fuzz "^$2\$" -fuzzminimizetime 1x -fuzztime "$time" "$1" </dev/null 2>&1 | tee "$log"; then
			return 0
		fi
		if grep -q 'Failing input written' "$log" || ! grep -qx ' *context deadline exceeded' "$log"; then
			return 1
		fi
		echo "fuzz $1 $2: the time was up, not the target wrong; try $try"
	done
	return 1
}

grep -rhoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' -H . | sed 's/:func /|/' | while IFS='|' read -r file target; do
	echo "fuzz $(dirname "$file") $target $time"
	fuzz "$(dirname "$file")" "$target"
done
