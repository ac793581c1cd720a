"""Ends of channels between sockets: each is read only while the other takes what comes, and closed in time."""

import errno
import os
import socket
import time

import pytest
from rig import product


class FakeEnd:
    """An end of a channel that notes what is asked of it, and takes as much as a test has it take."""

    def __init__(self):
        self.pending, self.untaken, self.takes = b"", 0, True
        self.calls = []

    def write(self, data):
        self.calls.append(bytes(data))
        self.pending = b"" if self.takes else bytes(data)
        return self.takes

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda: self.calls.append(name)


class FakeBoard:
    kernel_over = False

    def __init__(self):
        self.loop, self.heard = product.Loop(), []

    def on_moved(self):
        pass

    def end_finished(self, channel, end):
        self.heard.append(end)


def joined():
    """A channel between two ends that are none; they have been told to read."""
    board, kernel, front_end = FakeBoard(), FakeEnd(), FakeEnd()
    channel = product.Channel(board, kernel, front_end)
    assert (kernel.calls, front_end.calls) == (["resume"], ["resume"])
    del kernel.calls[:], front_end.calls[:]
    return board, channel, kernel, front_end


@pytest.mark.parametrize("swapped", [False, True])
def test_an_end_is_read_only_while_the_other_takes_what_comes(swapped):
    _, channel, one, other = joined()
    if swapped:
        one, other = other, one
    one.on_data(b"first")
    assert (one.calls, other.calls) == ([], [b"first"])
    other.takes = False
    one.on_data(b"second")
    assert one.calls == ["pause"]
    other.takes, other.pending = True, b""
    other.on_room()
    assert one.calls == ["pause", "resume"]
    assert channel.is_open


def test_an_end_that_has_finished_is_not_read_again():
    board, channel, kernel, front_end = joined()
    kernel.pending = b"waits"
    front_end.on_finish()
    assert board.heard == [front_end]
    assert kernel.calls == ["finish"]
    kernel.pending = b""
    kernel.on_room()
    assert front_end.calls == []
    kernel.on_finish()
    assert not channel.is_open
    assert (kernel.calls[-1], front_end.calls[-1]) == ("close", "close")


@pytest.mark.parametrize("waiting", ["kernel", "front end"])
def test_a_channel_is_closed_only_when_nothing_waits_to_be_sent(waiting):
    _, channel, kernel, front_end = joined()
    late = kernel if waiting == "kernel" else front_end
    late.pending = b"waits"
    kernel.on_finish()
    front_end.on_finish()
    assert channel.is_open
    late.pending = b""
    late.on_room()
    assert not channel.is_open
    channel.close()  # harmless
    assert kernel.calls.count("close") == front_end.calls.count("close") == 1


def test_what_the_front_end_says_after_its_kernels_end_goes_nowhere():
    """It would be written to a client that is about to close, and cost what that has not handed on yet."""
    board, _, kernel, front_end = joined()
    board.kernel_over = True
    front_end.on_data(b"more")
    assert kernel.calls == []
    kernel.on_data(b"the last")
    assert front_end.calls == [b"the last"]


def socket_end():
    """An end in a loop of its own, and its peer."""
    loop = product.Loop()
    here, there = socket.socketpair()
    here.setblocking(False)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    there.settimeout(5)
    return loop, product.SocketEnd(loop, here), there


def test_an_end_that_is_finished_sends_what_waits_before_it_closes():
    loop, end, there = socket_end()
    room, data = [], os.urandom(1 << 20)
    end.on_room = lambda: room.append(len(end.pending))
    assert not end.write(data)
    assert not end.write(b"and this")
    end.finish()
    received = b""
    while len(received) < len(data) + 8:
        loop.after(0.01, lambda: None)
        loop.step()
        received += there.recv(1 << 16)
    assert received == data + b"and this"
    assert room == [0]
    assert there.recv(1) == b""
    end.close()
    there.close()


def test_an_end_whose_peer_has_gone_takes_all_and_keeps_nothing():
    loop, end, there = socket_end()
    there.send(b"last words")
    there.close()
    assert end.write(b"x" * 100)
    assert end.write(memoryview(b"y" * 100))
    assert (end.pending, end.deaf, end.untaken) == (b"", True, 0)
    heard = []
    end.on_data, end.on_finish = lambda data: heard.append(bytes(data)), lambda: heard.append("finish")
    end.on_close = lambda: (heard.append("close"), end.pause())
    end.resume()
    while loop.readers:
        loop.after(0.01, lambda: None)
        loop.step()
    assert heard[0] == b"last words"
    assert heard[1:] in (["finish"], ["close"])
    end.close()


def test_an_end_looks_after_its_peer_while_it_is_not_read():
    """And once in a while only, however often it pauses: bulk data does so thousands of times."""
    loop, end, there = socket_end()
    gone = []
    end.on_gone = lambda: gone.append(True)
    for _ in range(1000):
        end.resume()
        end.pause()
    assert len(loop.timers) == 1
    end.resume()
    time.sleep(1.1)
    loop.after(0, lambda: None)
    loop.step()
    assert loop.timers == []
    assert gone == []
    end.pause()
    there.close()
    while not gone:
        loop.step()
    assert loop.timers == []
    end.close()


def test_an_end_that_is_closed_calls_nobody_any_more():
    loop, end, there = socket_end()
    calls = []
    end.on_data = end.on_finish = end.on_room = end.on_close = lambda *_: calls.append(1)
    end.write(bytes(1 << 20))
    end.resume()
    there.send(b"x")
    end.close()
    end.on_data(b"")
    end.on_finish()
    assert (loop.readers, loop.writers, end.pending) == ({}, {}, b"")
    assert calls == []
    there.close()


def test_a_peer_that_has_gone_by_the_time_its_socket_is_set_up_ends_one_channel():
    """macOS refuses TCP_NODELAY then."""
    near, far = socket.socketpair()

    class Gone:
        """A connection of which the system says that it is none any more."""

        def __getattr__(self, name):
            return getattr(near, name)

        def setsockopt(self, *_):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    loop, told = product.Loop(), []
    end = product.SocketEnd(loop, Gone())
    end.on_finish = lambda: told.append("finished")
    end.resume()
    far.close()
    loop.step()
    assert told == ["finished"]
    end.close()
