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
	// published, stored before: false
	// published, stored before: true
	// com.example.order.placed from /shop/berlin: o-1, 990 cents
	// not published: true
	// dead: undecodable
}
