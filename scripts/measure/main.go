// Command measure prints the shape of the code in one line: sizes, lengths of files and functions,
// cyclomatic complexity, share of comments, dependencies. Run it at the root of the module.
//
// It counts Go files that are not generated, and tests apart from the rest. A triple a/b/c is
// median, 95th percentile and maximum. It keeps no state and uses one goroutine.
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// tally is what has been counted so far.
type tally struct {
	packages                 map[string]bool // by directory: whether some file has a package comment
	edges                    map[[2]string]bool
	fileLines, funcLines     []int
	complexity, members      []int
	code, testCode, comments int
	fuzz, tests, notes       int
	nolint                   int
}

func main() {
	t := tally{packages: map[string]bool{}, edges: map[[2]string]bool{}}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != "." || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		return t.file(path)
	})
	if err == nil {
		err = t.print()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "measure:", err)
		os.Exit(1)
	}
}

func (t *tally) file(path string) error {
	src, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read source: %w", err)
	}
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, path, src, parser.ParseComments)
	if err != nil {
		return fmt.Errorf("parse source: %w", err)
	}
	if ast.IsGenerated(f) {
		return nil
	}
	code, comments := count(string(src))
	if strings.HasSuffix(path, "_test.go") {
		t.testCode += code
		t.testFuncs(f)
		return nil
	}
	t.code += code
	t.comments += comments
	t.fileLines = append(t.fileLines, strings.Count(string(src), "\n"))
	dir := filepath.Dir(path)
	t.packages[dir] = t.packages[dir] || f.Doc != nil
	for _, imp := range f.Imports {
		if p := strings.Trim(imp.Path.Value, `"`); strings.HasPrefix(p, "farside/") {
			t.edges[[2]string{dir, p}] = true
		}
	}
	t.shape(fset, f)
	return nil
}

// count returns the lines of code and of whole-line comments.
func count(src string) (code, comments int) {
	for line := range strings.Lines(src) {
		switch line = strings.TrimSpace(line); {
		case line == "":
		case strings.HasPrefix(line, "//"):
			comments++
		default:
			code++
		}
	}
	return code, comments
}

func (t *tally) testFuncs(f *ast.File) {
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		switch {
		case !ok || fn.Recv != nil:
		case strings.HasPrefix(fn.Name.Name, "Fuzz"):
			t.fuzz++
		case strings.HasPrefix(fn.Name.Name, "Test") && fn.Name.Name != "TestMain":
			t.tests++
		}
	}
}

// shape takes the functions, interfaces and notes of a file.
func (t *tally) shape(fset *token.FileSet, f *ast.File) {
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok {
			t.funcLines = append(t.funcLines, fset.Position(fn.End()).Line-fset.Position(fn.Pos()).Line+1)
			t.complexity = append(t.complexity, cyclomatic(fn))
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if i, ok := n.(*ast.InterfaceType); ok && i.Methods.NumFields() > 0 {
			t.members = append(t.members, i.Methods.NumFields())
		}
		return true
	})
	for _, g := range f.Comments {
		for _, c := range g.List {
			if strings.Contains(c.Text, "TODO") || strings.Contains(c.Text, "FIXME") {
				t.notes++
			}
			if strings.HasPrefix(c.Text, "//nolint") {
				t.nolint++
			}
		}
	}
}

// cyclomatic counts one plus the branches of a function.
func cyclomatic(fn *ast.FuncDecl) int {
	n := 1
	ast.Inspect(fn, func(node ast.Node) bool {
		switch x := node.(type) {
		case *ast.IfStmt, *ast.ForStmt, *ast.RangeStmt:
			n++
		case *ast.CaseClause:
			if x.List != nil {
				n++
			}
		case *ast.CommClause:
			if x.Comm != nil {
				n++
			}
		case *ast.BinaryExpr:
			if x.Op == token.LAND || x.Op == token.LOR {
				n++
			}
		}
		return true
	})
	return n
}

func (t *tally) print() error {
	deps, err := directDependencies("go.mod")
	if err != nil {
		return err
	}
	documented := 0
	for _, doc := range t.packages {
		if doc {
			documented++
		}
	}
	complex15 := 0
	for _, c := range t.complexity {
		if c > 15 {
			complex15++
		}
	}
	_, err = fmt.Printf("pkgs %d files %d sloc %d test/code %.2f file %s fn %s/%d/%d cyc95 %d cyc>15 %.1f%% comment %.0f%% pkgdoc %.0f%% iface %d/%d edges/pkg %.1f deps %d fuzz %d tests %d todo %d nolint %d\n",
		len(t.packages), len(t.fileLines), t.code, ratio(t.testCode, t.code), spread(t.fileLines),
		fmt.Sprintf("%d/%d", at(t.funcLines, 50), at(t.funcLines, 95)), at(t.funcLines, 99), at(t.funcLines, 100),
		at(t.complexity, 95), 100*ratio(complex15, len(t.complexity)), 100*ratio(t.comments, t.code+t.comments),
		100*ratio(documented, len(t.packages)), at(t.members, 50), at(t.members, 95),
		ratio(len(t.edges), len(t.packages)), deps, t.fuzz, t.tests, t.notes, t.nolint)
	return err
}

func directDependencies(path string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read module file: %w", err)
	}
	n, block := 0, false
	for line := range strings.Lines(string(text)) {
		switch line = strings.TrimSpace(line); {
		case line == "require (":
			block = true
		case line == ")":
			block = false
		case line != "" && (block || strings.HasPrefix(line, "require ")) && !strings.HasSuffix(line, "// indirect"):
			n++
		}
	}
	return n, nil
}

func ratio(a, b int) float64 { return float64(a) / float64(max(b, 1)) }

func spread(values []int) string {
	return fmt.Sprintf("%d/%d/%d", at(values, 50), at(values, 95), at(values, 100))
}

// at returns the given percentile.
func at(values []int, percent int) int {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return values[percent*(len(values)-1)/100]
}
