// Package farsidev1 holds the messages and enumerations of the API, generated
// from the .proto files beside it. It does nothing but carry them.
package farsidev1
