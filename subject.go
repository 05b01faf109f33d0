package natsx

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
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
