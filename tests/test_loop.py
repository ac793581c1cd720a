"""The loop: timers, hosts that are looked up and connected to, ports that are probed; none holds up another."""

import contextlib
import errno
import os
import socket
import threading
import time

import pytest
from rig import frontend, product
from rig.product import LOOPBACK

# -- timers and descriptors


def test_timers_go_off_in_time_in_order_and_not_when_cancelled():
    loop, calls = product.Loop(), []
    for seconds, name in ((0.2, "last"), (0.05, "first"), (0.1, "never"), (0.1, "second")):
        timer = loop.after(seconds, lambda name=name: calls.append((name, time.monotonic())))
        if name == "never":
            loop.cancel(timer)
            loop.cancel(timer)  # harmless
    loop.cancel(None)
    begin = time.monotonic()
    while len(calls) < 3:
        loop.step()
    assert [name for name, _ in calls] == ["first", "second", "last"]
    assert calls[0][1] - begin > 0.03
    assert not loop.timers


def test_a_timer_that_another_one_cancels_does_not_go_off():
    loop, calls = product.Loop(), []
    loop.after(0, lambda: loop.cancel(second))
    second = loop.after(0, lambda: calls.append("second"))
    time.sleep(0.01)
    loop.step()
    assert calls == []


def test_who_is_no_longer_waited_for_is_not_called():
    """Of two that are ready at the same moment the first may close the second."""
    loop, calls = product.Loop(), []
    (one, far_one), (other, far_other) = socket.socketpair(), socket.socketpair()
    far_one.send(b"x")
    far_other.send(b"x")
    loop.readers[one] = lambda: (calls.append("one"), loop.readers.pop(other))
    loop.readers[other] = lambda: calls.append("other")
    loop.step()
    assert calls == ["one"]
    for each in (one, far_one, other, far_other):
        each.close()


# -- connecting


def dialled(host, port, seconds=5, patience=10):
    """What ``dial`` calls back with, in a loop of its own."""
    loop, calls = product.Loop(), []
    product.dial(loop, host, port, lambda *found: calls.append(found), seconds)
    end = time.monotonic() + patience
    while not calls and time.monotonic() < end:
        loop.after(0.05, lambda: None)
        loop.step()
    ((connection, reason),) = calls
    assert not loop.writers
    assert not loop.readers
    assert [timer for timer in loop.timers if timer[0] > time.monotonic() + 0.1] == []
    return connection, reason


@pytest.fixture
def listener():
    (listener, other) = frontend.listening_pair()
    other.close()
    yield listener
    listener.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.01", "127.1", "localhost", "LOCALHOST"])
def test_a_host_is_reached_by_whatever_it_is_called(host, listener):
    connection, reason = dialled(host, listener.getsockname()[1])
    assert reason is None
    assert connection.getpeername() == listener.getsockname()
    with contextlib.closing(listener.accept()[0]) as accepted:
        accepted.sendall(b"x")
        connection.setblocking(True)
        assert connection.recv(1) == b"x"
    connection.close()


def test_localhost_is_the_other_loopback_too():
    (listener, other) = frontend.listening_pair("::1")
    connection, reason = dialled("localhost", listener.getsockname()[1])
    assert reason is None
    assert connection.getpeername()[:2] == listener.getsockname()[:2]
    for each in (connection, listener, other):
        each.close()


def test_nobody_is_asked_where_localhost_is(monkeypatch, listener):
    """It may be written in no file, and asking a name server takes its time."""
    import _socket

    monkeypatch.setattr(_socket, "getaddrinfo", None)
    connection, _ = dialled("localhost", listener.getsockname()[1])
    connection.close()


def test_where_nobody_listens_is_told():
    (listener, other) = frontend.listening_pair()
    port = listener.getsockname()[1]
    listener.close()
    other.close()
    for host in (LOOPBACK, "localhost", "::1"):
        assert dialled(host, port) == (None, "Connection refused")


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "1.2.3.999", "a..b", "a" * 64 + ".example", "x" * 255, "-"]
)
def test_a_host_that_cannot_be_found_is_told(host):
    connection, reason = dialled(host, 9)
    assert connection is None
    assert reason


def test_a_host_that_does_not_answer_is_given_up():
    with socket.socket() as full:
        full.bind((LOOPBACK, 0))
        full.listen(0)
        waiting = []
        for _ in range(4):  # who waits to be accepted; there is room for one or two
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(full.getsockname())
            waiting.append(one)
        time.sleep(0.1)
        begin = time.monotonic()
        connection, reason = dialled(LOOPBACK, full.getsockname()[1], seconds=0.3)
        assert (connection, reason) == (None, "no answer within 0.3 s")
        assert 0.25 < time.monotonic() - begin < 3
        for one in waiting:
            one.close()


def test_an_address_of_which_this_machine_knows_nothing_is_passed_over(monkeypatch, listener):
    """As ::1 where IPv6 has been switched off."""
    import _socket

    odd, good = (9999, ("x", 1)), (_socket.AF_INET, listener.getsockname())
    monkeypatch.setattr(product, "resolve", lambda loop, host, port, done: done([odd, good], None))
    connection, reason = dialled("any", 1)
    assert reason is None
    connection.close()
    monkeypatch.setattr(product, "resolve", lambda loop, host, port, done: done([odd], None))
    assert dialled("any", 1) == (None, os.strerror(errno.EAFNOSUPPORT))


def test_a_name_server_that_takes_its_time_stops_nothing(monkeypatch, listener):
    import _socket

    asked = _socket.getaddrinfo

    def slow(host, port, family, kind, protocol, flags):
        if not flags:
            time.sleep(0.5)
        return asked(LOOPBACK if not flags else host, port, family, kind, protocol, flags)

    monkeypatch.setattr(_socket, "getaddrinfo", slow)
    loop, calls, begin = product.Loop(), [], time.monotonic()
    product.dial(loop, "somewhere.example", listener.getsockname()[1], lambda *found: calls.append(found))
    assert time.monotonic() - begin < 0.3
    turns = 0
    while not calls:
        loop.after(0.02, lambda: None)
        loop.step()
        turns += 1
    assert turns > 5
    assert calls[0][1] is None
    calls[0][0].close()


# -- who listens where the kernel is going to


class Far:
    """Stands for ports that the client forwards: what happens to who connects is told for each port.

    :param behaviours: ``cut`` (nobody listens over there), ``greets`` or ``waits`` (somebody does), ``late`` (the
        same as ``cut``, but later than others)
    """

    def __init__(self, *behaviours):
        self.listeners, self.ports, self.kept = [], [], []
        for behaviour in behaviours:
            (listener, other) = frontend.listening_pair()
            other.close()
            self.listeners.append(listener)
            self.ports.append(listener.getsockname()[1])
            threading.Thread(target=self.serve, args=(listener, behaviour), daemon=True).start()

    def serve(self, listener, behaviour):
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        if behaviour == "greets":
            connection.sendall(b"220 host ready\r\n")
        if behaviour == "late":
            time.sleep(product.Probe.PATIENCE / 2)
        if behaviour in ("cut", "late"):
            connection.close()
        else:
            self.kept.append(connection)

    def close(self):
        for each in self.listeners + self.kept:
            each.close()


@pytest.mark.parametrize(
    "behaviours, held",
    [
        (("cut", "cut", "cut", "cut"), None),
        (("cut", "greets", "cut", "cut"), 1),
        (("greets", "greets", "greets", "greets"), "any"),
        (("cut", "cut", "waits", "cut"), 2),
        (("waits", "cut", "cut", "waits"), "any"),
        (("late", "cut", "cut", "cut"), None),
        (("waits", "waits", "waits", "waits"), None),  # they all wait: so does a server that opens no channel yet
    ],
)
def test_ports_that_somebody_holds_already(behaviours, held, monkeypatch):
    monkeypatch.setattr(product.Probe, "PATIENCE", 1.0 if "late" in behaviours else 0.5)
    if "late" in behaviours:  # later than others, but not by as much as a port may be
        monkeypatch.setattr(product.Probe, "LAST_PATIENCE", 1.0)
    far, calls = Far(*behaviours), []
    loop = product.Loop()
    probe = product.Probe(loop, far.ports, calls.append)
    end = time.monotonic() + product.Probe.PATIENCE + 0.5
    while time.monotonic() < end and not calls:
        loop.after(0.02, lambda: None)
        loop.step()
    if held is None:
        assert calls == []
    elif held == "any":
        assert len(calls) == 1
        assert calls[0] in [port for port, each in zip(far.ports, behaviours) if each in ("greets", "waits")]
    else:
        assert calls == [far.ports[held]]
    probe.stop()
    probe.stop()  # harmless
    assert not loop.readers
    assert len(calls) <= 1
    far.close()


def test_a_probe_that_is_cancelled_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(product.Probe, "PATIENCE", 20)
    monkeypatch.setattr(product.Probe, "LAST_PATIENCE", 20)
    far, loop = Far("cut", "cut", "cut", "waits"), product.Loop()
    probe = product.Probe(loop, far.ports, None)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        loop.after(0.02, lambda: None)
        loop.step()
    assert len(probe.open) == 1
    probe.stop()
    assert (loop.readers, loop.writers) == ({}, {})
    assert [timer for timer in loop.timers if timer[0] > time.monotonic() + 6] == []
    far.close()


def test_a_probe_that_is_cancelled_finds_nothing(monkeypatch):
    monkeypatch.setattr(product.Probe, "PATIENCE", 0.2)
    far, calls, loop = Far("cut", "waits"), [], product.Loop()
    probe = product.Probe(loop, far.ports, calls.append)
    probe.stop()
    end = time.monotonic() + product.Probe.PATIENCE + 0.5
    while time.monotonic() < end:
        loop.after(0.02, lambda: None)
        loop.step()
    assert calls == []
    assert not loop.readers
    assert not loop.writers
    far.close()
