"""What a try finds out from what is said: its stages, its obstacles, and what the next try does otherwise."""

import itertools
import random

import pytest
from rig import product
from rig.product import ANSWERED, LOGGED_IN, STARTED, Facts, OpenSSH, Plan, Plink
from rig.tries import (
    LOGIN,
    MUX,
    PLINK_LOGIN,
    PLINK_SESSION,
    READ,
    SESSION,
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
