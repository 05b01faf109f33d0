package natsx

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// pinFor is how long the server keeps a pin that is not renewed. The leases of the pinned
// client's messages end before, so that the next client receives these first.
func pinFor(ackWait time.Duration) time.Duration { return 2 * ackWait }

// durableDiff is one setting of an existing durable that differs from the route.
type durableDiff struct {
	field string // the route's option, by its setter's name in lower camel case
	want  string // its value
	have  string // what the durable has, as in "its MaxAckPending is 10"
	fixed bool   // the server cannot change it
}

// incompatible returns the settings of a durable with which a route cannot run: it would
// receive other messages, or the server would settle them in another way.
func incompatible(have, want jetstream.ConsumerConfig) (diffs []durableDiff) {
	add := func(differs bool, d durableDiff) {
		if differs {
			diffs = append(diffs, d)
		}
	}
	add(have.AckPolicy != want.AckPolicy, durableDiff{"durable", strconv.Quote(want.Durable), fmt.Sprintf("its ack policy is %s, not %s", have.AckPolicy, want.AckPolicy), true})
	add(len(have.BackOff) > 0, durableDiff{"durable", strconv.Quote(want.Durable),
		fmt.Sprintf("it has the BackOff %v, not none: the server combines it with the delays of natsx", have.BackOff), false})
	add(have.HeadersOnly, durableDiff{"durable", strconv.Quote(want.Durable), "it delivers headers only, not payloads", false})
	add(have.PriorityPolicy != want.PriorityPolicy || !slices.Equal(have.PriorityGroups, want.PriorityGroups),
		durableDiff{"pinnedBy", priorityText(want), "its priority policy is " + priorityText(have), false})
	add(!slices.Equal(filtersOf(have), filtersOf(want)), durableDiff{"subject", filtersText(want), "its filter is " + filtersText(have), false})
	return diffs
}

// optionDiffs returns the other settings of a durable that differ from the options which
// the route has. Options that it does not have are left as the durable has them.
func optionDiffs(set option, have, want jetstream.ConsumerConfig) (diffs []durableDiff) {
	add := func(opt option, field, name, wanted, existing string, fixed bool) {
		if set&opt != 0 && wanted != existing {
			diffs = append(diffs, durableDiff{field, wanted, "its " + name + " is " + existing, fixed})
		}
	}
	add(optDeliver, "deliver", "deliver policy", startText(want), startText(have), true)
	add(optAckWait, "ackWait", "AckWait", want.AckWait.String(), have.AckWait.String(), false)
	add(optMaxAckPending, "maxAckPending", "MaxAckPending", strconv.Itoa(want.MaxAckPending), strconv.Itoa(have.MaxAckPending), false)
	add(optInactiveThreshold, "inactiveThreshold", "InactiveThreshold", want.InactiveThreshold.String(), have.InactiveThreshold.String(), false)
	return diffs
}

// changed returns have with every difference removed that the server can change.
func changed(set option, have, want jetstream.ConsumerConfig) jetstream.ConsumerConfig {
	next := have
	next.FilterSubject, next.FilterSubjects = want.FilterSubject, want.FilterSubjects
	next.PriorityPolicy, next.PriorityGroups, next.PinnedTTL = want.PriorityPolicy, want.PriorityGroups, want.PinnedTTL
	next.HeadersOnly = false
	if set&optAckWait != 0 || len(have.BackOff) > 0 { // which replaces AckWait
		next.AckWait = want.AckWait
	}
	next.BackOff = nil
	if set&optMaxAckPending != 0 {
		next.MaxAckPending = want.MaxAckPending
	}
	if set&optInactiveThreshold != 0 {
		next.InactiveThreshold = want.InactiveThreshold
	}
	return next
}

// filtersOf returns the filters of a consumer in order; > for none.
func filtersOf(c jetstream.ConsumerConfig) []string {
	switch {
	case c.FilterSubject != "":
		return []string{c.FilterSubject}
	case len(c.FilterSubjects) > 0:
		return slices.Sorted(slices.Values(c.FilterSubjects))
	}
	return []string{">"}
}

func filtersText(c jetstream.ConsumerConfig) string { return fmt.Sprintf("%q", filtersOf(c)) }

func priorityText(c jetstream.ConsumerConfig) string {
	if c.PriorityPolicy == jetstream.PriorityPolicyNone {
		return "none"
	}
	policy, _ := c.PriorityPolicy.MarshalJSON()
	return fmt.Sprintf("%s of %q", strings.Trim(string(policy), `"`), c.PriorityGroups)
}

// startText describes where a consumer starts.
func startText(c jetstream.ConsumerConfig) string {
	text := c.DeliverPolicy.String()
	switch {
	case c.DeliverPolicy == jetstream.DeliverByStartSequencePolicy:
		text += " " + strconv.FormatUint(c.OptStartSeq, 10)
	case c.DeliverPolicy == jetstream.DeliverByStartTimePolicy && c.OptStartTime != nil:
		text += " " + c.OptStartTime.UTC().Format(time.RFC3339Nano)
	}
	return text
}

// conflict is the reason of the fault for a difference.
func (d durableDiff) conflict(adopts bool) string {
	switch {
	case d.fixed:
		return fmt.Sprintf("the durable exists and %s, which the server cannot change: let the route have what it has, name another durable, or delete it to start anew", d.have)
	case adopts:
		return fmt.Sprintf("the durable exists and %s, and is not changed while other differences stay", d.have)
	}
	return fmt.Sprintf("the durable exists and %s: let the route have what it has, or change the durable with AdoptChanges", d.have)
}

// state describes the durable.
func (d durableDiff) state() string { return d.have }

// change describes the change of the durable.
func (d durableDiff) change() string {
	return fmt.Sprintf("%s %s, where %s", d.field, d.want, strings.Replace(d.have, " is ", " was ", 1))
}

// diffText joins descriptions of differences in one line.
func diffText(diffs []durableDiff, each func(durableDiff) string) string {
	var list []string
	for _, d := range diffs {
		list = append(list, each(d))
	}
	return strings.Join(list, "; ")
}

// changesOf describes what was changed of a durable: the differences that were removed,
// a limit of deliveries that was lifted, and an id that was given.
func changesOf(have, now jetstream.ConsumerConfig, before, after []durableDiff) string {
	made := slices.DeleteFunc(before, func(d durableDiff) bool { return slices.Contains(after, d) })
	if have.MaxDeliver != now.MaxDeliver {
		made = append(made, durableDiff{field: "maxDeliver", want: limitText(int64(now.MaxDeliver)), have: "its MaxDeliver is " + limitText(int64(have.MaxDeliver))})
	}
	if have.Metadata[metadataID] != now.Metadata[metadataID] {
		made = append(made, durableDiff{field: "metadata", want: metadataID, have: "its metadata is without it"})
	}
	return diffText(made, durableDiff.change)
}
