"""The switchboard between sockets: which channel leads where, and that all arrives however a launch ends."""

import os
import re
import socket
import struct
import threading
import time

import pytest
import rig
from rig import frontend, product
from rig import standin_kernel as wire
from rig.names import PAIRS, marked, told_for
from rig.product import LOOPBACK, LinkName


class Lines:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def write(self, text):
        self.lines.append(text)


class Running:
    """A loop in a thread."""

    def __init__(self):
        self.loop, self.stopped, self.jobs, self.failure = product.Loop(), False, [], None
        self.wake, self.woken = socket.socketpair()
        self.loop.readers[self.woken] = self.work
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        try:
            while not self.stopped:
                self.loop.step()
        except BaseException as error:
            self.failure = error
            raise

    def work(self):
        for _ in self.woken.recv(64):
            if self.jobs:
                self.jobs.pop(0)()

    def do(self, action):
        """Call ``action`` in the loop's thread; returns what it returns."""
        done, result = threading.Event(), []
        self.jobs.append(lambda: (result.append(action()), done.set()))
        self.wake.send(b"x")
        assert done.wait(10)
        return result[0]

    def end(self):
        self.stopped = True
        self.wake.send(b"x")
        self.thread.join(5)
        assert self.failure is None
        self.wake.close()
        for each in list(self.loop.readers):
            if not isinstance(each, int):
                each.close()


class Alone(Running):
    """A switchboard in a thread, with a front end on one side and a kernel on the other; their main data channel
    stands.

    :param host: of the front end's links
    """

    def __init__(self, host=LOOPBACK, link=None, small_buffers=False):
        super().__init__()
        self.log, self.heard, self.sockets = Lines(), [], []
        self.listeners = frontend.listening_pair("127.0.0.1" if host == "localhost" else host)
        if small_buffers:
            self.listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.link = link or LinkName.parse(frontend.name_of(self.listeners, host))
        self.way = product.Forwards(self.loop, self.log, 6, 4)
        told = "20000@127.0.0.1,20001@127.0.0.1"
        self.board = product.NamingSwitchboard(self.loop, self.log, self.link, self.way, told, PAIRS)
        self.board.on_connected = lambda: self.heard.append("connected")
        self.board.on_front_end_gone = lambda: self.heard.append("lost")
        self.ports, self.inward_pairs = self.way.ports, self.way.inward_pairs
        self.way.serve(self.board)
        self.thread.start()

    def __enter__(self):
        self.kernel, self.front_end = self.connect(0, self.listeners[0])
        return self

    def __exit__(self, *_):
        self.end()
        for each in self.listeners + self.sockets:
            each.close()

    def connect(self, position, listener):
        """A channel from one of the kernel's ports to where the front end listens; both its ends."""
        count = len(self.board.channels)
        kernel = self.keep(socket.create_connection((LOOPBACK, self.ports[position]), 5))
        front_end = self.keep(listener.accept()[0])
        rig.wait_until(lambda: len(self.board.channels) > count, 5)
        return kernel, front_end

    def keep(self, connection):
        connection.settimeout(10)
        self.sockets.append(connection)
        return connection

    def listen(self):
        """Another link of somebody's: its listeners and its name."""
        listeners = frontend.listening_pair()
        self.sockets += listeners
        return listeners, frontend.name_of(listeners).encode()

    def fill(self):
        """Have the kernel send until nobody takes any more; returns how much has left its machine."""
        self.kernel.setblocking(False)
        chunk, sent, last = os.urandom(1 << 16), 0, time.monotonic()
        while time.monotonic() - last < 0.25:
            try:
                sent += self.kernel.send(chunk)
                last = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        self.kernel.settimeout(10)
        return sent, sent - product.unsent(self.kernel)

    def received(self):
        """How many bytes the front end gets to its channel's end."""
        count = 0
        while True:
            more = len(self.front_end.recv(1 << 20))
            if not more:
                return count
            count += more


def test_half_closes_are_passed_on():
    with Alone() as alone:
        alone.front_end.sendall(b"last words 12")
        alone.front_end.shutdown(socket.SHUT_WR)
        assert wire.read_until(alone.kernel, b"12") == b"last words 12"
        assert alone.kernel.recv(1) == b""
        alone.kernel.sendall(b"answer")
        alone.kernel.close()
        assert wire.read_until(alone.front_end, b"answer") == b"answer"
        assert alone.front_end.recv(1) == b""
        rig.wait_until(lambda: not alone.board.channels[0].is_open, 5)


def test_each_half_is_closed_only_when_all_before_it_has_been_sent():
    with Alone(small_buffers=True) as alone:
        sent, _ = alone.fill()
        alone.kernel.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        assert alone.received() == sent
        alone.front_end.sendall(b"answer")
        assert wire.read_until(alone.kernel, b"answer") == b"answer"


def test_the_greeting_goes_on_at_once():
    """Each of its parts waits for the other side's answer: with 0.2 s for each a launch takes a third longer."""
    with Alone() as alone:
        begin = time.monotonic()
        for _ in range(5):
            for data in (b"Math Link", b" 6", b"\n-libraryid '!&*' -decoders 0\n"):
                alone.front_end.sendall(data)
                assert wire.read_until(alone.kernel, data) == data
                alone.kernel.sendall(data)
                assert wire.read_until(alone.front_end, data) == data
        assert time.monotonic() - begin < 5 * product.HOLD_SECONDS


@pytest.mark.parametrize("sender", ["kernel", "front end"])
def test_what_is_held_goes_on_soon_when_nothing_follows(sender):
    with Alone() as alone:
        here, there = (alone.kernel, alone.front_end) if sender == "kernel" else (alone.front_end, alone.kernel)
        begin = time.monotonic()
        here.sendall(b'"1234')
        assert wire.read_until(there, b"1234") == b'"1234'
        assert product.HOLD_SECONDS / 2 < time.monotonic() - begin < 10 * product.HOLD_SECONDS
        here.sendall(b"5@")
        assert wire.read_until(there, b"@") == b"5@"
        here.sendall(b'"1234')
        here.shutdown(socket.SHUT_WR)
        assert wire.read_until(there, b"1234") == b'"1234'  # the end of it is an end as well
        assert there.recv(1) == b""


def test_what_is_held_is_not_lost_with_the_connection():
    with Alone() as alone:
        alone.kernel.sendall(b'x"1234')
        assert wire.read_until(alone.front_end, b"x") == b"x"
        alone.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        alone.kernel.close()  # with a reset
        assert wire.read_until(alone.front_end, b"4") == b'"1234'


def test_a_slow_name_is_found_all_the_same():
    """Its length has told that more has to come."""
    with Alone() as alone:
        _, name = alone.listen()
        text = marked(name)
        alone.front_end.sendall(text[:12])
        time.sleep(2 * product.HOLD_SECONDS)
        alone.front_end.sendall(text[12:])
        assert wire.read_until(alone.kernel, b"\n") == marked(told_for(name))


def test_a_slow_reader_stops_the_sender_and_memory_does_not_grow():
    with Alone() as alone:
        alone.front_end.settimeout(0.5)  # so long a pause means that nothing is read any more
        chunk, sent = bytes(1 << 16), 0
        with pytest.raises(socket.timeout):
            while sent < 256 << 20:
                sent += alone.front_end.send(chunk)
        assert 0 < sent < 64 << 20  # what the system buffers on four sockets, and 256 KiB
        assert len(alone.board.channels[0].kernel.pending) <= 1 << 18
        received = 0
        while received < sent:
            received += len(alone.kernel.recv(1 << 20))
        assert received == sent


def test_bulk_data_leaves_nothing_behind_in_the_loop():
    """Each pause and each moment that something is held ends; a timer for each would slow all that follows."""
    with Alone() as alone:
        alone.do(lambda: [each.stop() for each in alone.board.channels[0].filters.values()])
        before = alone.do(lambda: len(alone.loop.timers))
        chunk = os.urandom(1 << 20)
        for here, there in ((alone.kernel, alone.front_end), (alone.front_end, alone.kernel)):
            sender = threading.Thread(
                target=lambda here=here: [here.sendall(chunk) for _ in range(30)], daemon=True
            )
            sender.start()
            received = 0
            while received < 30 << 20:
                received += len(there.recv(1 << 16))
            sender.join(10)
            assert alone.do(lambda: len(alone.loop.timers)) <= before + 1


def test_nobody_gets_through_before_the_names_are_known_and_only_the_first_after():
    with Alone() as alone:
        for position in (2, 3, 4, 5):
            early = socket.create_connection((LOOPBACK, alone.ports[position]), 5)
            early.settimeout(5)
            assert early.recv(1) == b""
            early.close()
        others, name = alone.listen()
        alone.front_end.sendall(b'"' + name + b'"\n')
        wire.read_until(alone.kernel, b"\n")
        first, taken = alone.connect(2, others[0])
        taken.sendall(b"x")
        assert first.recv(1) == b"x"
        with pytest.raises(OSError):
            socket.create_connection((LOOPBACK, alone.ports[2]), 5)
        with pytest.raises(OSError):
            socket.create_connection((LOOPBACK, alone.ports[0]), 5)


def test_each_port_leads_to_where_its_name_says():
    with Alone() as alone:
        alone.connect(1, alone.listeners[1])
        links = [alone.listen(), alone.listen()]
        alone.front_end.sendall(marked(b"EvaluatePacket") + b"".join(marked(name) for _, name in links))
        wire.read_until(alone.kernel, b"EvaluatePacket\n")
        told = [wire.read_until(alone.kernel, b"\n") for _ in links]
        assert told == [marked(told_for(name, pair)) for (_, name), pair in zip(links, PAIRS)]
        listeners = [listener for pair, _ in links for listener in pair]
        for position, listener in reversed(list(enumerate(listeners, 2))):
            kernel, front_end = alone.connect(position, listener)
            kernel.sendall(b"%d" % position)
            assert front_end.recv(1) == b"%d" % position
            front_end.sendall(b"back")
            assert kernel.recv(4) == b"back"
        assert (
            len(re.findall("link \\S+ of the front end is \\S+ for the kernel", "\n".join(alone.log.lines))) == 2
        )


def test_links_that_the_kernel_creates_pass_through_as_well():
    """As kernels up to 11.0 do; the front end is told ports of the launcher."""
    with Alone() as alone:
        links = [alone.listen(), alone.listen()]
        alone.kernel.sendall(marked(b"CallPacket") + b"".join(marked(name) for _, name in links))
        wire.read_until(alone.front_end, b"CallPacket\n")
        told = [wire.read_until(alone.front_end, b"\n") for _ in links]
        assert told == [marked(told_for(name, pair)) for (_, name), pair in zip(links, alone.inward_pairs)]
        ports = [port for pair in alone.inward_pairs for port in pair]
        for port, listener in zip(ports, [listener for pair, _ in links for listener in pair]):
            front_end = alone.keep(socket.create_connection((LOOPBACK, port), 5))
            kernel = alone.keep(listener.accept()[0])
            front_end.sendall(b"ask")
            assert kernel.recv(3) == b"ask"
            kernel.sendall(b"answer")
            assert front_end.recv(6) == b"answer"
            with pytest.raises(OSError):
                socket.create_connection((LOOPBACK, port), 5)
        assert (
            len(re.findall("link \\S+ of the kernel is \\S+ for the front end", "\n".join(alone.log.lines))) == 2
        )


def test_a_front_end_that_was_told_nothing_gets_nowhere():
    with Alone() as alone:
        for pair in alone.inward_pairs:
            for port in pair:
                early = socket.create_connection((LOOPBACK, port), 5)
                early.settimeout(5)
                assert early.recv(1) == b""
                early.close()
        assert len(alone.board.channels) == 1


def test_names_are_looked_for_in_the_main_data_channel_only_and_each_way_by_itself():
    with Alone() as alone:
        kernel, front_end = alone.connect(1, alone.listeners[1])
        (_, one), (_, other) = alone.listen(), alone.listen()
        for here, there in ((kernel, front_end), (front_end, kernel)):
            here.sendall(marked(one))
            assert wire.read_until(there, b"\n") == marked(one)
        alone.kernel.sendall(marked(one))
        assert wire.read_until(alone.front_end, b"\n") == marked(told_for(one, alone.inward_pairs[0]))
        alone.front_end.sendall(marked(other))
        assert wire.read_until(alone.kernel, b"\n") == marked(told_for(other, PAIRS[0]))


def test_a_name_that_is_too_short_is_logged_once_and_left_alone():
    with Alone() as alone:
        for _ in range(3):
            alone.front_end.sendall(b'"8000@::1,8001@::1"\n')
            assert wire.read_until(alone.kernel, b"\n") == b'"8000@::1,8001@::1"\n'
        assert str(alone.log.lines).count("too short") == 1
        assert len(alone.board.outward.short) == 1


def test_the_name_of_the_main_link_itself_is_left_alone():
    with Alone() as alone:
        for text in (b'"%s"\n' % str(alone.link).encode(), b'"20000@127.0.0.1,20001@127.0.0.1"\n'):
            for here, there in ((alone.front_end, alone.kernel), (alone.kernel, alone.front_end)):
                here.sendall(text)
                assert wire.read_until(there, b"\n") == text
        assert not alone.board.outward.given
        assert not alone.board.inward.given


def test_after_a_while_only_beginnings_whose_length_is_told_are_held_and_names_are_still_found(monkeypatch):
    monkeypatch.setattr(product, "NAMES_SECONDS", 0.2)
    monkeypatch.setattr(product, "HOLD_SECONDS", 30)
    with Alone() as alone:
        time.sleep(0.5)
        alone.front_end.sendall(b'"1234')
        assert alone.kernel.recv(100) == b'"1234'  # at once
        _, name = alone.listen()
        text = marked(name)
        told = marked(told_for(name))
        alone.front_end.sendall(b'"\n' + text[:20])
        rig.wait_until(lambda: alone.board.channels[0].filters[alone.board.channels[0].front_end].replacer.held, 5)
        alone.front_end.sendall(text[20:])
        assert wire.read_until(alone.kernel, told) == b'"\n' + told


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_front_ends_that_listen_elsewhere(host):
    with Alone(host) as alone:
        alone.kernel.sendall(b"x")
        assert alone.front_end.recv(1) == b"x"


def test_a_front_end_that_does_not_answer_is_logged_and_the_kernel_is_told():
    (gone,) = [listener.getsockname()[1] for listener in frontend.listening_pair()[:1]]
    alone = Alone(link=LinkName(gone, LOOPBACK, gone + 1, LOOPBACK))
    try:
        with socket.create_connection((LOOPBACK, alone.ports[0]), 5) as kernel:
            kernel.settimeout(10)
            assert kernel.recv(1) == b""
        assert alone.log.lines == [
            "the front end does not answer at {}@127.0.0.1: Connection refused".format(gone)
        ]
        assert alone.heard == []
    finally:
        alone.__exit__()


def test_the_kernel_has_connected_when_its_data_channel_has():
    alone = Alone()
    try:
        alone.connect(1, alone.listeners[1])
        rig.wait_until(lambda: alone.board.channels, 5)
        assert alone.heard == []
        alone.connect(0, alone.listeners[0])
        rig.wait_until(lambda: alone.heard == ["connected"], 5)
    finally:
        alone.__exit__()


@pytest.mark.parametrize("how", ["closes", "half-closes", "dies"])
def test_a_front_end_that_leaves_the_main_link_is_noticed(how):
    with Alone() as alone:
        message = alone.connect(1, alone.listeners[1])
        message[1].close()  # not with this one
        assert message[0].recv(1) == b""
        message[0].close()
        time.sleep(0.1)
        assert alone.heard == ["connected"]
        if how == "half-closes":
            alone.front_end.shutdown(socket.SHUT_WR)
        else:
            if how == "dies":
                alone.front_end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            alone.front_end.close()
        rig.wait_until(lambda: alone.heard == ["connected", "lost"], 5)
        assert alone.kernel.recv(1) == b""


@pytest.mark.parametrize("how", ["closes", "dies"])
def test_a_front_end_that_leaves_is_noticed_though_its_kernel_reads_nothing(how):
    """It has sent more than a computing kernel takes, so nobody reads from it either."""
    with Alone(small_buffers=True) as alone:
        alone.front_end.settimeout(0.5)
        with pytest.raises(socket.timeout):
            while True:
                alone.front_end.send(bytes(1 << 16))
        if how == "dies":
            alone.front_end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        alone.front_end.close()
        rig.wait_until(lambda: "lost" in alone.heard, 5)


def test_a_front_end_that_only_waits_is_not_taken_for_a_dead_one():
    with Alone(small_buffers=True) as alone:
        alone.fill()
        alone.front_end.settimeout(0.5)
        with pytest.raises(socket.timeout):
            while True:
                alone.front_end.send(bytes(1 << 16))
        time.sleep(1.5)  # longer than from one look to the next
        assert alone.heard == ["connected"]


def test_a_front_end_that_follows_its_kernel_is_not_lost():
    with Alone() as alone:
        alone.kernel.close()
        assert alone.front_end.recv(1) == b""
        alone.front_end.close()
        rig.wait_until(lambda: not alone.board.channels[0].is_open, 5)
        assert alone.heard == ["connected"]


@pytest.mark.parametrize("how", ["closes", "resets", "is gone when written to"])
def test_all_that_a_kernel_has_sent_arrives_however_it_ends(how):
    """To a front end that takes nothing before the kernel has gone."""
    with Alone(small_buffers=True) as alone:
        sent, passed = alone.fill()
        if how == "resets":
            alone.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        alone.kernel.close()
        if how == "is gone when written to":
            for _ in range(5):
                alone.front_end.sendall(b"anybody there?")
                time.sleep(0.05)
        time.sleep(0.2)
        assert alone.received() >= (sent if how == "closes" else passed)


def test_what_a_front_end_said_last_reaches_the_kernel():
    with Alone() as alone:
        alone.front_end.sendall(b"last words")
        alone.front_end.close()
        assert wire.read_until(alone.kernel, b"words") == b"last words"
        assert alone.kernel.recv(1) == b""


def test_it_is_known_when_the_front_end_has_all():
    with Alone(small_buffers=True) as alone:
        assert not alone.board.delivered
        sent, _ = alone.fill()
        alone.kernel.close()
        time.sleep(0.3)
        assert alone.do(lambda: alone.board.delivered) is False
        assert alone.do(lambda: alone.board.under_way) > 0
        assert alone.received() == sent
        rig.wait_until(lambda: alone.do(lambda: alone.board.delivered), 5)
        assert alone.do(lambda: alone.board.under_way) == 0


def test_no_port_is_taken_that_the_client_is_going_to_listen_on(monkeypatch):
    drawn = [product.listen() for _ in range(3)]
    first, *others = [listener.getsockname()[1] for listener in drawn]
    draw = iter(drawn)
    monkeypatch.setattr(product, "listen", lambda: next(draw))
    way = product.Forwards(product.Loop(), None, 1, 1, avoid=(first,))
    assert way.ports == others[:1] and way.front_end_side[0].getsockname()[1] == others[1]
    assert drawn[0].fileno() < 0
    way.close()


def delivery(alone, calls):
    return alone.do(lambda: product.Delivery(alone.loop, alone.board, lambda: calls.append(time.monotonic())))


def test_a_delivery_ends_when_the_front_end_has_all_and_not_before(monkeypatch):
    monkeypatch.setattr(product, "STALL_SECONDS", 20)
    monkeypatch.setattr(product, "QUIET_SECONDS", 20)
    with Alone(small_buffers=True) as alone:
        calls = []
        sent, _ = alone.fill()
        alone.kernel.close()
        delivery(alone, calls)
        time.sleep(0.5)
        assert calls == []
        assert alone.received() == sent
        rig.wait_until(lambda: calls, 3)
        time.sleep(0.3)
        assert len(calls) == 1
        before = alone.do(lambda: [timer for timer in alone.loop.timers if timer[0] < time.monotonic() + 60])
        assert before == []  # nothing is waited for any more


@pytest.mark.parametrize("under_way", [True, False])
def test_a_delivery_that_does_not_move_ends_too(under_way, monkeypatch):
    """Sooner where nothing is left to deliver, though somebody still holds the kernel's connection."""
    monkeypatch.setattr(product, "STALL_SECONDS", 1.5)
    monkeypatch.setattr(product, "QUIET_SECONDS", 0.4)
    with Alone(small_buffers=True) as alone:
        calls = []
        if under_way:
            alone.fill()
        begin = time.monotonic()
        delivery(alone, calls)
        rig.wait_until(lambda: calls, 5)
        assert 0.9 * (1.5 if under_way else 0.4) < calls[0] - begin
        assert (calls[0] - begin < 1.4) is not under_way
        assert any("bytes are given up" in line for line in alone.log.lines) is under_way


def test_a_delivery_waits_as_long_as_the_front_end_goes_on_taking(monkeypatch):
    monkeypatch.setattr(product, "STALL_SECONDS", 1.2)
    with Alone(small_buffers=True) as alone:
        calls = []
        sent, _ = alone.fill()
        alone.kernel.close()
        delivery(alone, calls)
        received = 0
        for _ in range(8):
            received += len(alone.front_end.recv(1 << 16))
            time.sleep(0.25)
        assert calls == []
        while received < sent:
            received += len(alone.front_end.recv(1 << 20))
        rig.wait_until(lambda: calls, 3)


def test_a_delivery_can_be_stopped(monkeypatch):
    monkeypatch.setattr(product, "QUIET_SECONDS", 0.2)
    with Alone() as alone:
        calls = []
        one = delivery(alone, calls)
        alone.do(one.stop)
        time.sleep(0.5)
        assert calls == []


def test_small_packets_wait_for_nothing():
    """Requests and answers of a few bytes each: neither end may wait for more (TCP_NODELAY)."""
    with Alone() as alone:
        channel = alone.board.channels[0]
        for end in (channel.kernel, channel.front_end):
            assert end.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
