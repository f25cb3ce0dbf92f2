#!/usr/bin/env bash
# judge-tests.sh LOG: reads what `go test -json` wrote, prints a line for each package and all that failed
# tests printed, and fails if a test failed, or was skipped for a reason that is not in the list: on
# machines that can do all of it, everything is to be run.
set -euo pipefail
log=${1:?usage: judge-tests.sh LOG}
# Reasons to skip that hold on every machine: asked for by a variable, part of another test, a judge that can't, luck.
allowed='run it with make bench|FARSIDE_LONG|run by Test|not with -short|platform without the driver|this time|was not held back|can.t be told where the certificates are'

jq -rRj 'fromjson? | select(.Action == "build-output" or .Action == "output" and .Test == null) | .Output' "$log" | grep -vE '^PASS$|no test files|^coverage' || true

bad=0
if ! grep -q '"Action":"pass"' "$log"; then
	bad=1
	echo "no test passed"
fi
while read -r package name; do
	bad=1
	echo "--- $package $name failed:"
	jq -rRj --arg p "$package" --arg t "$name" 'fromjson? | select(.Action == "output" and .Package == $p and .Test == $t) | .Output' "$log" | tail -n 80
done < <(jq -rR 'fromjson? | select(.Action == "fail" and .Test != null) | .Package + " " + .Test' "$log")
if jq -rR 'fromjson? | select(.Action == "fail") | .Package' "$log" | grep -q .; then bad=1; fi

while read -r package name; do
	why=$(jq -rRj --arg p "$package" --arg t "$name" 'fromjson? | select(.Action == "output" and .Package == $p and .Test == $t) | .Output' "$log" | grep -vE '^(===|\s*---)' || true)
	if ! grep -qE "$allowed" <<<"$why"; then
		bad=1
		echo "--- $package $name was skipped: $why"
	fi
done < <(jq -rR 'fromjson? | select(.Action == "skip" and .Test != null) | .Package + " " + .Test' "$log")
exit $bad
