package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
)

// A meter reads what a run costs client and server.
type meter struct {
	at             time.Time
	client         time.Duration // of CPU
	server         serverState
	machine        time.Duration // of CPU, of all processes
	mallocs, bytes uint64
}

func readMeter(nc *nats.Conn) (meter, error) {
	answer, err := nc.Request(stateSubject, nil, time.Minute)
	if err != nil {
		return meter{}, fmt.Errorf("state of the server: %w", err)
	}
	var server serverState
	if err := json.Unmarshal(answer.Data, &server); err != nil {
		return meter{}, err
	}
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return meter{
		at: time.Now(), client: cpuTime(), server: server,
		machine: machineTime(), mallocs: mem.Mallocs, bytes: mem.TotalAlloc,
	}, nil
}

func (m *meter) start(nc *nats.Conn) error {
	var err error
	*m, err = readMeter(nc)
	return err
}

func (m *meter) stop(nc *nats.Conn) (figure, error) {
	end, err := readMeter(nc)
	f := figure{
		ClientCPU: end.client - m.client,
		ServerCPU: end.server.CPU - m.server.CPU,
		Mallocs:   end.mallocs - m.mallocs,
		Bytes:     end.bytes - m.bytes,
		MaxRSS:    maxRSS(),

		SlowConsumers: end.server.SlowConsumers - m.server.SlowConsumers,
	}
	others := end.machine - m.machine - f.ClientCPU - f.ServerCPU
	f.Others = max(share(others, end.at.Sub(m.at)), 0)
	return f, err
}

// share is what part of the machine's cores a CPU time is.
func share(cpu, elapsed time.Duration) float64 {
	return float64(cpu) / float64(elapsed) / float64(runtime.NumCPU())
}

// machineTime is the CPU time that all processes have used since boot, in steps
// of 10 ms, and 0 where the system does not tell.
func machineTime() time.Duration {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(text), "\n")
	var ticks int64
	for i, field := range strings.Fields(line) { // cpu user nice system idle iowait irq softirq steal guest guest_nice
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// maxRSS is the most memory in bytes that this process has had resident, and 0 where
// the system does not tell. What getrusage says may be the parent's.
func maxRSS() int64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kB, _, _ := strings.Cut(rest, " kB")
	n, _ := strconv.ParseInt(strings.TrimSpace(kB), 10, 64)
	return n << 10
}

// cpuTime is the user and system time that this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err) // only for a bad argument
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
