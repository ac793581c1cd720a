"""The lines that clients print: what each means, in which stage of a try, and that no other line means that."""

import pytest
from rig import product
from rig.product import ANSWERED, SILENT, STARTED, Form, OpenSSH, Plink
from rig.tries import PLINK_LINES, READ, SSH_LINES, STAGES

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.mark.parametrize(
    "dialect, row",
    [
        row for row in READ if row[1][1] not in ("no session", "no opening")
    ],  # which come in the same words: see below
    ids=lambda value: value[0][:60] if isinstance(value, tuple) else "",
)
def test_what_a_line_means_and_when(dialect, row):
    line, event, stages, words = row
    for stage in STAGES:
        found = dialect.read(line, stage)
        assert (found and found[0]) == (event if stage in stages else None)
        if found and words is not None:
            assert found[1] == words


def test_a_server_that_opens_no_channel_allows_no_session_or_no_forwards():
    line = "channel 0: open failed: administratively prohibited: open failed"
    meanings = [(OpenSSH.read(line, stage) or (None,))[0] for stage in STAGES]
    assert meanings == [None, None, "no session", "no opening"]
    line = "Forwarded connection refused by remote: Administratively prohibited [open failed]"
    assert [(Plink.read(line, stage) or (None,))[0] for stage in STAGES] == [None, None, None, "no opening"]
    nobody = "channel 6: open failed: connect failed: Connection refused"  # nobody listens yet: as it should be
    assert [OpenSSH.read(nobody, stage) for stage in STAGES] == [None] * 4


@pytest.mark.parametrize("dialect, lines", [(OpenSSH, SSH_LINES), (Plink, PLINK_LINES)])
def test_each_form_is_that_of_a_line_which_a_client_prints(dialect, lines):
    forms = dialect.forms + getattr(dialect, "aside_forms", ())
    idle = []
    for form in forms:
        if not any(form.match(line) is not None and event == form.event for line, event, _, _ in lines):
            idle.append("*".join([form.first] + form.middle + [form.last or ""]))
    assert idle == []


@pytest.mark.parametrize("dialect, row", READ, ids=lambda value: value[0][:60] if isinstance(value, tuple) else "")
def test_a_line_that_only_holds_the_words_means_nothing(dialect, row):
    """As in a banner, a debug note that quotes a server, or what a kernel prints."""
    line, event, _, _ = row
    for change in AROUND:
        if change.startswith("{}") and event in OPEN_ENDED:
            continue  # the form ends with a star: what follows belongs to the line
        changed = change.format(line)
        for stage in STAGES:
            assert dialect.read(changed, stage) is None, changed


AROUND = [
    "> {}",
    "  {}",
    "debug1: Remote: {}",
    "| {}",
    "debug2: {}",
    "bash: {}: not found",
    "{}\tand so on",
    "proxy: {}",
]

# What ends with something that the client quotes: a path, a reason, a command.
OPEN_ENDED = ("version", "proxy", "host key", "bad option", "no log", "command", "shared", "full", "stale", "name")
OPEN_ENDED += (
    "no session",
    "no opening",
    "mux forward",
    "port",
    "foreign forward",
    "family",
    "no terminal",
    "ended",
    "signal",
    "status",
    "dropped",
)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "*",
        "***************************************************************************",
        "Welcome to host. Connecting to port 22.",
        "Authenticated users only.",
        "If it says Permission denied (publickey). call 5555.",
        "Your connection timed out? Permission denied? Call 5555.",
        "Unauthorized access: Connection refused",
        "Exit status 0",
        "Sending command: x",
        "Server has disabled port forwarding.",
        "Error: remote port forwarding failed",
        "X11 forwarding request failed on channel 0",
        "bind [127.0.0.1]:53995: Address already in use",
        "debug1: Remote: /home/john/.ssh/authorized_keys:1: key options: agent-forwarding port-forwarding pty",
        "debug1: Remote: PTY allocation request failed on channel 0",
        "debug1: remote forward success for: listen 127.0.0.1:53994, connect 127.0.0.1:40001",
        "debug1: Authentications that can continue: publickey,password",
        "debug1: client_input_channel_req: channel 0 rtype keepalive@openssh.com reply 1",
        "debug1: client_input_channel_req: channel 0 rtype eow@openssh.com reply 0",
        "debug1: kex_exchange_identification: banner line 0: Welcome, Connection closed by remote host",
        "debug1: ssh_exchange_identification: read: welcome",
        "debug1: channel 0: new session [client-session] (inactive timeout: 0)",
        "debug1: Connection established.",
        "debug1: connect to address ::1 port 22: Connection refused",
        "ssh: connect to host h port 22: Connection refused",
        "Connection to host closed by remote host.",
        "Transferred: sent 2888, received 2312 bytes, in 0.1 seconds",
        "client_loop: send disconnect: Broken pipe",
    ],
)
def test_lines_of_ssh_that_decide_nothing(line):
    for stage in STAGES:
        assert OpenSSH.read(line, stage) is None
        assert OpenSSH.read(line, stage, aside=True) is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "| Access granted",
        "| Started a shell/command",
        "proxy: Access granted",
        'Looking up host "host" for SSH connection',
        "We claim version: SSH-2.0-PuTTY_Release_0.78",
        "Remote version: SSH-2.0-OpenSSH_9.2p1",
        "Access denied",
        "Opened main channel",
        "Allocated pty",
        "Remote port forwarding from 127.0.0.1:53994 enabled",
        "Local port 127.0.0.1:53995 forwarding to 127.0.0.1:53995",
        "Remote debug message: Access granted",
        "Forwarded port closed due to local error: Connection refused",
        "Session sent command",
        'plink: unknown option "-foo"',
    ],
)
def test_lines_of_plink_that_decide_nothing(line):
    for stage in STAGES:
        assert Plink.read(line, stage) is None


def test_what_comes_beside_the_log_of_ssh_may_only_refuse_a_login():
    """Through stderr others speak too: a jump host, a server's banner, the kernel."""
    for line, event, stages, _ in SSH_LINES:
        for stage in STAGES:
            found = OpenSSH.read(line, stage, aside=True)
            counts = event in ("refused", "jump failed") and stage in stages
            assert (found and found[0]) == (event if counts else None)


@pytest.mark.parametrize(
    "line",
    [
        "please mail root@host if you see: Permission denied (publickey).",
        "a@b: you may see x@y: Permission denied (publickey).",
        "Permission denied (publickey). Or not (so sure).",
    ],
)
def test_a_banner_that_quotes_a_refusal_is_none(line):
    for aside in (False, True):
        assert OpenSSH.read(line, ANSWERED, aside=aside) is None


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("plain", "plain", []),
        ("plain", "plain ", None),
        ("plain", " plain", None),
        ("plain", "", None),
        ("a*", "a", [""]),
        ("a*", "abc", ["bc"]),
        ("*z", "abcz", ["abc"]),
        ("*", "", [""]),
        ("a*z", "az", [""]),
        ("a*z", "a", None),
        ("ab*ba", "aba", None),  # what stands at the beginning is not the end as well
        ("a*b*c", "abc", ["", ""]),
        ("a*b*c", "a b b c", [" ", " b "]),
        ("a*b*c", "acb", None),
        ("a*bc*c", "a bc", None),  # nor is what stands between
        ("*:* -> *:*", "h:1 -> g:2", ["h", "1", "g", "2"]),
        ("* x * x *", " x  x ", ["", "", ""]),
    ],
)
def test_forms(text, line, words):
    assert Form(text, "event").match(line) == words


def test_the_first_form_of_the_stage_counts():
    forms = (Form("a*", "late", (STARTED,)), Form("a*", "first"), Form("*", "second"))
    assert product.event_in(forms, "ab", STARTED) == ("late", ["b"])
    assert product.event_in(forms, "ab", SILENT) == ("first", ["b"])
    assert product.event_in(forms, "b", SILENT) == ("second", ["b"])
    assert product.event_in(forms[:2], "b", SILENT) is None


@pytest.mark.parametrize(
    "text, version",
    [
        ("9.2p1 Debian-2+deb12u10, OpenSSL 3.0.19 27 Jan 2026", (9, 2)),
        ("7.6p1, LibreSSL 2.6.2", (7, 6)),
        ("8.4p1 Debian-5+deb11u3, OpenSSL 1.1.1w", (8, 4)),
        ("10.0p1 Debian-7, OpenSSL 3.5.0", (10, 0)),
        ("10.3p1, OpenSSL 3.5.0", (10, 3)),
        ("9.9p2, LibreSSL 3.3.6", (9, 9)),
        ("for_Windows_8.1p1, LibreSSL 3.0.2", (0,)),
        ("", (0,)),
        ("9", (0,)),
        ("9.", (0,)),
        ("x.y", (0,)),
        ("٩.٢p1", (0,)),
        ("999999.1", (0,)),
    ],
)
def test_versions_of_openssh(text, version):
    assert product.version_of_openssh(text) == version
