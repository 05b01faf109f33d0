// Command natsx is for the person on call of services that use natsx: it lists, mends,
// redrives and deletes dead letters, replays stored messages, shows how far the durables
// are, and checks a stream and its DLQ. README.md describes it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Exit codes.
const (
	exitOK          = 0
	exitFailed      = 1   // the server or the network refused, or nothing is there
	exitUsage       = 2   // the command line is wrong; the server was not asked
	exitUnconfirmed = 3   // not confirmed, nothing was changed
	exitPartly      = 4   // some letters or messages failed, or lint found what natsx refuses
	exitInterrupted = 130 // by SIGINT or SIGTERM; what was done is reported
)

var (
	errUnconfirmed = errors.New("not confirmed, nothing was changed")
	errPartly      = errors.New("not all was done")
)

// usageError is a fault of the command line.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// tool is one run of a command.
type tool struct {
	in  io.Reader
	out io.Writer
	err io.Writer

	connection
	json bool
	yes  bool

	flags *flag.FlagSet
	args  []string // what is no flag
	nc    *nats.Conn
	js    jetstream.JetStream
}

// command is one row of the table of commands. prepare declares the command's flags
// and returns what runs it once they are parsed.
type command struct {
	name    string // with that of its group, such as "letters ls"
	args    string
	about   string
	prepare func(*tool) func(context.Context) error
}

var commands = []command{
	{"letters ls", "DLQ [SEQUENCE...]", "List dead letters.", prepareLettersLs},
	{"letters show", "DLQ SEQUENCE...", "Show single letters with error, headers and payload.", prepareLettersShow},
	{"letters count", "DLQ [SEQUENCE...]", "Count letters by durable and reason.", prepareLettersCount},
	{"letters redrive", "DLQ [SEQUENCE...]", "Send letters back to the durables that failed.", prepareLettersRedrive},
	{"letters edit", "DLQ [SEQUENCE...]", "Change letters and redrive them.", prepareLettersEdit},
	{"letters purge", "DLQ [SEQUENCE...]", "Delete letters for good.", prepareLettersPurge},
	{"routes", "[STREAM...]", "Show durables: lag, ack pending, last activity.", prepareRoutes},
	{"lint", "STREAM", "Report what natsx would refuse or warn of when it starts on a stream.", prepareLint},
	{"replay", "FILTER", "Print, count or copy the stored messages that a replay would handle.", prepareReplay},
}

// run runs one command line and returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	t := &tool{in: in, out: out, err: errs}
	err := t.run(ctx, args)
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errPartly): // said already
		return exitPartly
	case ctx.Err() != nil:
		fmt.Fprintln(errs, "natsx: interrupted")
		return exitInterrupted
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintln(errs, "natsx: "+clean(strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "natsx: ")))
	}
	switch {
	case errors.Is(err, errUnconfirmed):
		return exitUnconfirmed
	case errors.As(err, new(usageError)):
		return exitUsage
	}
	return exitFailed
}

func (t *tool) run(ctx context.Context, args []string) error {
	cmd, rest, err := find(args)
	if err != nil {
		return err
	}
	if cmd == nil {
		fmt.Fprint(t.out, usage(rest))
		return nil
	}
	t.flags = flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	t.flags.SetOutput(io.Discard)
	t.flags.Usage = func() {}
	own := flag.NewFlagSet("", flag.ContinueOnError)
	t.flags.BoolVar(&t.json, "json", false, "print JSON, one object a line")
	t.connection.declare(own)
	own.VisitAll(func(f *flag.Flag) { t.flags.Var(f.Value, f.Name, f.Usage) })
	do := cmd.prepare(t)
	for len(rest) > 0 { // flags may stand behind arguments
		if err := t.flags.Parse(rest); errors.Is(err, flag.ErrHelp) {
			t.help(cmd, own)
			return nil
		} else if err != nil {
			return usageError{fmt.Errorf("%s: %w", cmd.name, err)}
		}
		if rest = t.flags.Args(); len(rest) > 0 {
			t.args, rest = append(t.args, rest[0]), rest[1:]
		}
	}
	if err := t.connection.fromEnv(t.flags); err != nil {
		return err
	}
	err = do(ctx)
	if t.nc != nil {
		t.nc.Close()
	}
	return err
}

// find returns the command that args begin with and the arguments behind it, or no
// command and the group that was asked about.
func find(args []string) (*command, []string, error) {
	if len(args) > 0 && (args[0] == "help" || strings.TrimLeft(args[0], "-") == "help" || args[0] == "-h") {
		return nil, nil, nil
	}
	for i := range commands {
		words := strings.Fields(commands[i].name)
		if len(args) >= len(words) && slices.Equal(words, args[:len(words)]) {
			return &commands[i], args[len(words):], nil
		}
	}
	if len(args) == 0 {
		return nil, nil, usagef("which command? See natsx -h")
	}
	if inGroup(args[0]) {
		if len(args) > 1 && (args[1] == "help" || strings.HasPrefix(args[1], "-h") || args[1] == "--help") {
			return nil, args[:1], nil
		}
		return nil, nil, usagef("%s does what? See natsx %s -h", args[0], args[0])
	}
	return nil, nil, usagef("no command %q, see natsx -h", args[0])
}

func inGroup(name string) bool {
	return slices.ContainsFunc(commands, func(c command) bool { return strings.HasPrefix(c.name, name+" ") })
}

// usage lists the commands, or those of a group.
func usage(group []string) string {
	var b strings.Builder
	b.WriteString("Usage: natsx COMMAND [flags]\n\n")
	for _, c := range commands {
		if len(group) == 0 || strings.HasPrefix(c.name, group[0]+" ") {
			fmt.Fprintf(&b, "  %-38s %s\n", c.name+" "+c.args, c.about)
		}
	}
	b.WriteString("\nThe flags of a command: natsx COMMAND -h\n" +
		"Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not confirmed, 4 done in part or lint found faults, 130 interrupted\n")
	return b.String()
}

// help describes one command.
func (t *tool) help(cmd *command, own *flag.FlagSet) {
	fmt.Fprintf(t.out, "Usage: natsx %s %s [flags]\n\n%s\n\nFlags:\n", cmd.name, cmd.args, cmd.about)
	show := func(of bool) {
		t.flags.VisitAll(func(f *flag.Flag) {
			if (own.Lookup(f.Name) != nil) != of {
				return
			}
			value, about := flag.UnquoteUsage(f)
			if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "0s" {
				about += " (default " + f.DefValue + ")"
			}
			fmt.Fprintf(t.out, "  %-28s %s\n", strings.TrimSpace("-"+f.Name+" "+value), about)
		})
	}
	show(false)
	fmt.Fprint(t.out, "\nConnection, as in the nats CLI:\n")
	show(true)
}

// connect opens the connection that the flags describe.
func (t *tool) connect(ctx context.Context) (err error) {
	t.nc, t.js, err = t.connection.open(ctx)
	return err
}

// printJSON prints v on one line.
func (t *tool) printJSON(v any) error {
	enc := json.NewEncoder(t.out)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// isSet reports whether a flag is on the command line.
func (t *tool) isSet(name string) (set bool) {
	t.flags.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// oneArg returns the only argument.
func (t *tool) oneArg(what string) (string, error) {
	if len(t.args) != 1 {
		return "", usagef("%s: needs one argument, %s, and has %q", t.flags.Name(), what, t.args)
	}
	return t.args[0], nil
}
