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
	// handled  o-1 990 cents
	// dead     undecodable
	// answer   290 cents as application/protobuf
	// answer   404 no such item
}
