package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// moment is the value of a flag: a time, or how long ago.
type moment struct{ time.Time }

func (m *moment) String() string {
	if m == nil || m.IsZero() {
		return ""
	}
	return m.Format(time.RFC3339Nano)
}

const momentForms = `a time such as 2026-05-01, "2026-05-01 14:30" (local) or 2026-05-01T14:30:00Z, or how long ago, such as 90m or 2d`

func (m *moment) Set(text string) error {
	if d, ok := ago(text); ok {
		m.Time = time.Now().Add(-d)
		return nil
	}
	for _, form := range []string{time.DateOnly, "2006-01-02 15:04", time.DateTime, "2006-01-02T15:04", "2006-01-02T15:04:05", time.RFC3339Nano} {
		if at, err := time.ParseInLocation(form, text, time.Local); err == nil {
			m.Time = at
			return nil
		}
	}
	return fmt.Errorf("not %s", momentForms)
}

// ago reads a duration, which may be in days.
func ago(text string) (time.Duration, bool) {
	if days, found := strings.CutSuffix(text, "d"); found {
		n, err := strconv.ParseFloat(days, 64)
		return time.Duration(n * 24 * float64(time.Hour)), err == nil && n >= 0 && n < 100_000
	}
	d, err := time.ParseDuration(text)
	return d, err == nil && d >= 0
}

// since is how long ago a time is, for people.
func since(at time.Time) string {
	d := time.Since(at)
	switch {
	case at.IsZero():
		return "never"
	case d < time.Second:
		return "now"
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < 24*time.Hour:
		return strings.TrimSuffix(d.Truncate(time.Minute).String(), "0s")
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
