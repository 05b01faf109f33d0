package main

import (
	"fmt"
	"os"
)

func Example() {
	os.Unsetenv("NATS_URL")
	if err := run(false); err != nil {
		fmt.Println(err)
	}

	// Output:
	// 202 order o-1 is taken
	// 200 order o-1 was taken before
	// 400 an Idempotency-Key of 1 to 100 bytes is needed
	// 400 not an order
	// billed o-1
	// 200 ok
}
