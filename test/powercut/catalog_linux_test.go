package powercut

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
)

// TestCatalog: whenever the power goes, the configuration server's catalog opens, is whole, and has what the API had answered.
func TestCatalog(t *testing.T) {
	c := deploy(t, "config-server", false)
	c.tokens(images(40))
	for _, err := range c.judge(images(20), c.catalog) {
		t.Error(err)
	}
}

// TestCatalogUnsynced: with a configuration server whose fsync does nothing the same judgement finds losses.
func TestCatalogUnsynced(t *testing.T) {
	c := deploy(t, "config-server", true)
	c.tokens(40)
	bad := c.judge(10, c.catalog)
	if len(bad) == 0 {
		t.Fatal("nobody noticed that fsync does nothing")
	}
	t.Logf("%d of 10 power cuts are found to lose something, as %v", len(bad), bad[0])
}

// tokens makes n join tokens.
func (c *cut) tokens(n int) {
	c.t.Helper()
	for i := range n {
		name := fmt.Sprintf("token %d", i)
		r := &farsidev1.CreateTokenRequest{Role: farsidev1.Role_ROLE_AGENT, Name: name}
		if _, err := c.stage.Far.Client.CreateToken(c.t.Context(), r); err != nil {
			c.t.Fatal(err)
		}
		c.told(0, name)
	}
}

// catalog judges a configuration server's directory. That is done by a process of its own: SQLite maps a file, and a
// process that waits for a page that it serves itself may stand still for ever.
func (c *cut) catalog(dir string, seen []ack) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(c.t.Context(), self)
	cmd.Env = append(os.Environ(), "POWERCUT_CATALOG="+filepath.Join(dir, "catalog.db"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("open the catalog: %w: %s", err, out)
	}
	var names []string
	if err := json.Unmarshal(out, &names); err != nil {
		return fmt.Errorf("read %q: %w", out, err)
	}
	for _, a := range seen {
		if !slices.Contains(names, a.name) {
			return fmt.Errorf("%s was answered and is not in the catalog", a.name)
		}
	}
	return nil
}

// readCatalog opens a catalog as the configuration server does, lets SQLite check it, and prints the names of its tokens.
func readCatalog(ctx context.Context, path string) (err error) {
	if _, err := os.Stat(path); err != nil {
		return err // opening would make it
	}
	opened, err := catalog.Open(ctx, path)
	if err != nil {
		return err
	}
	if err := opened.Close(); err != nil {
		return err
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var verdict string
	if err := db.QueryRowContext(ctx, "PRAGMA integrity_check").Scan(&verdict); err != nil || verdict != "ok" {
		return fmt.Errorf("integrity check: %s: %w", verdict, errors.Join(err, errors.New("the catalog is damaged")))
	}
	var names string
	if err := db.QueryRowContext(ctx, "SELECT coalesce(json_group_array(name), '[]') FROM join_tokens").Scan(&names); err != nil {
		return err
	}
	fmt.Println(names)
	return nil
}
