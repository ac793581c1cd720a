"""What is said of a failure: for each thing that may go wrong, what happened and what to try next, in one line."""

import os

from tunnel import (
    BY_SIGNAL,
    CALLBACK_SECONDS,
    FAREWELLS,
    LOGGED_IN,
    LOGIN_SECONDS,
    STARTED,
    OpenSSH,
    ending,
    printable_command,
)

SAYS_NOTHING = FAREWELLS + ("debug1: ", "OpenSSH_", "Killed by signal ")  # a jump host's client is as verbose
NO_REASON = ("Authenticated to ", "Forwarded port opened", "Warning: Permanently added ")  # for a client's end
QUOTED_LENGTH = 200  # of what somebody else has said, how much goes into a line
UNANSWERED = (
    "{host} did not answer{seconds}{each}",
    "check the name, the port, firewalls and VPN; -o ConnectTimeout=60 waits longer",
)
CHECK_LOGIN = "check user, password and keys (password-less login needs a key that the server knows): {try_login}"
CHECK_LOGIN += "{copy_key}{second}"
SIGNING = r"sign_and_send_pubkey: signing failed .*|.*agent refused operation.*"  # of an agent that has the key
# What a client says when a launch fails (a regular expression that its whole message has to match), what that
# means, and what to try next. The first that is found counts, so the more specific stand first.
DIAGNOSES = (
    (
        r"@\s+WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!\s+@|WARNING - POTENTIAL SECURITY BREACH!"
        r"|(?:\S+ h|H)ost key for \S+ has changed and you have requested strict checking\."
        r"|(?:FATAL ERROR: )?Host key (?:not|did not appear) in manually configured list",
        "the host key of {host} has changed: this may be another machine, or an attack",
        "if the change is known to be right, remove the old key with"
        " `ssh-keygen -R {host}` (PuTTY: connect once with putty) and try again",
    ),
    (
        r"The (?:server's )?host key is not cached.*|No \S+ host key is known for \S+ and .*"
        r"|(?:FATAL ERROR: )?Cannot confirm a host key in batch mode",
        "the host key of {host} is unknown{fingerprint}",
        "check it, then accept it once by hand: {by_hand}",
    ),
    (
        r".*host key.* is marked as revoked.*|.* host key for .* was revoked .*",
        "the host key of {host} has been revoked here (known_hosts)",
        "ask who runs that machine: this may be an attack",
    ),
    (
        r"Host key verification failed\.",
        "the host key of {host} was refused",
        "connect once by hand: {by_hand}",
    ),
    (
        r"(?:\S+: Could not resolve host\S* \S+: |(?:FATAL ERROR: )?Unable to open connection: ?)?"
        r"(?:Temporary failure in name resolution|This is usually a temporary error during hostname resolution.*"
        r"|Non-recoverable failure in name resolution)",
        "the name {host} could not be looked up",
        "no name server answers: check the network and VPN",
    ),
    (
        r"bind \S+: .*|getifaddrs: .*",
        "this machine lacks the address from which ssh is to connect ({found})",
        "connect the VPN that has it, or take BindAddress out of ~/.ssh/config",
    ),
    (
        r"\S+: Could not resolve host.*"
        r"|(?:FATAL ERROR: |\S+: )?(?:Unable to open connection:.*)?[Hh]ost does not exist"
        r"|(?:Unable to open connection: ?)?(?:Name or service not known|nodename nor servname.*"
        r"|No address associated with hostname|Host not found)",
        "no machine named {host} is known here",
        "check the name, or its Host entry in ~/.ssh/config",
    ),
    (
        r"command-line:? line 0: unsupported option \"accept-new\".*|.*Bad configuration option: remotecommand",
        "this ssh is older than OpenSSH 7.6",
        "install a newer one and name it with --client or TUNNEL_SSH",
    ),
    (
        r'plink: unknown option "-pwfile"',
        "this plink is older than 0.77, and would need the password in its arguments, where all can read it",
        "install a newer PuTTY, or log in with a key",
    ),
    (
        r"\S+ line \d+: (?:[Bb]ad|[Uu]nsupported|[Mm]issing|[Gg]arbage|[Ii]nvalid|no argument|extra arguments) .*"
        r"|Bad owner or permissions on .*|plink: (?:unknown )?option .*|command-line:? line 0: .*"
        r"|.*: terminating, \d+ bad configuration options",
        "the client rejected its options",
        "check -o and ~/.ssh/config: {found}",
    ),
    (
        r"ssh: connect to host \S+ port \S+: Connection refused"
        r"|FATAL ERROR: (?:Network error: )?Connection refused",
        "{host} refused the connection: no SSH server listens there",
        "check the port, and that the SSH server runs",
    ),
    (
        r"ssh: connect to host \S+ port \S+: (?:Connection|Operation) timed out"
        r"|FATAL ERROR: (?:Network error: )?Connection timed out|Connection timed out during banner exchange"
        r"|(?:banner exchange: )?Connection to \S+ port \d+(?: timed out|: Connection timed out)",
        *UNANSWERED,
    ),
    (
        r"ssh: connect to host \S+ port \S+: (?:No route to host|(?:Network|Host) is (?:unreachable|down))"
        r"|FATAL ERROR: (?:Network error: )?(?:No route to host|(?:Network|Host) is (?:unreachable|down))",
        "there is no route to {host}",
        "check the network, VPN or jump host",
    ),
    (
        r"Received disconnect from \S+ port \d+:\d+: Too many authentication failures"
        r"|Disconnecting .*: Too many authentication failures|\"Too many authentication failures\"",
        "{host} ended the login after too many keys were offered",
        "name the right key with IdentityFile and set IdentitiesOnly=yes",
    ),
    (
        r"Unable to negotiate with .*|no matching .* found.*|(?:FATAL ERROR: )?Couldn't agree an? .*",
        "client and server share no algorithm",
        "update one of them: {found}",
    ),
    (
        r"(?:\S+@\S+: )?Permission denied \((?P<methods>[^)]*)\)\.|(?:FATAL ERROR: |Disconnected: )?No supported"
        r" authentication methods available \(server sent: (?P<sent>[^)]*)\)|Access denied"
        r"|(?:FATAL ERROR: )?(?:Configured password was not accepted"
        r"|Cannot answer interactive prompts in batch mode|Unable to authenticate)"
        r"|Disconnected: Unable to authenticate",
        "{host} refused the login{methods}",
        CHECK_LOGIN,
    ),
    (r"Permission denied, please try again\.", "{host} refused the login", CHECK_LOGIN),
    (
        r"(?:kex|ssh)_exchange_identification: (?:Connection closed by remote host|read: .*|No banner received)"
        r"|(?:FATAL ERROR: )?(?:Remote side|Server) unexpectedly closed .*"
        r"|Connection (?:closed|reset) by .*|FATAL ERROR: (?:Network error: )?Connection reset by peer",
        "{host} {closed}",
        "{advice}{aside}",
    ),
)
# Diagnoses of a connection that ended in use, whatever ssh was doing; the least specific of all.
LOST_DIAGNOSES = (
    (
        r"Connection to .* closed by remote host\.|client_loop: send disconnect: .*"
        r"|\w+: .*: (?:Broken pipe|Connection reset by peer)",
        "{host} {closed}",
        "{advice}{aside}",
    ),
)
DIAGNOSES += LOST_DIAGNOSES
# When a server has closed a connection, and what to do: before the key exchange, after it, and after the login.
CLOSED_WORDS = (
    {
        "closed": "closed the connection before the login",
        "advice": "it may be overloaded (MaxStartups), or refuse this machine; try again later",
    },
    {
        "closed": "closed the connection during the login",
        "advice": "it may not let this account in, or not wait as long as the login takes; ask who runs it",
    },
    {
        "closed": "closed the connection right after the login",
        "advice": "the network may have failed, or the server cannot give this account a session (ChrootDirectory,"
        " PAM); try again, or ask who runs it",
    },
)
# Diagnoses from what a server says of an account that it lets in, but lets do nothing.
ACCOUNT_DIAGNOSES = (
    (
        r"(?:\| )?You are required to change your password .*|(?:WARNING: )?Your password has expired\.?"
        r"|Password expired\. .*|Password change required but no TTY available\.",
        "the password on {host} has expired",
        "log in by hand and change it: {login} ({found})",
    ),
    (
        r"(?:There were )?[Tt]oo many logins for .*",
        "{host} lets this account in no more often at the same time",
        "end what else it runs there ({found})",
    ),
)
# Diagnoses from what a jump host's client says.
JUMP_DIAGNOSES = (
    (
        r"\S+@(?P<who>\S+): Permission denied \((?P<methods>[^)]*)\)\.",
        "{who}, on the way to {host}, refused the login{methods}",
        CHECK_LOGIN,
    ),
    (
        r"channel \d+: open failed: (?:connect failed|administratively prohibited): .*|stdio forwarding failed",
        "the jump host does not reach {host} ({found})",
        "check the name, the port, and that the SSH server runs there",
    ),
)
CHECK_PATH = (
    "check the path and its permissions with: {by_hand}; in a folder the kernel is Executables/WolframKernel"
)
# What is said of a kernel that ended before it called back. Its exit code is looked at first, and what it printed
# after that, since any words can stand in a path.
KERNEL_CODES = {
    127: ("there is no kernel {kernel} on {host}", "check the path with: {by_hand}"),
    126: ("{kernel} on {host} cannot be executed", CHECK_PATH),
}
# Diagnoses of a script at the kernel's path that could not start the kernel. The path stands in front of what the
# script, or a shell, says.
SCRIPT_DIAGNOSES = (
    (
        r".*{}: (?:(?:line )?\d+: .*|.*\bbad interpreter\b.*|.*\brequired file not found)",
        "{kernel} on {host} could not start the kernel: {found}",
        "run it by hand: {by_hand}",
    ),
)
LIBRARY_DIAGNOSES = (
    (
        r"the kernel cannot be started: .*",  # says the relay
        "{found} ({kernel} on {host})",
        "what a kernel needs may have run out there: processes, open files, terminals, ports",
    ),
    (
        r".*(?:error while loading shared libraries|symbol lookup error|version `\S+' not found).*"
        r"|.*Library not loaded.*",
        "the kernel {kernel} lacks a library: {found}",
        "what sets it up for you by hand (a module, LD_LIBRARY_PATH) has to stand in the file that the login shell"
        " on {host} reads without a terminal; try: {by_hand}",
    ),
)
AMISS = r"\b(?:no|not|cannot|can't|unable|invalid|expired|denied|failed|failure|exceeded|error)\b"
LICENCE_DIAGNOSES = (
    (
        r".*\bvalid password\b.*|.*\bnot activated\b.*|.*\bactivation\b.*"
        r"|.*{0}.*\blicen[sc]e.*|.*\blicen[sc]e.*{0}.*".format(AMISS),
        "the kernel {kernel} found no licence",
        "activate it on {host}, or free a licence: {found}",
    ),
)
# Shells whose exit code does not tell (csh, cmd.exe) say it in a line that names the path.
SHELL_DIAGNOSES = (
    (r".*(?:No such file or directory|Command not found|not recognized as|cannot find).*", *KERNEL_CODES[127]),
    (r".*(?:Permission denied|cannot execute|Exec format error|is a directory)\.?", *KERNEL_CODES[126]),
)


def diagnose(table, lines, words, any_case=False):
    """Explain a failure.

    :param table: rows of pattern, meaning, advice
    :param lines: what was said
    :param words: a dict for the words in braces
    :returns: one line, or None when no row fits
    """
    import re

    flags = re.IGNORECASE if any_case else 0
    for pattern, what, advice in table:
        for line in lines:
            match = re.match("(?:{})$".format(pattern), line.strip(), flags)
            if match:
                groups = match.groupdict()
                methods = groups.get("methods") or groups.get("sent")
                asks = "keyboard-interactive" in (methods or "") and words["copy_key"]
                key = re.search(r"(?:SHA256:|ssh-\S+ \d+ )\S+", "\n".join(lines))
                words = dict(
                    words,
                    found=line.strip(),
                    second="; for" + SECOND_FACTOR if asks else "",
                    methods=" (it offers: {})".format(methods) if methods else "",
                    fingerprint=" ({})".format(key.group()) if key else "",
                    who=groups.get("who"),
                )
                return "{}; {}".format(what, advice).format(**words)
    return None


def reason(launch, facts, settings, request):
    """Why a launch has failed, and what to try next, from what its last try has found out.

    :param launch: for its client, and how long it has waited
    :returns: one line, without what was tried
    """
    words = words_for(launch, facts, settings, request)
    return explain_kernel(facts, words) or explain_connection(launch.dialect, facts, settings, words)


def words_for(launch, facts, settings, request):
    """What stands for the words in braces."""
    there, ssh = request.destination, launch.dialect is OpenSSH
    login = ["ssh" if ssh else os.path.basename(launch.program)]
    login += ["-p" if ssh else "-P", str(there.port)] if there.port else []
    login += ["-l", there.user] if there.user else []
    terminal = settings and settings.terminal and request.relay is None
    kernel = [there.host, (request.via + " " if request.via else "") + request.kernel.quoted]
    aside = last_of(facts.said_by_others) if facts.proxy or facts.reached else ""
    silent = [line for line in facts.notes if line.startswith("debug1: connect to address ")]
    addresses = sum(line.endswith(" timed out") for line in silent)
    return dict(
        CLOSED_WORDS[2 if facts.stage >= LOGGED_IN else facts.reached],
        host=there.host,
        kernel=request.kernel.path,
        login=printable_command(login + [there.host]),
        try_login=printable_command(login + [there.host, "true"]),
        copy_key=", then " + printable_command(copy_key_words(there)) if ssh else "",
        second="",
        by_hand=printable_command(login + kernel),
        at_terminal=printable_command(login + (["-tt" if ssh else "-t"] if terminal else []) + kernel),
        shell="; a start-up file there may start another shell where there is a terminal: try --relay"
        if terminal
        else "",
        seconds=" within {} s".format(launch.connect_seconds) if launch.connect_seconds else "",
        each=" at each of {} addresses".format(addresses) if addresses > 1 else "",
        aside="; {}: {}".format("on the way there" if facts.on_the_way else "it said", aside) if aside else "",
    )


def copy_key_words(there):
    """The command that has a server know the user's key."""
    words = ["ssh-copy-id"] + (["-p", str(there.port)] if there.port else [])
    return words + [(there.user + "@" if there.user else "") + there.host]


def says_closed(line):
    """Whether ssh says of its connection, which a ``ProxyCommand`` carries, that it has been closed."""
    return "UNKNOWN port 65535" in line or "_exchange_identification: " in line


def proxy_ended(facts, words):
    """The line on a ``ProxyCommand`` that has ended before the server spoke; None where it may not have."""
    start = "debug1: Executing proxy command: exec "
    commands = [line[len(start) :] for line in facts.notes if line.startswith(start)]
    if not commands or not any(map(says_closed, facts.said)):
        return None
    last = last_of(facts.aside) or "it said nothing"
    return "the ProxyCommand to {host} has ended by itself: {} ({}); run it by hand".format(
        commands[-1][:QUOTED_LENGTH], last, host=words["host"]
    )


def jump_words(facts, words):
    """The words for the jump host that has not let anybody in; None where no ``ProxyJump`` leads to the host.

    ssh runs itself for each jump host, and tells with which words; a jump host that lets in is told, too.
    """
    import shlex

    start, lines = "debug1: Executing proxy command: exec ", facts.notes + facts.aside
    commands = [line[len(start) :] for line in lines if line.startswith(start) and " -W " in line]
    let_in = [line.split()[2] for line in lines if line.startswith("Authenticated to ")]
    try:
        commands = [shlex.split(command) for command in commands]
    except ValueError:
        return None
    commands = [command for command in commands if command[-1] not in let_in]
    if not commands:
        return None
    login, host = commands[-1], commands[-1][-1]
    at = login.index("-W")
    login = ["ssh"] + [word for word in login[1:at] + login[at + 2 :] if not word.startswith("-v")]
    again = dict.fromkeys(("by_hand", "at_terminal", "login", "try_login"), printable_command(login + ["true"]))
    return dict(words, copy_key="", **dict(again, host="{}, on the way to {},".format(host, words["host"])))


def last_of(lines):
    """The last line that says something; empty for none."""
    found = [line.strip() for line in lines if not line.startswith(SAYS_NOTHING)]
    return ([""] + [line for line in found if any(map(str.isalnum, line))])[-1][:QUOTED_LENGTH]


UNANSWERED_LINK = "the kernel had connected, but {}; create the link anew in the front end, and launch again"
NOT_CALLED_BACK = "the kernel has not called back within {seconds} s{asked}; run it by hand: {at_terminal}{shell}"


def not_called_back(launch, facts, settings):
    """The line on a kernel that runs, and has not connected in time."""
    return unanswered_call(facts, words_for(launch, facts, settings, launch.request))


def unanswered_call(facts, words):
    """The line on a kernel that has not connected, with what it has said last: that may be a question."""
    last = last_of(facts.printed)
    asked = " (it said: {})".format(last) if last else ""
    return NOT_CALLED_BACK.format(**dict(words, seconds=CALLBACK_SECONDS, asked=asked))


ENDED_SHELL = (
    "the kernel {kernel} did not call back, and its shell on {host} ended with exit code 0 and without a word: a"
    " start-up file there (as .bashrc, with `exit 0`) may have ended the shell before the kernel's command, or a"
    " script at that path leaves the kernel in the background; if this prints nothing, it is a start-up file:"
    " {login} echo reached"
)


def explain_kernel(facts, words):
    """What became of a kernel that had been started; None where none had."""
    if facts.stopped_by == "no kernel":
        return unanswered_call(facts, words)
    if facts.obstacle in EXPLAINED or facts.stage < STARTED:
        return None
    if facts.unanswered and not facts.connected:
        return UNANSWERED_LINK.format(facts.unanswered)
    if facts.stopped_by == "links held" and facts.connected:
        return (
            "the kernel has ended; its exit code is not known, since the front end, or a process that the kernel"
            " has left behind, keeps its links open"
        )
    if not facts.kernel_ended:
        said = [line for line in facts.said if not line.startswith(NO_REASON)]
        last = (["it said nothing"] + facts.printed + said)[-1].strip()
        if not facts.killed and 128 < (facts.code or 0) < 160:
            last = "the client was ended by signal {}".format(facts.code - 128)
        return "the connection was lost ({}); the kernel is hung up on when the server notices".format(last)
    code = facts.kernel_code
    if facts.signal:
        text = "the kernel {kernel} was ended {} before it called back; run it by hand: {by_hand}"
        return text.format(BY_SIGNAL, **words)
    path = words["kernel"]  # which may hold any words
    found = diagnose(LIBRARY_DIAGNOSES, facts.printed, words, any_case=True) if code else None
    if code in KERNEL_CODES:
        found = found or misplaced(path, code, facts.printed, words)
        found = found or diagnose(of_script(path), facts.printed[::-1], words)
        found = found or "; ".join(KERNEL_CODES[code]).format(**words)
    about = [
        line for line in facts.printed if path in line or "\\" in path
    ]  # cmd.exe does not name the path that it has not found
    about = [line.replace(path, "") for line in about if code in (None, 1, 9009)]
    printed = [line.replace(path, "") for line in facts.printed]
    found = found or diagnose(SHELL_DIAGNOSES, about, words, any_case=True)
    found = found or diagnose(LICENCE_DIAGNOSES, printed, words, any_case=True)
    last = last_of(facts.printed)
    if code == 0 and not last:  # a kernel that ends so early says why, and not with 0
        found = found or ENDED_SHELL.format(**words)
    how = (", " + ending(facts, code) if code is not None else "") + (" ({})".format(last) if last else "")
    text = "the kernel {kernel} ended before it called back{}; run it by hand: {by_hand}"
    return found or text.format(how, **words)


def misplaced(path, code, printed, words):
    """The line on a text at the kernel's place that is none of a kernel's paths; None where it may be one.

    :param code: 127 or 126, as shells tell that there is no such program, or that it cannot be run
    :param printed: what was said of it
    """
    blanks, slash = path.split(), "/" in path
    if code == 127 and (";" in path or (len(blanks) > 1 and "/" not in blanks[0])):
        text = (
            "there is no kernel {kernel} on {host}; a path has to stand there: a command goes into --via, or into"
        )
        return (text + " a script whose path is given instead").format(**words)
    if code == 127 and not slash and "\\" not in path:
        return "there is no kernel {kernel} on {host}; give the full path of the kernel there".format(**words)
    if code == 126 and any(line.lower().rstrip(".").endswith("is a directory") for line in printed):
        text = "{kernel} on {host} is a folder; the kernel is Executables/WolframKernel in it (MathKernel up to 9)"
        return text.format(**words)
    return None


def of_script(path):
    """SCRIPT_DIAGNOSES for a kernel's path, of which the shell may have put the beginning in place."""
    import re

    for start in ("~", "$HOME"):
        path = path[len(start) :] if path.startswith(start + "/") else path
    return [(row[0].replace("{}", re.escape(path)),) + row[1:] for row in SCRIPT_DIAGNOSES]


AGENT_REFUSED = (
    "the agent has not signed with a key that it holds ({found}); unlock it, or load the key without -c"
)
SECOND_FACTOR = " a second factor log in by hand and share that connection (ControlMaster of OpenSSH)"
# What users are told of an obstacle that ends a launch, and of a wait that came to its limit.
EXPLAINED = {
    "no answer": "; ".join(UNANSWERED),
    "front end gone": "the front end has closed the main link, and nothing is run for it",
    "no login": "the login on {host} did not come to an end within {limit} s; try: {by_hand}",
    "asked": "the login on {host} asks for what nobody can answer here ({evidence}); a jump host needs a key; for"
    + SECOND_FACTOR,
    "half": "the login on {host} needs a second step, which nobody has taken here ({half}); check the password, if"
    " it is that; a step that asks nothing, such as a push, needs -o BatchMode=no; for" + SECOND_FACTOR,
    "no forwarding": "the server forwards no ports; use --relay, which needs none, or set AllowTcpForwarding"
    " yes in its sshd_config; if it forwards those of others, see what it says to {login}{aside}",
    "port": "{blocks} blocks of ports were refused ({evidence}); if the server forbids forwarding, use"
    " --relay, which needs none, or set AllowTcpForwarding yes in its sshd_config{aside}",
    "held": "{blocks} blocks of ports were tried, and each had one in use on the kernel machine ({evidence}),"
    " maybe by another kernel; to see who listens there: {login} ss -tlnp",
    "family": "AddressFamily leaves out the loopback address 127.0.0.1, where links are; take the option away",
    "no session": "the server allows no session on this connection (MaxSessions in its sshd_config)",
    "no opening": "the server lets nobody reach its loopback, where kernels up to 11.0 listen; use --relay, which"
    " needs no forwards, or set AllowTcpForwarding yes and PermitOpen any in its sshd_config",
    "no terminal": "the server allows no terminal, and the kernel was not run ({evidence})",
}


def explain_connection(dialect, facts, settings, words):
    """Why no kernel was started."""
    if facts.reached and facts.obstacle in (None, "no forwarding", "port"):
        found = diagnose(ACCOUNT_DIAGNOSES, facts.said_by_others, words)
        if found:
            return found
    half = facts.half if facts.obstacle == "refused" else None
    for reason in ("half" if half else None, facts.obstacle, facts.stopped_by):
        if reason in EXPLAINED:
            values = dict(words, blocks=settings.block, limit=LOGIN_SECONDS, half=half)
            return EXPLAINED[reason].format(evidence=(facts.evidence or "").strip(), **values)
    on_the_way = facts.on_the_way
    said = facts.said + (facts.aside if on_the_way or not facts.said else [])
    notes = [line.partition("debug1: ")[2] for line in facts.notes if " line " not in line]
    found = diagnose(JUMP_DIAGNOSES, facts.aside, words) if on_the_way else None
    jump = jump_words(facts, words) if on_the_way and not found else None
    if jump:
        spoken = [line for line in facts.aside if not line.startswith(SAYS_NOTHING)]
        found = diagnose(DIAGNOSES, spoken, jump)
    if not found and facts.obstacle == "refused":
        found = diagnose(((SIGNING, "{host} refused the login", AGENT_REFUSED),), said[::-1], words)
    if on_the_way and not (found or jump):
        mine = [line for line in facts.said if not says_closed(line)]
        found = diagnose(DIAGNOSES, mine + facts.aside, words) or proxy_ended(facts, words)
    found = found or diagnose(DIAGNOSES, said, words)
    if facts.obstacle == "refused":  # the client may have been ended before it could say so
        found = found or "{host} refused the login; ".format(**words) + CHECK_LOGIN.format(**words)
    found = found or diagnose(DIAGNOSES, notes, words)
    said = facts.printed + [line for line in said if not line.startswith(NO_REASON)]
    if facts.stage == LOGGED_IN and not (said or facts.killed):
        found = found or "{host} {closed}; {advice}".format(**words)
    last = (["it said nothing"] + said)[-1].strip()
    text = "{} failed with exit code {}: {}; try: {by_hand}"
    return found or text.format(dialect.kind, facts.code, last, **words)
