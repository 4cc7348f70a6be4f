package seed

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

var (
	shellName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	// notForLogins are the names that a login has its own values for, or that change how programs start.
	notForLogins = regexp.MustCompile(`^(PATH|HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|TERM|MAIL|IFS|ENV|BASH_ENV|HOSTNAME|LANG|LC_.*|LD_.*)$`)
	doubleQuoted = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`")
)

// environment is the text of EnvFile: KEY="value", quoted such that a shell (sh(1)) and systemd's EnvironmentFile= (systemd.exec(5)) read the same. A name that neither
// takes is named in a comment.
func environment(env []EnvVar, take func(name string) bool) string {
	var b strings.Builder
	b.WriteString("# The environment of the pod's container.\n")
	for i, v := range env {
		switch later := slices.ContainsFunc(env[i+1:], func(o EnvVar) bool { return o.Name == v.Name }); {
		case later || !take(v.Name):
		case !shellName.MatchString(v.Name):
			fmt.Fprintf(&b, "# left out, not the name of a variable: %q\n", v.Name)
		default:
			fmt.Fprintf(&b, "%s=\"%s\"\n", v.Name, doubleQuoted.Replace(v.Value))
		}
	}
	return b.String()
}

func everywhere(string) bool { return true }

func forLogins(name string) bool {
	return shellName.MatchString(name) && !notForLogins.MatchString(name)
}

// loginScript gives logins the environment, those that may read it: root, and the group adm, which a cloud image's default user is in.
const loginScript = `# Made by vmruntime: the environment of the pod's container, without what a login has its own values for.
if [ -r /etc/vmruntime/login.env ]; then
	set -a
	. /etc/vmruntime/login.env
	set +a
fi
`
