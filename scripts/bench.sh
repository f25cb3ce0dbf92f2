#!/usr/bin/env bash
# bench.sh [REGEXP]: runs the benchmarks (those whose name matches), prints each figure, and writes all of
# them into docs/benchmarks.md between its marks and into bench/latest.json. FARSIDE_BENCH_ROUNDS sets the rounds (default 5).
set -euo pipefail
cd "$(dirname "$0")/.."
doc=docs/benchmarks.md
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
FARSIDE_BENCH=1 go test -count=1 -timeout 90m -v ${1:+-run "$1"} ./test/bench/ 2>&1 | tee "$tmp/log" | grep --line-buffered -E '^(BENCH|---|FAIL|ok|panic)|^ *[a-z_]+_test.go' || true
grep -q '^ok' "$tmp/log" || { tail -n 40 "$tmp/log"; exit 1; }
sed -n 's/^BENCH //p' "$tmp/log" >"$tmp/figures"
[ -s "$tmp/figures" ] || { echo "bench: no figures; are fio, nbdkit and root there?" >&2; exit 1; }
{
	echo '<!-- begin of what make bench writes -->'
	echo
	echo "$(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD), $(nproc) cores ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), $(awk '/MemTotal/{printf "%.0f GiB", $2/1048576}' /proc/meminfo), Linux $(uname -r)."
	echo
	echo '| what | Farside | compared with | ratio | unit | aim | rounds |'
	echo '|---|---|---|---|---|---|---|'
	jq -r '"| \(.name) | \(.ours) | \(if .peer == 0 then "–" else .peer end) | \(if .peer == 0 then "–" else .ratio end) | \(.unit) | \(.aim // "") | \(.rounds) |"' "$tmp/figures"
	echo
	echo '<!-- end of what make bench writes -->'
} >"$tmp/table"
if [ -z "${1:-}" ]; then
	awk -v table="$tmp/table" '
		/^<!-- begin of what make bench writes -->/ { while ((getline line < table) > 0) print line; skip = 1 }
		!skip { print }
		/^<!-- end of what make bench writes -->/ { skip = 0 }' "$doc" >"$tmp/doc"
	cp "$tmp/doc" "$doc"
	mkdir -p bench
	jq -s . "$tmp/figures" >bench/latest.json
	echo "bench: wrote $doc and bench/latest.json"
else
	cat "$tmp/table"
fi
