package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// A task tells a helper process what to do.
type task struct {
	Kind    string // of helperKinds
	URL     string
	N, Size int
}

// helperKinds are what helpers do until stop is closed; they return their report.
var helperKinds = map[string]func(t task, stop <-chan struct{}) (any, error){
	"burn":         burn,
	"publish-core": publishCore,
	"trickle":      publishTrickle,
}

// runHelper is the helper process, which ends when its standard input closes.
func runHelper(arg string) error {
	var t task
	if err := json.Unmarshal([]byte(arg), &t); err != nil {
		return err
	}
	stop := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	report, err := helperKinds[t.Kind](t, stop)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(report)
}

// A helper is a process beside the client, which does what must not count as the
// client's work.
type helper struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	stdout bytes.Buffer
	ended  chan error // receives what Wait returned
}

// startHelper starts a helper, whose failure is the job's.
func (j *job) startHelper(t task) (*helper, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	arg, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	h := &helper{cmd: exec.Command(exe, "helper", string(arg)), ended: make(chan error, 1)}
	h.cmd.Stdout, h.cmd.Stderr = &h.stdout, os.Stderr
	if h.stdin, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := h.cmd.Start(); err != nil {
		return nil, err
	}
	j.helpers = append(j.helpers, h)
	go func() {
		err := h.cmd.Wait()
		if err != nil {
			err = fmt.Errorf("helper %q: %w", t.Kind, err)
			j.fail(err)
		}
		h.ended <- err
	}()
	return h, nil
}

// stop ends the helper and decodes its report, unless that is nil.
func (h *helper) stop(report any) error {
	_ = h.stdin.Close() // fails when the helper has ended, as the next line finds
	if err := <-h.ended; err != nil || report == nil {
		return err
	}
	return json.Unmarshal(h.stdout.Bytes(), report)
}

// besideBurners calls fn while another process keeps so many cores busy.
func (j *job) besideBurners(n int, fn func(*job) error) error {
	if n == 0 {
		return fn(j)
	}
	h, err := j.startHelper(task{Kind: "burn", N: n})
	if err != nil {
		return err
	}
	return errors.Join(fn(j), h.stop(nil))
}

// burn keeps so many cores busy.
func burn(t task, stop <-chan struct{}) (any, error) {
	for range t.N {
		go func() {
			for n := 0; ; n++ {
			}
		}()
	}
	<-stop
	return nil, nil
}
