package natsx

import (
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What .ci/run shows of dropped setters holds for all of them.
func TestEverySetterIsAmongTheDropped(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("testdata/dropped/dropped.go")
	if err != nil {
		t.Fatal(err)
	}
	builder := reflect.TypeFor[RouteBuilder]()
	for i := range builder.NumMethod() {
		if name := builder.Method(i).Name; !strings.Contains(string(source), "\tr."+name+"(") {
			t.Errorf("testdata/dropped does not call %s", name)
		}
	}
}

// exported is a name that a package exports: Func, Type, Type.Method or Type.Field.
type exported struct {
	documented bool
	callable   bool // a function or method
	at         token.Position
}

// exportedNames are those of the package in a directory.
func exportedNames(t *testing.T, dir string) map[string]exported {
	t.Helper()
	fset := token.NewFileSet()
	names := map[string]exported{}
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if file.Name.Name == "main" {
			continue
		}
		add := func(name string, pos token.Pos, callable bool, docs ...*ast.CommentGroup) {
			documented := slices.ContainsFunc(docs, func(d *ast.CommentGroup) bool { return d != nil && strings.TrimSpace(d.Text()) != "" })
			names[name] = exported{documented, callable, fset.Position(pos)}
		}
		for _, decl := range file.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				name := d.Name.Name
				if receiver := receiverType(d); receiver != "" {
					if !ast.IsExported(receiver) {
						continue
					}
					name = receiver + "." + name
				}
				if d.Name.IsExported() {
					add(name, d.Pos(), true, d.Doc)
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch s := spec.(type) {
					case *ast.TypeSpec:
						if s.Name.IsExported() {
							add(s.Name.Name, s.Pos(), false, d.Doc, s.Doc, s.Comment)
							addMembers(s, add)
						}
					case *ast.ValueSpec:
						for _, n := range s.Names {
							if n.IsExported() {
								add(n.Name, n.Pos(), false, d.Doc, s.Doc, s.Comment)
							}
						}
					}
				}
			}
		}
	}
	return names
}

// receiverType is the name of a method's type, empty for a function.
func receiverType(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	typ := d.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	if index, ok := typ.(*ast.IndexExpr); ok {
		typ = index.X
	}
	return typ.(*ast.Ident).Name
}

// addMembers adds the fields of a struct and the methods of an interface.
func addMembers(s *ast.TypeSpec, add func(name string, pos token.Pos, callable bool, docs ...*ast.CommentGroup)) {
	var list *ast.FieldList
	switch typ := s.Type.(type) {
	case *ast.StructType:
		list = typ.Fields
	case *ast.InterfaceType:
		list = typ.Methods
	default:
		return
	}
	for _, f := range list.List {
		for _, n := range f.Names {
			if n.IsExported() {
				add(s.Name.Name+"."+n.Name, n.Pos(), false, f.Doc, f.Comment)
			}
		}
	}
}

// Every exported name has a doc comment, in every package that others import.
func TestEveryExportedNameIsDocumented(t *testing.T) {
	t.Parallel()
	dirs := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "internal" || path == "examples" || path == "bench") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) == ".go" {
			dirs[filepath.Dir(path)] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir := range dirs {
		names := exportedNames(t, dir)
		for name, n := range names {
			if !n.documented {
				t.Errorf("%s: %s has no doc comment", n.at, name)
			}
		}
		if dir == "." && len(names) < 300 {
			t.Errorf("%d exported names were found, want all", len(names))
		}
	}
}

// shownByExamples are the functions and methods of the package that its runnable
// examples use, directly or in what they call: Func and Type.Method.
func shownByExamples(t *testing.T) map[string]bool {
	t.Helper()
	fset := token.NewFileSet()
	paths, err := filepath.Glob("example*_test.go")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	var files []*ast.File
	imports := map[string]bool{}
	for _, path := range paths {
		file, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
		for _, spec := range file.Imports {
			imports[strings.Trim(spec.Path.Value, `"`)] = true
		}
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: importer.ForCompiler(fset, "gc", exportData(t, slices.Collect(maps.Keys(imports))...))}
	if _, err := conf.Check("github.com/natsx/natsx_test", fset, files, info); err != nil {
		t.Fatal(err)
	}

	bodies := map[types.Object]*ast.FuncDecl{} // of the examples' functions and methods
	methods := map[string][]types.Object{}     // by the name of their type
	var reached []types.Object
	for _, file := range files {
		for _, decl := range file.Decls {
			d, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			object := info.Defs[d.Name]
			bodies[object] = d
			if receiver := receiverType(d); receiver != "" {
				methods[receiver] = append(methods[receiver], object)
			} else if strings.HasPrefix(d.Name.Name, "Example") && hasOutput(file, d) {
				reached = append(reached, object)
			}
		}
	}
	shown, seen := map[string]bool{}, map[types.Object]bool{}
	for len(reached) > 0 {
		object := reached[0]
		reached = reached[1:]
		if seen[object] {
			continue
		}
		seen[object] = true
		ast.Inspect(bodies[object], func(n ast.Node) bool {
			name, ok := n.(*ast.Ident)
			if !ok {
				return true
			}
			switch use := info.Uses[name].(type) {
			case *types.Func:
				if use.Origin().Pkg() != nil && use.Origin().Pkg().Path() == "github.com/natsx/natsx" {
					shown[funcName(use.Origin())] = true
				} else if bodies[use] != nil {
					reached = append(reached, use)
				}
			case *types.TypeName: // whose methods the package may call
				if use.Pkg() != nil && use.Pkg().Name() == "natsx_test" {
					reached = append(reached, methods[use.Name()]...)
				}
			}
			return true
		})
	}
	return shown
}

// funcName is Func or Type.Method.
func funcName(f *types.Func) string {
	receiver := f.Signature().Recv()
	if receiver == nil {
		return f.Name()
	}
	typ := receiver.Type()
	if pointer, ok := typ.(*types.Pointer); ok {
		typ = pointer.Elem()
	}
	if named, ok := typ.(*types.Named); ok {
		return named.Obj().Name() + "." + f.Name()
	}
	return f.Name()
}

// hasOutput reports whether go test runs an example.
func hasOutput(file *ast.File, d *ast.FuncDecl) bool {
	return slices.ContainsFunc(file.Comments, func(c *ast.CommentGroup) bool {
		text := strings.ToLower(c.Text())
		return c.Pos() > d.Pos() && c.End() < d.End() && (strings.HasPrefix(text, "output:") || strings.HasPrefix(text, "unordered output:"))
	})
}

// withoutExample are functions and methods that need none.
var withoutExample = []string{}

// Every capability, which is a function or a method, is shown by an example that go
// test runs.
func TestEveryCapabilityHasAnExample(t *testing.T) {
	t.Parallel()
	shown := shownByExamples(t)
	var missing []string
	for name, n := range exportedNames(t, ".") {
		_, method, _ := strings.Cut(name, ".")
		if !n.callable || slices.Contains([]string{"Error", "Unwrap", "Is", "String"}, method) {
			continue
		}
		if !shown[name] && !slices.Contains(withoutExample, name) {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		t.Errorf("%d have no example that runs: %s", len(missing), strings.Join(missing, " "))
	}
}

// goBlocks are the Go blocks of a document whose opening line is fence.
func goBlocks(t *testing.T, path, fence string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^"+fence+"\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// docsImports are what the blocks of the documents may import without saying so, and
// docsPreamble the names that they may use.
var docsImports = []string{
	"context", "encoding/json", "errors", "fmt", "log", "log/slog", "net/http", "os", "testing", "time",
	"github.com/nats-io/nats.go", "github.com/nats-io/nats.go/jetstream", "github.com/natsx/natsx",
}

const docsPreamble = `
type Order struct { ID string; Cents int }
var (
	nc     *nats.Conn
	pub    *natsx.Publisher
	quiet  natsx.Option
	handle natsx.Handler
	logged natsx.Middleware
	ctx    context.Context
	bill   func(context.Context, []byte) error
)
func charge(ctx context.Context, o Order) error { return nil }
`

// The Go blocks of the documents compile. A block is a file, declarations or statements.
func TestDocsCompile(t *testing.T) {
	t.Parallel()
	paths, err := filepath.Glob("docs/*.md")
	if err != nil || len(paths) < 4 {
		t.Fatalf("the documents are %q, %v", paths, err)
	}
	fset := token.NewFileSet()
	export := importer.ForCompiler(fset, "gc", exportData(t, docsImports...))
	imports := ""
	for _, path := range docsImports {
		imports += fmt.Sprintf("import %q\n", path)
	}
	for _, path := range paths {
		if path == "docs/testing.md" {
			continue // it runs, in natsxtest
		}
		for i, block := range goBlocks(t, path, "```go") {
			name := fmt.Sprintf("%s, Go block %d", path, i+1)
			source := block
			switch {
			case strings.HasPrefix(block, "package "):
			case regexp.MustCompile(`(?m)\A(//.*\n)*(func|type|var|const) `).MatchString(block):
				source = "package docs\n" + imports + docsPreamble + block
			default:
				source = "package docs\n" + imports + docsPreamble + "func _() {\n" + block + "}\n"
			}
			file, err := parser.ParseFile(fset, name, source, 0)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			conf := types.Config{Importer: export, Error: func(err error) {
				var fault types.Error
				if errors.As(err, &fault) && !fault.Soft { // what is not used is soft
					t.Errorf("%s: %v\n%s", name, err, block)
				}
			}}
			conf.Check("docs", fset, []*ast.File{file}, nil)
		}
	}
}

// The texts by which one finds a problem are those that natsx says.
func TestTroubleshootingQuotesWhatIsSaid(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		part, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		source.Write(part)
	}
	quotes := regexp.MustCompile("(?m)^### `(.*)`$").FindAllStringSubmatch(string(text), -1)
	if len(quotes) < 20 {
		t.Errorf("%d quotes, want more", len(quotes))
	}
	for _, q := range quotes {
		if !strings.Contains(source.String(), q[1]) {
			t.Errorf("nothing says %q", q[1])
		}
	}
}

// Links between the documents lead somewhere.
func TestDocsLinks(t *testing.T) {
	t.Parallel()
	paths, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	anchor := func(heading string) string {
		heading = strings.ToLower(strings.TrimLeft(heading, "# "))
		return strings.ReplaceAll(regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(heading, ""), " ", "-")
	}
	for _, path := range append(paths, "README.md", "bench/README.md") {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		prose := regexp.MustCompile("(?s)```.*?```|`[^`]*`").ReplaceAllString(string(text), "")
		for _, link := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(prose, -1) {
			if strings.Contains(link[1], "://") {
				continue
			}
			target, fragment, _ := strings.Cut(link[1], "#")
			file := path
			if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
			}
			there, err := os.ReadFile(file)
			if info, statErr := os.Stat(file); statErr == nil && info.IsDir() {
				continue
			}
			if err != nil {
				t.Errorf("%s: link to %q: %v", path, link[1], err)
				continue
			}
			headings := regexp.MustCompile(`(?m)^#+ .*$`).FindAllString(string(there), -1)
			if fragment != "" && !slices.ContainsFunc(headings, func(h string) bool { return anchor(h) == fragment }) {
				t.Errorf("%s: link to %q: no such heading", path, link[1])
			}
		}
	}
}
