// Package embedded runs a nats-server inside the process, for the examples and natsxtest.
package embedded

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Run starts a nats-server with JetStream on a free port of the loopback, with its
// files in a new temporary directory. It returns the server's URL once clients can
// connect, and stop, which ends the server and removes its files; close the
// connections before.
func Run() (url string, stop func(), err error) {
	s, stop, err := Start()
	if err != nil {
		return "", nil, err
	}
	return s.ClientURL(), stop, nil
}

// Start is [Run] for a server whose options edit may change first.
func Start(edit ...func(*server.Options)) (s *server.Server, stop func(), err error) {
	dir, err := os.MkdirTemp("", "natsx-")
	if err != nil {
		return nil, nil, fmt.Errorf("embedded nats-server: %w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	opts := &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT,
		JetStream: true, StoreDir: dir,
		NoLog: true, NoSigs: true,
	}
	for _, fn := range edit {
		fn(opts)
	}
	s, err = server.NewServer(opts)
	if err != nil {
		return nil, nil, fmt.Errorf("embedded nats-server: %w", err)
	}
	s.Start()
	stop = func() {
		s.Shutdown()
		s.WaitForShutdown()
		os.RemoveAll(dir)
	}
	if !s.ReadyForConnections(30 * time.Second) {
		stop()
		return nil, nil, errors.New("embedded nats-server: not ready within 30 s")
	}
	return s, stop, nil
}
