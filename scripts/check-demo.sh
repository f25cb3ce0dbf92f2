#!/usr/bin/env bash
# check-demo.sh CAPTURE: reads the object that `farside demo --once --json` prints last, on standard
# input, and fails unless everything in it is there and good and the driver was CAPTURE.
set -euo pipefail
capture=${1:?usage: check-demo.sh ebpf|tap}
answer=$(cat)
echo "$answer"
echo "$answer" | jq -e --arg capture "$capture" '
	.capture == $capture
	and .writes > 0 and .bytes > 0
	and .initial_replication_s > 0
	and .rpo_ms.p50 >= 0 and .rpo_ms.p99 >= .rpo_ms.p50
	and .view_open_ms > 0 and .rto_ms > .view_open_ms
	and .committed > 0 and .recovered > 0
	and .lost_durable == 0
	and .replica_equal == true
	and .database == "ok"
	and (if $capture == "ebpf" then .fsck == "clean" else .fsck == "skipped" end)
	and .boot.marker == true and .boot.seconds > 0
' >/dev/null || { echo "check-demo: something in this answer is missing or bad" >&2; exit 1; }
