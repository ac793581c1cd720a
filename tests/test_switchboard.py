"""The switchboard: link names in a stream are replaced at equal length, and everything else is left alone."""

import base64
import json
import os
import random
import re
import socket
import threading
import time

import frontend
import pytest
import rig
import standin_kernel as wire

import tunnel
from tunnel import LinkName, NameReplacer

HERE = os.path.dirname(os.path.abspath(__file__))
SESSIONS = json.load(open(os.path.join(HERE, "data", "transcripts.json")))
CALLBACKS = [session for session in SESSIONS if session["mode"] == "callback"]
PAIRS = [(53999, 54000), (54001, 54002)]


class Board:
    """Gives out two pairs of ports, as the switchboard does."""

    def __init__(self, pairs=PAIRS):
        self.pairs, self.given, self.names = list(pairs), {}, []
        self.replacer = NameReplacer(self.replace)

    def replace(self, text):
        if text not in self.given:
            told = tunnel.rewritten(text, self.pairs[len(self.given)]) if len(self.given) < 2 else None
            if told is None:
                return None
            self.given[text] = told
        return self.given[text]

    def feed(self, *chunks):
        return b"".join(self.replacer.feed(chunk) for chunk in chunks) + self.replacer.flush()


def stream(session, direction="listener->connector"):
    chunks = [base64.b64decode(data) for channel, kind, data in session["events"] if kind == direction]
    return b"".join(chunks)


def split(data, draw):
    """``data`` in pieces of random sizes, many of them one byte long."""
    pieces, position = [], 0
    while position < len(data):
        size = draw.choice((1, 1, 2, 3, 7, 30, 500))
        pieces.append(data[position : position + size])
        position += size
    return pieces


@pytest.mark.parametrize("session", CALLBACKS, ids=lambda session: session["parallel_links"][0])
def test_names_of_recorded_sessions_are_replaced_however_they_are_split(session):
    data = stream(session)
    expected = data
    for name, (data_port, message_port) in zip(session["parallel_links"], PAIRS):
        host = "127.0.0.1"  # as long as the hosts that were recorded
        told = "{0}@{2},{1}@{2}".format(data_port, message_port, host)
        expected = expected.replace(name.encode(), told.encode())
    assert len(expected) == len(data)
    assert expected != data
    draw = random.Random(1)
    for _ in range(300):
        assert Board().feed(*split(data, draw)) == expected


def test_a_session_in_which_the_kernel_sends_the_names_is_left_alone():
    (classic,) = [session for session in SESSIONS if session["mode"] == "classic"]
    data = stream(classic)
    draw = random.Random(2)
    for _ in range(100):
        assert Board().feed(*split(data, draw)) == data


def test_random_bytes_come_out_as_they_went_in():
    draw = random.Random(3)
    for _ in range(300):
        data = bytes(draw.choice(b'0123456789@@@,,,.abZ:-_\n"\x00\xff') for _ in range(draw.randint(0, 400)))
        board = Board()
        out = board.feed(*split(data, draw))
        for name, told in board.given.items():
            out = out.replace(told.encode(), name.encode())
        assert out == data
        assert len(out) == len(data)


def test_a_name_among_random_bytes_is_found():
    draw = random.Random(4)
    name = b"32817@127.0.0.1,35625@127.0.0.1"
    for _ in range(300):
        noise = [bytes(draw.choice(b'\x00\xff\n~"{}; ') for _ in range(draw.randint(1, 300))) for _ in range(2)]
        out = Board().feed(*split(noise[0] + name + noise[1], draw))
        assert out == noise[0] + b"53999@127.0.0.1,54000@127.0.0.1" + noise[1]


@pytest.mark.parametrize(
    "name, found",
    [
        ("8000@127.0.0.1,8001@127.0.0.1", True),
        ("44487@192.168.10.20,41967@192.168.10.20", True),
        ("37027@localhost,34245@localhost", True),
        ("37027@my-laptop.example.org,34245@my-laptop.example.org", True),
        ("37027@127.1,34245@127.1", True),
        ("40000@fe80::1,40001@fe80::1", True),
        ("40000@fe80::aa%eth0,40001@fe80::aa%eth0", True),
        ("40000@[fe80::1],40001@[fe80::1]", False),
    ],
)
def test_hosts_of_every_kind(name, found):
    got = Board().feed(b'"' + name.encode() + b'"')[1:-1].decode()
    assert len(got) == len(name)
    assert (got != name) is found
    if found:
        parsed = LinkName.parse(got)
        assert (parsed.data_port, parsed.message_port) == PAIRS[0]
        assert socket.inet_aton(parsed.data_host) == socket.inet_aton(parsed.message_host) == b"\x7f\0\0\1"


@pytest.mark.parametrize(
    "text",
    [
        b"32817@127.0.0.1 35625@127.0.0.1\n",
        b"32817@127.0.0.1,35625\n",
        b"0@127.0.0.1,35625@127.0.0.1\n",
        b"70000@127.0.0.1,35625@127.0.0.1\n",
        b"132817@127.0.0.1,35625@127.0.0.1\n",
        b"32817@127.0.0.1,35625@127.0.0.1,4@x\n",
        b"1.32817@127.0.0.1,35625@127.0.0.1\n",
        b"32817@,35625@127.0.0.1\n",
        b"32817@127.0.0.1,35625@127.0.0.1@x\n",
        b"a@b.c,d@e.f\n",
        b"32817@" + b"a" * 256 + b",35625@" + b"a" * 256 + b"\n",
    ],
)
def test_what_is_not_exactly_a_link_name_is_left_alone(text):
    for size in (1, 1000):
        board = Board()
        assert board.feed(*[text[n : n + size] for n in range(0, len(text), size)]) == text
        assert not board.given


def test_only_what_may_be_the_beginning_of_a_name_is_held():
    board = Board()
    assert board.replacer.feed(b"Math Link") == b"Math Link"
    assert board.replacer.feed(b" 6") == b" "
    assert board.replacer.flush() == b"6"
    assert board.replacer.feed(b"\nabc 123456") == b"\nabc 123456"
    assert board.replacer.feed(b"@h,1@h\n") == b"@h,1@h\n"
    assert board.replacer.feed(b"12@") == b""
    assert board.replacer.feed(b"!") == b"12@!"


def test_a_third_name_and_a_repeated_one():
    names = [b"1111@127.0.0.%d,2222@127.0.0.%d" % (n, n) for n in (11, 12, 13)]
    out = Board().feed(b'"%s" "%s" "%s" "%s"' % (names[0], names[1], names[0], names[2])).split()
    assert out[0] == out[2] != out[1]
    assert out[3] == b'"' + names[2] + b'"'


# -- end to end


@pytest.mark.parametrize("client", ["ssh", "plink"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_all_three_links_of_a_modern_front_end(desk, machine, client, host):
    end = desk.launch(machine, "callback", client=client, host_of_links=host)
    end.accept()
    end.echo(100000)
    log = desk.logs()[0]
    assert len(re.findall(r"link \S+ of the front end is \S+ for the kernel", log)) == 2
    end.tell(b"!quit 0\n")
    assert end.wait()[0] == 0
    desk.no_process()


def test_a_megabyte_right_after_the_names_and_a_third_name_later(desk, machine):
    end = desk.launch(machine, "callback")
    main = wire.handshake_listening(end.main)
    end.channels = list(main)
    names = [frontend.name_of(pair).encode() for pair in end.others]
    later = os.urandom(1 << 20) + b' "40001@127.0.0.1,40002@127.0.0.1" ' + b"".join(names)
    sender = threading.Thread(
        target=main[0].sendall, args=(wire.packet(b"EvaluatePacket", *names) + later,), daemon=True
    )
    sender.start()
    for pair in end.others:
        end.channels += wire.handshake_listening(pair)
    wire.read_strings(main[0], 1)
    received = b""
    while len(received) < len(later):
        received += main[0].recv(1 << 18)
    first = received[: 1 << 20]
    assert first == later[: 1 << 20]
    assert b"40001@127.0.0.1,40002@127.0.0.1" in received
    sender.join(10)


def test_classic_links_can_be_had_with_a_modern_path_and_the_other_way_round(desk, machine):
    end = desk.launch(machine, "classic", "--links", "classic")
    end.accept()
    end.echo()
    old = machine.install_kernel("usr/local/Wolfram/Mathematica/11.0/Executables/WolframKernel")
    other = desk.launch(machine, "callback", "--links", "callback", kernel=old)
    other.accept()
    other.echo()


def test_old_tunnel_m_and_switchboard_together(desk, machine):
    """A kernel that listens itself, though its path says no version, is served as well."""
    kernel = machine.install_kernel("opt/Mathematica/Executables/MathKernel")
    machine.behave(kernel, "classic")
    end = desk.launch(machine, "classic", kernel=kernel)
    end.accept()
    end.echo()
    assert "the switchboard" not in desk.logs()[0]


@pytest.mark.parametrize("way", ["front end quits", "kernel quits"])
def test_either_end_may_go_first(desk, machine, way):
    end = desk.launch(machine, "callback")
    end.accept()
    if way == "kernel quits":
        end.tell(b"!quit 0\n")
    else:
        end.quit()
    assert end.wait(10)[0] == 0
    desk.no_process()
    rig.wait_until(lambda: not machine.kernels(), 5)


# -- the switchboard alone, between two sockets


class Alone:
    """A switchboard in a thread, with a front end on one side and a kernel on the other."""

    class Log:
        lines = ()

        def write(self, text):
            self.lines += (text,)

    def __init__(self):
        self.loop, self.log = tunnel.Loop(), self.Log()
        self.listeners = frontend.listening_pair()
        self.link = LinkName.parse(frontend.name_of(self.listeners))
        self.board = tunnel.Switchboard(self.loop, self.link, self.log)
        self.board.kernel_link, self.board.pairs = self.link, PAIRS
        self.wake, far = socket.socketpair()
        self.stopped = False
        self.loop.readers[far] = lambda: far.recv(1)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.kernel = socket.create_connection(("127.0.0.1", self.board.ports[0]), 5)
        self.front_end, _ = self.listeners[0].accept()
        for side in (self.kernel, self.front_end):
            side.settimeout(10)

    def run(self):
        while not self.stopped:
            self.loop.step()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped = True
        self.wake.send(b"x")
        self.thread.join(5)
        for each in self.listeners + [self.kernel, self.front_end, self.wake] + list(self.loop.readers):
            each.close()


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


def test_what_is_held_goes_on_soon_when_nothing_follows():
    with Alone() as alone:
        begin = time.monotonic()
        alone.front_end.sendall(b" 6")
        assert wire.read_until(alone.kernel, b" 6") == b" 6"
        assert time.monotonic() - begin < 5 * tunnel.HOLD_SECONDS


def test_a_slow_reader_stops_the_sender_and_memory_does_not_grow():
    with Alone() as alone:
        alone.front_end.settimeout(0.5)  # so long a pause means that nothing is read any more
        chunk, sent = bytes(1 << 16), 0
        with pytest.raises(socket.timeout):
            while sent < 256 << 20:
                sent += alone.front_end.send(chunk)
        assert 0 < sent < 64 << 20  # what the system buffers on four sockets, and 256 KiB
        received = 0
        while received < sent:
            received += len(alone.kernel.recv(1 << 20))
        assert received == sent


def test_nobody_gets_through_before_the_names_are_known_and_only_the_first_after():
    with Alone() as alone:
        early = socket.create_connection(("127.0.0.1", alone.board.ports[1]), 5)
        early.settimeout(5)
        assert early.recv(1) == b""
        early.close()
        others = frontend.listening_pair()
        name = frontend.name_of(others).encode()
        alone.front_end.sendall(b'"' + name + b'"\n')
        wire.read_until(alone.kernel, b"\n")
        first = socket.create_connection(("127.0.0.1", alone.board.ports[1]), 5)
        taken, _ = others[0].accept()
        taken.sendall(b"x")
        first.settimeout(5)
        assert first.recv(1) == b"x"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", alone.board.ports[1]), 5)
        for each in [first, taken] + others:
            each.close()


def test_a_name_that_is_too_short_is_logged_and_left_alone():
    with Alone() as alone:
        alone.front_end.sendall(b'"8000@::1,8001@::1"\n')
        assert wire.read_until(alone.kernel, b"\n") == b'"8000@::1,8001@::1"\n'
        assert "too short" in str(alone.log.lines)


def test_the_name_of_the_main_link_itself_is_left_alone():
    with Alone() as alone:
        text = '"{}"\n'.format(alone.link).encode()
        alone.front_end.sendall(text)
        assert wire.read_until(alone.kernel, b"\n") == text
        assert not alone.board.given
