"""Exit codes, and the line that explains them: each reason is that of lines which somebody prints."""

import itertools

import pytest
from rig import product
from rig.product import ANSWERED, LOGGED_IN, SILENT, STARTED, Facts, OpenSSH, Plink
from rig.tries import KERNEL, LINK, LOGIN, PLINK_LOGIN, PLINK_SESSION, SESSION, STAGES, facts_of, request, settings

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.mark.parametrize(
    "dialect, found, signal, code",
    [
        (OpenSSH, {}, None, 1),  # the client ended with 0, though no kernel has run: that is no success
        (OpenSSH, {"code": 255}, None, 255),
        (OpenSSH, {"code": 7}, None, 7),
        (Plink, {"code": 1}, None, 1),
        (OpenSSH, {"code": 143, "killed": True}, None, 255),
        (Plink, {"code": 143, "killed": True}, None, 1),
        (OpenSSH, {"code": 0, "killed": True, "stopped_by": "no answer"}, None, 255),
        # The kernel's own.
        (OpenSSH, {"ended": True, "status": 0, "connected": True, "code": 0}, None, 0),
        (OpenSSH, {"ended": True, "status": 7, "connected": True, "code": 143, "killed": True}, None, 7),
        (OpenSSH, {"ended": True, "status": 7, "connected": False, "code": 7}, None, 7),
        # A client that ends by itself with another code than it has told has lost the connection, and maybe data.
        (OpenSSH, {"ended": True, "status": 0, "connected": True, "code": 255}, None, 255),
        (OpenSSH, {"ended": True, "status": 0, "connected": True, "code": None}, None, 0),
        (OpenSSH, {"ended": True, "status": 0, "connected": False, "code": 0}, None, 1),  # it never called back
        (OpenSSH, {"ended": True, "status": None, "connected": True, "code": 9}, None, 9),
        (OpenSSH, {"ended": True, "status": None, "connected": True, "code": 0}, None, 0),
        # A code that is not known is never 0.
        (OpenSSH, {"ended": True, "connected": True, "code": 0, "killed": True}, None, 255),
        (Plink, {"ended": True, "connected": True, "code": 0, "killed": True}, None, 1),
        (
            OpenSSH,
            {"ended": True, "connected": True, "code": 0, "killed": True, "stopped_by": "links held"},
            None,
            255,
        ),
        # A client on a shared connection.
        (OpenSSH, {"shared": True, "stage": STARTED, "connected": True, "code": 0}, None, 0),
        (OpenSSH, {"shared": True, "stage": STARTED, "connected": True, "code": 6}, None, 6),
        (OpenSSH, {"shared": True, "stage": STARTED, "connected": True, "code": 255}, None, 255),
        (OpenSSH, {"shared": True, "stage": LOGGED_IN, "code": 0}, None, 1),
        # What ended it from here.
        (OpenSSH, {"stopped_by": "checked", "code": 143, "killed": True}, None, 0),
        (OpenSSH, {"stopped_by": "front end gone", "code": 143, "killed": True}, None, 129),
        (OpenSSH, {"stopped_by": "front end gone", "ended": True, "status": 0, "connected": True}, None, 129),
        (OpenSSH, {"stopped_by": "signal", "code": 143, "killed": True}, 15, 143),
        (Plink, {"ended": True, "status": 0, "connected": True, "code": 0}, 2, 130),
        (OpenSSH, {"stopped_by": "checked"}, 1, 129),
    ],
)
def test_exit_codes(dialect, found, signal, code):
    facts = Facts()
    for name, value in found.items():
        setattr(facts, name, value)
    assert product.verdict(dialect, facts, signal) == code


def test_only_a_kernel_that_has_connected_and_said_so_itself_or_a_check_ends_with_0():
    for stage, killed, ended, connected, shared in itertools.product(STAGES, *[(False, True)] * 4):
        for status, code, reason in itertools.product((None, 0, 3), (0, 3, 255), (None, "links held", "no login")):
            facts = Facts()
            facts.stage, facts.killed, facts.ended, facts.connected = stage, killed, ended, connected
            facts.shared, facts.status, facts.code, facts.stopped_by = shared, status, code, reason
            if product.verdict(OpenSSH, facts) == 0:
                assert connected
                assert (code == 0 and not killed) or (status == 0 and killed)


class Case:
    """A launch as far as explanations need one."""

    def __init__(self, dialect, *argv, connect_seconds=15):
        self.request = request(*argv)
        self.dialect, self.connect_seconds = dialect, connect_seconds
        self.program = "/usr/bin/ssh" if dialect is OpenSSH else "/opt/putty/plink"

    def explain(self, given=None, **found):
        facts = Facts()
        facts.code = self.dialect.failure
        facts.code = found.get("status", facts.code)
        for name, value in found.items():
            setattr(facts, name, value)
        text = product.explain(self, facts, given or settings())
        assert "\n" not in text
        assert "{" not in text
        start = "launching {} on {}: ".format(self.request.role, self.request.destination)
        assert text.startswith(start)
        return text[len(start) :]


WORDS = (
    "host",
    "kernel",
    "seconds",
    "each",
    "by_hand",
    "login",
    "closed",
    "advice",
    "aside",
    "try_login",
    "copy_key",
)
CHANGED, UNKNOWN = "the host key of host has changed", "the host key of host is unknown"
REFUSED, DROPPED = "host refused the login", "host closed the connection before the login; it may be overloaded"
NOBODY, NO_ANSWER = "no machine named host is known here", "host did not answer within 15 s; "
NO_NAMES = "the name host could not be looked up; no name server answers"
NO_SERVER, NO_ROUTE = "host refused the connection: no SSH server listens there", "there is no route to host"
OPTIONS, ALGORITHM = "the client rejected its options", "client and server share no algorithm"
KEYS, OLD_SSH = "host ended the login after too many keys were offered", "this ssh is older than OpenSSH 7.6"
SAID = [
    (
        OpenSSH,
        ["@       WARNING: REVOKED HOST KEY DETECTED!               @"]
        + ["The ED25519 host key for host is marked as revoked.", "Host key verification failed."],
        "the host key of host has been revoked here",
    ),
    (
        OpenSSH,
        ["bind 203.0.113.1: Cannot assign requested address", "ssh: connect to host host port 22: failure"],
        "this machine lacks the address from which ssh is to connect (bind 203.0.113.1: Cannot assign",
    ),
    (OpenSSH, ["Connection to host closed by remote host."], DROPPED),
    (OpenSSH, ["@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @"], CHANGED),
    (OpenSSH, ["Host key for host has changed and you have requested strict checking."], CHANGED),
    (
        OpenSSH,
        ["ED25519 host key for [host]:2222 has changed and you have requested strict checking."],
        CHANGED,
    ),
    (
        OpenSSH,
        ["@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @", "Host key verification failed."],
        CHANGED,
    ),
    (Plink, ["WARNING - POTENTIAL SECURITY BREACH!", "Cannot confirm a host key in batch mode"], CHANGED),
    (Plink, ["Host key not in manually configured list"], CHANGED),
    (Plink, ["FATAL ERROR: Host key did not appear in manually configured list"], CHANGED),
    (OpenSSH, ["No ED25519 host key is known for host and you have requested strict checking."], UNKNOWN),
    (Plink, ["The host key is not cached for this server:", "ssh-ed25519 255 SHA256:x"], UNKNOWN),
    (Plink, ["The server's host key is not cached. You have no guarantee"], UNKNOWN),
    (Plink, ["FATAL ERROR: Cannot confirm a host key in batch mode"], UNKNOWN),
    (OpenSSH, ["Host key verification failed."], "the host key of host was refused"),
    (
        OpenSSH,
        [
            "ED25519 host key for host was revoked and you have requested strict checking.",
            "Host key verification failed.",
        ],
        "the host key of host has been revoked here",
    ),
    (OpenSSH, ["ssh: Could not resolve hostname host: Name or service not known"], NOBODY),
    (OpenSSH, ["ssh: Could not resolve hostname host: nodename nor servname provided, or not known"], NOBODY),
    (OpenSSH, ["/usr/bin/ssh: Could not resolve hostname host: Temporary failure in name resolution"], NO_NAMES),
    (OpenSSH, ['ssh: Could not resolve host "host"'], NOBODY),
    (Plink, ["Unable to open connection:", "Name or service not known"], NOBODY),
    (Plink, ["Unable to open connection:", "Host does not exist"], NOBODY),
    (Plink, ["Unable to open connection:", "Temporary failure in name resolution"], NO_NAMES),
    (
        OpenSSH,
        [
            "ssh: Could not resolve hostname host: This is usually a temporary error during hostname resolution"
            " and means that the local server did not receive a response from an authoritative server."
        ],
        NO_NAMES,
    ),
    (Plink, ["Unable to open connection:", "No address associated with hostname"], NOBODY),
    (OpenSSH, ["command-line: line 0: Bad configuration option: remotecommand"], OLD_SSH),
    (OpenSSH, ['command-line line 0: unsupported option "accept-new".'], OLD_SSH),
    (Plink, ['plink: unknown option "-pwfile"'], "this plink is older than 0.77"),
    (OpenSSH, ["command-line: line 0: Bad configuration option: mine"], OPTIONS),
    (OpenSSH, ["command-line line 0: invalid time value."], OPTIONS),
    (OpenSSH, ['command-line line 0: no argument after keyword "compression"'], OPTIONS),
    (OpenSSH, ["/home/me/.ssh/config: line 3: Bad configuration option: mine"], OPTIONS),
    (OpenSSH, ["/home/me/.ssh/config line 3: Bad yes/no argument: perhaps"], OPTIONS),
    (OpenSSH, ['/home/me/.ssh/config line 3: Unsupported option "mine"'], OPTIONS),
    (OpenSSH, ['/home/me/.ssh/config: line 4: garbage at end of line; "x".'], OPTIONS),
    (OpenSSH, ["Bad owner or permissions on /home/me/.ssh/config"], OPTIONS),
    (OpenSSH, ["/home/me/.ssh/config: terminating, 1 bad configuration options"], OPTIONS),
    (Plink, ['plink: unknown option "-foo"'], OPTIONS),
    (Plink, ['plink: option "-x" not available in this tool'], OPTIONS),
    (OpenSSH, ["ssh: connect to host host port 22: Connection refused"], NO_SERVER),
    (Plink, ["FATAL ERROR: Connection refused"], NO_SERVER),
    (Plink, ["FATAL ERROR: Network error: Connection refused"], NO_SERVER),
    (OpenSSH, ["ssh: connect to host host port 22: Connection timed out"], NO_ANSWER),
    (OpenSSH, ["ssh: connect to host host port 22: Operation timed out"], NO_ANSWER),
    (
        OpenSSH,
        ["Connection timed out during banner exchange", "Connection to 192.0.2.7 port 22 timed out"],
        NO_ANSWER,
    ),
    (OpenSSH, ["banner exchange: Connection to 192.0.2.7 port 22: Connection timed out"], NO_ANSWER),
    (Plink, ["FATAL ERROR: Connection timed out"], NO_ANSWER),
    (Plink, ["FATAL ERROR: Network error: Connection timed out"], NO_ANSWER),
    (OpenSSH, ["ssh: connect to host host port 22: No route to host"], NO_ROUTE),
    (OpenSSH, ["ssh: connect to host host port 22: Network is unreachable"], NO_ROUTE),
    (OpenSSH, ["ssh: connect to host host port 22: Host is down"], NO_ROUTE),
    (Plink, ["FATAL ERROR: No route to host"], NO_ROUTE),
    (Plink, ["FATAL ERROR: Network error: Network is unreachable"], NO_ROUTE),
    (
        OpenSSH,
        [
            "Received disconnect from 192.0.2.7 port 22:2: Too many authentication failures",
            "Disconnected from x",
        ],
        KEYS,
    ),
    (OpenSSH, ["Disconnecting 192.0.2.7 port 22: Too many authentication failures"], KEYS),
    (
        Plink,
        [
            "FATAL ERROR: Remote side sent disconnect message",
            "type 2 (protocol error):",
            '"Too many authentication failures"',
        ],
        KEYS,
    ),
    (
        OpenSSH,
        ["Unable to negotiate with 192.0.2.7 port 22: no matching host key type found. Their offer: ssh-rsa"],
        ALGORITHM,
    ),
    (Plink, ["FATAL ERROR: Couldn't agree a key exchange algorithm (available: x)"], ALGORITHM),
    (
        OpenSSH,
        ["john@host: Permission denied (publickey,password)."],
        REFUSED + " (it offers: publickey,password)",
    ),
    (OpenSSH, ["Permission denied (publickey)."], REFUSED + " (it offers: publickey)"),
    (OpenSSH, ["Permission denied, please try again."], REFUSED + "; "),
    (
        OpenSSH,
        ["Permission denied, please try again.", "john@host: Permission denied (publickey,password)."],
        REFUSED + " (it offers: publickey,password)",
    ),
    (
        Plink,
        ["FATAL ERROR: No supported authentication methods available (server sent: publickey)"],
        REFUSED + " (it offers: publickey)",
    ),
    (Plink, ["Access denied", "FATAL ERROR: Configured password was not accepted"], REFUSED),
    (Plink, ["FATAL ERROR: Cannot answer interactive prompts in batch mode"], REFUSED),
    (Plink, ["Disconnected: Unable to authenticate"], REFUSED),
    (OpenSSH, ["kex_exchange_identification: Connection closed by remote host"], DROPPED),
    (OpenSSH, ["ssh_exchange_identification: read: Connection reset by peer"], DROPPED),
    (OpenSSH, ["Connection closed by 192.0.2.7 port 22"], DROPPED),
    (OpenSSH, ["Connection reset by 192.0.2.7 port 22"], DROPPED),
    (Plink, ["FATAL ERROR: Remote side unexpectedly closed network connection"], DROPPED),
    (Plink, ["FATAL ERROR: Server unexpectedly closed network connection"], DROPPED),
    (Plink, ["FATAL ERROR: Network error: Connection reset by peer"], DROPPED),
    (Plink, ["FATAL ERROR: Connection reset by peer"], DROPPED),
    (
        OpenSSH,
        ["percent_expand: unknown key %z"],
        "ssh failed with exit code 255: percent_expand: unknown key %z; ",
    ),
    (
        Plink,
        ["FATAL ERROR: something"],
        "plink failed with exit code 1: FATAL ERROR: something; try: plink -l john ",
    ),
    (OpenSSH, [], "ssh failed with exit code 255: it said nothing; try: ssh -l john host "),
]


@pytest.mark.parametrize("dialect, lines, reason", SAID)
def test_what_a_client_says_is_explained(dialect, lines, reason):
    assert Case(dialect).explain(said=lines).startswith(reason)
    known = "Warning: Permanently added 'host' (ED25519) to the list of known hosts."  # whatever it says besides
    assert Case(dialect).explain(said=[known] + lines).startswith(reason)


def test_each_reason_is_that_of_lines_which_a_client_prints():
    found = set()
    for _, lines, _ in SAID:
        for row in product.DIAGNOSES:
            if product.diagnose([row], lines, dict.fromkeys(WORDS, "")):
                found.add(row)
                break
    idle = [row for row in product.DIAGNOSES if row not in found]
    assert idle == []


@pytest.mark.parametrize(
    "line",
    [
        "Permission denied, and so on: ask (somebody).",
        "Welcome! If your connection timed out, or Permission denied (publickey), call 5555.",
        "* Host key verification failed. *",
        "This is host: Connection refused is what you get",
        "/bin/bash: line 1: exec: socat: not found",
        "no machine: Could not resolve",
    ],
)
def test_a_line_that_only_holds_the_words_explains_nothing(line):
    for dialect in (OpenSSH, Plink):
        said = Case(dialect).explain(said=[line])
        assert said.startswith(
            "{} failed with exit code {}: {}; try: ".format(dialect.kind, dialect.failure, line)
        )


def test_debug_notes_explain_only_when_nothing_else_does():
    notes = [
        "debug1: Connection timed out during banner exchange",
        "debug1: ssh: connect to host h port 22: Connection refused",
    ]
    assert Case(OpenSSH).explain(notes=notes).startswith(NO_SERVER)
    assert (
        Case(OpenSSH).explain(notes=notes, said=["john@host: Permission denied (publickey)."]).startswith(REFUSED)
    )
    aside = ["jump: Could not resolve hostname host: Name or service not known"]
    assert Case(OpenSSH).explain(notes=notes, aside=aside).startswith(NOBODY)


@pytest.mark.parametrize(
    "note",
    [
        "debug1: Connecting to host [192.0.2.7] port 22.",
        "debug1: connect to address ::1 port 22: Connection refused",
        "debug1: /home/me/.ssh/config line 1: Applying options for host",
        "debug1: kex_exchange_identification: banner line 0: Welcome",  # a server that speaks before its version
        "debug1: ssh_exchange_identification: Welcome",
        "debug1: Remote: john@host: Permission denied (publickey).",
        "debug1: Authentications that can continue: publickey",
    ],
)
def test_debug_notes_of_every_launch_explain_nothing(note):
    assert Case(OpenSSH).explain(notes=[note]).startswith("ssh failed with exit code 255: it said nothing; ")


def test_what_others_say_counts_where_they_may_be_the_reason():
    """A jump host's client writes where servers do; a banner explains nothing that ssh explains itself."""
    aside = ["jump@gate: Permission denied (publickey)."]
    gone = ["Connection closed by UNKNOWN port 65535"]
    text = Case(OpenSSH).explain(said=gone, aside=aside, proxy=True)
    assert text.startswith("gate, on the way to host, refused the login (it offers: publickey); check user, ")
    assert Case(OpenSSH).explain(said=gone, aside=["stdio forwarding failed"]).startswith(DROPPED)
    assert Case(OpenSSH).explain(said=gone, aside=aside).startswith(DROPPED)
    assert Case(OpenSSH).explain(aside=aside).startswith(REFUSED)


@pytest.mark.parametrize(
    "lines",
    [
        ["channel 0: open failed: connect failed: Connection refused", "stdio forwarding failed"],
        ["channel 0: open failed: connect failed: Name or service not known", "stdio forwarding failed"],
        ["channel 0: open failed: administratively prohibited: open failed", "stdio forwarding failed"],
        ["stdio forwarding failed"],
    ],
)
def test_a_jump_host_that_gets_no_further_is_told(lines):
    gone = [
        "kex_exchange_identification: Connection closed by remote host",
        "Connection closed by UNKNOWN port 65535",
    ]
    text = Case(OpenSSH).explain(said=gone, aside=lines, proxy=True)
    assert text.startswith("the jump host does not reach host ({})".format(lines[0]))


NOLOGIN = "The cluster is down for maintenance until Monday."
EXPIRED = "You are required to change your password immediately (password expired)."


@pytest.mark.parametrize(
    "dialect, said",
    [
        (OpenSSH, ["Connection closed by 192.0.2.7 port 22"]),
        (OpenSSH, ["Connection reset by 192.0.2.7 port 22"]),
        (
            Plink,
            [
                "Remote side unexpectedly closed network connection",
                "FATAL ERROR: Remote side unexpectedly closed network connection",
            ],
        ),
    ],
)
def test_a_server_that_ends_a_login_is_not_overloaded(dialect, said):
    """pam_nologin, pam_access, an account that has expired: after the key was accepted."""
    start = "host closed the connection during the login; it may not let this account in, or not wait as long as"
    start += " the login takes; ask who runs it"
    for aside, end in ([], ""), ([NOLOGIN, "", "*****"], "; it said: " + NOLOGIN):
        text = Case(dialect).explain(said=said, aside=aside, reached=True, stage=ANSWERED)
        assert text == start + end
        text = Case(dialect).explain(said=said, aside=aside)
        assert text.startswith(DROPPED) and NOLOGIN not in text
    jump = ["debug1: pledge: network", "Killed by signal 1."]
    text = Case(dialect).explain(said=said, aside=[NOLOGIN] + jump, reached=True, proxy=True, stage=ANSWERED)
    assert text.endswith("; it said: " + NOLOGIN)
    text = Case(dialect).explain(said=said, aside=[NOLOGIN], proxy=True, stage=ANSWERED)
    assert text.startswith(DROPPED) and text.endswith("; on the way there: " + NOLOGIN)


@pytest.mark.parametrize(
    "dialect, said",
    [
        (OpenSSH, ['Authenticated to host ([192.0.2.7]:22) using "publickey".']),
        (OpenSSH, ["Warning: Permanently added 'host' (ED25519) to the list of known hosts."]),
        (OpenSSH, ["Connection to host closed by remote host."]),
        (OpenSSH, ["client_loop: send disconnect: Broken pipe"]),
        (OpenSSH, ["channel_request_remote_forwarding: request tcpip-forward: Broken pipe"]),
        (OpenSSH, ["ssh_dispatch_run_fatal: Connection to 192.0.2.7 port 22: Broken pipe"]),
        (Plink, ["FATAL ERROR: Remote side unexpectedly closed network connection"]),
    ],
)
def test_a_connection_that_ends_right_after_the_login_is_told_as_that(dialect, said):
    text = Case(dialect).explain(said=said, reached=True, stage=LOGGED_IN)
    assert text.startswith("host closed the connection right after the login; ")
    if "run_fatal" in said[0]:
        text = Case(dialect).explain(said=said, reached=True, stage=ANSWERED)
        assert text.startswith("host closed the connection during the login; ")


def test_what_a_client_says_of_the_way_is_no_reason_for_a_lost_connection():
    said = ["Warning: Permanently added 'host' (ED25519) to the list of known hosts."]
    text = Case(OpenSSH).explain(said=said, reached=True, stage=STARTED)
    assert text.startswith("the connection was lost (it said nothing); ")


@pytest.mark.parametrize(
    "dialect, said, aside, line",
    [
        (OpenSSH, [], [EXPIRED], EXPIRED),
        (OpenSSH, [], [EXPIRED.replace("(password expired)", "(administrator enforced)")], None),
        (OpenSSH, [], ["Password expired. Change your password now."], None),
        (OpenSSH, [], ["WARNING: Your password has expired."], None),
        (Plink, ["-- Pre-authentication banner message from server: ---", "| " + EXPIRED], [], EXPIRED),
    ],
)
def test_an_expired_password_is_told_where_it_shows_as_forwards_that_are_refused(dialect, said, aside, line):
    start = "the password on host has expired; log in by hand and change it: {} -l john host (".format(
        dialect.kind
    )
    for obstacle in ("no forwarding", "port", None):
        found = {"said": said, "aside": aside, "obstacle": obstacle, "evidence": "x", "reached": True}
        text = Case(dialect).explain(stage=LOGGED_IN, **found)
        assert text == start + (line or aside[0]) + ")"
    refused = {"said": said + ["Permission denied (publickey)."], "aside": aside, "reached": True}
    text = Case(OpenSSH).explain(stage=ANSWERED, obstacle="refused", **refused)  # a banner explains nothing then
    assert text.startswith(REFUSED)
    if aside:
        unreached = Case(dialect).explain(said=["Connection closed by 192.0.2.7 port 22"], aside=aside, proxy=True)
        assert unreached.startswith(DROPPED)


@pytest.mark.parametrize(
    "line",
    [
        "Passwords expire after 90 days.",
        "Call 5555 if you are told: Your password has expired.",
        "Your password will expire in 3 days.",
        "Your password has expired. You have 3 grace login(s) remaining.",
    ],
)
def test_a_banner_about_passwords_is_no_expired_one(line):
    found = {"aside": [line], "obstacle": "no forwarding", "reached": True, "stage": LOGGED_IN}
    text = Case(OpenSSH).explain(**found)
    assert text.startswith("the server forwards no ports; use --relay")
    assert text.endswith("see what it says to ssh -l john host; it said: " + line)


def test_too_many_logins_are_told():
    """By who lets them run a command all the same, as with a relay."""
    for line in ("There were too many logins for 'john'.", "Too many logins for 'john'."):
        text = product.diagnose(product.ACCOUNT_DIAGNOSES, ["x", line], dict.fromkeys(WORDS, "host"))
        assert text.startswith("host lets this account in no more often at the same time; end ")
        assert text.endswith("({})".format(line))


@pytest.mark.parametrize(
    "dialect, half, refused",
    [
        (
            OpenSSH,
            'Authenticated using "publickey" with partial success.',
            "john@192.0.2.7: Permission denied (keyboard-interactive).",
        ),
        (OpenSSH, "Authenticated with partial success.", "john@192.0.2.7: Permission denied (password)."),
        (
            Plink,
            "Further authentication required",
            "FATAL ERROR: Cannot answer interactive prompts in batch mode",
        ),
    ],
)
def test_a_login_that_needs_a_second_step_is_not_told_as_refused(dialect, half, refused):
    before = LOGIN[:3] if dialect is OpenSSH else PLINK_LOGIN[:2]
    facts = facts_of(*(before + [half, refused]), dialect=dialect)
    assert (facts.obstacle, facts.half, facts.stage) == ("refused", half, ANSWERED)
    found = {"said": [half, refused], "obstacle": "refused", "evidence": refused, "reached": True}
    text = Case(dialect).explain(half=half, **found)
    assert text.startswith("the login on host needs a second step, which nobody has taken here ({})".format(half))
    assert text.endswith("for a second factor log in by hand and share that connection (ControlMaster of OpenSSH)")
    assert Case(dialect).explain(**found).startswith(REFUSED)
    assert OpenSSH.read(half, ANSWERED, aside=True) is None  # a step of a jump host's login is none of this one


def test_the_fingerprint_of_an_unknown_key_is_shown():
    lines = [
        "The host key is not cached for this server:",
        "  ssh-ed25519 255 SHA256:47DEQpj8HBSa+/TImW",
        "Connection abandoned.",
    ]
    assert Case(Plink).explain(said=lines).startswith(UNKNOWN + " (ssh-ed25519 255 SHA256:47DEQpj8HBSa+/TImW); ")
    assert Case(Plink).explain(said=lines[:1]).startswith(UNKNOWN + "; ")


@pytest.mark.parametrize(
    "dialect, argv, command",
    [
        (OpenSSH, ["host", "/k/14.1/math", LINK], "ssh host '\"/k/14.1/math\"'"),
        (OpenSSH, ["john:secret@host:2222", "/k/14.1/math", LINK], "ssh -p 2222 -l john host '\"/k/14.1/math\"'"),
        (Plink, ["john@host:2222", "/k/14.1/math", LINK], "plink -P 2222 -l john host '\"/k/14.1/math\"'"),
    ],
)
def test_the_command_to_try_by_hand_is_one_that_works(dialect, argv, command):
    text = Case(dialect, *argv).explain(said=["Host key verification failed."])
    assert text.endswith("connect once by hand: " + command)
    assert "secret" not in text


def test_how_long_was_waited_is_told_only_where_it_is_known():
    timeout = ["ssh: connect to host host port 22: Connection timed out"]
    for found in ({"said": timeout}, {"stopped_by": "no answer"}):
        assert Case(OpenSSH).explain(**found).startswith("host did not answer within 15 s; ")
        assert Case(OpenSSH, connect_seconds=60).explain(**found).startswith("host did not answer within 60 s; ")
        assert Case(OpenSSH, connect_seconds=0).explain(**found).startswith("host did not answer; ")
    notes = ["debug1: connect to address 192.0.2.{} port 22: Connection timed out".format(n) for n in (7, 8)]
    notes += ["debug1: connect to address ::1 port 22: Connection refused"]
    text = Case(OpenSSH).explain(said=timeout, notes=notes)
    assert text.startswith("host did not answer within 15 s at each of 2 addresses; check the name, ")
    assert "did not come to an end within 150 s" in Case(OpenSSH).explain(stopped_by="no login")


@pytest.mark.parametrize(
    "obstacle, reason",
    [
        (
            "no forwarding",
            "the server forwards no ports; use --relay, which needs none, or set AllowTcpForwarding",
        ),
        ("port", "3 blocks of ports were refused (line); if the server forbids forwarding, use --relay, "),
        ("no session", "the server allows no session on this connection (MaxSessions in its sshd_config)"),
        (
            "no opening",
            "the server lets nobody reach its loopback, where kernels up to 11.0 listen; use --relay, ",
        ),
        ("held", "3 blocks of ports were tried, and each had one in use on the kernel machine (line)"),
        ("family", "AddressFamily leaves out the loopback address 127.0.0.1"),
        ("no terminal", "the server allows no terminal, and the kernel was not run (line)"),
    ],
)
def test_obstacles_to_which_there_is_no_further_try_are_explained(obstacle, reason):
    facts = {"obstacle": obstacle, "evidence": " line ", "code": 255}
    said = ["john@host: Permission denied (publickey)."]  # whatever was said besides
    for stage in STAGES:
        assert Case(OpenSSH).explain(settings(block=3), stage=stage, said=said, **facts).startswith(reason)
    assert (
        Case(OpenSSH).explain(settings(block=3), ended=True, stage=STARTED, status=1, **facts).startswith(reason)
    )


PATH = "/opt/licensed/14.1/WolframKernel"


@pytest.mark.parametrize(
    "status, printed, reason",
    [
        (127, ["bash: line 1: /opt/licensed/14.1/WolframKernel: No such file or directory"], "there is no kernel"),
        (127, ["fish: Unknown command: /opt/licensed/14.1/WolframKernel"], "there is no kernel"),
        (127, ["No valid password found."], "there is no kernel"),  # the code outranks words
        (127, [], "there is no kernel"),
        (
            126,
            ["bash: /opt/licensed/14.1/WolframKernel: Permission denied"],
            "/opt/licensed/14.1/WolframKernel on host cannot",
        ),
        (126, ["license"], "/opt/licensed/14.1/WolframKernel on host cannot be executed"),
        (1, ["/opt/licensed/14.1/WolframKernel: Command not found."], "there is no kernel"),  # csh, tcsh
        (
            1,
            ["/opt/licensed/14.1/WolframKernel: Permission denied."],
            "/opt/licensed/14.1/WolframKernel on host cannot",
        ),
        (
            1,
            ["Mathematica cannot find a valid password.", "No valid password found."],
            "the kernel {} found no licence",
        ),
        (1, ["Wolfram product is not activated."], "the kernel {} found no licence"),
        (1, ["License error: no more processes"], "the kernel {} found no licence"),
        (
            3,
            ["Segmentation fault"],
            "the kernel {} ended before it called back, with exit code 3 (Segmentation fault); run it by hand: ",
        ),
        (
            1,
            ["This account is currently not available.", "Connection to host closed.", "", "---"],
            "the kernel {} ended before it called back, with exit code 1 (This account is currently not",
        ),
        (
            127,
            [
                "/etc/profile.d/modules.sh: line 7: tclsh: command not found",
                PATH + ": line 2: module: command not found",
                PATH + ": line 3: exec: WolframKernel: not found",
                "Connection to 192.0.2.7 closed.",
            ],
            "{0} on host could not start the kernel: {0}: line 3: exec: WolframKernel: not found; run it by ",
        ),
        (
            127,
            [PATH + ": 3: exec: WolframKernel: not found"],  # dash
            "{0} on host could not start the kernel: {0}: 3: exec: WolframKernel: not found; run it by hand: ",
        ),
        (
            126,
            [PATH + ": line 3: /opt/math: Permission denied"],
            "{0} on host could not start the kernel: {0}: line 3: /opt/math: Permission denied; run it by hand: ",
        ),
        (
            126,
            ["bash: line 1: " + PATH + ": /bin/sh^M: bad interpreter: No such file or directory"],
            "{0} on host could not start the kernel: bash: line 1: {0}: /bin/sh^M: bad interpreter: No such file",
        ),
        (
            127,
            ["bash: line 1: " + PATH + ": cannot execute: required file not found"],
            "{0} on host could not start the kernel: bash: line 1: {0}: cannot execute: required file not found; ",
        ),
        (
            127,
            ["zsh:1: " + PATH + ": bad interpreter: /no/sh: no such file or directory"],
            "{0} on host could not start the kernel: zsh:1: {0}: bad interpreter: /no/sh: no such file",
        ),
        (127, ["sh: 1: " + PATH + ": not found"], "there is no kernel"),
        (127, ["/etc/bash.bashrc: line 3: required file not found"], "there is no kernel"),
        (0, [], "the kernel {} did not call back, and its shell on host ended with exit code 0 and without"),
        (
            3,
            ["a licenseless kernel"],
            "the kernel {} ended before it called back, with exit code 3 (a licenseless",
        ),
    ],
)
def test_a_kernel_that_ended_before_it_called_back_is_explained(status, printed, reason):
    text = Case(OpenSSH, "john@host", PATH, LINK).explain(
        stage=STARTED, ended=True, status=status, printed=printed
    )
    assert text.startswith(reason.format(PATH))


@pytest.mark.parametrize("path", ["~/bin/WolframKernel", "$HOME/bin/WolframKernel", "bin/WolframKernel"])
def test_a_script_is_known_by_its_path_as_the_shell_writes_it(path):
    said = "/home/john/bin/WolframKernel: line 3: exec: math: not found"
    text = Case(OpenSSH, "host", path, LINK).explain(stage=STARTED, ended=True, status=127, printed=[said])
    assert text.startswith("{} on host could not start the kernel: {}; ".format(path, said))


def test_a_kernel_that_a_signal_ended_before_it_called_back_is_told():
    """A client has no code for that but the one of its own failures."""
    ended = "debug1: client_input_channel_req: channel 0 rtype exit-signal reply 0"
    facts = facts_of(*(SESSION + [ended, "debug1: Exit status -1"]))
    assert (facts.ended, facts.signal, facts.status) == (True, True, None)
    assert not facts_of(*(SESSION + [ended.replace("signal", "status"), "debug1: Exit status 9"])).signal
    for code in (255, 127):
        text = Case(OpenSSH).explain(stage=STARTED, ended=True, signal=True, code=code, printed=["no licence"])
        start = "the kernel {} was ended by a signal (out of memory?) before it called back; run it by hand: "
        assert text.startswith(start.format(KERNEL))
    # A client that shares a connection has the same code for a kernel that ends with 255 by itself.
    text = Case(OpenSSH).explain(stage=STARTED, ended=True, shared=True, code=255)
    assert ", with exit code 255, or by a signal (out of memory?); run it by hand: " in text
    facts = facts_of(*(PLINK_SESSION + ['Session exited on unrecognised signal "KILL"']), dialect=Plink)
    assert (facts.ended, facts.signal) == (True, True)


@pytest.mark.parametrize(
    "path", ["/opt/license/14.1/math", "/opt/activated/math", "/home/me/no valid password/math"]
)
@pytest.mark.parametrize(
    "said, reason", [("{}: Command not found.", "there is no kernel "), ("{}: Permission denied.", "")]
)
def test_words_in_the_path_of_a_kernel_are_no_reason(path, said, reason):
    """csh and tcsh end with exit code 1 for a program that is not there."""
    text = Case(OpenSSH, "host", path, LINK).explain(
        stage=STARTED, ended=True, status=1, printed=[said.format(path)]
    )
    assert text.startswith(reason + path)


@pytest.mark.parametrize("status", [1, 9009])
@pytest.mark.parametrize(
    "said",
    [
        "'\"{}\"' is not recognized as an internal or external command,",
        "The system cannot find the path specified.",
        "The system cannot find the file specified.",
    ],
)
def test_a_windows_machine_has_no_exit_code_of_its_own_for_a_missing_kernel(status, said):
    path = "C:\\Licensed\\14.1\\math.exe"
    text = Case(OpenSSH, "host", path, LINK).explain(
        stage=STARTED, ended=True, status=status, printed=[said.format(path)]
    )
    assert text.startswith("there is no kernel " + path)


def test_what_a_kernel_says_of_other_files_is_no_reason():
    for said in (
        "mathpass: No such file or directory",
        "/etc/x: Permission denied",
        "sh: lsb_release: command not found",
    ):
        text = Case(OpenSSH, "host", PATH, LINK).explain(stage=STARTED, ended=True, status=1, printed=[said])
        assert text.startswith("the kernel {} ended before it called back, with exit code 1".format(PATH))


def test_a_kernel_that_says_so_of_its_own_path_and_ends_with_its_own_code_was_there():
    said = PATH + ": No such file or directory"
    text = Case(OpenSSH, "host", PATH, LINK).explain(stage=STARTED, ended=True, status=3, printed=[said])
    assert text.startswith("the kernel {} ended before it called back, with exit code 3".format(PATH))


LOST = "the kernel is hung up on when the server notices"


def test_a_client_that_somebody_has_ended_is_said_to_be():
    said = ['Authenticated to host ([192.0.2.1]:22) using "publickey".']
    assert Case(OpenSSH).explain(stage=STARTED, connected=True, said=said, code=137) == (
        "the connection was lost (the client was ended by signal 9); " + LOST
    )
    assert (
        Case(OpenSSH)
        .explain(stage=STARTED, said=said, code=255)
        .startswith("the connection was lost (it said nothing)")
    )


@pytest.mark.parametrize("code", [1, 127])
def test_a_kernel_that_lacks_a_library_is_not_missing(code):
    said = PATH + ": error while loading shared libraries: libiomp5.so: No such file or directory"
    text = Case(OpenSSH, "host", PATH, LINK).explain(stage=STARTED, ended=True, status=code, printed=[said])
    assert text.startswith("the kernel {} lacks a library: {}; ".format(PATH, said))


def test_what_became_of_a_kernel_that_had_been_started():
    case = Case(OpenSSH)
    lost = case.explain(stage=STARTED, connected=True, said=["Timeout, server host not responding."])
    assert lost == "the connection was lost (Timeout, server host not responding.); " + LOST
    assert case.explain(stage=STARTED).startswith("the connection was lost (it said nothing)")
    assert case.explain(stage=STARTED, printed=["In[1]:="]).startswith("the connection was lost (In[1]:=)")
    held = case.explain(stage=STARTED, connected=True, ended=True, stopped_by="links held", killed=True)
    assert held.startswith("the kernel has ended; its exit code is not known")
    held = case.explain(stage=STARTED, connected=False, ended=True, stopped_by="links held", killed=True)
    assert held.startswith("the kernel {} ended before it called back; ".format(KERNEL))
    never = case.explain(stage=STARTED, stopped_by="no kernel", killed=True)
    assert never.startswith("the kernel has not called back within 120 s; run it by hand: ssh -l john -tt host ")
    assert never.endswith("; a start-up file there may start another shell where there is a terminal: try --relay")
    never = case.explain(settings(terminal=False), stage=STARTED, stopped_by="no kernel", killed=True)
    assert never.startswith("the kernel has not called back within 120 s; run it by hand: ssh -l john host ")
    assert "start-up file" not in never
    relayed = Case(OpenSSH, "--relay", "john@host", KERNEL, LINK)
    assert relayed.explain(stage=STARTED, stopped_by="no kernel").endswith(KERNEL + "\"'")
    unknown = case.explain(stage=STARTED, ended=True, killed=True)
    assert ", with exit code" not in unknown
    assert unknown.startswith("the kernel {} ended before it called back; ".format(KERNEL))


@pytest.mark.parametrize(
    "table",
    [
        product.DIAGNOSES,
        product.JUMP_DIAGNOSES,
        product.ACCOUNT_DIAGNOSES,
        product.SCRIPT_DIAGNOSES,
        product.LICENCE_DIAGNOSES,
        product.SHELL_DIAGNOSES,
    ],
)
def test_every_row_of_the_diagnoses_can_be_formatted(table):
    words = {name: name for name in WORDS}
    for _, what, advice in table:
        assert "\n" not in what + advice
        line = product.diagnose([("x", what, advice)], ["x"], words)
        given = dict(words, found="x", methods="", fingerprint="", second="", who=None)
        assert line == "{}; {}".format(what, advice).format(**given)


def test_a_row_is_for_whole_lines_and_the_first_row_counts():
    table = [("a+", "first", "x"), ("a+|b", "second", "{found}")]
    assert product.diagnose(table, ["b", "aa"], {}) == "first; x"
    assert product.diagnose(table, [" b "], {}) == "second; b"
    assert product.diagnose(table, ["ab", "ba", "A"], {}) is None
    assert product.diagnose(table, ["A"], {}, any_case=True) == "first; x"
    assert product.diagnose(table, [], {}) is None


def test_braces_in_what_was_said_stay_as_they_are():
    table = [("(.*)", "{found}", "{host}")]
    assert product.diagnose(table, ["{x} {0} {found}"], {"host": "h"}) == "{x} {0} {found}; h"
    text = Case(OpenSSH).explain(said=["odd line"], stage=SILENT)
    assert "odd line" in text


@pytest.mark.parametrize(
    "text, seconds",
    [
        (None, 15),
        ("90", 90),
        ("1m", 60),
        ("1M", 60),
        ("0", 0),
        ("0s", 0),
        ("none", 0),
        ("None", 0),
        ("1h30m", 5400),
        ("1m30", 90),
        ("2W", 1209600),
        ("1d", 86400),
        ("1w1d1h1m1s", 694861),
        ("", 15),
        ("m", 15),
        ("1mm", 15),
        ("1x", 15),
        ("-1", 15),
        ("+5", 15),
        ("1 m", 15),
        ("2.5", 15),
        ("\u0661", 15),
        ("1²", 15),
        ("99999999999999999999", 1 << 30),
        ("9999w", 1 << 30),
    ],
)
def test_times_are_read_as_ssh_reads_them(text, seconds):
    assert product.parse_seconds(text, 15) == seconds
