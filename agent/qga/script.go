package qga

import (
	"strings"

	"github.com/vmruntime/vmruntime/agent/posixsh"
)

// How Exec streams through an agent that gives output only at the end.
//
// The agent's child makes a directory in the guest's /tmp and starts, in a session of its own, the supervisor. That
// starts the command in one more session, with pipes as its output. A pump for each pipe moves it into the files
// 1.0, 1.1, ... (2.0, ... of stderr), the next one when one is full; the host reads them as they grow and empties each
// when the next is there. A pump that is four files ahead of the host waits, and with it the
// command. The file that follows the last one is empty, with 1.end beside it.
//
// The host shows that it lives by emptying the file lease. A watchdog in the supervisor's session fills it every
// twenty seconds; when it finds it full three times, the host is gone and the command is killed. However Exec ends, it
// runs cleanup, which leaves no file and no process but those that a command that ended by itself has left behind.
//
// stop and pid make it sound that the command is killed whatever the moment: the supervisor and the command write
// their numbers and then look for stop, cleanup writes stop and then looks for the numbers.

const (
	// filesAhead is how many files a pump may be ahead of the host.
	filesAhead = "4"
	// noSetup on the child's output says that there is no streaming in this guest.
	noSetup = "no streaming"
)

// pumps writes 32 reads of a pipe into each file.
const pumps = `pump() { i=0; while :; do dd bs=65536 count=32 of=$1.$i 2>/dev/null; [ -s $1.$i ] || break; i=$((i+1)); ` +
	`while [ -s $1.$((i-` + filesAhead + `)) ]; do ` + posixsh.Sleep + `; done; done; : >$1.end; }; `

// finish ends what is left in the directory it is in: with kill, also the command. Given the agent's child too, it waits
// for the end of that, lest it makes the directory anew; else it runs in the supervisor's session, and its own end is last.
const finish = posixsh.KillSession + `; finish() { : >stop; d=$PWD; s=; c=; [ -s sup ] && read s <sup; [ -s pid ] && read c <pid; ` +
	`[ "$1" ] && [ "$c" ] && kill_session "$c"; cd /; ` +
	`[ "$2" ] && { [ "$s" ] && kill_session "$s"; gone "$2"; }; ` +
	// Who still writes into it makes it fail.
	`n=0; until rm -rf "$d" || [ $n -ge 50 ]; do ` + posixsh.Sleep + `; n=$((n+1)); done; ` +
	`[ "$s" ] && kill_session "$s"; :; } 2>/dev/null; ` +
	`gone() { n=0; while case "$(tr '\0' ' ' </proc/$1/cmdline)" in *"$d"*) :;; *) false;; esac; do ` +
	`[ $n -lt 50 ] || { kill -KILL $1; return; }; ` + posixsh.Sleep + `; n=$((n+1)); done; } 2>/dev/null; `

const watchdog = `watch() { m=0; while sleep 20; do [ -e sup ] || exit; if [ -s lease ]; then m=$((m+1)); [ $m -lt 3 ] || finish kill; ` +
	`else m=0; echo x >lease; fi; done; }; `

// streamScript is the agent's child. Its exit status is the command's.
func streamScript(dir, command string) string {
	run := `echo $$ >pid && [ ! -e stop ] || exit 1; cd /; ` + command
	supervise := `echo $$ >sup && [ ! -e stop ] || exit 1; ` + pumps + finish + watchdog +
		`watch & pump 1 <out & pump 2 <err & ` +
		`setsid /bin/sh -c ` + word(run) + ` >out 2>err & wait $!`
	return `for t in mkfifo setsid dd rm sleep; do command -v $t >/dev/null || { echo ` + noSetup + `: $t is missing; exit 1; }; done; ` +
		`{ mkdir -m 700 ` + dir + ` && cd ` + dir + ` && mkfifo out err; } || { echo ` + noSetup + `: cannot write to /tmp; exit 1; }; ` +
		`setsid /bin/sh -c ` + word(supervise) + ` </dev/null >/dev/null 2>&1 & wait $!`
}

// cleanupScript ends a streamScript, whose process is pid. The directory is made here if it is not there yet, so that it
// cannot be made behind our back.
func cleanupScript(dir, pid string, kill bool) string {
	how := `""`
	if kill {
		how = "kill"
	}
	return finish + `mkdir -m 700 ` + dir + ` 2>/dev/null; cd ` + dir + ` && finish ` + how + ` ` + pid + `; :`
}

// word quotes a script for a shell.
func word(s string) string { return `'` + strings.ReplaceAll(s, `'`, `'\''`) + `'` }

// captureScript runs the command in a session with the number of the agent's child.
func captureScript(command string) string {
	return `command -v setsid >/dev/null && exec setsid /bin/sh -c ` + word(command) + `; ` + command
}
