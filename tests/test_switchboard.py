"""The switchboard: link names in a stream are replaced at equal length, and everything else is left alone."""

import base64
import contextlib
import errno
import json
import os
import random
import re
import socket
import struct
import threading
import time

import pytest
import rig
from rig import frontend, product
from rig import standin_kernel as wire
from rig.names import PAIRS, marked, name_of_length, told_for
from rig.product import LOOPBACK, LinkName, NameReplacer

SESSIONS = json.load(open(os.path.join(rig.TESTS, "data", "transcripts.json")))
CALLBACKS = [session for session in SESSIONS if session["mode"] == "callback"]


class Board:
    """What a main data channel does with names: those of the switchboard, around a replacer."""

    def __init__(self, pairs=PAIRS, main=()):
        self.names = product.Names(main, pairs)
        self.replacer = NameReplacer(self.names.replace)

    @property
    def given(self):
        return self.names.given

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
        noise = [bytes(draw.choice(b'\x00\xff\n"{};') for _ in range(draw.randint(1, 300))) for _ in range(2)]
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


# -- strings as they travel: their length stands before them


def test_names_of_every_length_are_replaced_wherever_they_are_split():
    replaced = 0
    for length in range(15, 301):
        name = name_of_length(length)
        assert len(name) == length
        data = marked(b"EvaluatePacket") + marked(name) + marked(b"rest")
        expected = data.replace(name, told_for(name))
        replaced += expected != data
        begin, end = data.index(name), data.index(name) + length
        for at in range(len(data) + 1):
            if length > 132 and at % 7 and not (begin - 6 < at < begin + 8 or end - 6 < at < end + 3):
                continue  # long hosts are all alike within
            board = Board()
            out = board.replacer.feed(data[:at]) + board.replacer.feed(data[at:])
            assert out == expected, (length, at)
            assert not board.replacer.held
    assert replaced == 301 - 23  # shorter ones have no room for the loopback's address


@pytest.mark.parametrize("length", [23, 31, 62, 63, 64, 65, 99, 100, 128, 300])
def test_names_are_replaced_wherever_they_are_split_twice(length):
    name = name_of_length(length)
    data = marked(b"12") + marked(name)
    expected = data.replace(name, told_for(name))
    step = 1 if length < 70 else 3
    for first in range(0, len(data) + 1, step):
        for second in range(first, len(data) + 1, step):
            board = Board()
            out = b"".join(map(board.replacer.feed, (data[:first], data[first:second], data[second:])))
            assert out == expected, (first, second)


@pytest.mark.parametrize("length", [31, 64, 100])
def test_both_names_of_a_packet_are_found_wherever_it_is_split(length):
    names = [name_of_length(length), name_of_length(length, (44839, 37327))]
    data = wire.packet(b"EvaluatePacket") + b"".join(map(marked, names)) + b"FA#OA~L"
    expected = data.replace(names[0], told_for(names[0])).replace(names[1], told_for(names[1], PAIRS[1]))
    for at in range(len(data) + 1):
        board = Board()
        assert board.replacer.feed(data[:at]) + board.replacer.feed(data[at:]) == expected
        assert board.names.finished


@pytest.mark.parametrize("around", [b'"%s"', b"<%s>\n", b"\0%s\0", b"\x1f%s\0", b"(%s)"])
@pytest.mark.parametrize("length", [23, 31, 64, 120])
def test_names_without_a_length_before_them_are_found_as_well(around, length):
    """As a library would write them that encodes strings in another way."""
    name = name_of_length(length)
    data = b"Begin" + around.replace(b"%s", name) + b"end"
    expected = data.replace(name, told_for(name))
    for at in range(len(data) + 1):
        board = Board()
        assert board.replacer.feed(data[:at]) + board.replacer.feed(data[at:]) == expected, at
    for first in range(0, len(data) + 1, 5):
        for second in range(first, len(data) + 1, 3):
            assert Board().feed(data[:first], data[first:second], data[second:]) == expected


def test_a_name_after_a_blank_is_found_unless_it_is_split_where_a_greeting_could_be():
    """The version in the greeting, " 6", passes at once: up to three digits do, after a blank."""
    name = b"32817@127.0.0.1,35625@127.0.0.1"
    data = b"x " + name + b" x"
    expected = data.replace(name, told_for(name))
    for at in range(len(data) + 1):
        assert Board().feed(data[:at], data[at:]) == (data if 2 < at < 6 else expected), at


@pytest.mark.parametrize("filling", [b" ", b'"', b"@", b",", b".", b"\xff"])
def test_what_looks_like_a_name_in_a_string_of_another_length_is_left_alone(filling):
    lengths = (31, 62, 64, 99)
    longer = (32, 40, 63, 64, 65, 99, 100, 101, 523, 999, 1000, 12345)
    for length, told in [(length, told) for length in lengths for told in longer if told > length]:
        name = name_of_length(length)
        data = marked(name + (filling * told)[: told - length]) + marked(b"end")
        for at in range(min(len(data), length + 20) + 1):
            board = Board()
            assert board.feed(data[:at], data[at:]) == data, (length, told, at)
            assert not board.given


@pytest.mark.parametrize("before", [b"see ", b"to:", b'a "', b"-" * 40 + b" "])
def test_what_looks_like_a_name_within_a_longer_string_is_left_alone(before):
    """``Print["see 32817@127.0.0.1,35625@127.0.0.1 "]``: a string is a name as a whole."""
    name = b"32817@127.0.0.1,35625@127.0.0.1"
    data = marked(before + name + b" and so on") + marked(name)
    expected = marked(before + name + b" and so on") + marked(told_for(name))
    for at in range(len(data) + 1):
        assert Board().feed(data[:at], data[at:]) == expected


@pytest.mark.parametrize("length", [400, 999, 1000, 1023])
def test_what_looks_like_a_name_far_within_a_long_string_is_left_alone(length):
    name = b"32817@127.0.0.1,35625@127.0.0.1"
    text = b"x" * 300 + b" " + name + b" " + b"y" * (length - 302 - len(name))
    assert len(text) == length
    data = marked(text) + marked(name)
    expected = marked(text) + marked(told_for(name))
    for at in range(250, len(data) + 1, 3):
        assert Board().feed(data[:at], data[at:]) == expected


def test_a_name_right_behind_a_string_is_not_within_it():
    name = b"32817@127.0.0.1,35625@127.0.0.1"
    for before in (b"~Cabc", b"~A!", b"~64 " + b"z" * 64):
        assert Board().feed(before + name + b'"') == before + told_for(name) + b'"'
        assert Board().feed(before[:-1] + name + b'"' + b"z") == before[:-1] + name + b'"' + b"z"


def test_a_name_whose_length_is_told_is_one_whatever_follows():
    name = b"32817@127.0.0.1,35625@127.0.0.1"
    for follows in (b"", b"\n", b"7", b"x", b".", b"@", b",", b'"bD~B12\n'):
        data = marked(name)[:-1] + follows
        expected = data.replace(name, told_for(name))
        for at in range(len(data) + 1):
            board = Board()
            assert board.replacer.feed(data[:at]) + board.replacer.feed(data[at:]) == expected, (follows, at)


@pytest.mark.parametrize(
    "data, position, length",
    [
        (b"~@", 2, 0),
        (b"~A", 2, 1),
        (b"~_x", 2, 31),
        (b"~~", 2, 62),
        (b"~\x7f", 2, 63),
        (b"~\x80", 2, None),
        (b"~?", 2, None),
        (b"_", 1, None),
        (b"x_", 2, None),
        (b"~64 ", 4, 64),
        (b"x~99 ", 5, 99),
        (b"~100 ", 5, 100),
        (b"bD~523 ", 7, 523),
        (b"~ ", 2, None),
        (b"64 ", 3, None),
        (b"~6x ", 4, None),
        (b"~64", 3, None),
        (b"~64\n", 4, None),
        (b"", 0, None),
        (b"~", 1, None),
        (b" ", 1, None),
    ],
)
def test_the_length_that_stands_before_a_string(data, position, length):
    assert product.length_before(data, position) == length
    assert product.length_before(data + b"1@a,2@b", position) == length


NAME = re.compile(rb"\d{1,5}@[0-9A-Za-z.:_%-]{1,255},\d{1,5}@[0-9A-Za-z.:_%-]{1,255}")
SHORTEST_ENDS = [b"", b"h", b"@h", b"1@h", b",1@h", b"h,1@h", b"@h,1@h", b"1@h,1@h"]


def can_become_a_name(beginning, length):
    """Whether a string of ``length`` bytes (None: any number) that begins so can be a link name."""
    for end in SHORTEST_ENDS:
        more = 0 if length is None else length - len(beginning) - len(end)
        if more >= 0 and NAME.fullmatch(beginning + end + b"h" * more):
            return True
        # the other host may be the longer one
        at = (beginning + end).find(b",")
        longer = (beginning + end)[:at] + b"h" * more + (beginning + end)[at:]
        if more >= 0 and at >= len(beginning) and NAME.fullmatch(longer):
            return True
    return False


def length_told(before):
    """The length that the bytes before a string tell; written down once more, to compare."""
    found = re.search(rb"~(?:([@-\x7f])|(\d+) )\Z", before)
    if not found:
        return None
    return found.group(1)[0] - 0x40 if found.group(1) else int(found.group(2))


def check_what_is_held(board, passed):
    held = board.replacer.held
    if held:
        length = length_told(passed)
        assert can_become_a_name(held, length), (passed[-10:], held)
        assert length is not None or len(held) > 3 or not re.search(rb"[ :A-Za-z]\Z", passed), held


@pytest.mark.parametrize(
    "text", [b"6", b"12", b"123", b"1234", b"12345", b"1@", b"1@a", b"1@a,", b"1@a,2", b"1@a,2@"]
)
def test_nothing_is_held_that_cannot_become_a_name(text):
    for length in range(len(text), 64):
        board = Board()
        passed = board.replacer.feed(marked(text, length)[: 5 + len(text)])
        assert passed + board.replacer.held == marked(text, length)[: 5 + len(text)]
        assert bool(board.replacer.held) is can_become_a_name(text, length), (text, length)
    for before, held in ((b" ", len(text) > 3), (b"t", len(text) > 3), (b'"', True), (b"\0", True), (b".", False)):
        board = Board()
        board.replacer.feed(before + text)
        assert bool(board.replacer.held) is held, before


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session["main_link"])
@pytest.mark.parametrize("direction", ["listener->connector", "connector->listener"])
def test_of_a_recorded_session_only_names_are_held(session, direction):
    """However slowly it comes: the handshake goes back and forth, and each byte that is held costs time."""
    data = stream(session, direction)
    names = [each.encode() for each in session["parallel_links"]]
    board, passed = Board(), b""
    for position in range(len(data)):
        passed += board.replacer.feed(data[position : position + 1])
        check_what_is_held(board, data[: position + 1 - len(board.replacer.held)])
        if board.replacer.held:
            assert any(name.startswith(board.replacer.held) for name in names), passed[-20:]
    assert len(passed) == len(data)


def test_the_greeting_passes_at_once():
    for greeting in (
        b" 6",
        b"Math Link 6",
        b"need_msg_portN",
        b"-numericsid boxer -tokens 33,98,100,102,116,118,120",
    ):
        for at in range(len(greeting) + 1):
            board = Board()
            assert board.replacer.feed(greeting[:at]) + board.replacer.feed(greeting[at:]) == greeting
    board = Board()
    assert board.replacer.feed(b"Math Link") == b"Math Link"
    assert board.replacer.feed(b" 6") == b" 6"
    assert board.replacer.feed(b"\nabc 123456") == b"\nabc 123456"
    assert board.replacer.feed(b"@h,1@h\n") == b"@h,1@h\n"
    assert board.replacer.feed(b"1234") == b""
    assert board.replacer.feed(b"!") == b"1234!"
    assert board.replacer.feed(b"12@h") == b""
    assert board.replacer.flush() == b"12@h"
    assert board.replacer.flush() == b""


def test_random_streams_are_held_for_names_only_and_come_out_as_they_went_in():
    draw = random.Random(6)
    pieces = [
        b"~",
        b"_",
        b"~_",
        b"~64 ",
        b"~100 ",
        b"~C",
        b"6",
        b" 6",
        b"12",
        b"123",
        b"1234",
        b"12345",
        b"@",
        b",",
        b".",
        b"a",
    ]
    pieces += [b"127.0.0.1", b"1@a", b"32817@127.0.0.1,35625@127.0.0.1", b"\n", b'"', b"\0", b"\xff", b"-", b" "]
    found = 0
    for _ in range(1500):
        data = b"".join(draw.choice(pieces) for _ in range(draw.randint(0, 40)))
        board, passed, position = Board(), b"", 0
        for piece in split(data, draw):
            passed += board.replacer.feed(piece)
            position += len(piece)
            check_what_is_held(board, data[: position - len(board.replacer.held)])
            assert len(passed) + len(board.replacer.held) == position  # never longer, never shorter
        passed += board.replacer.flush()
        for name, told in board.given.items():
            assert LinkName.parse(told)
            passed = passed.replace(told.encode(), name.encode())
        assert passed == data
        found += len(board.given)
    assert found > 100


def test_names_among_random_strings_are_all_found():
    draw = random.Random(7)
    for _ in range(400):
        names = [name_of_length(draw.randint(23, 300), ports) for ports in ((32817, 35625), (44839, 37327))]
        noise = [
            bytes(draw.choice(b"0123456789@,.abcXYZ~_ \n\xff") for _ in range(draw.randint(0, 80)))
            for _ in range(9)
        ]
        chunks = [marked(each) for each in noise[:3]] + [marked(names[0])] + [marked(each) for each in noise[3:6]]
        chunks += [marked(names[1])] + [marked(each) for each in noise[6:]]
        data = b"".join(chunks)
        expected = data.replace(names[0], told_for(names[0])).replace(names[1], told_for(names[1], PAIRS[1]))
        assert Board().feed(*split(data, draw)) == expected


@pytest.mark.parametrize(
    "name, told",
    [
        ("8000@127.0.0.1,8001@127.0.0.1", "53999@127.0.01,54000@127.0.01"),
        ("32817@127.0.0.1,35625@127.0.0.1", "53999@127.0.0.1,54000@127.0.0.1"),
        ("32817@localhost,35625@localhost", "53999@127.0.0.1,54000@127.0.0.1"),
        ("32817@192.168.10.20,35625@192.168.10.20", "53999@127.0.0.00001,54000@127.0.0.00001"),
        ("1@abcdefghi,2@abcdefghi", "53999@127.1,54000@127.1"),
        ("32817@a.b.c,35625@longer.example.org", "53999@127.1,54000@127.0.0.0000000001"),
        ("8000@::1,8001@::1", None),
        ("1@a,2@b", None),
        ("32817@1234,35625@localhost", None),  # one part is enough
        ("32817@localhost,35625@1234", None),
    ],
)
def test_what_is_told_for_a_name_is_as_long_and_leads_to_the_loopback(name, told):
    names = product.Names((), PAIRS)
    assert names.replace(name) == told
    assert names.short == ([] if told else [name])
    if told:
        assert len(told) == len(name)
        parsed = LinkName.parse(told)
        assert {socket.inet_aton(host) for host in (parsed.data_host, parsed.message_host)} == {b"\x7f\0\0\1"}


def test_each_name_gets_a_pair_of_its_own_until_there_is_none():
    names = product.Names(("11111@127.0.0.1,22222@127.0.0.1", "20000@127.0.0.1,20001@127.0.0.1"), PAIRS)
    texts = ["{}@127.0.0.1,{}@127.0.0.1".format(30000 + n, 30100 + n) for n in range(3)]
    assert [names.target(position) for position in range(4)] == [None] * 4
    assert names.replace("11111@127.0.0.1,22222@127.0.0.1") is None  # the main link's own, on either side
    assert names.replace("20000@127.0.0.1,20001@127.0.0.1") is None
    assert names.replace("8000@::1,8001@::1") is None
    first = names.replace(texts[0])
    assert first == "53999@127.0.0.1,54000@127.0.0.1"
    assert not names.finished
    assert [names.target(position) for position in range(4)] == [
        ("127.0.0.1", 30000),
        ("127.0.0.1", 30100),
        None,
        None,
    ]
    assert names.replace(texts[0]) == first
    assert names.replace(texts[1]) == "54001@127.0.0.1,54002@127.0.0.1"
    assert names.finished
    assert names.replace(texts[2]) is None
    assert names.replace(texts[0]) == first
    assert names.target(2) == ("127.0.0.1", 30001)
    assert names.target(3) == ("127.0.0.1", 30101)
    assert names.target(4) is None
    assert product.Names((), []).finished


def test_a_name_of_two_hosts_leads_to_each():
    names = product.Names((), PAIRS)
    names.replace("32817@one.example,35625@other.example")
    assert [names.target(position) for position in (0, 1)] == [("one.example", 32817), ("other.example", 35625)]


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
    log = desk.logs()[0]
    assert len(re.findall(r"link \S+ of the kernel is \S+ for the front end", log)) == 2
    assert "of the front end is" not in log


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


# -- the switchboard alone, between sockets


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


def test_after_a_while_nothing_is_looked_for_any_more(monkeypatch):
    monkeypatch.setattr(product, "NAMES_SECONDS", 0.2)
    with Alone() as alone:
        alone.front_end.sendall(b'"1234')
        time.sleep(0.5)
        _, name = alone.listen()
        alone.front_end.sendall(b'"' + name + b'"\n')
        assert wire.read_until(alone.kernel, b"\n") == b'"1234"' + name + b'"\n'


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


def test_small_packets_wait_for_nothing():
    """Requests and answers of a few bytes each: neither end may wait for more (TCP_NODELAY)."""
    with Alone() as alone:
        channel = alone.board.channels[0]
        for end in (channel.kernel, channel.front_end):
            assert end.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


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
    probe.cancel()
    probe.cancel()  # harmless
    assert not loop.readers
    assert len(calls) <= 1
    far.close()


def test_a_probe_that_is_cancelled_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(product.Probe, "PATIENCE", 20)
    far, loop = Far("cut", "cut", "cut", "waits"), product.Loop()
    probe = product.Probe(loop, far.ports, None)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        loop.after(0.02, lambda: None)
        loop.step()
    assert len(probe.open) == 1
    probe.cancel()
    assert (loop.readers, loop.writers) == ({}, {})
    assert [timer for timer in loop.timers if timer[0] > time.monotonic() + 6] == []
    far.close()


def test_a_probe_that_is_cancelled_finds_nothing(monkeypatch):
    monkeypatch.setattr(product.Probe, "PATIENCE", 0.2)
    far, calls, loop = Far("cut", "waits"), [], product.Loop()
    probe = product.Probe(loop, far.ports, calls.append)
    probe.cancel()
    end = time.monotonic() + product.Probe.PATIENCE + 0.5
    while time.monotonic() < end:
        loop.after(0.02, lambda: None)
        loop.step()
    assert calls == []
    assert not loop.readers
    assert not loop.writers
    far.close()


# -- the loop itself


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
