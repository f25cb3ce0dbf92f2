package ebpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -tags linux -no-global-types -cc clang-14 -strip llvm-strip-14 -cflags "-O2 -g -mcpu=v3 -Wall -Wno-unused-function -Werror" program bpf/capture.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -tags linux -no-global-types -cc clang-14 -strip llvm-strip-14 -cflags "-O2 -g -mcpu=v3 -Wall -Wno-unused-function -Werror" calibration bpf/calibrate.c
