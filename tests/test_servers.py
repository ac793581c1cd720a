"""What servers allow and do: harmless, or explained in one line."""

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
    tries,
    works,
)

EXPOSED = "opens the forwarded ports to its whole network (GatewayPorts yes in its sshd_config)"


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
