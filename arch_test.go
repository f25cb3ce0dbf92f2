package farside

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "rewrite the generated part of .golangci.yml")

const (
	module       = "farside"
	internal     = module + "/internal/"
	architecture = "docs/ARCHITECTURE.md"
	linter       = ".golangci.yml"
	generatedTop = "        # Generated from docs/ARCHITECTURE.md by `make generate`; do not edit.\n"
	generatedEnd = "        # End of the generated part.\n"
)

// table maps each row of the import table to the rows that it may import.
type table map[string][]string

func readTable(t *testing.T) table {
	t.Helper()
	text, err := os.ReadFile(architecture)
	if err != nil {
		t.Fatal(err)
	}
	tab, err := parseTable(text)
	if err != nil {
		t.Fatalf("%s: %v", architecture, err)
	}
	return tab
}

func parseTable(text []byte) (table, error) {
	_, rest, ok := bytes.Cut(text, []byte("```imports\n"))
	block, _, ok2 := bytes.Cut(rest, []byte("```\n"))
	if !ok || !ok2 {
		return nil, errors.New("no block of imports")
	}
	tab := table{}
	for line := range strings.Lines(string(block)) {
		name, allowed, ok := strings.Cut(line, "→")
		name = strings.TrimSpace(name)
		if _, twice := tab[name]; !ok || name == "" || twice {
			return nil, fmt.Errorf("bad or repeated row %q", line)
		}
		tab[name] = strings.Fields(allowed)
	}
	for name, allowed := range tab {
		for _, other := range allowed {
			if _, ok := tab[other]; !ok {
				return nil, fmt.Errorf("row %s allows %s, which has no row", name, other)
			}
		}
	}
	return tab, nil
}

// pkg is what `go list` says of a package that the checks need.
type pkg struct {
	ImportPath string
	Doc        string
	GoFiles    []string
	Imports    []string
}

// listPackages lists the module's packages for every platform that we support, since build
// constraints hide files.
func listPackages(t *testing.T) []pkg {
	t.Helper()
	var all []pkg
	for _, platform := range []string{"linux/amd64", "linux/arm64", "windows/amd64"} {
		goos, goarch, _ := strings.Cut(platform, "/")
		cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Doc,GoFiles,Imports", "./...")
		cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH="+goarch, "CGO_ENABLED=0")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list for %s: %v", platform, err)
		}
		dec := json.NewDecoder(bytes.NewReader(out))
		for {
			var p pkg
			err := dec.Decode(&p)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(p.GoFiles) > 0 {
				all = append(all, p)
			}
		}
	}
	return all
}

// row returns the row of the table that an import path belongs to: the first directory below internal.
func row(path string) (string, bool) {
	rest, ok := strings.CutPrefix(path, internal)
	if !ok {
		return "", false
	}
	name, _, _ := strings.Cut(rest, "/")
	return name, true
}

// testOnly reports whether a package exists for tests alone.
func testOnly(path string) bool {
	return path == internal+"testenv" || strings.HasSuffix(path, "test")
}

// violations says what in p breaks the table.
func violations(tab table, p pkg) []string {
	name, ours := row(p.ImportPath)
	allowed, known := tab[name]
	if ours && !known {
		return []string{fmt.Sprintf("%s has no row in the table of %s", p.ImportPath, architecture)}
	}
	var bad []string
	for _, imp := range p.Imports {
		other, inner := row(imp)
		switch {
		case !inner:
		case testOnly(imp) && !testOnly(p.ImportPath):
			bad = append(bad, fmt.Sprintf("%s imports %s, which is for tests only", p.ImportPath, imp))
		case testOnly(p.ImportPath) && testOnly(imp), other == name:
		case ours && !slices.Contains(allowed, other):
			bad = append(bad, fmt.Sprintf("%s imports %s: the row %s of %s does not allow it", p.ImportPath, imp, name, architecture))
		}
	}
	return bad
}

func TestImportTable(t *testing.T) {
	tab := readTable(t)
	for _, p := range listPackages(t) {
		for _, v := range violations(tab, p) {
			t.Error(v)
		}
	}
}

// TestImportTableHasPower shows that each kind of violation is seen.
func TestImportTableHasPower(t *testing.T) {
	tab, err := parseTable([]byte("```imports\na →\nb → a\n```\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		p    pkg
		want int
	}{
		{"allowed", pkg{ImportPath: internal + "b", Imports: []string{internal + "a", internal + "b/sub", "fmt"}}, 0},
		{"not in the row", pkg{ImportPath: internal + "a", Imports: []string{internal + "b"}}, 1},
		{"subpackage of a row", pkg{ImportPath: internal + "a/sub", Imports: []string{internal + "b/sub"}}, 1},
		{"no row", pkg{ImportPath: internal + "c"}, 1},
		{"for tests only", pkg{ImportPath: internal + "b", Imports: []string{internal + "a/atest"}}, 1},
		{"command", pkg{ImportPath: module + "/cmd/x", Imports: []string{internal + "a", internal + "b"}}, 0},
		{"command, for tests only", pkg{ImportPath: module + "/cmd/x", Imports: []string{internal + "testenv"}}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := violations(tab, tc.p); len(got) != tc.want {
				t.Errorf("got %d violations %q, want %d", len(got), got, tc.want)
			}
		})
	}
	for _, bad := range []string{"", "```imports\na → b\n```\n", "```imports\na →\na →\n```\n", "```imports\nnothing\n```\n"} {
		if _, err := parseTable([]byte(bad)); err == nil {
			t.Errorf("table %q was accepted", bad)
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range listPackages(t) {
		if p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

// depguardRules renders the table as rules of the linter depguard.
func depguardRules(tab table) string {
	var b strings.Builder
	b.WriteString(generatedTop)
	names := make([]string, 0, len(tab))
	for name := range tab {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(&b, "        %s:\n          list-mode: lax\n          files: [\"**/internal/%s/**\", \"!$test\", \"!**/*test/**\"]\n          allow:\n", name, name)
		for _, other := range append([]string{name}, tab[name]...) {
			fmt.Fprintf(&b, "            - %s%s\n", internal, other)
		}
		fmt.Fprintf(&b, "          deny:\n            - pkg: %s/\n              desc: the import table of docs/ARCHITECTURE.md\n", module)
	}
	b.WriteString(generatedEnd)
	return b.String()
}

// TestDepguard checks that the linter's rules are the table's; with -update it makes them so.
func TestDepguard(t *testing.T) {
	text, err := os.ReadFile(linter)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), generatedTop)
	_, after, ok2 := strings.Cut(rest, generatedEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has lost the marks around its generated part", linter)
	}
	want := before + depguardRules(readTable(t)) + after
	if *update {
		if err := os.WriteFile(linter, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if want != string(text) {
		t.Errorf("the depguard rules of %s are not those of %s: run make generate", linter, architecture)
	}
	var parsed map[string]any
	if err := yaml.Unmarshal(text, &parsed); err != nil {
		t.Errorf("%s: %v", linter, err)
	}
}

// TestLinks checks that the documents name only files that exist.
func TestLinks(t *testing.T) {
	out, err := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md").Output()
	if err != nil {
		t.Skipf("git does not list the documents: %v", err)
	}
	sc := bufio.NewScanner(bytes.NewReader(out))
	for sc.Scan() {
		checkLinks(t, sc.Text())
	}
}

func checkLinks(t *testing.T, doc string) {
	t.Helper()
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Error(err)
		return
	}
	dir := "."
	if i := strings.LastIndexByte(doc, '/'); i >= 0 {
		dir = doc[:i]
	}
	for _, part := range strings.Split(string(text), "](")[1:] {
		target, _, _ := strings.Cut(part, ")")
		target, _, _ = strings.Cut(target, "#")
		if target == "" || strings.Contains(target, "://") || strings.ContainsAny(target, " \n") {
			continue
		}
		if _, err := os.Stat(dir + "/" + target); err != nil {
			t.Errorf("%s links to %s, which does not exist", doc, target)
		}
	}
}
