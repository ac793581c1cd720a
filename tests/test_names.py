"""Link names in a stream are replaced at equal length, however it is split, and everything else is left alone."""

import base64
import json
import os
import random
import re
import socket
import threading

import pytest
import rig
from rig import frontend, product
from rig import standin_kernel as wire
from rig.names import PAIRS, marked, name_of_length, told_for
from rig.product import LinkName, NameReplacer

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


# -- what is held

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
