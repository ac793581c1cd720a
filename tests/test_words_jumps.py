"""Which machine is named when a jump host is in the way."""

import os
import socket
import sys
import threading

import pytest
import rig
from rig.launches import key_lines


@pytest.mark.parametrize(
    "jump, words",
    [
        ("root@clustr.invalid", "no machine named clustr.invalid, on the way to node19, is known here"),
        ("gate", "the host key of gate, on the way to node19, is unknown"),
    ],
)
def test_the_jump_host_that_is_in_the_way_is_named(desk, machine, jump, words):
    lines = [line for line in key_lines(machine) if "KnownHosts" not in line and "Strict" not in line]
    lines += ["UserKnownHostsFile /dev/null", "StrictHostKeyChecking yes"]
    config = ["Host gate", "HostName {}".format(machine.address)] + lines
    config += ["Host node19", "HostName 127.0.0.1", "ProxyJump {}".format(jump)] + lines
    environ = desk.environment(machine, TUNNEL_SSH=machine.make_ssh("jumping", config)[1])
    argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check", "john@node19", machine.classic]
    done = rig.run(*argv, env=dict(os.environ, **environ))
    assert words in done.stderr, done.stderr + "".join(desk.logs())
    assert done.returncode == 255 and done.stderr.count("\n") == 1


def test_a_proxy_command_that_ends_by_itself_is_named_with_its_last_words(desk, machine):
    lines = ["Host node19", "ProxyCommand sh -c 'echo the proxy wants a ticket >&2; exit 3'"] + key_lines(machine)
    environ = desk.environment(machine, TUNNEL_SSH=machine.make_ssh("ending", lines)[1])
    argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check", "john@node19", machine.classic]
    done = rig.run(*argv, env=dict(os.environ, **environ))
    assert "the ProxyCommand to node19 has ended by itself: " in done.stderr, done.stderr
    assert "(the proxy wants a ticket)" in done.stderr and "overloaded" not in done.stderr
    assert done.returncode == 255 and done.stderr.count("\n") == 1


def test_a_jump_host_that_closes_before_the_login_is_named(desk, machine):
    """As a server at its MaxStartups does."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(8)
        threading.Thread(target=close_each, args=(full,), daemon=True).start()
        lines = ["Host gate", "HostName 127.0.0.1", "Port {}".format(full.getsockname()[1]), "Host node19"]
        lines += ["HostName 127.0.0.1", "ProxyJump gate"] + key_lines(machine)
        environ = desk.environment(machine, TUNNEL_SSH=machine.make_ssh("full", lines)[1])
        argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check", "john@node19", machine.classic]
        done = rig.run(*argv, env=dict(os.environ, **environ))
    assert "gate, on the way to node19, closed the connection before the login" in done.stderr, done.stderr


def close_each(listener):
    """Accept and close, until the listener is closed."""
    try:
        while True:
            listener.accept()[0].close()
    except OSError:
        pass  # the test is over
