package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"
)

func TestRunOnATerminalAndPiped(t *testing.T) {
	t.Parallel()
	for _, terminal := range []bool{true, false} {
		var out bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := run(ctx, &out, terminal); err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		if drawn := strings.Contains(out.String(), "\r["); drawn != terminal {
			t.Errorf("terminal %t, bar drawn %t:\n%s", terminal, drawn, out.String())
		}
		if !strings.Contains(out.String(), "594 orders were billed once, 600 audited once, 6 letters are left") {
			t.Errorf("got\n%s", out.String())
		}
	}
}
