package main

import (
	"fmt"
	"os"
)

func Example() {
	os.Unsetenv("NATS_URL")
	if err := run(); err != nil {
		fmt.Println(err)
	}

	// Output:
	// o-1 is placed
	// o-2 is not placed, and has no event
	// o-3 is placed
	// the relay is killed before it notes what it has published
	// the next relay publishes 2, of which the stream has 2 already
	// and then 0
	// o-1 is billed once: 990 cents
	// o-3 is billed once: 450 cents
}
