// Package e2e holds the tests that run the farside binary as a user would: real processes, real kernel. They build the
// program first. What they need beyond a user account they ask of testenv.
package e2e
