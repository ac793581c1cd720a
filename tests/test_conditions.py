"""What servers allow, ask for and say: each harmless, or explained in one line."""

import pytest
import rig
from rig.launches import (
    FAKED,
    clients,
    ends_with,
    failure,
    kinds,
    launched,
    log_of,
    masters,
    nothing_else,
    patched,
    tries,
    works,
)
from rig.servers import Relay

EXPOSED = "opens the forwarded ports to its whole network (GatewayPorts yes in its sshd_config)"


# -- what servers allow


@clients
def test_a_server_without_terminals_runs_one_kernel_and_that_is_the_one_watched(desk, serve, client):
    machine = serve("PermitTTY no")
    before = machine.kernel_starts()
    for _ in range(2):
        ends = [launched(desk, machine, role, client=client, slow=True) for role in kinds(client)]
        for end in ends:
            desk.accept(end)
        assert machine.kernel_starts() == before + len(ends)
        assert len(machine.kernels()) == len(ends)
        before = machine.kernel_starts()
        for end in ends:
            end.echo(1000)
            end.tell(b"!quit 7\n")
        for end in ends:
            assert end.wait()[0] == (0 if end.role == "compute" else 7)
        nothing_else(desk)
        logs = [log_of(desk, end) for end in ends]
        for log in logs:
            assert "allows no terminal" in log
            assert log.splitlines()[-1].endswith("with exit code 7")
    assert [tries(log) for log in logs] == [1] * len(ends)  # the first ones have left word


def test_a_server_that_allows_no_terminals_any_more_still_runs_kernels(desk, serve, machine):
    roles = ["classic", "shared"]
    works(desk, machine, roles)  # these have left word of a terminal
    for pid in machine.sessions():
        rig.end_process(pid)
    rig.wait_until(lambda: not masters(desk), 5)
    serve("PermitTTY no")
    before = machine.kernel_starts()
    logs = works(desk, machine, roles, slow=True)
    assert machine.kernel_starts() <= before + 2 * len(roles)  # the links go to the one that is watched
    assert "allows no terminal" in logs[0]


def test_a_terminal_that_was_asked_for_and_is_not_allowed_is_explained(desk, serve):
    machine = serve("PermitTTY no")
    end = desk.slow(machine, "classic", "-o", "RequestTTY=force")
    ends_with(desk, end, 255, "the server allows no terminal")
    assert not machine.kernels()


@clients
@pytest.mark.parametrize("line", ["AllowTcpForwarding no", "AllowTcpForwarding local", "DisableForwarding yes"])
def test_a_server_that_forwards_no_ports_is_explained(desk, serve, client, line):
    machine = serve(line)
    before, logins = machine.kernel_starts(), machine.logins()
    ends = [launched(desk, machine, role, client=client) for role in kinds(client)]
    for end in ends:
        ends_with(desk, end, failure(client), "set AllowTcpForwarding yes in its sshd_config", 20)
    if client == "ssh":
        assert machine.logins() == logins + len(ends)
        assert machine.kernel_starts() == before
    rig.wait_until(lambda: not machine.kernels(), 5)


@pytest.mark.parametrize("role", ["compute", "shared"])
def test_a_server_that_opens_none_of_the_ports_is_explained(desk, serve, role):
    machine = serve("PermitListen none")
    before = machine.logins()
    end = launched(desk, machine, role)
    ends_with(desk, end, 255, "5 blocks of ports were refused .* set AllowTcpForwarding yes", 20)
    assert machine.logins() == before + (5 if role == "compute" else 1)


@clients
@pytest.mark.parametrize("line", ["AllowTcpForwarding remote", "PermitOpen none"])
def test_a_server_that_lets_nobody_reach_its_loopback_is_explained_where_that_matters(desk, serve, client, line):
    machine = serve(line)
    works(desk, machine, kinds(client)[1:], client=client)
    end = desk.slow(machine, "classic", client=client)
    ends_with(desk, end, failure(client), "up to 11.0.*PermitOpen")


@clients
def test_a_server_that_opens_ports_to_its_network_is_told(desk, serve, client):
    machine = serve("GatewayPorts yes")
    for _ in range(2):
        for log in works(desk, machine, kinds(client), client=client):
            assert EXPOSED in log


@pytest.mark.parametrize("value", ["clientspecified", "no"])
def test_a_server_that_leaves_it_to_the_client_opens_nothing(desk, serve, value):
    machine = serve("GatewayPorts " + value)
    end = desk.launch(machine, "callback")
    desk.accept(end)
    assert set(machine.listeners(everywhere=True)) - set(machine.listeners()) == {machine.port}
    assert EXPOSED not in log_of(desk, end)


HARMLESS = {
    "little is allowed": [
        "MaxSessions 1",
        "MaxAuthTries 1",
        "LoginGraceTime 3",
        "AllowAgentForwarding no",
        "AllowStreamLocalForwarding no",
        "ClientAliveInterval 1",
        "ClientAliveCountMax 1",
        "RekeyLimit 1M",
        "SetEnv TERM=dumb",
    ],
    "a command of its own": ['ForceCommand echo wait; sleep 0.5; sh -c "$SSH_ORIGINAL_COMMAND"'],
    "a banner": ["Banner {folder}/banner"],
}


@clients
@pytest.mark.parametrize("name", list(HARMLESS))
def test_a_server_is_harmless(desk, serve, machine, client, name):
    machine.write("banner", "\n".join(FAKED) + "\n")
    serve(*[line.format(folder=machine.folder) for line in HARMLESS[name]])
    starts, logins = machine.kernel_starts(), machine.logins()
    roles = kinds(client)
    for log in works(desk, machine, roles, client=client):
        assert tries(log) == 1
    assert machine.kernel_starts() == starts + len(roles)
    assert machine.logins() == logins + len(roles)


@pytest.mark.parametrize("role", ["classic", "shared"])
def test_a_server_that_allows_no_session_is_explained(desk, serve, role):
    machine = serve("MaxSessions 0")
    before = machine.logins()
    end = launched(desk, machine, role)
    ends_with(desk, end, 255, "MaxSessions")
    assert machine.logins() <= before + 2


def test_a_server_that_runs_something_else_is_explained(desk, serve):
    machine = serve("ForceCommand echo john may copy files only")
    end = desk.launch(machine, "compute")
    ends_with(desk, end, 1, "ended before it called back")
    assert "john may copy files only" in log_of(desk, end)


# -- logins


@clients
def test_a_banner_does_not_explain_a_refused_login(desk, serve, machine, client):
    machine.write("banner", "\n".join(FAKED) + "\n")
    serve("Banner {}".format(machine.path("banner")), "DenyUsers john")
    machine.client(client)  # which introduces plink to the machine
    for role in kinds(client)[::3]:
        before = machine.attempts()
        end = launched(desk, machine, role, client=client)
        ends_with(desk, end, failure(client), "refused the login")
        assert machine.attempts() == before + 1


def test_a_banner_decides_nothing_where_ssh_has_no_log_of_its_own(desk, serve, machine):
    """As on Windows, and where no private folder can be made: words, that is, but whole lines of ssh's own."""
    machine.write("banner", "\n".join("> " + line for line in FAKED) + "\n")
    serve("Banner {}".format(machine.path("banner")))
    nowhere = str(desk.runtime) + "/none"
    before = machine.attempts()
    environ = {"XDG_RUNTIME_DIR": nowhere, "TMPDIR": nowhere}
    logs = works(desk, machine, ["classic", "callback", "compute"], slow=True, env=environ)
    assert [tries(log) for log in logs] == [1] * 3
    assert all("nothing is remembered" in log for log in logs)
    assert machine.attempts() == before + 3


@clients
@pytest.mark.parametrize("denied", [False, True], ids=["let in", "refused"])
def test_lines_before_the_servers_version_decide_nothing(desk, serve, client, denied):
    machine = serve(*(["DenyUsers john"] if denied else []))
    before = machine.attempts()
    # plink stops at a line that begins with "SSH-"; neither takes more than 1024 of them.
    with Relay(machine, "".join(line + "\r\n" for line in FAKED).encode()) as relay:
        host = "john@127.0.0.1:{}".format(relay.port)
        wrapper = machine.client(client)
        if client == "plink":
            rig.run(wrapper, "-ssh", "-P", str(relay.port), "nobody@127.0.0.1", "true", input="y\n\n")
            before = machine.attempts()
        if denied:
            end = desk.launch(machine, "classic", client=client, host=host)
            ends_with(desk, end, failure(client), "refused the login")
        else:
            (log,) = works(desk, machine, ["callback"], client=client, host=host)
            assert tries(log) == 1
        assert machine.attempts() == before + 1


def with_hosts(machine, lines):
    """ssh on a machine whose /etc/hosts has further lines."""
    with open("/etc/hosts") as stream:
        hosts = machine.write("hosts", stream.read() + "\n".join(lines) + "\n")
    script = 'mount --bind "$0" /etc/hosts && exec "$@"'
    words = "unshare -m --propagation private sh -c '{}' {} {}".format(script, hosts, machine.ssh)
    return machine.write("ssh-hosts", '#!/bin/sh\nexec {} "$@"\n'.format(words), 0o755)


@pytest.mark.parametrize("denied", [False, True], ids=["let in", "refused"])
def test_of_two_addresses_one_that_refuses_decides_nothing(desk, serve, denied):
    machine = serve(*(["DenyUsers john"] if denied else []))
    wrapper = with_hosts(machine, ["127.0.0.9 twofold", "{} twofold".format(machine.address)])
    before = machine.attempts()
    options = {"host": "john@twofold", "env": {"TUNNEL_SSH": wrapper}}
    if denied:
        end = desk.launch(machine, "classic", **options)
        ends_with(desk, end, 255, "refused the login")
    else:
        (log,) = works(desk, machine, ["classic"], **options)
        assert tries(log) == 1
    assert "127.0.0.9 port 22: Connection refused" in desk.logs()[0]
    assert machine.attempts() == before + 1


SLOW_LOGIN = "AuthorizedKeysCommand /bin/sh -c 'sleep {}; cat {}'"


def slow_to_log_in(serve, machine, seconds):
    keys = machine.path("home", ".ssh", "authorized_keys")
    command = SLOW_LOGIN.format(seconds, keys)
    return serve(command, "AuthorizedKeysCommandUser john", "AuthorizedKeysFile none")


def test_a_login_may_take_longer_than_an_answer(desk, serve, machine):
    slow_to_log_in(serve, machine, 1)  # for each of two questions
    before = machine.attempts()
    works(desk, machine, ["classic", "shared"], ("-o", "ConnectTimeout=1"))
    assert machine.attempts() == before + 2


def test_a_login_that_stalls_is_not_told_as_a_host_that_does_not_answer(desk, serve, machine):
    slow_to_log_in(serve, machine, 30)
    end = patched(desk, machine, "classic", {"LOGIN_SECONDS": 2}, "-o", "ConnectTimeout=1")
    line = ends_with(desk, end, 255, "the login on .* did not come to an end within 2 s")
    assert "did not answer" not in line


def test_a_server_that_ends_a_login_which_takes_too_long_is_not_asked_again(desk, serve, machine):
    helper = machine.write("slow-askpass", "#!/bin/sh\nsleep 2\n", 0o755)
    serve("LoginGraceTime 1")
    before = machine.attempts()
    asking = {"TUNNEL_SSH": machine.make_keyless_ssh(), "SSH_ASKPASS": helper, "SSH_ASKPASS_REQUIRE": "force"}
    asking["DISPLAY"] = "x"
    end = desk.launch(machine, "compute", env=asking)
    ends_with(desk, end, 255, "closed the connection during the login|ended the login", 20)
    assert machine.attempts() == before + 1


# -- ports that somebody else holds


@pytest.mark.parametrize("client, position", [("ssh", 1), ("plink", 4)])
def test_a_port_that_the_kernel_would_listen_on_is_noticed_before_it_boots(desk, machine, client, position):
    block = rig.Ports()
    release = machine.occupy(block.first + 1 + position)
    try:
        end = desk.slow(machine, "classic", client=client, ports=(block.first, block.first + 1))
        desk.accept(end)
        end.echo(1000)
    finally:
        release()
        block.close()
    log = log_of(desk, end)
    assert "port {} is in use on the kernel machine".format(block.first + 1 + position) in log
    assert log.count("the kernel has called back") == 1
    assert tries(log) == 2


def test_blocks_that_are_all_held_are_explained(desk, machine):
    """Each block has a port that somebody answers at: then there is no sixth try."""
    block = rig.Ports()
    release = machine.occupy(block.first + 2)
    end = patched(
        desk,
        machine,
        "classic",
        {
            "draw_ports": "lambda: ({0}, {0} + 1)".format(block.first),
            "first_ports": "lambda _: ({0}, {0} + 1)".format(block.first),
            "Probe.PATIENCE": 0.3,
        },
    )
    try:
        ends_with(desk, end, 255, "5 blocks of ports were tried, and each had one in use", 30)
    finally:
        release()
        block.close()
    rig.wait_until(lambda: not machine.kernels(), 5)


@pytest.mark.parametrize("role", ["callback", "shared"])
def test_a_login_without_a_terminal_at_its_standard_input(desk, own_machine, role):
    own_machine.write("home/.bashrc", "exec </dev/null\n")
    (log,) = works(desk, own_machine, [role])
    assert "the login has no terminal at its standard input" in log
    assert own_machine.kernel_starts() == 1


@pytest.mark.parametrize("role", ["classic", "shared"])
def test_a_kernel_that_has_connected_has_been_reached_whatever_ssh_says(desk, machine, role):
    """An ssh whose words are not understood; here they go nowhere."""
    text = "#!/bin/sh\nn=$#\nwhile [ $n -gt 0 ]; do case $1 in -E) shift 2; n=$((n-2));;"
    text += ' *) set -- "$@" "$1"; shift; n=$((n-1));; esac; done\nexec {} "$@"\n'
    wrapper = machine.write("wordless-ssh", text.format(machine.ssh), 0o755)
    desk.alter(SHARED_SECONDS=3, CONNECT_SECONDS=3)
    end = launched(desk, machine, role, env={"TUNNEL_SSH": wrapper})
    end.accept()
    end.busy(4)
    end.echo(1000)
    end.quit()
    end.wait(10)
