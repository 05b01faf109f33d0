//go:build race

package natsx

func init() { raceDetector = true }
