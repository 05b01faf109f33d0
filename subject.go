package natsx

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
)

// filterFault returns why a subject may not be subscribed to, or "". A wildcard must be a
// whole token, and > the last one.
func filterFault(subject string) string {
	if reason := subjectFault(subject); reason != "" {
		return reason
	}
	tokens := strings.Split(subject, ".")
	for i, token := range tokens {
		switch {
		case token == "*", token == ">" && i == len(tokens)-1:
		case token == ">":
			return "has > before its last token"
		case strings.ContainsAny(token, "*>"):
			return fmt.Sprintf("has a wildcard inside the token %q", token)
		}
	}
	return ""
}

// publishFault returns why a subject may not be published to, or "".
func publishFault(subject string) string {
	if reason := subjectFault(subject); reason != "" {
		return reason
	}
	if strings.ContainsAny(subject, "*>") {
		return "has a wildcard"
	}
	if subject[0] == '$' {
		return "starts with $, which belongs to the server"
	}
	return ""
}

// subjectFault is the common part of filterFault and publishFault.
func subjectFault(subject string) string {
	switch {
	case subject == "":
		return "must not be empty"
	case len(subject) > maxSubjectLength:
		return fmt.Sprintf("is longer than %d bytes", maxSubjectLength)
	case !utf8.ValidString(subject):
		return "is not valid UTF-8"
	case strings.ContainsFunc(subject, unicode.IsSpace):
		return "has white space"
	case strings.ContainsFunc(subject, unicode.IsControl):
		return "has a control character"
	case subject[0] == '.', subject[len(subject)-1] == '.', strings.Contains(subject, ".."):
		return "has an empty token"
	}
	return ""
}

// nameFault returns why a stream or durable may not have this name, or "" (ADR-6).
func nameFault(name string) string {
	switch {
	case name == "":
		return "must not be empty"
	case len(name) > maxNameLength:
		return fmt.Sprintf("is longer than %d bytes", maxNameLength)
	case !utf8.ValidString(name):
		return "is not valid UTF-8"
	case strings.ContainsAny(name, ".*>/\\"):
		return `must not contain any of . * > / \`
	case strings.ContainsFunc(name, unicode.IsSpace):
		return "has white space"
	case strings.ContainsFunc(name, func(c rune) bool { return !unicode.IsPrint(c) }):
		return "has a character that is not printable"
	}
	return ""
}

// groupFault returns why a queue group may not have this name, or "".
func groupFault(name string) string {
	switch {
	case name == "":
		return "must not be empty"
	case len(name) > maxNameLength:
		return fmt.Sprintf("is longer than %d bytes", maxNameLength)
	}
	return subjectFault(name)
}

// priorityGroupFault returns why a priority group may not have this name, or "".
func priorityGroupFault(name string) string {
	const most = 16 // of the server
	switch {
	case name == "":
		return "must not be empty"
	case len(name) > most:
		return fmt.Sprintf("is longer than %d bytes", most)
	case strings.ContainsFunc(name, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.ContainsRune("/_=-", c))
	}):
		return "must have only letters, digits and / _ = -"
	}
	return ""
}

// headerNameFault returns why a header may not have this name, or "".
func headerNameFault(name string) string {
	if name == "" {
		return "must not be empty"
	}
	for i := range len(name) {
		if !headerNameByte(name[i]) {
			return "must be an HTTP token of letters, digits and characters such as -"
		}
	}
	return ""
}

// headerNameByte reports whether c may be in the name of a header, an HTTP token:
// nats.go does not send others.
func headerNameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
		strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// subjectMatches reports whether filter matches every subject that other matches.
func subjectMatches(filter, other string) bool {
	for {
		f, fRest, fMore := strings.Cut(filter, ".")
		o, oRest, oMore := strings.Cut(other, ".")
		switch {
		case f == ">":
			return true
		case o == ">", f != "*" && f != o:
			return false
		case !fMore || !oMore:
			return fMore == oMore
		}
		filter, other = fRest, oRest
	}
}

// subjectsOverlap reports whether both filters match some common subject.
func subjectsOverlap(a, b string) bool {
	for {
		at, aRest, aMore := strings.Cut(a, ".")
		bt, bRest, bMore := strings.Cut(b, ".")
		switch {
		case at == ">" || bt == ">":
			return true
		case at != bt && at != "*" && bt != "*":
			return false
		case !aMore || !bMore:
			return aMore == bMore
		}
		a, b = aRest, bRest
	}
}

// EscapeToken returns a subject token for any text, a different one for each text. ASCII
// letters, digits, - and _ are unchanged; every other byte becomes = and its two
// hexadecimal digits, and the empty text becomes =. The token is up to three times as
// long as the text.
func EscapeToken(s string) string {
	if s == "" {
		return "="
	}
	plain := 0
	for plain < len(s) && plainByte(s[plain]) {
		plain++
	}
	if plain == len(s) {
		return s
	}
	const digits = "0123456789ABCDEF"
	token := append(make([]byte, 0, len(s)+2*(len(s)-plain)), s[:plain]...)
	for _, c := range []byte(s[plain:]) {
		if plainByte(c) {
			token = append(token, c)
		} else {
			token = append(token, '=', digits[c>>4], digits[c&15])
		}
	}
	return string(token)
}

// UnescapeToken reverses [EscapeToken]. The error is [ErrInvalidSubject] for a token that
// EscapeToken does not return.
func UnescapeToken(token string) (string, error) {
	if token == "=" {
		return "", nil
	}
	text := make([]byte, 0, len(token))
	for i := 0; i < len(token); i++ {
		c := token[i]
		if c == '=' && i+2 < len(token) {
			n, err := strconv.ParseUint(token[i+1:i+3], 16, 8)
			if err == nil {
				c = byte(n)
				i += 2
			}
		}
		text = append(text, c)
	}
	if s := string(text); EscapeToken(s) == token {
		return s, nil
	}
	return "", failure(fmt.Sprintf("token %q was not made by EscapeToken", token), ErrInvalidSubject)
}

func plainByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

func subjectToken(subject string, i int) string {
	if i < 0 {
		return ""
	}
	for ; i > 0; i-- {
		dot := strings.IndexByte(subject, '.')
		if dot < 0 {
			return ""
		}
		subject = subject[dot+1:]
	}
	token, _, _ := strings.Cut(subject, ".")
	return token
}

func captures(info *jetstream.StreamInfo, subject string) bool {
	return slices.ContainsFunc(info.Config.Subjects, func(s string) bool { return subjectMatches(s, subject) })
}

// Bounds of what a route accepts.
const (
	// maxSubjectLength is the longest subject in bytes that natsx accepts. A server closes
	// the connection on a protocol line above 4,096 bytes, which includes the subject, the
	// reply subject and the sizes.
	maxSubjectLength = 1024
	// maxNameLength is the longest name of a stream or durable in bytes, the
	// server's JSMaxNameLen.
	maxNameLength = 255
	// minAckWait is the shortest ack wait that can be extended in time.
	minAckWait = 100 * time.Millisecond
	// minInactiveThreshold is the shortest time without a reader after which a durable can
	// be kept in time.
	minInactiveThreshold = time.Second
)
