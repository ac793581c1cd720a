"""Jump hosts: what they say and what they refuse is told apart from what the machine behind them does."""

import os
import socket

import pytest
import rig
from rig.desk import make_machine
from rig.launches import FAKED, ends_with, key_lines, launched, log_of, tries, works


@pytest.fixture(scope="module")
def gate(request):
    return make_machine(request, password=True)


@pytest.fixture(scope="module")
def cluster(request, gate):
    """A machine that only ``gate`` reaches."""
    return make_machine(request, behind=gate, password=True)


def through(gate, cluster, *lines, key=True):
    """ssh with a configuration that reaches ``cluster`` through ``gate``.

    :param lines: what it has for the gate, before all else
    :param key: whether it logs in on ``cluster`` with a key
    """
    config = ["Host gate"] + list(lines) + ["HostName {}".format(gate.address)]
    config += gate.client_lines + ["StrictHostKeyChecking accept-new"]
    config += ["Host cluster closed", "HostName {}".format(cluster.address), "ProxyJump gate"]
    config += ["Host closed", "Port 9", "Host cluster closed"] + key_lines(cluster, key)
    return {"TUNNEL_SSH": gate.make_ssh("through", config)[1]}


def test_banners_on_the_way_are_read_as_what_they_are(desk, gate, cluster):
    for each in (gate, cluster):
        each.write("banner", "\n".join(FAKED) + "\n")
        each.restart_server("Banner " + each.path("banner"))
    try:
        before = gate.logins(), cluster.logins()
        logs = works(desk, cluster, slow=True, host="john@cluster", env=through(gate, cluster))
        assert [tries(log) for log in logs] == [1] * 4
        assert (gate.logins(), cluster.logins()) == (before[0] + 4, before[1] + 4)
        end = desk.slow(cluster, "compute", host="john@cluster", env=through(gate, cluster))
        assert end.wait() == (0, "")
        assert "the kernel has called back after" not in log_of(desk, end)  # it has returned before
        desk.accept(end)
    finally:
        desk.close()
        gate.restart_server()
        cluster.restart_server()


REFUSALS = {
    "keys": (["PubkeyAuthentication no", "PasswordAuthentication no"], "refused the login"),
    "too many keys": (["IdentityFile {other}", "IdentitiesOnly yes"], "refused the login|too many keys"),
    "host key": (["UserKnownHostsFile {wrong}"], "the host key of .* has changed"),
    "port": (["Port 1"], "refused the connection"),
    "name": (["HostName no-such-host.invalid"], "no machine named"),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_a_jump_host_that_refuses_is_asked_once(desk, gate, cluster, name):
    lines, words = REFUSALS[name]
    other, wrong = gate.path("other"), gate.path("wrong")
    if not os.path.exists(other):
        rig.must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other)
        with open(other + ".pub") as stream:
            gate.write("wrong", "{} {}".format(gate.address, " ".join(stream.read().split()[:2])) + "\n", 0o600)
    gate.restart_server(*(["MaxAuthTries 1"] if name == "too many keys" else []))
    environ = through(gate, cluster, *[line.format(other=other, wrong=wrong) for line in lines])
    for role in ("classic", "shared"):
        before = gate.attempts()
        end = launched(desk, cluster, role, host="john@cluster", env=environ)
        ends_with(desk, end, 255, words, 20)
        assert gate.attempts() == before + (name not in ("port", "name"))
        log = log_of(desk, end)
        assert tries(log) + log.count(" shared connection: ") == 1


def test_a_machine_that_refuses_behind_a_jump_host_is_asked_once(desk, gate, cluster):
    before = cluster.attempts()
    environ = through(gate, cluster, key=False)
    end = desk.launch(cluster, "compute", host="john:wrong@cluster", env=environ)
    ends_with(desk, end, 255, "refused the login")
    assert cluster.attempts() == before + 1


def test_a_machine_that_a_jump_host_cannot_reach_is_not_told_as_overloaded(desk, gate, cluster):
    before = gate.logins()
    end = desk.launch(cluster, "compute", host="john@closed", env=through(gate, cluster))
    line = ends_with(desk, end, 255, "Connection refused|refused the connection", 20)
    assert "overloaded" not in line
    assert gate.logins() == before + 1


@pytest.mark.parametrize("role", ["classic", "shared"])
def test_a_chain_of_jump_hosts_ends_with_the_launch(desk, gate, cluster, role):
    """The first accepts a connection and says nothing, so that the client of the client waits for it."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        lines = ["Host silent", "HostName 127.0.0.1", "Port {}".format(silent.getsockname()[1])]
        lines += ["Host cluster", "ProxyJump silent,gate", "HostName {}".format(cluster.address)]
        environ = {"TUNNEL_SSH": gate.make_ssh("chain", lines + ["ConnectTimeout 1"] + key_lines(cluster))[1]}
        end = launched(desk, cluster, role, "-o", "ConnectTimeout=1", host="john@cluster", env=environ)
        ends_with(desk, end, 255, "cluster", 20)


NOBODY = dict.fromkeys(("DISPLAY", "WAYLAND_DISPLAY", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE"), "")  # can be asked


@pytest.mark.parametrize(
    "host, display",
    [("john@cluster", ""), ("john@cluster", ":99"), ("john:{}@cluster".format(rig.PASSWORD), "")],
    ids=["nobody", "desktop", "password"],
)
def test_a_jump_host_that_wants_a_password_gets_no_empty_ones(desk, gate, cluster, host, display):
    """Its client has none of the launcher's options, and would send three."""
    config = ["Host gate", "HostName {}".format(gate.address), "StrictHostKeyChecking accept-new"]
    config += key_lines(gate, key=False) + [
        "Host cluster",
        "HostName {}".format(cluster.address),
        "ProxyJump gate",
    ]
    wrapper = gate.make_ssh("asked", config + key_lines(cluster))[1]
    with open(wrapper, "a") as stream:
        stream.write("# /none/ssh-askpass\n")  # as in a binary: the program that it would ask with
    environ = dict(NOBODY, TUNNEL_SSH=wrapper, DISPLAY=display)
    failed = gate.server_log().count("Failed password")
    for role in ("classic", "shared"):
        end = launched(desk, cluster, role, host=host, env=environ)
        words = "the login on cluster asks for what nobody can answer here .john@{}'s password:".format(
            gate.address
        )
        ends_with(desk, end, 255, words, 5)
    assert gate.server_log().count("Failed password") == failed


@pytest.mark.parametrize("role", ["classic", "shared"])
def test_a_banner_on_the_way_does_not_explain_what_the_machine_behind_says(desk, gate, cluster, role):
    gate.write("banner", "\n".join(FAKED) + "\n")
    gate.restart_server("Banner " + gate.path("banner"))
    try:
        end = launched(desk, cluster, role, host="john:wrong@cluster", env=through(gate, cluster, key=False))
        ends_with(desk, end, 255, "cluster refused the login")
    finally:
        gate.restart_server()
