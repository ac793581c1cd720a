"""The way to the server: names, addresses, servers that are silent or drop connections, lost connections."""

import socket
import time

import pytest
import rig
from rig.launches import FAKED, clients, ends_with, fails, failure, launch_through, log_of, patched, tries, works
from rig.processes import BOUND, Before, all_gone
from rig.servers import Relay, silent_server


@clients
@pytest.mark.parametrize("role", ["classic", "compute"])
def test_no_such_host(desk, machine, client, role):
    end = desk.launch(machine, role, client=client, host="no-such-host.invalid")
    fails(desk, end, failure(client), "no machine named no-such-host.invalid", 10)


@clients
def test_refused_connection(desk, machine, client):
    end = desk.launch(machine, "compute", client=client, host="{}:{}".format(machine.destination, 1))
    fails(desk, end, failure(client), "refused the connection: no SSH server listens", 5)


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


# -- name servers

SLOW_NAMES = (
    "import _socket\n"
    "real = _socket.getaddrinfo\n"
    "def look_up(host, port, family=0, type=0, proto=0, flags=0):\n"
    "    if host != 'slow.example':\n"
    "        return real(host, port, family, type, proto, flags)\n"
    "    if flags & _socket.AI_NUMERICHOST:\n"
    "        raise _socket.gaierror(-2, 'no number')\n"
    "    time.sleep({})\n"
    "    return real('127.0.0.1', port, family, type, proto, flags)\n"
    "_socket.getaddrinfo = look_up\n"
    "stay()\n"
)


def test_a_name_server_that_takes_its_time_is_waited_for(desk, machine):
    end = launch_through(desk, machine, "callback", SLOW_NAMES.format(1), host_of_links="slow.example")
    end.accept()
    end.echo()
    end.tell(b"!quit 3\n")
    assert end.wait()[0] == 3


def test_a_signal_ends_a_launch_that_waits_for_a_name_server(desk, machine):
    end = launch_through(desk, machine, "callback", SLOW_NAMES.format(60), host_of_links="slow.example")
    rig.wait_until(lambda: machine.kernels(), 10, "the kernel")
    rig.wait_until(lambda: "kernel: started" in log_of(desk, end), 5, "its connection")
    time.sleep(0.3)  # nobody tells when it looks up a name
    end.signal()
    assert end.wait(3)[0] == 143
    all_gone(desk)
    rig.wait_until(lambda: not machine.kernels(), 5, "the end of the kernel")


# -- silence


def test_a_server_that_says_nothing_is_given_up_in_the_time_that_was_asked_for(desk, machine):
    port, end_server = silent_server()
    named, end_named_server = silent_server(b"SSH-2.0-OpenSSH_9.2\r\n")
    host, named_host = ("john@127.0.0.1:{}".format(each) for each in (port, named))
    try:
        ends = [
            desk.launch(machine, "compute", "-o", "ConnectTimeout=" + text, host=host)
            for text in ("2", "2s", "0m2S", "1s1s")
        ]
        ends.append(desk.launch(machine, "classic", "-o", "connecttimeout=2", host=named_host))
        ends.append(patched(desk, machine, "classic", {"CONNECT_SECONDS": 2}, host=host))
        environ = {"TUNNEL_SSH": machine.make_plink()}
        ends.append(patched(desk, machine, "classic", {"CONNECT_SECONDS": 2}, host=host, env=environ))
        wrong = desk.launch(machine, "classic", "-o", "ConnectTimeout=soon", host=host)
        for end in ends:
            code, errors = end.wait(10)
            assert (code, len(errors.splitlines())) == (failure("plink" if end is ends[-1] else "ssh"), 1)
            assert "127.0.0.1 did not answer within 2 s; check the name, the port" in errors
        code, errors = wrong.wait()
        assert code == 255
        assert "the client rejected its options" in errors
    finally:
        end_server()
        end_named_server()


@pytest.mark.parametrize("text", ["0", "1m", "90"])
def test_a_server_that_may_take_its_time_gets_it(desk, machine, text):
    """With 1 s as the launcher's own limit, and a server that goes away without a word after more than that."""
    port, end_server = silent_server()
    begin = time.monotonic()
    host = "john@127.0.0.1:{}".format(port)
    end = patched(
        desk, machine, "classic", {"CONNECT_SECONDS": 1, "TRIES": 1}, "-o", "ConnectTimeout=" + text, host=host
    )
    try:
        with pytest.raises(Exception, match="timed out"):
            end.launcher.wait(2.5 - (time.monotonic() - begin))
    finally:
        end_server()
    fails(desk, end, 255, "closed the connection before the login", 10)


# -- connections that are dropped or lost


def test_dropped_connections_are_tried_again(desk, serve):
    machine = serve("MaxStartups 1:50:100")
    ends = [desk.launch(machine, "compute") for _ in range(8)]
    for end in ends:
        assert end.wait(60)[0] == 0
        end.accept()
        end.echo()


@clients
def test_a_server_that_drops_all_connections_is_given_up_after_five(desk, serve, client):
    machine = serve("MaxStartups 1:100:1")
    guest = socket.create_connection((machine.address, machine.port))  # as many as it lets in at once
    try:
        assert guest.recv(4) == b"SSH-"
        before = machine.attempts()
        end = desk.launch(machine, "compute", client=client)
        line = fails(
            desk, end, failure(client), "closed the connection before the login; it may be overloaded", 20
        )
        assert "trying again" not in desk.logs()[0].splitlines()[-2]
        assert machine.attempts() == before + 5
        assert "blocks" not in line
    finally:
        guest.close()


def test_connection_lost_later(desk, machine):
    end = desk.launch(machine, "classic")
    end.accept()
    for pid in machine.sessions():
        if "sshd:" in str(rig.command_line(pid)):
            rig.end_process(pid)
    fails(desk, end, 255, "the connection was lost", 5)
    rig.wait_until(lambda: not machine.kernels(), 5)


def test_network_cut(desk, own_machine):
    """Without a word to either side: noticed by ServerAliveInterval here, and by the server's own there."""
    own_machine.restart_server("ClientAliveInterval 1", "ClientAliveCountMax 2")
    before = Before(desk, own_machine)
    quick = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    end = desk.launch(own_machine, "callback", *quick)
    end.accept()
    before.watch(end)
    own_machine.cut()
    code, errors = end.wait(10)
    assert code == 255
    assert "the connection was lost" in errors
    before.again(end, 15)


def test_a_frozen_server_is_noticed(desk, own_machine):
    end = desk.launch(own_machine, "callback", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    end.accept()
    own_machine.freeze()
    try:
        code, errors = end.wait(10)
        assert code == 255
        assert "the connection was lost" in errors
        all_gone(desk)
    finally:
        own_machine.thaw()
    rig.wait_until(lambda: not own_machine.kernels(), BOUND, "the end of the kernel")
