package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
)

// maxEdited is how many letters are edited in an editor, one by one.
const maxEdited = 20

// content is what of a letter an edit changes.
type content struct {
	header nats.Header
	data   []byte
}

func prepareLettersEdit(t *tool) func(context.Context) error {
	r := t.redriving()
	data := t.flags.String("data", "", "take the payload from `FILE`, - for the standard input; for one letter")
	with := t.flags.String("with", "", "pass each payload through this shell `COMMAND`, such as 'jq .cents=0'")
	var set, remove texts
	t.flags.Var(&set, "header", "set a header, `NAME=VALUE`; may be repeated")
	t.flags.Var(&remove, "delete-header", "delete the header with this `NAME`; may be repeated")
	editor := t.flags.String("editor", cmp.Or(os.Getenv("VISUAL"), os.Getenv("EDITOR"), "vi"), "without these flags, `COMMAND` that edits a file [$VISUAL, $EDITOR]")
	return func(ctx context.Context) error {
		if err := t.readArgs(r.selection); err != nil {
			return err
		}
		single := r.seqs.single()
		switch {
		case t.isSet("data") && t.isSet("with"):
			return usagef("letters edit: -data and -with exclude each other")
		case t.isSet("data") && len(single) != 1:
			return usagef("letters edit: -data is for one letter; give its sequence")
		}
		for _, header := range set {
			if name, _, found := strings.Cut(header, "="); !found || name == "" {
				return usagef("letters edit: header %q is not NAME=VALUE", header)
			}
		}
		byHand := !t.isSet("data") && !t.isSet("with") && len(set)+len(remove) == 0
		if byHand && !(isTerminal(t.in) && isTerminal(t.out)) {
			return usagef("letters edit: there is no terminal for an editor: give -data, -with, -header or -delete-header")
		}
		var payload []byte
		if t.isSet("data") {
			var err error
			if payload, err = t.readFile(*data); err != nil {
				return err
			}
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		if byHand {
			return t.editByHand(ctx, r, *editor)
		}
		return t.redrive(ctx, r, "Edit and redrive", func(l *natsx.DeadLetter) error {
			before := content{maps.Clone(l.Header), l.Data}
			switch {
			case t.isSet("data"):
				l.Data = payload
			case t.isSet("with"):
				changed, err := passThrough(ctx, *with, l)
				if err != nil {
					return err
				}
				l.Data = changed
			}
			for _, name := range remove {
				delete(l.Header, name)
			}
			for _, header := range set {
				name, value, _ := strings.Cut(header, "=")
				l.Header[name] = []string{value}
			}
			return before.unchanged(l)
		})
	}
}

// unchanged is the fault of a letter with the same content.
func (c content) unchanged(l *natsx.DeadLetter) error {
	if bytes.Equal(c.data, l.Data) && (len(c.header) == 0 && len(l.Header) == 0 || reflect.DeepEqual(c.header, l.Header)) {
		return errUnchanged
	}
	return nil
}

func (t *tool) readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(t.in)
	}
	return os.ReadFile(name)
}

// passThrough gives a payload to a shell command and returns what that prints.
func passThrough(ctx context.Context, command string, l *natsx.DeadLetter) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.Stdin = bytes.NewReader(l.Data)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%q: %w: %s", command, err, strings.TrimSpace(said.String()))
	}
	return out, nil
}

// letterID names a letter also if its DLQ is made anew.
type letterID struct {
	seq    uint64
	stored int64
}

func idOf(l *natsx.DeadLetter) letterID { return letterID{l.DLQSequence, l.DLQTime.UnixNano()} }

// editByHand has a person edit each letter, and redrives those that were changed. The
// letters are read first, so that nothing waits at the server for the person.
func (t *tool) editByHand(ctx context.Context, r *redriving, editor string) (err error) {
	var found []natsx.DeadLetter
	errMany := fmt.Errorf("letters edit: more than %d letters for an editor: select fewer, or give -with or -header", maxEdited)
	gather, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	_, err = t.redriveQuery(r, 0).DryRun().Redrive(gather, t.nc,
		natsx.WithRedriveEdit(func(l *natsx.DeadLetter) error {
			if found = append(found, *l); len(found) > maxEdited {
				stop(errMany)
			}
			return nil
		}),
		natsx.WithRedriveProgress(func(p natsx.RedriveProgress) {
			if p.Err != nil {
				fmt.Fprintln(t.err, clean(fmt.Sprintf("letter %d: %s", p.Letter.DLQSequence, faultText(p.Err))))
			}
		}))
	switch {
	case errors.Is(context.Cause(gather), errMany):
		return usageError{errMany}
	case err != nil:
		return judged(err)
	case len(found) == 0:
		return fmt.Errorf("no letter of %s that can be redriven is selected", r.dlq)
	}
	edits := map[letterID]content{}
	var files []string
	defer func() {
		// What a person has written is lost only if it was used or is not wanted.
		for _, file := range files {
			if err == nil || errors.Is(err, errUnconfirmed) {
				os.Remove(file)
			} else {
				fmt.Fprintf(t.err, "what you wrote is in %s\n", file)
			}
		}
	}()
	r.seqs = nil
	for i := range found {
		l := &found[i]
		if !utf8.Valid(l.Data) || bytes.IndexByte(l.Data, 0) >= 0 {
			return fmt.Errorf("letter %d: the payload is no text for an editor: give -data or -with", l.DLQSequence)
		}
		text := letterText(l)
		file, written, err := t.openEditor(ctx, editor, text)
		if file != "" {
			files = append(files, file)
		}
		if err != nil {
			return err
		}
		changed, err := parseLetterText(written, l.Data)
		if err != nil {
			return fmt.Errorf("letter %d: %w", l.DLQSequence, err)
		}
		if bytes.Equal(written, text) || changed == nil {
			fmt.Fprintf(t.err, "letter %d: not changed, it stays\n", l.DLQSequence)
			continue
		}
		fmt.Fprintf(t.err, "letter %d: %d bytes of payload, before %d\n", l.DLQSequence, len(changed.data), len(l.Data))
		edits[idOf(l)] = *changed
		r.seqs = append(r.seqs, [2]uint64{l.DLQSequence, l.DLQSequence})
	}
	if len(edits) == 0 {
		return nil
	}
	return t.redrive(ctx, r, "Redrive, as edited,", func(l *natsx.DeadLetter) error {
		changed, ok := edits[idOf(l)]
		if !ok {
			return errUnchanged
		}
		l.Header, l.Data = changed.header, changed.data
		return nil
	})
}

// openEditor has a person edit text in a file, which is left to the caller.
func (t *tool) openEditor(ctx context.Context, editor string, text []byte) (name string, written []byte, _ error) {
	file, err := os.CreateTemp("", "natsx-letter-*.txt") // for this user only
	if err != nil {
		return "", nil, err
	}
	name = file.Name()
	_, err = file.Write(text)
	if err := errors.Join(err, file.Close()); err != nil {
		return name, nil, err
	}
	cmd := exec.CommandContext(ctx, "sh", "-c", editor+` "$1"`, "sh", name)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = t.in, t.out, t.err
	if err := cmd.Run(); err != nil {
		return name, nil, fmt.Errorf("editor %q: %w", editor, err)
	}
	written, err = os.ReadFile(name)
	return name, written, err
}

// letterText is a letter for an editor: comments, headers, an empty line, the payload.
func letterText(l *natsx.DeadLetter) []byte {
	var b bytes.Buffer
	comment := func(format string, args ...any) {
		fmt.Fprintf(&b, "# %s\n", clean(fmt.Sprintf(format, args...)))
	}
	comment("Letter %d of %s: %s of durable %s", l.DLQSequence, l.DLQSubject, l.Subject, l.Durable)
	comment("%s: %s", l.Reason, l.Error)
	comment("Headers stand above the empty line, the payload below. Without a change, or as an")
	comment("empty file, the letter stays in the DLQ.")
	for _, name := range slices.Sorted(maps.Keys(l.Header)) {
		for _, value := range l.Header[name] {
			fmt.Fprintf(&b, "%s: %s\n", name, value)
		}
	}
	b.WriteByte('\n')
	b.Write(l.Data)
	return b.Bytes()
}

// parseLetterText reads what letterText has written, nil for an empty file. An editor ends
// the last line, which the payload before may not have had.
func parseLetterText(text, before []byte) (*content, error) {
	if len(bytes.TrimSpace(text)) == 0 {
		return nil, nil
	}
	c := &content{header: nats.Header{}}
	for {
		line, rest, found := bytes.Cut(text, []byte("\n"))
		line = bytes.TrimSuffix(line, []byte("\r"))
		switch name, value, isHeader := bytes.Cut(line, []byte(":")); {
		case len(line) == 0:
			if c.data = rest; !bytes.HasSuffix(before, []byte("\n")) {
				c.data = bytes.TrimSuffix(rest, []byte("\n"))
			}
			return c, nil
		case line[0] == '#':
		case !isHeader || len(name) == 0:
			return nil, fmt.Errorf("%q is not a header, and no empty line stands before it", line)
		default:
			c.header[string(name)] = append(c.header[string(name)], string(bytes.TrimSpace(value)))
		}
		if !found {
			return nil, errors.New("no empty line stands before the payload")
		}
		text = rest
	}
}

// texts is a flag that may be repeated.
type texts []string

func (t *texts) String() string { return "" }

func (t *texts) Set(text string) error {
	*t = append(*t, text)
	return nil
}
