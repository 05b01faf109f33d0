package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
)

// The README names every command and exit code, and no flag that there is not.
func TestReadme(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	known := map[string]bool{"h": true}
	for _, c := range commands {
		if !strings.Contains(text, "| `"+c.name+"` |") {
			t.Errorf("README.md has no row for %s", c.name)
		}
		tool := &tool{flags: flag.NewFlagSet(c.name, flag.ContinueOnError), out: io.Discard}
		tool.connection.declare(tool.flags)
		tool.flags.Bool("json", false, "")
		c.prepare(tool)
		tool.flags.VisitAll(func(f *flag.Flag) { known[f.Name] = true })
	}
	for _, code := range []int{exitOK, exitFailed, exitUsage, exitUnconfirmed, exitPartly, exitInterrupted} {
		if !strings.Contains(text, fmt.Sprintf("| %d | ", code)) {
			t.Errorf("README.md has no row for exit code %d", code)
		}
	}
	for _, found := range regexp.MustCompile("[ `]-([a-z][a-z-]*)").FindAllStringSubmatch(text, -1) {
		if !known[found[1]] {
			t.Errorf("README.md has a flag -%s, which no command has", found[1])
		}
	}
}
