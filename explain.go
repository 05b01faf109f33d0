package natsx

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/nats-io/nats.go/jetstream"
)

// explainWait bounds a request that only serves an explanation: a fault or a log line
// has to do without it after that.
const explainWait = 2 * time.Second

// makeStream says what makes a stream for a subject, of this name or, when it is empty,
// of one made of the subject.
func makeStream(name, subject string) string {
	if name == "" {
		name = strings.ToUpper(subjectToken(subject, 0))
	}
	if nameFault(name) != "" {
		name = "NAME" // the first token is a wildcard
	}
	return fmt.Sprintf("WithStreams(Stream(%q).Subjects(%q)) makes one", name, subject)
}

// nearStreams says which subjects of streams are the nearest to one that no stream has,
// and what makes a stream for it.
func (a *api) nearStreams(ctx context.Context, name, subject string) string {
	configs, err := a.streamConfigs(ctx)
	switch {
	case err != nil: // may not be listed, or not now
		return makeStream(name, subject)
	case len(configs) == 0:
		return "the account has no streams; " + makeStream(name, subject)
	}
	near := nearestSubjects(subject, configs)
	if len(near) == 0 {
		return makeStream(name, subject)
	}
	return "the nearest are " + strings.Join(near, ", ") + "; " + makeStream(name, subject)
}

// streamConfigs lists all streams, as far as that is quick.
func (a *api) streamConfigs(ctx context.Context) (configs []jetstream.StreamConfig, err error) {
	ctx, cancel := context.WithTimeout(ctx, explainWait)
	defer cancel()
	err = a.once(ctx, "STREAM.LIST", func(ctx context.Context) error {
		configs = nil
		list := a.js.ListStreams(ctx)
		for info := range list.Info() {
			configs = append(configs, info.Config)
		}
		return list.Err()
	})
	return configs, err
}

// listedConsumer is a consumer in a list of them.
type listedConsumer struct {
	Name   string                   `json:"name"`
	Config jetstream.ConsumerConfig `json:"config"`
}

// consumerList lists the consumers of a stream, as far as one answer has them.
func (a *api) consumerList(ctx context.Context, stream string) ([]listedConsumer, error) {
	ctx, cancel := context.WithTimeout(ctx, explainWait)
	defer cancel()
	var list struct {
		Consumers []listedConsumer `json:"consumers"`
	}
	err := a.askOnce(ctx, "CONSUMER.LIST."+stream, []byte(`{"offset":0}`), &list)
	return list.Consumers, err
}

// consumerNames lists the names of a stream's consumers, as far as one answer has them.
func (a *api) consumerNames(ctx context.Context, stream string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, explainWait)
	defer cancel()
	var list struct {
		Consumers []string `json:"consumers"`
	}
	err := a.askOnce(ctx, "CONSUMER.NAMES."+stream, []byte(`{"offset":0}`), &list)
	return list.Consumers, err
}

// mostNearest is how many of the nearest subjects are named.
const mostNearest = 3

// nearestSubjects are the subjects of streams that are the most like subject, the
// nearest first, each with its stream.
func nearestSubjects(subject string, streams []jetstream.StreamConfig) []string {
	type near struct {
		distance int
		text     string
	}
	var all []near
	for _, s := range streams {
		for _, candidate := range s.Subjects {
			all = append(all, near{subjectDistance(subject, candidate), fmt.Sprintf("%q of stream %q", candidate, s.Name)})
		}
	}
	slices.SortFunc(all, func(a, b near) int {
		return cmp.Or(cmp.Compare(a.distance, b.distance), cmp.Compare(a.text, b.text))
	})
	var texts []string
	for _, n := range all[:min(len(all), mostNearest)] {
		texts = append(texts, n.text)
	}
	return texts
}

// subjectDistance is how much has to be changed for one subject to overlap with the
// other: characters of tokens, and tokens that are missing.
func subjectDistance(a, b string) int {
	const missing = 3
	left, right := strings.Split(a, "."), strings.Split(b, ".")
	if right[len(right)-1] == ">" { // which stands for the rest
		left = left[:min(len(left), len(right))]
	}
	if left[len(left)-1] == ">" {
		right = right[:min(len(left), len(right))]
	}
	return editDistance(left, right, func(a, b string) int {
		switch {
		case a == "" || b == "":
			return missing
		case a == "*" || b == "*" || a == ">" || b == ">":
			return 0
		case strings.EqualFold(a, b) && a != b:
			return 1
		}
		return textDistance(a, b)
	})
}

// textDistance is the edit distance of two texts.
func textDistance(a, b string) int {
	return editDistance([]rune(a), []rune(b), func(a, b rune) int {
		if a == b {
			return 0
		}
		return 1
	})
}

// editDistance is the cost of turning a into b. The cost of an element against the zero
// value is that of adding or removing it.
func editDistance[T any](a, b []T, cost func(a, b T) int) int {
	var none T
	row := make([]int, len(b)+1) // of the distances of a's beginning to all beginnings of b
	for j := range b {
		row[j+1] = row[j] + cost(none, b[j])
	}
	for i := range a {
		diagonal := row[0]
		row[0] += cost(a[i], none)
		for j := range b {
			best := min(diagonal+cost(a[i], b[j]), row[j]+cost(none, b[j]), row[j+1]+cost(a[i], none))
			diagonal, row[j+1] = row[j+1], best
		}
	}
	return row[len(b)]
}

// lookAlike is a name that the given one may have been meant to be, or nothing: one that
// differs by case or separators only, or by one or two letters. Names that differ by a
// number or a short part of their own, such as those of shards, do so on purpose.
func lookAlike(name string, names []string) string {
	for _, other := range names {
		if other == name {
			continue
		}
		a, b := nameParts(name), nameParts(other)
		if strings.Join(a, "") == strings.Join(b, "") {
			return other
		}
		const short = 2 // bytes
		if len(a) == len(b) {
			for i := range a {
				if len(a[i]) <= short && len(b[i]) <= short {
					a[i], b[i] = "", ""
				}
			}
		} else {
			isShort := func(part string) bool { return len(part) <= short }
			a, b = slices.DeleteFunc(a, isShort), slices.DeleteFunc(b, isShort)
		}
		x, y := withoutDigits(a), withoutDigits(b)
		least := min(len(x), len(y))
		if x != y && least >= 4 && textDistance(x, y) <= min(1+least/8, 2) {
			return other
		}
	}
	return ""
}

// nameParts are the parts of a name between dashes and underscores, in lower case.
func nameParts(name string) []string {
	return strings.FieldsFunc(strings.ToLower(name), func(c rune) bool { return c == '-' || c == '_' })
}

func withoutDigits(parts []string) string {
	return strings.Map(func(c rune) rune {
		if unicode.IsDigit(c) {
			return -1
		}
		return c
	}, strings.Join(parts, ""))
}

// changes are differences as they are logged.
func changes(diffs []StreamDiff) []string {
	var list []string
	for _, d := range diffs {
		list = append(list, d.Field+": "+d.Have+" -> "+d.Want)
	}
	return list
}

// streamAttrs are the log attributes of a stream.
func streamAttrs(c *jetstream.StreamConfig, more ...any) []any {
	return append([]any{
		"stream", c.Name, "subjects", fmt.Sprintf("%q", c.Subjects), "retention", c.Retention.String(),
		"storage", c.Storage.String(), "replicas", c.Replicas,
	}, more...)
}
