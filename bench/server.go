package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// stateSubject is where the server process answers with its serverState.
const stateSubject = "bench-server.state"

// A serverState is what the server process has counted since its start.
type serverState struct {
	CPU           time.Duration
	SlowConsumers int64
}

// serve is the server process: nats-server with its files in dir, until its
// standard input closes, which it does when the parent ends in any way.
func serve(dir string) error {
	signal.Ignore(os.Interrupt, syscall.SIGTERM) // they reach the parent too
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT,
		JetStream: true, StoreDir: dir, NoLog: true, NoSigs: true,
	})
	if err != nil {
		return err
	}
	s.Start()
	if !s.ReadyForConnections(time.Minute) {
		return errors.New("nats-server is not ready")
	}
	nc, err := nats.Connect("", nats.InProcessServer(s), nats.Timeout(30*time.Second))
	if err != nil {
		return err
	}
	if _, err := nc.Subscribe(stateSubject, func(m *nats.Msg) {
		// An answer that is lost shows as the client's timeout.
		state, _ := json.Marshal(serverState{CPU: cpuTime(), SlowConsumers: s.NumSlowConsumers()})
		_ = m.Respond(state)
	}); err != nil {
		return err
	}
	if err := nc.Flush(); err != nil {
		return err
	}
	fmt.Println(s.ClientURL())
	_, err = io.Copy(io.Discard, os.Stdin)
	// Only a parent that was interrupted gets here; otherwise it kills and cleans up.
	s.Shutdown()
	s.WaitForShutdown()
	return errors.Join(err, os.RemoveAll(dir))
}

type serverProcess struct {
	url   string
	dir   string
	cmd   *exec.Cmd
	stdin io.Closer
}

func startServer() (*serverProcess, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "natsx-bench-")
	if err != nil {
		return nil, err
	}
	p := &serverProcess{dir: dir, cmd: exec.Command(exe, "serve", dir)}
	p.cmd.Stderr = os.Stderr
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	p.stdin = stdin
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err := p.cmd.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		p.stop()
		return nil, fmt.Errorf("start the server: %w", err)
	}
	p.url = strings.TrimSpace(line)
	return p, nil
}

// stop kills: nobody reads the store again, so there is nothing to close.
func (p *serverProcess) stop() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // "signal: killed"
	_ = p.stdin.Close()
	_ = os.RemoveAll(p.dir)
}

const (
	benchStream  = "BENCH"
	benchSubject = "bench.msg"
	dlqStream    = "DLQ"
	dlqSubject   = "dlq.bench"
)

// pendingBytes bounds what is on its way into the stream.
const pendingBytes = 16 << 20

// prepare makes the streams of a section and stores its messages.
func prepare(url string, s section, n int) error {
	nc, err := connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(min(asyncPending, pendingBytes/max(s.size, 1))))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeLimit)
	defer cancel()
	subjects := []string{benchSubject}
	if s.does == trickling {
		subjects = []string{routeSubjects}
	}
	for _, cfg := range []jetstream.StreamConfig{
		{Name: benchStream, Subjects: subjects, Storage: s.storage, AllowBatchPublish: s.does == fastPublishing},
		{Name: dlqStream, Subjects: []string{dlqSubject}, Discard: jetstream.DiscardNew},
	} {
		if _, err := js.CreateStream(ctx, cfg); err != nil {
			return err
		}
	}
	if s.does != consuming && s.does != draining && s.does != reading {
		return nil
	}
	for i := range n {
		payload := make([]byte, s.size)
		binary.BigEndian.PutUint64(payload, uint64(i))
		if _, err := js.PublishAsync(benchSubject, payload, jetstream.WithStallWait(time.Minute)); err != nil {
			return err
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-ctx.Done():
		return ctx.Err()
	}
	st, err := js.Stream(ctx, benchStream)
	if err != nil {
		return err
	}
	if got := st.CachedInfo().State.Msgs; got != uint64(n) {
		return fmt.Errorf("the stream holds %d of %d messages", got, n)
	}
	return nil
}
