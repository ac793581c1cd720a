"""Which shared connection a launch takes: launches note how many sessions each has, and how many it can take."""

import os
import signal
import subprocess

import pytest
from rig import product

pytestmark = pytest.mark.usefixtures("in_time")


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
        memory.remember("session {} {}".format(at, pids[who]), "started")
    if room is not None:
        memory.remember("room", room)
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
    memory.remember(key, "started")
    memory.remember("room", "1")
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
            memory.remember("session 0 {}".format(other.pid), "started")
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
    memory.remember("room", "10")  # of a server that has been told to take fewer
    connections.refused()
    assert memory.read()["room"] == "1"
    connections.made.add(connections.number)
    assert not connections.refused()  # not even one


def test_what_a_connection_takes_is_learned_when_nobody_else_waits_for_an_answer(memory):
    connections = shared(memory)
    memory.change(connections._choose)
    for pid, value in ((1, "started"), (2, "asked")):
        memory.remember("session 0 {}".format(pid), value)
    connections.refused()
    assert "room" not in memory.read()
    memory.remember("room", "3")
    connections.refused()
    assert memory.read()["room"] == "3"
    memory.remember("session 0 2", "started")
    connections.refused()
    assert memory.read()["room"] == "2"


def test_what_a_connection_takes_is_forgotten_with_the_last_session(memory):
    memory.remember("room", "2")
    memory.remember("session 0 {}".format(gone_pid()), "started")
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
