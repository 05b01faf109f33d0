package natsx

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The README shows code that the tests run: each of its Go blocks is part of an
// example.
func TestReadmeShowsExamples(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(readme), "\n"); n > 200 {
		t.Errorf("README.md has %d lines, at most 200 are wanted", n)
	}

	var examples strings.Builder
	for _, pattern := range []string{"example_*_test.go", "examples/*/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("no files match %q: %v", pattern, err)
		}
		for _, name := range files {
			source, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			examples.WriteString(strings.Join(strings.Fields(string(source)), " ") + "\n")
		}
	}
	blocks := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(string(readme), -1)
	if len(blocks) == 0 {
		t.Fatal("README.md has no Go block")
	}
	for _, block := range blocks {
		if !strings.Contains(examples.String(), strings.Join(strings.Fields(block[1]), " ")) {
			t.Errorf("no example has this block of README.md:\n%s", block[1])
		}
	}
}
