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

	// Unordered output:
	// first report: once
	// first report: sales
	// and sales again
}
