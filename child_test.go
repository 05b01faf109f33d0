package natsx

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// childEnv tells a copy of the test binary which child it is.
const childEnv = "NATSX_TEST_CHILD"

// childModes are what a child process can be. Each runs until its standard input
// ends, which it does with the parent, and returns the exit status.
var childModes = map[string]func() int{
	"idle": idleChild,
}

func runChild(mode string) int {
	run, ok := childModes[mode]
	if !ok {
		fmt.Fprintf(os.Stderr, "no child mode %q\n", mode)
		return 2
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(3)
	}()
	return run()
}

// raceDetector tells that this binary has the race detector.
var raceDetector bool

// childBinary is what children are copies of: this binary, or one without the race
// detector, which triples what the start of a process costs. Hundreds are started,
// and what they do is run under the detector by other tests.
var childBinary = sync.OnceValues(func() (string, error) {
	if !raceDetector {
		return os.Args[0], nil
	}
	dir, err := os.MkdirTemp("", "natsx-child")
	if err != nil {
		return "", err
	}
	childDir = dir
	path := filepath.Join(dir, "child.test")
	if out, err := exec.Command("go", "test", "-c", "-o", path, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the children's binary: %w: %s", err, out)
	}
	return path, nil
})

// childDir is where childBinary was built; TestMain removes it.
var childDir string

// childURL is the server that the parent named.
func childURL() string { return os.Getenv(childEnv + "_URL") }

// child is a copy of the test binary in a process of its own.
type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
	ready chan struct{} // closed when the child has printed "ready"
	done  chan struct{} // closed when the process is gone
	err   error         // how it ended, once done is closed
}

// startChild runs mode against the server at url, until it ends by itself, is
// killed, or the test ends. What it prints goes to lines, when that is not nil,
// and is dropped while lines is full.
func startChild(t testing.TB, mode, url string, lines chan<- string) *child {
	t.Helper()
	binary, err := childBinary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), childEnv+"="+mode, childEnv+"_URL="+url)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatalf("child: %v", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatalf("child: %v", err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatalf("child: %v", err)
	}
	c := &child{cmd: cmd, stdin: stdin, ready: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(c.done)
		once := sync.OnceFunc(func() { close(c.ready) })
		for out := bufio.NewScanner(stdout); out.Scan(); {
			if out.Text() == "ready" {
				once()
			}
			select {
			case lines <- out.Text():
			default:
			}
		}
		if c.err = cmd.Wait(); c.err != nil && stderr.Len() > 0 {
			c.err = fmt.Errorf("%w: %s", c.err, stderr.String())
		}
	}()
	t.Cleanup(c.kill)
	return c
}

// kill ends the process with SIGKILL, when it has not ended already, and waits
// until it is gone.
func (c *child) kill() {
	c.cmd.Process.Kill()
	<-c.done
	c.stdin.Close()
}

// serves waits until the child is ready, and tells whether it is before it ended.
func (c *child) serves(t testing.TB) bool {
	t.Helper()
	select {
	case <-c.ready:
		return true
	case <-c.done:
		return false
	case <-time.After(testLimit):
		t.Fatal("the child is neither ready nor gone")
		return false
	}
}

// idleChild only connects.
func idleChild() int {
	nc, err := nats.Connect(childURL(), nats.Name("idle child"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer nc.Close()
	fmt.Println("ready")
	select {}
}

func TestChildIsKilled(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	c := startChild(t, "idle", s.ClientURL(), nil)
	if !c.serves(t) {
		t.Fatalf("the child ended: %v", c.err)
	}
	eventually(t, "the child is connected", func() bool { return s.NumClients() == 1 })
	c.kill()
	eventually(t, "the child's connection is gone", func() bool { return s.NumClients() == 0 })
	var exit *exec.ExitError
	if !errors.As(c.err, &exit) || exit.ExitCode() != -1 {
		t.Errorf("got %v, want an end by a signal", c.err)
	}

	failing := startChild(t, "no such mode", s.ClientURL(), nil)
	if failing.serves(t) {
		t.Error("an unknown mode must not run")
	}
	if err := failing.err; err == nil || !strings.Contains(err.Error(), "no such mode") {
		t.Errorf("got %v, want the child's own words", err)
	}
}
