package agent

// The capture drivers by name.
const (
	driverAuto = "auto"
	driverEBPF = "ebpf"
	driverTap  = "tap"
)
