//go:build !linux

package control

import farsidev1 "farside/internal/api/farside/v1"

// fillHost adds nothing here.
func fillHost(*farsidev1.HostInfo) {}
