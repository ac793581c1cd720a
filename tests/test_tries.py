"""What one try at a launch finds out, and what follows from it: lines, facts, rules, verdicts, explanations.

Tables of lines as the clients print them, read in their sources (OpenSSH 7.6 to 10.3, PuTTY 0.70 to 0.85) or
recorded from them. Nothing here starts a client.
"""

import fcntl
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import rig
from rig import product
from rig.product import ANSWERED, LOGGED_IN, SILENT, STARTED, Facts, Form, OpenSSH, Plan, Plink
from rig.tries import (
    KERNEL,
    LINK,
    LOGIN,
    MUX,
    PLINK_LINES,
    PLINK_LOGIN,
    PLINK_SESSION,
    READ,
    SESSION,
    SSH_LINES,
    STAGES,
    changes,
    classic_plan,
    facts_of,
    met,
    plan,
    request,
    settings,
)

pytestmark = pytest.mark.usefixtures("in_time")


# -- the clients' lines


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
OPEN_ENDED = ("version", "proxy", "host key", "bad option", "no log", "session", "shared", "full", "stale", "name")
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


# -- facts and obstacles


@pytest.mark.parametrize("dialect, lines", [(OpenSSH, SESSION), (Plink, PLINK_SESSION)])
def test_a_try_goes_through_its_stages_and_never_back(dialect, lines):
    stages = [facts_of(*lines[:count], dialect=dialect).stage for count in range(len(lines) + 1)]
    assert stages == sorted(stages)
    assert set(stages) == set(STAGES)
    facts = facts_of(*(lines + lines), dialect=dialect)
    for event in product.STAGE_AFTER:
        product.note(facts, settings(), plan(), event, [""], "line")
        assert facts.stage == STARTED


def test_a_proxy_may_speak_before_the_server_does():
    facts = facts_of("debug1: Executing proxy command: exec nc proxy 22")
    assert (facts.stage, facts.proxy) == (ANSWERED, True)
    lost = "kex_exchange_identification: Connection closed by remote host"
    assert facts_of("debug1: Executing proxy command: exec nc proxy 22", lost).obstacle is None
    assert facts_of(lost).obstacle == "dropped"


@pytest.mark.parametrize(
    "line",
    [
        "john@host: Permission denied (publickey).",
        "stdio forwarding failed",
        "Host key verification failed.",
        "kex_exchange_identification: Connection closed by remote host",
    ],
)
def test_who_has_logged_in_was_not_refused_whoever_said_so(line):
    for before, later in ((LOGIN[:1], LOGIN[1:]), ([], MUX)):
        assert facts_of(*(before + [line])).obstacle in ("refused", "jump failed", "dropped")
        facts = facts_of(*(before + [line] + later))
        assert (facts.obstacle, facts.evidence) == (None, None)
    other = "Couldn't open logfile /x: No space left on device"
    assert facts_of(*([other] + LOGIN)).obstacle == "no log"


def test_a_connection_that_ends_after_the_key_exchange_is_not_made_again():
    lost = "Remote side unexpectedly closed network connection"
    assert facts_of(*(PLINK_LOGIN[:1] + [lost]), dialect=Plink).obstacle == "dropped"
    assert facts_of(*(PLINK_LOGIN[:2] + [lost]), dialect=Plink).obstacle is None
    assert facts_of(*(PLINK_SESSION + [lost]), dialect=Plink).obstacle is None


def test_the_end_of_a_kernel_and_its_exit_code():
    ended = "debug1: client_input_channel_req: channel 2 rtype exit-status reply 0"
    facts = facts_of(*(SESSION + [ended]))
    assert (facts.ended, facts.status, facts.kernel_ended, facts.kernel_code) == (True, None, True, None)
    facts = facts_of(*(SESSION + [ended, "debug1: Exit status 7"]))
    assert (facts.ended, facts.status, facts.kernel_code) == (True, 7, 7)
    assert not facts_of(*(LOGIN + [ended])).ended  # a kernel that has not been started cannot end
    lost = facts_of(*(SESSION + ["debug1: Exit status -1"]))  # ssh has heard of no end
    assert (lost.ended, lost.status, lost.kernel_ended, lost.kernel_code) == (False, None, False, None)
    facts = facts_of(*(PLINK_SESSION + ["Session sent command exit status 3"]), dialect=Plink)
    assert (facts.ended, facts.status) == (True, 3)
    facts = facts_of(*(PLINK_SESSION + ["Session exited on signal SIGHUP"]), dialect=Plink)
    assert (facts.ended, facts.status) == (True, None)
    for text in ("x", "", "²", "999999", "1 2"):
        assert facts_of(*(SESSION + ["debug1: Exit status " + text])).status is None


def test_the_code_of_a_client_that_was_ended_means_nothing():
    facts = facts_of(*(SESSION + ["debug1: client_input_channel_req: channel 2 rtype exit-signal reply 0"]))
    facts.code = 255
    assert facts.kernel_code == 255
    facts.killed = True
    assert facts.kernel_code is None
    facts.status = 4
    assert facts.kernel_code == 4


@pytest.mark.parametrize(
    "stage, killed, code, ended",
    [
        (STARTED, False, 0, True),
        (STARTED, False, 7, True),
        (STARTED, False, 255, False),  # the connection was lost
        (STARTED, False, None, False),  # it runs
        (STARTED, True, 7, False),
        (LOGGED_IN, False, 7, False),
    ],
)
def test_a_client_on_a_shared_connection_tells_by_its_code_that_the_kernel_has_ended(stage, killed, code, ended):
    facts = facts_of(*MUX)
    assert (facts.shared, facts.stage) == (True, LOGGED_IN)
    facts.stage, facts.killed, facts.code = stage, killed, code
    assert facts.kernel_ended is ended
    assert facts.kernel_code == (code if ended else None)
    facts.shared = False
    assert not facts.kernel_ended


def test_a_shared_connection_that_takes_no_more_is_an_obstacle_whose_ever_it_is():
    """ssh would make one of its own then, with the forwards that the other has already."""
    full = "mux_client_request_session: session request failed: Session open refused by peer"
    for given in (settings(), settings(share="/run/x-0")):
        assert facts_of(*(MUX + [full]), given=given).obstacle == "full"


def test_the_version_is_that_of_the_client():
    assert facts_of("OpenSSH_8.4p1 Debian-5, OpenSSL").version == (8, 4)
    assert facts_of("debug1: OpenSSH_10.0p1, OpenSSL").version == (10, 0)
    assert facts_of(*(LOGIN + ["OpenSSH_1.1p1, a banner"])).version == (9, 2)


def test_exposed_ports_are_known_and_no_obstacle():
    line = 'debug1: Remote: Forwarding listen address "127.0.0.1" overridden by server GatewayPorts'
    facts = facts_of(*(LOGIN + [line]))
    assert facts.exposed
    assert facts.obstacle is None
    assert not facts_of(*LOGIN).exposed


FOREIGN = "foreign forward"


@pytest.mark.parametrize(
    "line, changed, obstacle",
    [
        ("Error: remote port forwarding failed for listen port 53994", {}, "port"),
        ("Error: remote port forwarding failed for listen port 54002", {}, "port"),  # the last of the block
        ("Error: remote port forwarding failed for listen port 54003", {}, FOREIGN),
        ("Warning: remote port forwarding failed for listen port 8080", {}, FOREIGN),
        ("Warning: remote port forwarding failed for listen port 8080", {"lenient": True}, None),
        ("Warning: remote port forwarding failed for listen port 53994", {"lenient": True}, "port"),
        ("channel_setup_fwd_listener_tcpip: cannot listen to port: 53998", {}, "port"),
        ("channel_setup_fwd_listener_tcpip: cannot listen to port: 8080", {}, FOREIGN),
        ("channel_setup_fwd_listener_tcpip: cannot listen to port: 8080", {"lenient": True}, None),
        ("Error: remote port forwarding failed for listen path /run/agent", {}, FOREIGN),
        ("Warning: remote port forwarding failed for listen path /run/agent", {"lenient": True}, None),
        ("unix_listener: cannot bind to path /tmp/s: Address already in use", {}, FOREIGN),
        ("unix_listener: cannot bind to path /tmp/s: Address already in use", {"lenient": True}, None),
        (
            "mux_client_forward: forwarding request failed: remote port forwarding failed for listen port 53994",
            {},
            "port",
        ),
        (
            "mux_client_forward: forwarding request failed: remote port forwarding failed for listen port 8080",
            {},
            FOREIGN,
        ),
        ("mux_client_forward: forwarding request failed: Port forwarding failed", {}, "port"),
        ("mux_client_forward: forwarding request failed: Port forwarding failed.", {}, "port"),
        (
            "mux_client_forward: forwarding request failed: remote port forwarding failed for listen port 53994",
            {"share": "/x"},
            "port",
        ),
        ("mux_client_forward: forwarding request failed: Port forwarding failed", {"share": "/x"}, FOREIGN),
        (
            "mux_client_forward: forwarding request failed: Port forwarding failed",
            {"share": "/x", "lenient": True},
            None,
        ),
        ("muxclient: master forward request failed", {}, None),  # what it was has been said before
        ("Could not request local forwarding.", {}, FOREIGN),
        ("Could not request local forwarding.", {"lenient": True}, None),
        ("debug1: Remote: Server has disabled port forwarding.", {}, "no forwarding"),
        ("PTY allocation request failed on channel 0", {}, "no terminal"),
        ("PTY allocation request failed on channel 0", {"terminal": False}, "no terminal"),
        ("connect_to 127.0.0.1: unknown host (Address family for hostname not supported)", {}, "family"),
        ("command-line: line 0: Bad configuration option: sessiontype", {}, "bad option"),
        ("command-line: line 0: Bad configuration option: SessionType", {}, "bad option"),
        ("command-line: line 0: Bad configuration option: forkafterauthentication", {}, "bad option"),
        ("command-line: line 0: Bad configuration option: mine", {}, None),
        ("command-line: line 0: Bad configuration option: ", {}, None),
        ("Couldn't open logfile /x: No such file or directory", {}, "no log"),
        ("Control socket connect(/home/john/.ssh/master): Connection refused", {}, None),  # the user's own
        ("Control socket connect(/run/x-0): Connection refused", {"share": "/run/x-0"}, "stale"),
        ('debug1: Control socket "/run/x-0" does not exist', {"share": "/run/x-0"}, "stale"),
        ("muxclient: master hello exchange failed", {"share": "/run/x-0"}, "stale"),
        ("muxclient: master forward request failed", {"share": "/run/x-0"}, "stale"),
        ("mux_client_request_session: read from master failed: Broken pipe", {"share": "/run/x-0"}, "stale"),
        ("mux_client_forward: write packet: Broken pipe", {"share": "/run/x-0"}, "stale"),
        ("mux_client_request_session: session request failed: Session open refused", {}, "full"),
        ("mux_client_request_session: session request failed: Session open refused", {"share": "/x"}, "full"),
        ("kex_exchange_identification: Connection closed by remote host", {}, "dropped"),
        ("john@host: Permission denied (publickey).", {}, "refused"),
    ],
)
def test_obstacles_on_the_way_of_ssh(line, changed, obstacle):
    facts = facts_of(line, given=settings(**changed))
    assert facts.obstacle == obstacle
    assert facts.evidence == (line if obstacle else None)


@pytest.mark.parametrize(
    "line, obstacle",
    [
        ("Remote port forwarding from 127.0.0.1:53994 refused", "port"),
        ("Remote port forwarding from 127.0.0.1:54002 refused", "port"),
        ("Remote port forwarding from 127.0.0.1:8080 refused", FOREIGN),  # of a saved session
        ("Local port 127.0.0.1:53995 forwarding to 127.0.0.1:53995 failed: Address already in use", "port"),
        ("Local port 127.0.0.1:8080 forwarding to 127.0.0.1:53995 failed: Address already in use", FOREIGN),
        ("Remote debug message: Server has disabled port forwarding.", "no forwarding"),
        ('plink: unknown option "-pwfile"', "old plink"),
        ("FATAL ERROR: Remote side unexpectedly closed network connection", "dropped"),
    ],
)
def test_obstacles_on_the_way_of_plink(line, obstacle):
    assert facts_of(line, dialect=Plink).obstacle == obstacle


def test_a_terminal_that_plink_does_not_get_is_no_obstacle():
    """It runs the kernel all the same."""
    facts = facts_of(*(PLINK_LOGIN + ["Server refused to allocate pty"]), dialect=Plink)
    assert facts.obstacle is None


def test_a_foreign_forward_on_the_users_shared_connection_is_no_port_of_ours():
    """ssh goes on with a connection of its own, where forwards may fail."""
    lines = MUX + [
        "mux_client_forward: forwarding request failed: remote port forwarding failed for listen port 8080",
        "muxclient: master forward request failed",
    ]
    assert facts_of(*lines).obstacle == FOREIGN
    assert facts_of(*lines, given=settings(lenient=True)).obstacle is None


def test_of_several_obstacles_the_most_certain_counts_whatever_comes_first():
    assert product.OBSTACLES[0] == "refused"
    for one, other in itertools.permutations(product.OBSTACLES, 2):
        facts = Facts()
        facts.meet(one, "line of " + one)
        facts.meet(other, "line of " + other)
        first = min(one, other, key=product.OBSTACLES.index)
        assert (facts.obstacle, facts.evidence) == (first, "line of " + first)
    facts = Facts()
    facts.meet("port", "first")
    facts.meet("port", "second")
    assert facts.evidence == "first"


def test_ports_over_there_that_nobody_may_reach_matter_where_kernels_listen():
    line = "channel 6: open failed: administratively prohibited: open failed"
    assert facts_of(*(SESSION + [line])).obstacle is None  # 11.1 and later: the kernel listens nowhere
    assert facts_of(*(SESSION + [line]), of=classic_plan()).obstacle == "no opening"
    assert facts_of(*(LOGIN + [line])).obstacle == "no session"


def test_a_compute_kernel_needs_no_port_over_there():
    """A forward of the configuration may be used for places that the server prohibits."""
    line = "channel 6: open failed: administratively prohibited: open failed"
    of = Plan(request(role=product.COMPUTE), settings(), (1, 2))
    assert facts_of(*(SESSION + [line]), of=of).obstacle is None


def test_once_the_kernel_has_connected_nothing_is_in_its_way():
    """Whatever is said after hours: by ssh, of forwards that are not ours, or by the kernel in ssh's words."""
    for dialect, (line, _, _, _) in READ:
        for given in (settings(), settings(share="/x")):
            facts = Facts()
            facts.stage, facts.connected = STARTED, True
            found = dialect.read(line, STARTED)
            if found:
                product.note(facts, given, classic_plan(), found[0], found[1], line)
            assert facts.obstacle is None, line


def test_each_obstacle_is_met_by_some_line_and_each_rule_is_for_one():
    met = {"held", "guard", "asked", "lost"}  # by the probe, an exit code, a prompt, and where it is stale
    for dialect, (line, _, stages, _) in READ:
        facts = Facts()
        facts.stage = stages[0]
        event = dialect.read(line, facts.stage) or ("", [])
        product.note(facts, settings(share="/x"), classic_plan(), event[0], event[1], line)
        met.add(facts.obstacle)
    assert set(product.OBSTACLES) <= met
    assert set(product.RULES) <= set(product.OBSTACLES)
    assert set(product.EXPLAINED) <= set(product.OBSTACLES) | {"no answer", "no login", "front end gone", "half"}
    assert set(product.ENDS_ITSELF) <= set(product.OBSTACLES)
    assert set(product.STAGE_AFTER) <= {form.event for form in OpenSSH.forms + Plink.forms}


@pytest.mark.parametrize("dialect", [OpenSSH, Plink])
def test_no_text_of_a_server_brings_the_launcher_down(dialect):
    """A server's banner may come through the same pipe as what the client says of itself."""
    draw = random.Random(5)
    words = ["*".join([form.first] + form.middle + [form.last or ""]) for form in dialect.forms]
    words += [word for text in words for word in text.split("*")]
    words += ["port", "127.0.0.1:", "99999999", "²", "-1", ",", " failed: ", " refused", "\udcff", "\x85", ""]
    of = plan()
    for number in range(3000):
        given = settings(share=draw.choice((None, "/x")), lenient=draw.random() < 0.5)
        facts = Facts()
        for _ in range(draw.randint(1, 6)):
            line = draw.choice(("", " ")).join(draw.choice(words) for _ in range(draw.randint(1, 6)))
            line = line.replace("*", draw.choice(("", "x", "53994", "1:2", "²", ".")))
            facts.stage = draw.choice(STAGES)
            event = dialect.read(line, facts.stage, aside=draw.random() < 0.1)
            if event:
                product.note(facts, given, of, event[0], event[1], line)
        assert facts.obstacle in (None,) + product.OBSTACLES, number
        assert facts.status is None or 0 <= facts.status <= 99999


# -- what follows


@pytest.mark.parametrize(
    "obstacle, given, changed",
    [
        ("no log", {"separate": True}, {"separate": False}),
        ("no log", {"separate": False}, None),
        ("bad option", {}, {"modern": False}),
        ("bad option", {"modern": False}, None),
        ("held", {}, {"ports": None, "block": 2}),
        ("held", {"block": 4}, {"ports": None, "block": 5}),
        ("held", {"block": 5}, None),
        ("port", {}, {"ports": None, "block": 2}),
        ("port", {"block": 4}, {"ports": None, "block": 5}),
        ("port", {"block": 5}, None),
        ("foreign forward", {}, {"lenient": True}),
        ("foreign forward", {"lenient": True}, None),
        ("family", {}, {"any_family": True}),
        ("family", {"any_family": True}, None),
        ("no terminal", {}, {"terminal": False, "ports": None}),
        ("no terminal", {"guarded": True}, {"terminal": False, "guarded": False, "ports": None}),
        ("no terminal", {"terminal": False}, None),
        ("stale", {"share": "/x"}, {"share": "", "drops": 1}),
        ("stale", {"share": "/x", "drops": 3}, {"share": "", "drops": 4}),
        ("stale", {"share": "/x", "drops": 4}, {"share": None, "drops": 5}),
        ("stale", {"share": None, "drops": 5}, None),
        ("lost", {"share": "/x"}, {"share": None}),
        ("lost", {"share": None}, None),
        ("full", {"share": "/x"}, {"share": "", "drops": 1}),
        ("full", {"share": "/x", "drops": 4}, {"share": None, "drops": 5}),
        ("full", {"share": None}, {"own": True}),  # the user's
        ("full", {"share": None, "own": True}, None),
        ("dropped", {}, {"drops": 1}),
        ("dropped", {"drops": 3}, {"drops": 4}),
        ("dropped", {"drops": 4}, None),
        ("dropped", {"drops": 5}, None),
        ("dropped", {"drops": 9}, None),
        ("refused", {}, None),
        ("jump failed", {}, None),
        ("no session", {}, None),
        ("no forwarding", {}, None),
        ("no opening", {}, None),
        ("old plink", {}, None),
    ],
)
def test_what_follows_an_obstacle(obstacle, given, changed):
    before = settings(**given)
    following = product.after(met(obstacle), before)
    if changed is None:
        assert following is None
    else:
        assert changes(before, following.settings) == changed
        assert following.why
        assert "\n" not in following.why


def test_a_server_that_drops_connections_is_left_alone_for_longer_each_time():
    pauses, given = [], settings()
    while given:
        following = product.after(met("dropped"), given)
        given = following and following.settings
        pauses += [following.pause] if following else []
    assert pauses == [0.2, 0.4, 0.8, 1.6]


@pytest.mark.parametrize("obstacle", [each for each in product.OBSTACLES if each != "dropped"])
def test_nothing_else_is_waited_for(obstacle):
    following = product.after(met(obstacle), settings(share="/x", separate=True))
    assert following is None or following.pause == 0


@pytest.mark.parametrize("obstacle", product.OBSTACLES)
def test_a_launch_that_somebody_has_ended_is_over(obstacle):
    given = settings(share="/x", separate=True, guarded=True)
    for reason in ("signal", "no answer", "no login", "no kernel", "checked", "front end gone", "links held"):
        assert product.after(met(obstacle, stopped_by=reason), given) is None
    assert (product.after(met(obstacle, stopped_by="obstacle"), given) is None) is (obstacle not in product.RULES)
    assert product.after(Facts(), given) is None


@pytest.mark.parametrize("obstacle", product.OBSTACLES)
def test_a_kernel_that_has_ended_is_not_run_again(obstacle):
    """But for one that was run without its terminal: it was told to look, and has done nothing."""
    given = settings(share="/x", separate=True, guarded=True)
    again = product.after(met(obstacle, ended=True), given)
    assert (again is not None) is (obstacle in ("no terminal", "guard"))


def events():
    """What the lines of the tables mean."""
    found = [dialect.read(line, stages[0]) for dialect, (line, _, stages, _) in READ]
    return [each for each in found if each]


def obstacles_at(given, events, of):
    """Those that ``obstacle_in`` lets through for these settings, and what no line tells."""
    return {"held", "guard", "asked"} | {product.obstacle_in(given, of, *event) for event in events} - {None}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("which", ["those that can be", "any"])
def test_a_launch_comes_to_an_end_whatever_its_tries_find_out(shared, which):
    """``any``: as if each line could come at any time."""
    draw = random.Random(8)
    longest, lines, of = 0, events(), classic_plan()
    for _ in range(600):
        given = settings(
            share="" if shared else None,
            separate=draw.random() < 0.8,
            guarded=draw.random() < 0.5,
            terminal=draw.random() < 0.8,
        )
        some = draw.sample(product.OBSTACLES, draw.randint(1, 4))
        tries, waited = 0, 0
        while True:
            tries += 1
            assert tries <= 20, given
            given = given.but(ports=given.ports or (20000, 20001))
            if given.share == "":
                given = given.but(share=draw.choice(("/x-0", "/x-1", "/x-2", None)))
            possible = some
            if which != "any":
                here = obstacles_at(given, lines, of)
                possible = [each for each in some if each in here]
            if not possible:
                break
            obstacle = draw.choice(possible)
            following = product.after(met(obstacle, stopped_by=draw.choice((None, "obstacle"))), given)
            if obstacle == "refused":
                assert following is None
            if following is None:
                break
            waited += following.pause
            given = following.settings
        longest = max(longest, tries)
        assert waited <= 4
    assert longest > 5  # or this has not looked at much


def test_settings_are_copied_and_never_changed():
    given = settings(share="/x")
    other = given.but(ports=None, lenient=True)
    assert changes(given, other) == {"ports": None, "lenient": True}
    assert (given.ports, given.lenient, given.share) == ((53994, 39359), False, "/x")
    assert (other.share, other.block, other.drops, other.terminal, other.modern) == ("/x", 1, 0, True, True)
    assert changes(given, given.but()) == {}
    assert "lenient=True" in repr(other)
    with pytest.raises(AttributeError):
        given.but(lenent=True)
    with pytest.raises(AttributeError):
        settings(port=1)


def test_what_a_first_try_assumes():
    first = settings()
    assert (first.terminal, first.modern, first.block, first.drops, first.share) == (True, True, 1, 0, None)
    assert not (first.guarded or first.separate or first.lenient or first.any_family or first.own)


@pytest.mark.parametrize(
    "changed, options",
    [
        ({}, {"ExitOnForwardFailure": "yes", "RequestTTY": "force"}),
        ({}, {"SessionType": "default", "ForkAfterAuthentication": "no", "StdinNull": "no", "LogVerbose": "none"}),
        ({"lenient": True}, {"ExitOnForwardFailure": "no"}),
        ({"terminal": False}, {"RequestTTY": "no"}),
        ({"modern": False}, {"SessionType": None, "ForkAfterAuthentication": None, "LogVerbose": None}),
        ({"any_family": True}, {"AddressFamily": "any"}),
        ({"any_family": False}, {"AddressFamily": None}),
        ({"share": "/run/x-0"}, {"ControlPath": "/run/x-0", "ControlMaster": "no"}),
        ({"share": None}, {"ControlPath": None}),
        ({"own": True}, {"ControlPath": "none"}),
        ({"own": True, "share": "/run/x-0"}, {"ControlPath": "/run/x-0"}),
    ],
)
def test_settings_become_options_of_ssh(changed, options):
    words = OpenSSH.login(request(), settings(**changed))
    given = dict(word.split("=", 1) for flag, word in zip(words, words[1:]) if flag == "-o")
    for name, value in options.items():
        assert given.get(name) == value
    for name, value in (
        ("ClearAllForwardings", "no"),
        ("Tunnel", "no"),
        ("RemoteCommand", "none"),
        ("ForwardX11", "no"),
        ("StrictHostKeyChecking", "accept-new"),
        ("ConnectTimeout", "15"),
        ("ServerAliveInterval", "15"),
        ("ServerAliveCountMax", "3"),
    ):
        assert given[name] == value


@pytest.mark.parametrize(
    "changed, words",
    [
        ({}, []),
        ({"lenient": True}, []),
        ({"share": "/run/x-0"}, ["-o", "ProxyCommand=false"]),
        ({"share": "/run/x-0", "lenient": True}, ["-o", "ProxyCommand=false", "-F", os.devnull]),
    ],
)
def test_a_client_of_our_shared_connection_makes_none_of_its_own(changed, words):
    given = settings(**changed)
    arguments = OpenSSH.arguments(request(), plan(), given)
    assert arguments[: 1 + len(words)] == ["-v"] + words
    for word in ("ProxyCommand=false", "-F"):
        assert (word in arguments) is (word in words)
    login = OpenSSH.login(request(), given)  # with which the connection itself is made
    assert "ProxyCommand=false" not in login
    assert "-F" not in login


def test_a_password_is_asked_for_once_and_is_in_no_argument():
    asked = request("john:secret@host", KERNEL, LINK)
    words = OpenSSH.arguments(asked, plan(), settings(), "/run/log")
    assert "NumberOfPasswordPrompts=1" in words
    assert "BatchMode=no" in words
    assert "secret" not in " ".join(words)


def test_where_nobody_can_be_asked_no_empty_password_is_sent():
    assert "BatchMode=yes" in OpenSSH.arguments(request(), plan(), settings(asks=False))
    words = OpenSSH.arguments(request(), plan(), settings())
    assert "BatchMode=yes" not in words
    assert "NumberOfPasswordPrompts=1" in words


@pytest.mark.parametrize(
    "name", ["RemoteCommand", "sessiontype", "ForkAfterAuthentication", "CLEARALLFORWARDINGS"]
)
def test_options_that_would_take_away_what_a_launch_needs_are_refused(name):
    with pytest.raises(product.Fatal) as caught:
        OpenSSH.check(request("-o", name + "=no", "host", KERNEL, LINK))
    assert caught.value.text.startswith("-o {}: ".format(name))
    OpenSSH.check(request("-o", "Compression=no", "host", KERNEL, LINK))


# -- codes and reasons


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


WORDS = ("host", "kernel", "seconds", "each", "by_hand", "login", "closed", "advice", "aside")
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
        (0, [], "the kernel {} ended before it called back, with exit code 0; run it by hand: ssh "),
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
        given = dict(words, found="x", methods="", fingerprint="", who=None)
        assert line == "{}; {}".format(what, advice).format(**given)


def test_a_row_is_for_whole_lines_and_the_first_row_counts():
    table = [("a+", "first", "x"), ("a+|b", "second", "{found}")]
    assert product.diagnose(table, ["b", "aa"], {}) == "first; x"
    assert product.diagnose(table, [" b "], {}) == "second; b"
    assert product.diagnose(table, ["ab", "ba", "A"], {}) is None
    assert product.diagnose(table, ["A"], {}, any_case=True) == "first; x"
    assert product.diagnose(table, [], {}) is None


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain \u00e4 \u6f22", "plain \u00e4 \u6f22"),
        ("no UTF-8 \udcff\udc9b", "no UTF-8 \\xff\\x9b"),
        ("\u202eright to left\u2066", "\\u202eright to left\\u2066"),
        ("one\u2028two\u2029three\x85", "one\\u2028two\\u2029three\\x85"),
        ("\ufeff\U000e0041", "\\ufeff\\U000e0041"),
        ("a\x05b\x14\x1a\x7f", "a\\x05b\\x14\\x1a\\x7f"),
        ("\x1b[31mred\x9b0m", "\\x1b[31mred\\x9b0m"),
        ("a\tb\rc", "a b\\x0dc"),
        ("one\ntwo", "one\ntwo"),
    ],
)
def test_what_others_say_brings_no_control_characters_into_a_line(text, shown, log, capsys):
    assert product.visible(text) == shown
    log.write(text)
    assert text_of(log).partition(b" ")[2] == shown.encode("utf-8") + b"\n"
    product.say(text)
    assert capsys.readouterr().err == "tunnel: {}\n".format(shown)
    product.show(text)
    assert capsys.readouterr().out == shown


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


# -- what launches tell each other


def test_what_is_remembered_and_forgotten(memory, tmp_path):
    assert memory.read() == {}
    memory.keep("terminal", "yes")
    memory.keep("kernel /a b/14.1/math\tx", "2024-01-01 12:00:00")
    assert memory.read() == {"terminal": "yes", "kernel /a b/14.1/math\tx": "2024-01-01 12:00:00"}
    memory.keep("terminal", "no")
    memory.keep("died", "several\nlines and a\ttab")
    assert product.Memory(memory.path).read()["died"] == "several lines and a tab"
    memory.keep("died", None)
    memory.keep("never known", None)
    assert memory.read() == {"terminal": "no", "kernel /a b/14.1/math\tx": "2024-01-01 12:00:00"}
    assert (tmp_path / "memory").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", ["/ä/math", "/\udcff/math", "/a\u2028b/math", "/a\x85b/math", "/a\u00a0b/math"])
def test_a_path_is_remembered_whatever_letters_it_has(memory, path):
    memory.keep("kernel " + path, "now")
    memory.keep("terminal", "yes")
    assert memory.read() == {"kernel " + path: "now", "terminal": "yes"}


@pytest.mark.parametrize(
    "data", [b"", b"\n\n", b"no tab\n", b"\xff\xfe\x00", b"cut off", b"a\tb\nterminal", b"\0" * 5000]
)
def test_a_damaged_file_is_no_reason_to_fail(memory, data):
    with open(memory.path, "wb") as stream:
        stream.write(data)
    memory.keep("terminal", "yes")
    known = memory.read()
    assert known.pop("terminal") == "yes"
    assert known == ({"a": "b"} if b"a\t" in data else {})


@pytest.mark.parametrize("where", [None, "no/such/folder/memory", "."])
def test_where_nothing_can_be_remembered_a_launch_knows_nothing_and_goes_on(tmp_path, where):
    memory = product.Memory(where and str(tmp_path / where))
    calls = []
    assert memory.change(lambda values: calls.append(dict(values))) == {}
    assert calls == [{}]
    memory.keep("terminal", "yes")
    assert memory.read() == {}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink(os.path.dirname(path) + "/other", path)])
def test_what_is_no_file_of_ours_is_neither_waited_for_nor_written_to(memory, tmp_path, make):
    (tmp_path / "other").write_text("somebody's")
    make(memory.path)
    memory.keep("terminal", "yes")
    assert memory.read() == {}
    assert (tmp_path / "other").read_text() == "somebody's"


def test_a_full_disk_is_no_reason_to_fail(memory, monkeypatch):
    memory.keep("terminal", "yes")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    values = memory.change(lambda values: values.update(more="x"))
    assert values["more"] == "x"
    memory.keep("other", "x")
    monkeypatch.undo()
    memory.keep("terminal", "no")
    assert memory.read()["terminal"] == "no"


def test_somebody_who_holds_the_file_for_long_stops_nobody(memory):
    memory.keep("terminal", "yes")
    calls = []
    with open(memory.path) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        memory.change(lambda values: (calls.append(dict(values)), values.update(terminal="no")))
    assert len(calls) == 1
    assert memory.read() == {"terminal": "yes"}  # what somebody else is about to change was left alone


def test_launches_at_the_same_time_lose_nothing_of_each_other(memory):
    def count(values):
        time.sleep(0.002)  # so that they meet
        values["count"] = str(int(values.get("count", 0)) + 1)

    children = []
    for number in range(6):
        child = os.fork()
        if not child:
            try:
                for turn in range(10):
                    memory.change(count)
                    memory.keep("{} {}".format(number, turn), "x")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    known = memory.read()
    assert known.pop("count") == "60"
    assert sorted(known) == sorted("{} {}".format(number, turn) for number in range(6) for turn in range(10))


def gone_pid():
    """The number of a process that has ended."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


class NoLaunch:
    """A launch whose loop runs nothing."""

    def __init__(self):
        self.loop, self.signal, self.log = self, None, self
        self.later, self.said = [], ""

    def after(self, seconds, action):
        self.later.append(action)

    def write(self, text):
        self.said += text + "\n"


def shared(memory, full=()):
    connections = product.SharedConnections(NoLaunch(), memory, "/run/x")
    connections.full.update(full)
    return connections


@pytest.mark.parametrize(
    "sessions, room, full, number",
    [
        ([], None, (), 0),
        ([(0, "other")] * 1, None, (), 0),  # nobody knows how many fit: until one is refused
        ([(0, "other")], "1", (), 1),
        ([(0, "other")], "2", (), 0),
        ([(0, "gone")], "1", (), 0),  # who has ended makes room
        ([(0, "other"), (1, "parent")], "1", (), 2),
        ([(1, "other")], "1", (), 0),  # the first with room
        ([], None, (0,), 1),
        ([(1, "other")], "1", (0,), 2),
        ([], "3", (0, 1, 2), 3),
        # What a damaged file may hold.
        ([], "", (), 0),
        ([], "many", (), 0),
        ([], "0", (), 0),
        ([], "-3", (), 0),
    ],
)
def test_a_launch_takes_the_first_connection_with_room(memory, sessions, room, full, number):
    signal.alarm(5)
    pids = {"other": 1, "parent": os.getppid(), "gone": gone_pid()}
    for at, who in sessions:
        memory.keep("session {} {}".format(at, pids[who]), "started")
    if room is not None:
        memory.keep("room", room)
    connections = shared(memory, full)
    memory.change(connections._choose)
    assert connections.number == number
    known = memory.read()
    assert known["session {} {}".format(number, os.getpid())] == "asked"
    assert not [key for key in known if key.endswith(" {}".format(pids["gone"]))]


@pytest.mark.parametrize(
    "key",
    ["session ", "session 0", "session 0 x", "session x 1", "session 0 1 2", "session 0 99999999999999999999"]
    + ["session 0 -1", "session 0 0", "session  1"],
)
def test_a_damaged_file_stops_no_launch_on_a_shared_connection(memory, key):
    memory.keep(key, "started")
    memory.keep("room", "1")
    connections = shared(memory)
    memory.change(connections._choose)
    assert connections.number == 0
    connections.refused()
    connections.release()
    assert key not in memory.read()


def test_a_connection_that_has_refused_a_session_takes_as_many_as_are_on_it(memory):
    connections = shared(memory)
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        for other in others:
            memory.keep("session 0 {}".format(other.pid), "started")
        memory.change(connections._choose)
        connections.refused()  # the third
        assert memory.read()["room"] == "2"
        connections.release()
        memory.change(connections._choose)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert connections.number == 1
    connections.started()
    assert memory.read()["session 1 {}".format(os.getpid())] == "started"
    connections.release()
    assert "session 1 {}".format(os.getpid()) not in memory.read()
    connections.release()  # harmless
    assert connections.number is None


def test_a_connection_takes_one_session_at_least_and_what_it_took_once(memory):
    connections = shared(memory)
    memory.change(connections._choose)
    assert connections.refused()
    assert memory.read()["room"] == "1"
    memory.keep("room", "10")  # of a server that has been told to take fewer
    connections.refused()
    assert memory.read()["room"] == "1"
    connections.made.add(connections.number)
    assert not connections.refused()  # not even one


def test_what_a_connection_takes_is_learned_when_nobody_else_waits_for_an_answer(memory):
    connections = shared(memory)
    memory.change(connections._choose)
    for pid, value in ((1, "started"), (2, "asked")):
        memory.keep("session 0 {}".format(pid), value)
    connections.refused()
    assert "room" not in memory.read()
    memory.keep("room", "3")
    connections.refused()
    assert memory.read()["room"] == "3"
    memory.keep("session 0 2", "started")
    connections.refused()
    assert memory.read()["room"] == "2"


def test_what_a_connection_takes_is_forgotten_with_the_last_session(memory):
    memory.keep("room", "2")
    memory.keep("session 0 {}".format(gone_pid()), "started")
    memory.change(shared(memory)._choose)
    assert "room" not in memory.read()


def test_a_control_socket_at_which_nobody_answers_is_removed(memory, tmp_path):
    connections = product.SharedConnections(NoLaunch(), memory, str(tmp_path / "x"))
    memory.change(connections._choose)
    (tmp_path / "x-0").write_text("")
    (tmp_path / "x-1").write_text("")
    connections.gone()  # it is another one than was there before
    assert (tmp_path / "x-0").exists()
    connections.socket = product.identity(str(tmp_path / "x-0"))
    connections.gone()
    connections.gone()  # harmless
    assert sorted(os.listdir(str(tmp_path))) == ["memory", "x-0.lock", "x-1"]


def test_a_lock_that_cannot_be_had_ends_no_launch(memory, tmp_path):
    launch = NoLaunch()
    connections = product.SharedConnections(launch, memory, str(tmp_path / "none" / "x"))
    assert connections.take(product.Settings((50000, 50001))) is None
    connections.number = 0
    connections.gone()
    connections._prepare()
    assert launch.said.count("nothing can be shared: ") == 3


def test_who_runs():
    assert product.is_running(os.getpid())
    assert product.is_running(1)
    assert not product.is_running(gone_pid())


# -- the log, and what is said


@pytest.fixture
def log(tmp_path):
    return product.Log(str(tmp_path), "tunnel", {})


def text_of(log):
    with open(log.path, "rb") as stream:
        return stream.read()


@pytest.mark.parametrize("line", ["x" * 100, "", "é", "\U0001f600" * 200, "\udcff" * 100])
def test_what_somebody_says_without_end_does_not_fill_the_disk(monkeypatch, log, line):
    monkeypatch.setattr(product, "LOG_BYTES", 1 << 17)
    for _ in range(2 * product.LOG_BYTES // (len("kernel") + len(line))):
        log.quote("kernel", line)
    assert len(text_of(log)) < 5 * product.LOG_BYTES
    assert log.room["kernel"] < 0
    assert text_of(log).count(b"what comes from here on is not logged") == 1
    assert text_of(log).endswith(b"kernel: ... what comes from here on is not logged\n")
    log.quote("ssh", "is heard all the same")
    log.write("and so is the launcher")
    assert text_of(log).endswith(b"ssh: is heard all the same\n" + text_of(log)[-32:])
    assert b"and so is the launcher" in text_of(log)[-40:]


def test_a_log_has_as_much_of_what_is_said_as_there_is_room_for(log):
    for number in range(product.LOG_BYTES // 106 - 1):
        log.quote("kernel", "{:0100}".format(number))
    assert b"not logged" not in text_of(log)
    assert text_of(log).count(b"\n") == product.LOG_BYTES // 106 - 1


def test_a_log_file_is_its_owners_and_each_has_its_own(tmp_path):
    logs = [product.Log(str(tmp_path), "tunnel", {}) for _ in range(3)]
    assert len({log.path for log in logs}) == 3
    for log in logs:
        log.write("ä \udcff")
        assert os.stat(log.path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(log.path)).st_mode & 0o777 == 0o700
        assert text_of(log)[9:] == "ä \\xff\n".encode()


def test_a_full_disk_ends_the_log_and_not_the_launch(log, capsys):
    log.descriptor = os.open("/dev/full", os.O_WRONLY)
    log.write("one")
    log.write("two")
    log.quote("kernel", "three")
    assert log.descriptor is None
    assert capsys.readouterr().err.count("ends here: No space left on device") == 1


def test_the_last_lines_are_kept():
    lines = []
    for number in range(1000):
        product.keep_last(lines, number)
    assert lines == list(range(800, 1000))


def test_output_in_pieces_becomes_lines_however_it_is_split():
    data = "one\r\ntwo\n\n\r\nthrée \r x\r\r\n".encode() + b"\xff\xfe\nlast"
    expected = ["one", "two", "thrée \r x", "\udcff\udcfe", "last"]
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            lines = []
            taker = product.Lines(lines.append)
            for piece in (data[:first], data[first:second], data[second:]):
                if piece:
                    taker.feed(piece)
            assert lines == expected[:-1]
            taker.feed(b"")
            taker.feed(b"")
            assert lines == expected


def test_a_line_without_end_does_not_fill_the_memory():
    lines = []
    taker = product.Lines(lines.append)
    for _ in range(40):
        taker.feed(b"x" * 65536)
        assert len(taker.partial) <= 65536
    taker.feed(b"\nnext\n")
    assert len(lines[0]) <= 65536
    assert lines[1] == "next"


def test_a_launch_is_told_once():
    reader, writer = os.pipe()
    teller = product.Teller(writer)
    assert not teller.has_told
    teller.tell(7, "why \udcff ä")
    teller.tell(0, "never mind")
    assert teller.has_told
    data = os.read(reader, 4096)
    assert os.read(reader, 1) == b""  # closed: whoever waits need not
    assert data == b"7 why \\udcff \xc3\xa4"
    os.close(reader)


@pytest.mark.parametrize(
    "data, code, said",
    [
        (b"0 ", 0, ""),
        (b"7 it failed", 7, "tunnel: it failed\n"),
        (b"255 \xc3\xa4 \xff", 255, "tunnel: ä \ufffd\n"),
        (b"", 70, ""),  # who was to tell has gone
        (b"x y", 70, "tunnel: y\n"),
        ("² y".encode(), 70, "tunnel: y\n"),
        (b"-1 y", 70, "tunnel: y\n"),
    ],
)
def test_what_was_told_becomes_exit_code_and_line(data, code, said, capsys):
    assert product.Teller.hear(data) == code
    assert capsys.readouterr().err == said


def test_nobody_need_listen():
    teller = product.Teller()
    teller.tell(0, "x")
    assert not teller.has_told
    reader, writer = os.pipe()
    os.close(reader)
    teller = product.Teller(writer)
    teller.tell(0, "x")
    assert teller.has_told
    with pytest.raises(OSError):
        os.fstat(writer)


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    "nowhere", [lambda: open("/dev/full", "w"), closed_pipe], ids=["a full disk", "a closed pipe"]
)
def test_output_that_has_nowhere_to_go_is_no_failure(nowhere, monkeypatch):
    stream = nowhere()
    monkeypatch.setattr(sys, "stdout", stream)
    assert product.show("text\n" * 10000) == 0
    assert product.show("more\n") == 0
    stream.flush()  # as Python does at its end
    stream.close()


def test_without_standard_streams_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert product.show("text") == 0
    product.say("text")


def test_somebody_who_has_stopped_listening_is_no_failure(monkeypatch):
    stream = closed_pipe()
    monkeypatch.setattr(sys, "stderr", stream)
    product.say("text")
    monkeypatch.undo()
    stream.close()  # as Python does in the end, which would exit with 120 if this failed


@pytest.mark.parametrize(
    "encoding, text", [("utf-8", "/\udcff/math\n"), ("ascii", "/ä/math\n"), ("latin-1", "/日\n")]
)
def test_a_path_that_cannot_be_written_is_shown_in_another_way(encoding, text, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert product.show("kernel: " + text) == 0
    sys.stdout.flush()
    assert shown.getvalue().startswith(b"kernel: /")
    assert shown.getvalue().endswith(b"\n")


CHILD = """
import os, resource, sys
sys.path.insert(0, {tests!r})
from rig import product
out = os.dup2(os.open({out!r}, os.O_WRONLY | os.O_CREAT), 999)
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, most))
for _ in range(1100):
    os.open(os.devnull, os.O_RDWR)
for number in {closed!r}:
    os.close(number)
product.let_go_of_descriptors()
left = sorted(int(name) for name in os.listdir("/dev/fd"))
report = os.open({out!r}, os.O_WRONLY)
os.write(report, repr((report, [os.fstat(number).st_rdev for number in range(3)], len(left))).encode())
"""


@pytest.mark.parametrize("closed", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_launcher_lets_go_of_what_its_caller_had_open(tmp_path, closed):
    """The next descriptor is the fourth: all three standard streams are there, and nothing else is."""
    out = str(tmp_path / "out")
    code = CHILD.format(tests=rig.TESTS, out=out, closed=closed)
    with open(os.devnull, "r+") as null:
        ended = subprocess.run([sys.executable, "-c", code], stdin=null, stdout=null, stderr=null, close_fds=True)
    assert ended.returncode == 0
    with open(out) as stream:
        text = stream.read()
    assert text.startswith("(3, ["), text
    assert text.endswith(", 4)")  # and what lists them
    null = os.stat(os.devnull).st_rdev
    assert text == "(3, {!r}, 4)".format([null] * 3)
