#!/bin/sh
# Makes the Go code of the schema with pinned plugins. Needs protoc (apt: protobuf-compiler);
# its version leaves no trace in the output.
set -eu
cd "$(dirname "$0")/../.."
plugins=$(mktemp -d)
trap 'rm -rf "$plugins"' EXIT
GOBIN=$plugins go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$plugins go install connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1
PATH=$plugins:$PATH protoc -I internal/api \
	--go_out=. --go_opt=module=farside \
	--connect-go_out=. --connect-go_opt=module=farside,simple=true \
	internal/api/farside/v1/*.proto
sed -i '/^\/\/ 	protoc  *v[0-9.]*$/d' internal/api/farside/v1/*.pb.go
