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

// filterFault tells why a subject may not be subscribed to, or nothing. A
// wildcard is a token of its own, and > the last one.
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

// publishFault tells why a subject may not be published to, or nothing.
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

// subjectFault holds for subscribing and publishing alike.
func subjectFault(subject string) string {
	switch {
	case subject == "":
		return "must not be empty"
	case len(subject) > MaxSubjectLength:
		return fmt.Sprintf("is longer than %d bytes", MaxSubjectLength)
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

// nameFault tells why a stream or durable may not have this name, or nothing
// (ADR-6).
func nameFault(name string) string {
	switch {
	case name == "":
		return "must not be empty"
	case len(name) > MaxNameLength:
		return fmt.Sprintf("is longer than %d bytes", MaxNameLength)
	case !utf8.ValidString(name):
		return "is not valid UTF-8"
	case strings.ContainsAny(name, ".*>/\\"):
		return `must not hold any of . * > / \`
	case strings.ContainsFunc(name, unicode.IsSpace):
		return "has white space"
	case strings.ContainsFunc(name, func(c rune) bool { return !unicode.IsPrint(c) }):
		return "has a character that does not print"
	}
	return ""
}

// groupFault tells why a queue group may not have this name, or nothing.
func groupFault(name string) string {
	switch {
	case name == "":
		return "must not be empty"
	case len(name) > MaxNameLength:
		return fmt.Sprintf("is longer than %d bytes", MaxNameLength)
	}
	return subjectFault(name)
}

// priorityGroupFault tells why a priority group may not have this name, or nothing.
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
		return "must hold letters, digits and / _ = - only"
	}
	return ""
}

// headerNameFault tells why a header may not have this name, or nothing: it
// would not survive the wire.
func headerNameFault(name string) string {
	if name == "" {
		return "must not be empty"
	}
	for i := range len(name) {
		if !headerNameByte(name[i]) {
			return "must be an HTTP token: letters, digits, dashes and the like"
		}
	}
	return ""
}

// headerNameByte tells whether nats.go sends c in the name of a header: it must be
// a token of HTTP.
func headerNameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
		strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// subjectMatches tells whether filter selects every subject that other selects.
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

// subjectsOverlap tells whether some subject is selected by both filters.
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

// EscapeToken makes one subject token of any text, different for different
// texts. ASCII letters, digits, - and _ stay as they are; every other byte
// becomes = and its two hexadecimal digits, and the empty text becomes =. The
// token is up to three times as long.
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

// UnescapeToken returns the text of which [EscapeToken] made the token, and an
// error that is [ErrInvalidSubject] for a token that it does not make.
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
	// MaxSubjectLength is the longest subject in bytes that natsx takes. A
	// server closes the connection on a protocol line above 4,096 bytes, which
	// holds the subject, the reply and the sizes.
	MaxSubjectLength = 1024
	// MaxNameLength is the longest name of a stream or durable in bytes, the
	// server's JSMaxNameLen.
	MaxNameLength = 255
	// MinAckWait is the shortest lease that can be kept alive in time.
	MinAckWait = 100 * time.Millisecond
)
