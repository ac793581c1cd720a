"""Nothing is left behind, however a launch ends: no process, listener or file, on either side."""

import os
import re
import signal
import time

import pytest
import rig

BOUND = 5  # seconds until all is gone, SIGKILL included; the README states it


def temporary_files():
    """What launchers may have left in the temporary folder; other tests have folders of their own there."""
    return {name for name in os.listdir("/tmp") if re.match("tunnel-(?!rig-|run-|demo-)", name)}


class Before:
    """What there was before a launch, and whether it is so again."""

    def __init__(self, desk, machine):
        self.desk, self.machine = desk, machine
        self.files = temporary_files()
        self.there = set(machine.listeners())

    def again(self, end, seconds=BOUND):
        """Assert that all is as before within ``seconds``, though the front end may still hold its links."""
        begin = time.monotonic()
        self.desk.no_process(seconds)
        rig.wait_until(lambda: not self.machine.kernels(), seconds, "the end of the kernel")
        rig.wait_until(lambda: not self.machine.sessions(), seconds, "the end of the session there")
        end.close_listeners()
        here = set(self.desk.local_ports())
        rig.wait_until(lambda: not here & set(rig.listening_ports()), seconds, "listeners here")
        rig.wait_until(lambda: set(self.machine.listeners()) <= self.there, seconds, "listeners there")
        assert time.monotonic() - begin < 2 * seconds
        assert temporary_files() <= self.files
        assert list(self.desk.runtime.iterdir()) == []


@pytest.fixture(params=["ssh", "plink"])
def client(request):
    return request.param


@pytest.fixture(params=["classic", "callback", "compute"])
def role(request):
    return request.param


@pytest.fixture(params=["idle", "computing"])
def kernel_does(request):
    return request.param


def launched(desk, machine, role, client, kernel_does="idle"):
    before = Before(desk, machine)
    end = desk.launch(machine, role, client=client)
    end.accept()
    if kernel_does == "computing":
        end.tell(b"!compute\n")
        assert end.channels[0].recv(4) == b"busy"
    return before, end


def supervisor(desk, end):
    """The process that stays with the client."""
    if end.launcher.poll() is None and end.role != "compute":
        return end.launcher.pid
    (pid,) = [pid for pid in desk.processes() if any("tunnel_sub.py" in word for word in rig.command_line(pid))]
    return pid


def test_normal_end(desk, machine, role, client):
    before, end = launched(desk, machine, role, client)
    end.quit()
    before.again(end)


def test_kernel_quits_before_the_front_end_closes_its_links(desk, machine, role, client):
    before, end = launched(desk, machine, role, client)
    end.tell(b"!quit 0\n")
    before.again(end)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_launcher_killed(desk, machine, role, client, kernel_does, name):
    if name in ("SIGINT", "SIGHUP") and (client, kernel_does) != ("ssh", "computing"):
        name = "SIGTERM"  # the same code; each signal is tried with each role all the same
    before, end = launched(desk, machine, role, client, kernel_does)
    if role == "compute":
        assert end.wait()[0] == 0
    os.kill(supervisor(desk, end), getattr(signal, name))
    before.again(end)


def test_kernel_killed(desk, machine, role, client, kernel_does):
    before, end = launched(desk, machine, role, client, kernel_does)
    (kernel,) = machine.kernels()
    os.kill(kernel, signal.SIGKILL)
    before.again(end)


def test_server_session_killed(desk, machine, role, client, kernel_does):
    before, end = launched(desk, machine, role, client, kernel_does)
    for pid in machine.sessions():
        if "sshd:" in str(rig.command_line(pid)):
            rig.end_process(pid)
    before.again(end)


def test_launcher_killed_while_it_logs_in(desk, machine):
    from test_failures import silent_server

    port, end_server = silent_server()
    try:
        for name in ("SIGTERM", "SIGKILL"):
            before = Before(desk, machine)
            end = desk.launch(machine, "compute", host="john@127.0.0.1:{}".format(port))
            rig.wait_until(lambda: len(desk.processes()) >= 3, 5, "the client")
            os.kill(end.launcher.pid, getattr(signal, name))
            end.launcher.wait(5)
            if name == "SIGKILL":  # the one in front is gone; what it started goes on, and is ended
                for pid in desk.processes():
                    if any("tunnel_sub.py" in word for word in rig.command_line(pid)):
                        os.kill(pid, signal.SIGTERM)
            before.again(end)
    finally:
        end_server()


@pytest.mark.parametrize("client", ["ssh"])
def test_network_cut(desk, own_machine, client):
    """Without a word to either side: noticed by ServerAliveInterval here, and by the server's own there."""
    own_machine.restart_server("ClientAliveInterval 2", "ClientAliveCountMax 2")
    before = Before(desk, own_machine)
    quick = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    end = desk.launch(own_machine, "callback", *quick)
    end.accept()
    own_machine.cut()
    code, errors = end.wait(10)
    assert code == 255
    assert "the connection was lost" in errors
    before.again(end, 15)


def test_a_silent_server_is_noticed_within_a_minute_by_default():
    import tunnel

    values = dict(tunnel.OpenSSH.defaults(tunnel.parse_arguments(tunnel.COMPUTE, ["h", "k", "1@h,2@h"])))
    assert int(values["ServerAliveInterval"]) * (int(values["ServerAliveCountMax"]) + 1) <= 60
