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
	// nap stops the child when it has just handled a message, and has pulled more.
	nap := func() {
		publish(t, nc, &nats.Msg{Subject: "naps.x", Data: []byte("before")})
		for receive(t, lines, "the message before the nap") != "handled before" {
		}
		if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		var status syscall.WaitStatus
		if _, err := syscall.Wait4(c.cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
			t.Fatalf("the child is not stopped: %v, status %x", err, status)
		}
	}
	wake := func() {
		if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	// Its pull ends soon, and on a busy machine before the messages are there.
	round := ""
	for sent := false; !sent; {
		nap()
		unsettled := consumerInfo(t, nc, "NAPS", "d").NumAckPending
		round += "I"
		publishMany(t, nc, napWorkers, func(i int) *nats.Msg {
			return &nats.Msg{Subject: "naps.x", Data: fmt.Appendf(nil, "%s/%d", round, i)}
		})
		if sent = consumerInfo(t, nc, "NAPS", "d").NumAckPending > unsettled; !sent {
			wake()
		}
	}
	var handled tally // of the last round
	other := runBroker(t, NewBroker(nc), Route("naps.*").Durable("d").AckWait(time.Second).Handle(func(_ context.Context, m *Msg) error {
		if strings.HasPrefix(string(m.Data), round+"/") {
			handled.add(string(m.Data))
		}
		return nil
	}))
	eventually(t, "another broker has handled the rest", func() bool { return settled(t, nc, "NAPS", "d") })
	if err := other.stop(t); err != nil {
		t.Error(err)
	}
	wake()
	publish(t, nc, &nats.Msg{Subject: "naps.x", Data: []byte("after the nap")})
	for {
		line := receive(t, lines, "the message after the nap")
		if line == "handled after the nap" {
			break
		}
		if body, ok := strings.CutPrefix(line, "handled "); ok && handled.get(body) > 0 {
			t.Errorf("the child handled %s too", body)
		}
	}
	handled.wantOnce(t, napWorkers)
}
