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
	// stored   roof -3.5 °C at 2023-11-14 22:13:20
	// dead     undecodable after 1 attempt
	// answer   roof -3.5 °C as application/vnd.msgpack
	// answer   404 no such sensor
}
