// Package farsidev1connect holds the clients and handlers of the API's services,
// generated from the .proto files of package farsidev1. It does nothing but call
// and dispatch.
package farsidev1connect
