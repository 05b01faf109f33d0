package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A usage is what was used until one moment.
type usage struct {
	at             time.Time
	client         time.Duration // of CPU, as the next ones
	helpers        time.Duration
	machine        time.Duration // of all processes
	server         serverState
	mallocs, bytes uint64
}

func (j *job) read() (usage, error) {
	answer, err := j.nc.Request(stateSubject, nil, time.Minute)
	if err != nil {
		return usage{}, fmt.Errorf("state of the server: %w", err)
	}
	var server serverState
	if err := json.Unmarshal(answer.Data, &server); err != nil {
		return usage{}, err
	}
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	u := usage{
		at: time.Now(), client: cpuTime(), machine: machineTime(),
		server: server, mallocs: mem.Mallocs, bytes: mem.TotalAlloc,
	}
	for _, h := range j.helpers {
		u.helpers += processTime(h.cmd.Process.Pid)
	}
	return u, nil
}

// since is what was used after an earlier moment.
func (u usage) since(before usage) figure {
	f := figure{
		ClientCPU:     u.client - before.client,
		ServerCPU:     u.server.CPU - before.server.CPU,
		SlowConsumers: u.server.SlowConsumers - before.server.SlowConsumers,
		Mallocs:       u.mallocs - before.mallocs,
		Bytes:         u.bytes - before.bytes,
		MaxRSS:        maxRSS(),
	}
	others := u.machine - before.machine - f.ClientCPU - f.ServerCPU - (u.helpers - before.helpers)
	f.Others = max(share(others, u.at.Sub(before.at)), 0)
	return f
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

// processTime is the CPU time that a process has used, in steps of 10 ms, and 0 where
// the system does not tell.
func processTime(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// pid (command) state, 10 more, utime stime
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond
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
