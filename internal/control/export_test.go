package control

// SaveAssignment is for tests that make a data directory without joining.
var SaveAssignment = saveAssignment
