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
	// 200 readings of 5 sensors, 20 of them retried in their order
	// 200 changes written, many at once; 1 refused alone
}
