"""Passwords: each is given once, to the server that is to have it, and nobody else can ask for it."""

import errno
import os
import re
import socket
import time

import pytest
import rig
from rig.desk import make_machine
from rig.launches import clients, fails, failure, key_lines
from rig.processes import descriptors, supervisor


@clients
def test_wrong_password(desk, machine, client):
    host = "john:wrong-{}@{}".format(rig.PASSWORD, machine.address)
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    end = desk.launch(machine, "compute", host=host, env={"TUNNEL_SSH": wrapper})
    line = fails(desk, end, failure(client), "refused the login", 10)
    assert rig.PASSWORD not in line + "".join(desk.logs())


@clients
@pytest.mark.parametrize("display", ["", "127.0.0.1:99"], ids=["without a display", "with a display"])
def test_no_password_and_no_key_waits_for_no_terminal_and_guesses_nothing(desk, machine, client, display):
    """An ssh that can ask nobody sends an empty password, three times: fail2ban counts them."""
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    failed, attempts = machine.server_log().count("Failed password"), machine.attempts()
    environ = {"TUNNEL_SSH": wrapper, "DISPLAY": display, "SSH_ASKPASS_REQUIRE": "", "SSH_ASKPASS": ""}
    end = desk.launch(machine, "classic", env=environ)
    line = fails(desk, end, failure(client), "refused the login", 10)
    assert "check user, password and keys" in line
    assert (
        "{} -l john {} ".format(os.path.basename("plink" if client == "plink" else "ssh"), machine.address) in line
    )
    assert machine.attempts() == attempts + 1
    assert machine.server_log().count("Failed password") <= failed + bool(display)


@clients
def test_password_login(desk, machine, client):
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    end = desk.launch(machine, "callback", host=host, env={"TUNNEL_SSH": wrapper})
    end.accept()
    end.echo()
    for pid in desk.processes():
        assert pid == end.launcher.pid or rig.PASSWORD not in str(rig.command_line(pid))
        if pid != end.launcher.pid:
            with open("/proc/{}/environ".format(pid), "rb") as stream:
                assert rig.PASSWORD.encode() not in stream.read()
    end.tell(b"!quit 0\n")
    assert end.wait()[0] == 0
    assert rig.PASSWORD not in "".join(desk.logs())


def test_password_is_not_given_to_a_jump_host(request, desk):
    jump = make_machine(request, password=True)
    target = make_machine(request, behind=jump, password=True)
    lines = ["Host gate", "HostName {}".format(jump.address), "User john", "PubkeyAuthentication no"]
    lines += ["UserKnownHostsFile {}".format(jump.known_hosts), "StrictHostKeyChecking accept-new"]
    lines += ["Host cluster", "HostName {}".format(target.address), "ProxyJump gate"] + target.client_lines
    _, wrapper = jump.make_ssh("asking", lines)
    host = "john:{}@cluster".format(rig.PASSWORD)
    end = desk.launch(target, "compute", host=host, env={"TUNNEL_SSH": wrapper})
    fails(desk, end, 255, "asks for what nobody can answer here", 5)
    asked = "asked for something else than the password, not answered: john@{}"
    assert asked.format(jump.address) in desk.logs()[0]
    assert "password for john" not in jump.server_log()  # accepted or refused


def test_a_slow_look_up_in_the_configuration_keeps_no_password_back(desk, machine):
    """ssh goes through it for each login, and for the question who logs in."""
    lines = ['Match exec "sleep 5.5; true"', "Compression yes", "Host *"] + key_lines(machine, key=False)
    environ = {"TUNNEL_SSH": machine.make_ssh("slow", lines)[1], "PYTHONHOME": "/nowhere"}
    end = desk.launch(machine, "classic", host="john:{}@{}".format(rig.PASSWORD, machine.address), env=environ)
    end.accept()
    end.quit()
    assert end.wait(10)[0] == 0


def test_plink_older_than_0_77_is_refused_where_it_would_need_the_password_in_its_arguments(desk, machine):
    real = machine.make_plink(key=False)
    os.makedirs(machine.path("old"), exist_ok=True)
    old = machine.write(
        "old/plink",
        '#!/bin/sh\ncase "$*" in\n*-pwfile*) echo \'plink: unknown option "-pwfile"\' >&2; exit 1 ;;\nesac\n'
        'exec {} "$@"\n'.format(real),
        0o755,
    )
    before = machine.attempts()
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    end = desk.launch(machine, "compute", host=host, env={"TUNNEL_SSH": old})
    line = fails(desk, end, 1, "older than 0.77, .* install a newer PuTTY, or log in with a key", 5)
    assert machine.attempts() == before
    assert rig.PASSWORD not in line + "".join(desk.logs())


# -- who asks


def asking(machine, role, desk, gate, **options):
    """A launch with a password whose client is started as soon as the file ``gate`` exists."""
    wrapper = machine.write(
        "ssh-gate",
        '#!/bin/sh\nif [ "$1" != -G ]; then while ! [ -e "{}" ]; do sleep 0.02; done; fi\nexec {} "$@"\n'.format(
            gate, machine.make_keyless_ssh()
        ),
        0o755,
    )
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    return desk.launch(machine, role, host=host, env={"TUNNEL_SSH": wrapper}, **options)


def password_port(desk):
    """Where the launcher can be asked for the password, as its client has been told."""

    def found():
        for pid in desk.processes():
            try:
                with open("/proc/{}/environ".format(pid), "rb") as stream:
                    match = re.search(rb"TUNNEL_ASKPASS=(\d+):", stream.read())
            except OSError:
                continue
            if match:
                return int(match.group(1))
        return None

    return rig.wait_until(found, 5, "the client with its password helper")


def test_nobody_can_ask_for_the_password_once_it_has_been_used(desk, machine, tmp_path):
    """Not even while the kernel boots."""
    gate = tmp_path / "gate"
    end = asking(machine, "compute", desk, gate, kernel=machine.slow_classic)
    port = password_port(desk)
    assert port in rig.listening_ports()
    gate.write_text("")
    rig.wait_until(lambda: machine.kernels(), 10, "the kernel")
    assert not end.channels
    assert port not in rig.listening_ports()
    end.accept()
    end.echo()


@pytest.mark.parametrize(
    "number, said", [(20, b""), (20, b"x" * 200000), (1100, b"")], ids=["say nothing", "say much", "are many"]
)
def test_strangers_who_ask_for_the_password_delay_nothing(desk, machine, tmp_path, number, said):
    gate = tmp_path / "gate"
    end = asking(machine, "compute", desk, gate)
    port = password_port(desk)
    callers = []
    try:
        while len(callers) < number:
            caller = socket.socket()
            caller.settimeout(0.005)
            error = caller.connect_ex(("127.0.0.1", port))
            assert error != errno.ECONNREFUSED, end.wait()
            if error:  # so many at once are not let in: try again
                caller.close()
                continue
            callers.append(caller)
            caller.settimeout(5)
            try:
                caller.sendall(said)
            except OSError:
                pass  # it has been hung up on
        begin = time.monotonic()
        gate.write_text("")
        end.accept()
        assert time.monotonic() - begin < 4
        assert "the password prompt has been answered" in desk.logs()[0]
        assert len(descriptors(supervisor(desk, end))) < 40
    finally:
        for caller in callers:
            caller.close()
