// Command bench compares natsx with other clients that consume, publish and answer over
// NATS. The README explains its output.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"time"
)

// calmLimit is how long -calm waits for each figure.
const calmLimit = 10 * time.Minute

// standardN is -n unless it is said, for which the sections' shares are made.
const standardN = 200_000

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		err = serve(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "client":
		err = runClient(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "helper":
		err = runHelper(os.Args[2])
	default:
		err = measure()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func measure() error {
	rounds := flag.Int("rounds", 7, "rounds of each section; every peer runs once in each")
	n := flag.Int("n", standardN, "messages of one run; slow jobs take a fixed share of it")
	match := flag.String("run", "", "regular expression that chooses `sections` by name")
	only := flag.String("peers", "", "regular expression that chooses `peers` by name; the first of a section always runs")
	quick := flag.Bool("quick", false, "one round of 2,000 messages, to see that everything works")
	calm := flag.Float64("calm", 1, "`share` of the cores that other processes may take during a run; else it waits or is taken again, for 10 minutes at most")
	cpuProfile := flag.String("cpuprofile", "", "`file` for a CPU profile of the last natsx client")
	memProfile := flag.String("memprofile", "", "`file` for a profile of that client's allocations; slows it")
	flag.Parse()
	if *quick {
		*rounds, *n = 1, 2_000
	}
	if *rounds < 1 || *n < 100 || flag.NArg() > 0 {
		return fmt.Errorf("want -rounds of at least 1, -n of at least 100 and no arguments")
	}
	sectionRE, err := regexp.Compile(*match)
	if err != nil {
		return err
	}
	peerRE, err := regexp.Compile(*only)
	if err != nil {
		return err
	}

	fmt.Printf("%s, %s/%s, %d cores, nats.go %s, nats-server %s, %d rounds, load at start %s\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(),
		moduleVersion("github.com/nats-io/nats.go"), moduleVersion("github.com/nats-io/nats-server/v2"),
		*rounds, loadAverage())
	for i, s := range sections {
		if !sectionRE.MatchString(s.name) {
			continue
		}
		o := order{
			Section: i, N: max(int(math.Round(s.share*float64(*n))), 1),
			Window:     time.Duration(float64(s.window) * float64(*n) / standardN),
			CPUProfile: *cpuProfile, MemProfile: *memProfile,
		}
		results, err := s.measure(o, *rounds, *calm, peerRE)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		report(os.Stdout, s, o.N, results)
	}
	return nil
}

// measure runs the peers in turn. Each round begins with the next one, since the first and
// the last peer of a round find the machine in different states.
func (s section) measure(o order, rounds int, calm float64, only *regexp.Regexp) ([][]figure, error) {
	srv, err := startServer()
	if err != nil {
		return nil, err
	}
	defer srv.stop()
	o.URL = srv.url
	if err := prepare(o.URL, s, o.N); err != nil {
		return nil, err
	}
	results := make([][]figure, len(s.peers))
	for round := range rounds {
		for turn := range s.peers {
			o.Peer = (round + turn) % len(s.peers)
			p := s.peers[o.Peer]
			if o.Peer > 0 && !only.MatchString(p.name) {
				continue
			}
			f, err := spawnCalm(o, calm)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
			results[o.Peer] = append(results[o.Peer], f)
		}
	}
	return results, nil
}

// An order tells a client process what to run.
type order struct {
	URL                    string
	Section, Peer, N       int
	Window                 time.Duration
	CPUProfile, MemProfile string
}

// spawnCalm takes a figure when others leave the machine alone, and again when
// they did not until its end.
func spawnCalm(o order, calm float64) (f figure, err error) {
	const look = 250 * time.Millisecond
	for end := time.Now().Add(calmLimit); ; {
		before := machineTime()
		if calm < 1 {
			time.Sleep(look)
		}
		if calm >= 1 || share(machineTime()-before, look) <= calm {
			if f, err = spawn(o); err != nil || f.Others <= calm {
				return f, err
			}
		}
		if time.Now().After(end) {
			return f, fmt.Errorf("other processes left no calm moment for %s", calmLimit)
		}
	}
}

// spawn runs one figure in a fresh process, so that no peer inherits another's
// heap, connections or goroutines.
func spawn(o order) (figure, error) {
	var f figure
	exe, err := os.Executable()
	if err != nil {
		return f, err
	}
	arg, err := json.Marshal(o)
	if err != nil {
		return f, err
	}
	var out bytes.Buffer
	cmd := exec.Command(exe, "client", string(arg))
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		return f, err
	}
	return f, json.Unmarshal(out.Bytes(), &f)
}
