# Farside. `make demo` shows it at work, `make test` proves it; both set up what they need.

GO       ?= go
BIN      := bin/farside
PACKAGES ?= ./...
FUZZTIME ?= 10s

GOLANGCI := $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
GOFUMPT  := $(GO) run mvdan.cc/gofumpt@v0.12.0
IMPORTS  := $(GO) run golang.org/x/tools/cmd/goimports@v0.52.0
SOURCES   = $(shell git ls-files '*.go' | grep -v -e '\.pb\.go$$' -e '\.connect\.go$$' -e '_bpfel\.go$$')

export CGO_ENABLED ?= 0

.DEFAULT_GOAL := build
.PHONY: build test race lint format fuzz bench demo measure generate setup-demo setup-test clean FORCE

build: $(BIN)

# The go command decides what is out of date.
$(BIN): FORCE
	$(GO) build -trimpath -o $@ ./cmd/farside

setup-demo:
	@scripts/setup.sh demo

setup-test:
	@scripts/setup.sh test

# DEMO holds flags for the demo, e.g. make demo DEMO='--once --json --duration 5s'.
demo: setup-demo build
	$(BIN) demo $(DEMO)

test: setup-test build
	$(GO) test -timeout 20m $(TESTFLAGS) $(PACKAGES)

race:
	CGO_ENABLED=1 $(GO) test -race -short -timeout 20m $(TESTFLAGS) $(PACKAGES)

lint:
	$(GO) vet ./...
	GOOS=linux GOARCH=arm64 $(GO) vet ./...
	GOOS=windows GOARCH=amd64 $(GO) vet ./...
	@out=$$($(GOFUMPT) -l $(SOURCES)); test -z "$$out" || { echo "not gofumpt'd (make format):"; echo "$$out"; exit 1; }
	@out=$$($(IMPORTS) -local farside -l $(SOURCES)); test -z "$$out" || { echo "imports out of order (make format):"; echo "$$out"; exit 1; }
	$(GOLANGCI) run ./...

format:
	@$(IMPORTS) -local farside -w $(SOURCES)
	@$(GOFUMPT) -w $(SOURCES)

# Every fuzz target for FUZZTIME each.
fuzz:
	@scripts/fuzz.sh $(FUZZTIME)

# Measures what docs/benchmarks.md records.
bench: setup-test build
	@scripts/bench.sh

measure:
	@$(GO) run ./scripts/measure

# Regenerates what is generated; needs clang for the eBPF objects.
generate:
	$(GO) generate ./...
	$(GO) test -count=1 -run TestDepguard . -update

clean:
	rm -rf bin
