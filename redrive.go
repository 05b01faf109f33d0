package natsx

import (
	"strconv"

	"github.com/nats-io/nats.go"
)

// HeaderRedriveCount is how often a message was redriven.
const HeaderRedriveCount = "Natsx-Redrive-Count"

func redriveCount(h nats.Header) int {
	n, err := strconv.Atoi(h.Get(HeaderRedriveCount))
	if err != nil || n < 0 {
		return 0
	}
	return n
}
