"""Relays under test: their connections come and go, and nothing of them is left."""

import hashlib
import os
import shutil
import sys
import threading

import pytest

import rig
from rig import logins
from rig.desk import make_machine

QUICK = {"DEAD_SECONDS": 1.5, "PING_SECONDS": 0.4}  # so that a silent connection is noticed soon
SERVER = ["AllowTcpForwarding no"]
OTHERS = [sys.executable, sys.executable.replace("py3.13", "py3.6"), sys.executable.replace("py3.6", "py3.13")]


@pytest.fixture(scope="module")
def machine(request):
    return make_machine(request, password=True, sshd_options=SERVER)


@pytest.fixture
def desk(desk, machine):
    """A desk for a test, after which nothing is left of it on either machine."""
    yield desk
    try:
        desk.close()
    finally:
        mend(machine)
    nothing_left(desk, machine)


def cut(machine):
    machine.is_cut = True
    machine.cut()


def mend(machine):
    if getattr(machine, "is_cut", False):
        machine.is_cut = False
        machine.mend()


def nothing_left(desk, machine):
    desk.no_process()
    try:
        rig.wait_until(lambda: not machine.sessions(), 10, "the end of all on the kernel machine")
    except AssertionError as error:
        left = [logins.describe(pid) for pid in machine.sessions()]
        for pid in machine.sessions():
            rig.end_process(pid)
        shutil.rmtree(relay_folder(machine), ignore_errors=True)
        raise AssertionError("{}; left: {}".format(error, left)) from None
    assert sockets(machine) == []
    assert desk.left_files() == []
    folder = desk.runtime / "tunnel"
    for path in folder.iterdir() if folder.exists() else ():
        assert path.is_file(), "a socket or a pipe is left: {}".format(path)
        assert "relay " not in path.read_text(encoding="utf-8", errors="replace")


def relay_folder(machine):
    return machine.path("tmp", "tunnel-relay-{}".format(machine.uid))


def sockets(machine):
    """What keepers have in their folder."""
    try:
        return os.listdir(relay_folder(machine))
    except OSError:
        return []


def ssh_clients(desk):
    names = ("ssh", "plink")
    return [pid for pid in desk.processes() if os.path.basename((rig.command_line(pid) or [""])[0]) in names]


def launchers(desk):
    return [pid for pid in desk.processes() if any("import tunnel_sub" in word for word in rig.command_line(pid))]


def kill_client(desk, machine):
    for pid in ssh_clients(desk):
        rig.end_process(pid)


def kill_server_session(desk, machine):
    for pid in machine.pids():
        if rig.process_name(pid).startswith("sshd") and pid != machine.server.pid:
            rig.end_process(pid)


def keepers(machine):
    return [pid for pid in machine.pids() if logins.is_keeper(pid)]


def count(desk, text):
    return "\n".join(desk.logs()).count(text)


def logged(desk, text, times=1, seconds=15):
    rig.wait_until(lambda: count(desk, text) >= times, seconds, "{!r} in the log".format(text))


def came_back(desk, times=1):
    logged(desk, "the connection is back after ", times)


class Bulk:
    """Random bytes down every channel of a front end at once; the same have to come back."""

    def __init__(self, end, size=2000000):
        self.sent = [os.urandom(size) for _ in end.channels]
        self.total, self.received, self.right, self.failures = size * len(self.sent), 0, 0, []
        self.lock = threading.Lock()
        self.threads = []
        for act in (self._send, self._receive):
            for channel, data in zip(end.channels, self.sent):
                self.threads.append(threading.Thread(target=self._guard, args=(act, channel, data), daemon=True))
        for thread in self.threads:
            thread.start()

    def _guard(self, act, channel, data):
        try:
            act(channel, data)
        except (OSError, AssertionError) as error:
            self.failures.append(error)

    @staticmethod
    def _send(channel, data):
        channel.sendall(data)

    def _receive(self, channel, data):
        got, size = hashlib.sha256(), 0
        while size < len(data):
            more = channel.recv(1 << 16)
            assert more, "the channel ended after {} bytes".format(size)
            size += len(more)
            got.update(more)
            with self.lock:
                self.received += len(more)
        assert got.digest() == hashlib.sha256(data).digest(), "other bytes came back"
        self.right += 1

    def reached(self, part):
        """Wait until this part of all has come back."""
        rig.wait_until(lambda: self.failures or self.received >= part * self.total, 20, "data")
        assert not self.failures

    def finish(self):
        for thread in self.threads:
            thread.join(40)
        assert not self.failures
        assert self.right == len(self.sent)


def quits(end, code=0):
    end.tell("!quit {}\n".format(code).encode("ascii"))
    assert end.wait(15)[0] == code


def forget(desk):
    """What a launcher that was killed has noted of its session stays until the next one."""
    for path in desk.runtime.glob("tunnel/*"):
        path.unlink()
