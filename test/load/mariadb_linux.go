package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// MariaDB is a MariaDB server on a directory, run as the user mysql, that is reached
// through a Unix socket only. Commits are written out once a second: what is durable
// earlier is so because somebody saw to it.
type MariaDB struct {
	Socket string
	server *exec.Cmd
	ended  chan error
}

// MariaDBTools are the programs that a MariaDB and its judgement need.
var MariaDBTools = []string{"mariadbd", "mariadb", "mariadb-install-db", "myisamchk", "aria_chk"}

// InitMariaDB makes a data directory, which must not be there.
func InitMariaDB(data string) error {
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if _, err := run("chown", "mysql:", data); err != nil {
		return err
	}
	_, err := run("mariadb-install-db", "--no-defaults", "--user=mysql", "--datadir="+data, "--auth-root-authentication-method=normal",
		"--skip-test-db", "--innodb-log-file-size=16M")
	return err
}

// StartMariaDB starts a server and waits until it answers. It repairs no table by itself.
func StartMariaDB(data, socket string) (*MariaDB, error) {
	m := &MariaDB{Socket: socket, ended: make(chan error, 1)}
	m.server = exec.Command("mariadbd", "--no-defaults", "--user=mysql", "--datadir="+data, "--socket="+socket, "--pid-file="+socket+".pid",
		"--skip-networking", "--innodb-buffer-pool-size=16M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
		"--myisam-recover-options=OFF", "--aria-recover-options=", "--aria-pagecache-buffer-size=8M", "--key-buffer-size=8M",
		"--performance-schema=OFF", "--innodb-use-native-aio=OFF") // asynchronous I/O keeps files busy behind the end
	m.server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said strings.Builder
	m.server.Stdout, m.server.Stderr = &said, &said
	if err := m.server.Start(); err != nil {
		return nil, fmt.Errorf("start mariadbd: %w", err)
	}
	go func() { m.ended <- m.server.Wait() }()
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		_, err := m.Query("SELECT 1")
		if err == nil {
			return m, nil
		}
		select {
		case e := <-m.ended:
			return nil, fmt.Errorf("mariadbd ended: %w: %s", errors.Join(e, err), said.String())
		default:
		}
		if time.Now().After(until) {
			_ = m.server.Process.Kill() // nothing more is wanted of it
			return nil, fmt.Errorf("mariadbd does not answer: %w: %s", errors.Join(err, <-m.ended), said.String())
		}
	}
}

// Stop ends the server in good order.
func (m *MariaDB) Stop() error {
	if err := m.server.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop mariadbd: %w", err)
	}
	select {
	case err := <-m.ended:
		return err
	case <-time.After(30 * time.Second):
		return errors.Join(errors.New("stop mariadbd: not within 30 s"), m.server.Process.Kill())
	}
}

func (m *MariaDB) client() *exec.Cmd {
	return exec.Command("mariadb", "--no-defaults", "--user=root", "--socket="+m.Socket, "--batch", "--skip-column-names", "--unbuffered")
}

// Query returns the answer to a statement.
func (m *MariaDB) Query(sql string) (string, error) {
	cmd := m.client()
	cmd.Args = append(cmd.Args, "-e", sql)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", sql, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// The tables of Mark: one of an engine with transactions and two of engines without.
var engines = map[string]string{"i": "InnoDB", "y": "MyISAM", "a": "Aria TRANSACTIONAL=0"}

// Mark makes a table of each engine and adds numbered rows to all of them, which it records
// once the server has answered, until ctx ends.
func (m *MariaDB) Mark(ctx context.Context, o recorder) error {
	if _, err := m.Query("CREATE DATABASE load_"); err != nil {
		return err
	}
	for table, engine := range engines {
		if _, err := m.Query("CREATE TABLE load_." + table + " (n BIGINT PRIMARY KEY, filler TEXT, KEY (filler(20))) ENGINE=" + engine); err != nil {
			return err
		}
	}
	cmd := m.client()
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	cmd.Stderr = os.Stderr
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		return fmt.Errorf("start client: %w", err)
	}
	said := bufio.NewReader(out)
	var err error
	for row := int64(1); ctx.Err() == nil && err == nil; row++ {
		sql := "USE load_;\n"
		for table := range engines {
			sql += fmt.Sprintf("INSERT INTO %s VALUES (%d, repeat(md5(%d), 8));\n", table, row, row)
		}
		if _, err = fmt.Fprintf(in, "%sSELECT %d;\n", sql, row); err == nil {
			_, err = said.ReadString('\n')
		}
		if err == nil {
			o.Record(row, time.Now())
		}
	}
	return errors.Join(err, in.Close(), cmd.Wait())
}

// CheckMariaDBTables judges the tables of engines without transactions in a data directory
// on which no server runs: an error says which was not whole, or was not closed.
func CheckMariaDBTables(data string) error {
	_, err1 := run("myisamchk", "--no-defaults", "--check", "--silent", "--fast", "--check-only-changed", filepath.Join(data, "load_/y.MYI"))
	_, err2 := run("myisamchk", "--no-defaults", "--check", "--extend-check", filepath.Join(data, "load_/y.MYI"))
	_, err3 := run("aria_chk", "--no-defaults", "--check", "--extend-check", "--logdir="+data, filepath.Join(data, "load_/a.MAI"))
	return errors.Join(err1, err2, err3)
}

// CheckMariaDB starts a server on a recovered data directory and returns the number of rows of each
// engine's table. The error tells of a table that is not whole.
func CheckMariaDB(data, socket string) (rows map[string]int64, err error) {
	m, err := StartMariaDB(data, socket)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Stop()) }()
	rows = make(map[string]int64)
	for table := range engines {
		state, err := m.Query("CHECK TABLE load_." + table + " EXTENDED")
		if err != nil || !strings.HasSuffix(state, "status\tOK") || strings.Contains(state, "warning") {
			return nil, fmt.Errorf("check table %s: %q: %w", table, state, errors.Join(err))
		}
		text, err := m.Query("SELECT COUNT(*), COALESCE(MAX(n), 0) FROM load_." + table)
		if err != nil {
			return nil, err
		}
		var n, highest int64
		if _, err := fmt.Sscan(text, &n, &highest); err != nil || n != highest {
			return nil, fmt.Errorf("rows of table %s (number and highest): %q: some are missing", table, text)
		}
		rows[table] = n
	}
	return rows, nil
}
