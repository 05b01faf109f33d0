//go:build unix

package natsx

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func init() { childModes["suspended"] = suspendedChild }

// suspendedChild handles naps and says which.
func suspendedChild() int {
	nc, err := nats.Connect(childURL())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	b := NewBroker(nc, WithWorkers(napWorkers))
	go func() {
		<-b.Ready()
		fmt.Println("ready")
	}()
	err = b.Run(context.Background(), Route("naps.*").Durable("d").AckWait(time.Second).Handle(func(_ context.Context, m *Msg) error {
		fmt.Printf("handled %s\n", m.Data)
		return nil
	}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

const napWorkers = 8

// A process that was stopped finds messages in its socket whose leases ended
// while it slept, and which others have handled.
func TestSuspendedProcessStartsNothingOld(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "NAPS", Subjects: []string{"naps.*"}})
	lines := make(chan string, 1000)
	c := startChild(t, "suspended", s.ClientURL(), lines)
	if !c.serves(t) {
		t.Fatalf("the child ended: %v", c.err)
	}
	if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(c.cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("the child is not stopped: %v, status %x", err, status)
	}
	publishMany(t, nc, napWorkers, numbered("naps.x"))
	eventually(t, "the server has sent all", func() bool { return consumerInfo(t, nc, "NAPS", "d").NumPending == 0 })
	var handled tally
	other := runBroker(t, NewBroker(nc), Route("naps.*").Durable("d").AckWait(time.Second).Handle(func(_ context.Context, m *Msg) error {
		handled.add(string(m.Data))
		return nil
	}))
	eventually(t, "another broker has handled the rest", func() bool { return settled(t, nc, "NAPS", "d") })
	if err := other.stop(t); err != nil {
		t.Error(err)
	}
	if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	publish(t, nc, &nats.Msg{Subject: "naps.x", Data: []byte("after the nap")})
	for {
		line := receive(t, lines, "the message after the nap")
		if line == "handled after the nap" {
			break
		}
		if number, ok := strings.CutPrefix(line, "handled "); ok && handled.get(number) > 0 {
			t.Errorf("the child handled %s too", number)
		}
	}
	handled.wantOnce(t, napWorkers)
}
