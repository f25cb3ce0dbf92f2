//go:build !linux

package main

func main() { panic("the load runs on Linux only") }
