package control

import "testing"

func TestHostFiles(t *testing.T) {
	if got := bootTime("cpu 1 2\nbtime 1700000000\nprocesses 3\n"); got != 1700000000e9 {
		t.Errorf("boot time %d", got)
	}
	for _, bad := range []string{"", "btime x\n", "btim 5\n"} {
		if got := bootTime(bad); got != 0 {
			t.Errorf("%q: %d", bad, got)
		}
	}
	if got := prettyName("NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"); got != "Debian GNU/Linux 12 (bookworm)" {
		t.Errorf("name %q", got)
	}
	if got := prettyName("NAME=x\n"); got != "" {
		t.Errorf("name %q", got)
	}
}
