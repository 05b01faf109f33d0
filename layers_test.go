package natsx

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// layers are the files of the package from the ground up. A file uses names
// of its own layer or of one below.
var layers = []struct {
	name  string
	files string
}{
	{"ground", // pure: grammar, protocol, errors, small containers
		"subject.go wire.go errors.go queue.go clock.go"},
	{"access", // one client of the JetStream API, one policy of retries
		"api.go"},
	{"vocabulary", // what users and the engine talk about: values, no goroutines
		"natsx.go builder.go delivery.go order.go letter.go retrycopy.go codec.go stream.go envelope.go identity.go observe.go"},
	{"mechanics", // machines, each with one owner and one lock
		"pool.go rate.go agenda.go lease.go history.go window.go budget.go puller.go link.go acker.go env.go " +
			"connect.go explain.go ensure.go ensure_lock.go ordered.go reader.go"},
	{"publishing",
		"publisher.go recent.go denied.go digest.go outgoing.go lookup.go schedule.go publish.go publish_all.go publish_fast.go atomic.go replies.go request.go publish_hook.go"},
	{"running", // what a route does
		"route.go settle.go adopt.go outbox.go breaker.go batch.go sequencer.go consume.go flow.go consumer.go alone.go passover.go dlq.go retrystream.go retries.go core.go reply.go"},
	{"tools", // the day after
		"deadletters.go redrive.go redrive_retry.go redrive_marks.go replay.go replay_run.go replay_source.go kit.go"},
	{"face", // options and Run: start, run, drain
		"broker.go engine.go service.go serve.go doc.go"},
}

// largestCycle is how many files may refer to each other in a circle.
const largestCycle = 3

func TestFilesUseOnlyTheirOwnLayerAndThoseBelow(t *testing.T) {
	t.Parallel()
	uses := fileReferences(t)

	layerOf := map[string]int{}
	for i, layer := range layers {
		for file := range strings.FieldsSeq(layer.files) {
			if _, twice := layerOf[file]; twice {
				t.Errorf("%s stands in the table of layers twice", file)
			}
			if _, exists := uses[file]; !exists {
				t.Errorf("%s stands in the table of layers, but is no file of the package", file)
			}
			layerOf[file] = i
		}
	}
	for file, references := range uses {
		own, known := layerOf[file]
		if !known {
			t.Errorf("%s stands in no layer", file)
			continue
		}
		for other, name := range references {
			if above := layerOf[other]; above > own {
				t.Errorf("%s (%s) uses %s of %s (%s), which is a layer above",
					file, layers[own].name, name, other, layers[above].name)
			}
		}
	}
}

func TestFewFilesReferToEachOther(t *testing.T) {
	t.Parallel()
	for _, cycle := range cycles(fileReferences(t)) {
		if len(cycle) > largestCycle {
			t.Errorf("%d files refer to each other in a circle, of at most %d: %v", len(cycle), largestCycle, cycle)
		}
	}
}

// fileReferences type-checks the package and returns, for each of its files,
// the other files whose names it uses, each with one of those names.
func fileReferences(t *testing.T) map[string]map[string]string {
	t.Helper()
	fset := token.NewFileSet()
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	uses := map[string]map[string]string{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
		uses[path] = map[string]string{}
	}

	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: importer.ForCompiler(fset, "gc", exportData(t))}
	pkg, err := conf.Check("github.com/natsx/natsx", fset, files, info)
	if err != nil {
		t.Fatal(err)
	}
	for name, object := range info.Uses {
		if object.Pkg() != pkg {
			continue
		}
		from, to := fset.Position(name.Pos()).Filename, fset.Position(object.Pos()).Filename
		if from != to {
			uses[from][to] = name.Name
		}
	}
	return uses
}

// exportData finds what the compiler exported of packages and all that they import.
func exportData(t *testing.T, packages ...string) importer.Lookup {
	t.Helper()
	var stderr bytes.Buffer
	list := exec.Command("go", append([]string{"list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}"}, packages...)...)
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list -export: %v\n%s", err, &stderr)
	}
	exports := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, export, _ := strings.Cut(strings.TrimSpace(line), " ")
		exports[path] = export
	}
	return func(path string) (io.ReadCloser, error) {
		export, known := exports[path]
		if !known {
			return nil, fmt.Errorf("no export data of %s", path)
		}
		return os.Open(export)
	}
}

// cycles returns the files that refer to each other, directly or through
// others, by Tarjan's algorithm for strongly connected components.
func cycles(uses map[string]map[string]string) [][]string {
	var (
		found   [][]string
		stack   []string
		onStack = map[string]bool{}
		index   = map[string]int{}
		low     = map[string]int{}
		visit   func(file string)
	)
	visit = func(file string) {
		index[file] = len(index) + 1
		low[file] = index[file]
		stack = append(stack, file)
		onStack[file] = true
		for other := range uses[file] {
			if index[other] == 0 {
				visit(other)
				low[file] = min(low[file], low[other])
			} else if onStack[other] {
				low[file] = min(low[file], index[other])
			}
		}
		if low[file] != index[file] {
			return
		}
		start := slices.Index(stack, file)
		cycle := slices.Sorted(slices.Values(stack[start:]))
		stack = stack[:start]
		for _, member := range cycle {
			onStack[member] = false
		}
		if len(cycle) > 1 {
			found = append(found, cycle)
		}
	}
	for file := range uses {
		if index[file] == 0 {
			visit(file)
		}
	}
	return found
}
