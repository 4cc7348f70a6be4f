// Package posixsh writes small scripts for the /bin/sh of a guest: a command with any arguments as one line, and the
// end of all processes of a session.
//
// Invariants:
//   - Every script is one line without a newline in it, so that it passes any login shell.
//   - Scripts use nothing but POSIX sh and its usual tools, as dash, bash and busybox have them.
package posixsh

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// newline is the shell variable that stands for a newline, which no script contains.
const newline = "_vmruntime_nl"

// Command is a line that becomes the given program: exit status 127 says that it is not there, 126 that it cannot be
// executed. env holds "NAME=value" in addition to the shell's environment. All bytes but NUL are possible; in the
// line those that are not UTF-8 are written as escapes. Errors are ErrInvalidArgument.
func Command(args, env []string) (string, error) {
	if len(args) == 0 || args[0] == "" {
		return "", fmt.Errorf("args is empty, want at least the program: %w", errdefs.ErrInvalidArgument)
	}
	words := []string{"exec"}
	if len(env) > 0 {
		words = append(words, "env")
	}
	for _, e := range env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" || name[0] == '-' {
			return "", fmt.Errorf("env %q: want NAME=value: %w", e, errdefs.ErrInvalidArgument)
		}
		words = append(words, quote(e))
	}
	if len(env) > 0 && strings.Contains(args[0], "=") {
		// env would take it for one more variable.
		words = append(words, "/bin/sh", "-c", `'exec "$@"'`, "sh")
	}
	for _, a := range args {
		words = append(words, quote(a))
	}
	for _, s := range append(slices.Clip(env), args...) {
		if strings.IndexByte(s, 0) >= 0 {
			return "", fmt.Errorf("args or env %q: a NUL byte is not possible: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	line := strings.Join(words, " ")
	if strings.Contains(line, newline) {
		// $(...) drops newlines at its end, so one more byte follows.
		line = newline + `=$(printf '\nx'); ` + newline + `=${` + newline + `%x}; ` + line
	}
	return line, nil
}

// quote writes s as one word of a POSIX shell.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('\'')
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `'"$(printf '\%03o')"'`, s[i])
		case r == '\'':
			b.WriteString(`'\''`)
		case r == '\n':
			b.WriteString(`'"$` + newline + `"'`)
		default:
			b.WriteString(s[i : i+size])
		}
		i += size
	}
	b.WriteByte('\'')
	return b.String()
}

// LoginShell is a command for a user's login shell, whichever that is (sh, zsh, fish and csh read it alike), that
// becomes /bin/sh with the given script.
func LoginShell(script string) string {
	var b strings.Builder
	b.WriteString("exec /bin/sh -c '")
	for i := range len(script) {
		switch script[i] {
		case '\'':
			b.WriteString(`'"'"'`)
		case '\\', '!':
			// Inside quotes fish and csh have their own ideas of these.
			b.WriteString(`'\` + script[i:i+1] + `'`)
		default:
			b.WriteByte(script[i])
		}
	}
	b.WriteByte('\'')
	return b.String()
}

// Sleep waits a tenth of a second, or a second where that is the least.
const Sleep = `sleep 0.1 2>/dev/null || sleep 1`

// KillSession defines the shell function kill_session, which kills all processes of the session whose number is its
// argument and waits until they are gone, some seconds at most. It needs /proc.
const KillSession = `kill_session() { _n=0; while [ $_n -lt 50 ]; do _found=; for _f in /proc/[0-9]*/stat; do _l=; ` +
	`{ while read -r _m; do _l="$_l$_m"; done <"$_f"; } 2>/dev/null || continue; ` +
	// What follows the last parenthesis: state, parent, process group, session.
	`_s=$1; set -- ${_l##*) }; _p=${_f#/proc/}; ` +
	`if [ "$4" = "$_s" ] && [ "$1" != Z ] && [ "$1" != X ]; then kill -KILL "${_p%/stat}" 2>/dev/null; _found=1; fi; set -- "$_s"; done; ` +
	`[ "$_found" ] || return 0; [ $_n -eq 0 ] || ` + Sleep + `; _n=$((_n+1))` + `; done; return 1; }`
