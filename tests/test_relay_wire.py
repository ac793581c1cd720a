"""The relay's wire and channels, without processes: nothing is lost, doubled or held up, whatever happens."""

import gc
import json
import os
import random
import socket
import struct
import time

import pytest
from rig import product
from rig.product import (
    BODY,
    CONTROL,
    COST,
    DATA,
    HEAD_LENGTH,
    KEEP,
    SUM,
    TEXT,
    WINDOW,
    Channels,
    Wire,
    WireError,
)
from rig.wires import SEEDS, Pair, Sink, connected, frame


def some_frames(draw, count):
    sizes = (0, 1, 2, 10, 300, 5000)
    return [
        (draw.choice((DATA, CONTROL)), draw.randrange(1 << 32), os.urandom(draw.choice(sizes)))
        for _ in range(count)
    ]


def exchange(pair, draw, sent, cuts):
    """Pass all frames of ``sent`` in pieces of random sizes, over as many connections as ``cuts`` makes."""
    left = {wire: list(each) for wire, each in sent.items()}
    while any(left.values()) or any(len(pair.got[pair.other(w)]) < len(sent[w]) for w in sent):
        wire = draw.choice((pair.near, pair.far))
        act = draw.random()
        if act < 0.3 and left[wire]:
            wire.send(*left[wire].pop(0))
        elif not pair.connected:
            pair.connect(b"noise\nwithout an end" if draw.random() < 0.3 else b"")
        elif act < 0.6:
            pair.write(wire, draw.choice((1, 3, 24, 26, 100, 1 << 20)))
        elif act < 0.9:
            pair.read(wire, draw.choice((1, 3, 24, 26, 100, 1 << 20)))
        elif act < 0.95:
            wire.acknowledge()
        elif cuts > 0 and draw.random() < 0.2:
            cuts -= 1
            pair.cut()


def test_nothing_is_lost_or_doubled_over_connections_cut_at_random():
    for seed in range(SEEDS):
        draw = random.Random(seed)
        pair = Pair()
        sent = {wire: some_frames(draw, draw.randrange(12)) for wire in (pair.near, pair.far)}
        exchange(pair, draw, sent, draw.randrange(5))
        assert pair.got[pair.far] == sent[pair.near] and pair.got[pair.near] == sent[pair.far], seed
        if not pair.connected:
            pair.connect()
        pair.settle()
        assert pair.near.kept == pair.far.kept == pair.near.queued == 0, seed
        assert not pair.near.unacked and not pair.far.unacked, seed


@pytest.mark.parametrize("direction", ["near to far", "far to near"])
def test_a_cut_at_every_byte_loses_nothing(direction):
    sent = [(DATA, 7, bytes([10, n]) * n) for n in range(12)]
    length, position = 1, 0
    while position <= length:
        pair = Pair()
        pair.connect()
        wire = pair.near if direction == "near to far" else pair.far
        for message in sent:
            for each in (pair.near, pair.far):
                each.send(*message)
        pair.write(pair.other(wire))
        pair.read(wire)
        length = pair.write(wire)
        pair.read(pair.other(wire), position)
        pair.write(pair.other(wire))
        pair.read(wire, position)  # its acknowledgements arrive in part too
        pair.cut()
        pair.connect()
        pair.settle()
        assert pair.got == {pair.near: sent, pair.far: sent}, position
        position += 1
    assert position > 600


def test_what_is_acknowledged_is_not_sent_again():
    pair = Pair()
    pair.connect()
    for _ in range(3):
        pair.near.send(DATA, 1, b"x" * 60000)
    pair.settle()
    pair.cut()
    pair.moved = 0
    pair.connect()
    pair.settle()
    assert pair.moved < 2000 and len(pair.got[pair.far]) == 3


def test_it_keeps_4_mib_and_then_has_the_sources_wait():
    wire, told = Wire("near"), []
    wire.on_room = lambda: told.append(wire.kept)
    wire.attach({}, fresh=True)
    count = 0
    while wire.room:
        wire.send(DATA, 1, bytes(BODY))
        while wire.pull():
            wire.wrote(sum(map(len, wire.pull())))
        count += 1
    assert KEEP <= wire.kept < KEEP + BODY + 2 * COST and count == 64
    far = Wire("far")
    far.received = 30
    far.attach({})
    wire.feed(b"".join(far.pull()))
    assert wire.kept == (count - 30) * (BODY + COST) and told == [wire.kept] and wire.room


def test_without_a_connection_a_quarter_mib_waits():
    wire = Wire("far")
    while wire.room:
        wire.send(DATA, 2, bytes(1000))
    assert product.QUEUE <= wire.kept < product.QUEUE + 2000


def test_small_frames_are_bounded_as_well():
    wire = Wire("near")
    wire.attach({}, fresh=True)
    count = 0
    while wire.room:
        wire.send(DATA, 1, b"x")
        wire.wrote(sum(map(len, wire.pull())))
        count += 1
    assert count <= 25000


def test_it_acknowledges_after_16_frames_or_256_kib_at_once():
    for count, body in ((16, b""), (4, bytes(BODY))):
        pair = Pair()
        pair.connect()
        pair.settle()
        for number in range(count):
            pair.near.send(DATA, 1, body)
            pair.write(pair.near)
            pair.read(pair.far)
            wrote = pair.write(pair.far)
            assert bool(wrote) == (number == count - 1), (count, number)
        pair.read(pair.near)
        assert pair.near.kept == 0


def test_an_acknowledgement_rides_on_what_is_sent_anyway():
    pair = Pair()
    pair.connect()
    pair.settle()
    pair.near.send(DATA, 1, b"ping")
    pair.write(pair.near)
    pair.read(pair.far)
    pair.far.send(TEXT, 1, b"pong")
    pair.write(pair.far)
    assert not pair.far.acknowledge()
    pair.read(pair.near)
    assert pair.near.kept == 0


# -- what stands between


def test_every_flush_ends_with_a_newline():
    pair = Pair()
    pair.connect()
    for size in (0, 1, 5, BODY, BODY):
        pair.near.send(DATA, 1, bytes(size))
        assert b"".join(pair.near.pull()).endswith(b"\n")
        pair.settle()
    pair.near.want.add(product.PING)
    assert b"".join(pair.near.pull()).endswith(b"\n")


def test_a_program_that_passes_whole_lines_only_is_harmless():
    for seed in range(100):
        draw = random.Random(seed)
        pair = Pair()
        pair.connect()
        sent = {wire: some_frames(draw, 10) for wire in (pair.near, pair.far)}
        held = {pair.near: b"", pair.far: b""}
        for position in range(10):
            for wire in sent:
                wire.send(*sent[wire][position])
                pair.write(wire)
                other = pair.other(wire)
                held[other] += bytes(pair.under_way[other])
                whole, newline, held[other] = held[other].rpartition(b"\n")
                pair.under_way[other][:] = whole + newline
                pair.read(other)
                assert pair.got[other] == sent[wire][: position + 1], seed


def read_hello(data, side="far", piece=None):
    """What a HelloReader makes of data that comes in pieces."""
    reader = product.HelloReader(side)
    noise, facts, rest = b"", None, b""
    for start in range(0, len(data), piece or len(data)):
        if facts is not None:
            rest += data[start : start + piece]
            continue
        more, facts, rest = reader.feed(data[start : start + (piece or len(data))])
        noise += more
    return noise, facts, rest


@pytest.mark.parametrize(
    "noise", [b"", b"Welcome!\n", b"Last login: now\nno newline", b"\n--tunnel-relay", b"\r\n\n\n"]
)
def test_what_a_login_prints_comes_before_the_hello_and_is_handed_out(noise):
    data = noise + product.hello("far", {"host": "h", "received": 3}) + b"rest"
    for piece in (1, 2, 7, 19, None):
        got, facts, rest = read_hello(data, piece=piece)
        assert (got.strip(b"\n"), facts["host"], facts["received"]) == (noise.strip(b"\n"), "h", 3), piece
        assert rest.replace(b"\n", b"") == b"rest"


def test_what_a_login_prints_is_handed_out_while_it_prints():
    reader = product.HelloReader("far")
    assert reader.feed(b"Please wait...\nok")[0].strip() == b"Please wait...\nok"


def test_an_echo_of_the_own_hello_is_no_hello():
    assert read_hello(product.hello("near", {}))[1] is None


def test_a_login_that_prints_without_end_is_given_up():
    reader = product.HelloReader("far")
    with pytest.raises(WireError, match="prints without end"):
        for _ in range(200):
            reader.feed(b"y\n" * 5000)
    reader = product.HelloReader("far")
    with pytest.raises(WireError, match="altered"):
        reader.feed(product.MARKS["far"])
        for _ in range(200):
            reader.feed(b"y" * 5000)
    assert len(reader.data) < 30000


@pytest.mark.parametrize("value", range(256))
def test_a_byte_that_is_changed_on_the_way_is_named(value):
    data = product.hello("far", {"host": "h"})
    at = data.index(product.ALL_BYTES)
    name = "0x{:02x}".format(value)

    def told(replacement):
        whole = data[: at + value] + replacement + data[at + value + 1 :]
        with pytest.raises(WireError) as raised:
            read_hello(whole)
        assert raised.value.error == product.ALTERED and "\n" not in raised.value.text
        return raised.value.text

    assert "{} does not come through".format(name) in told(b"")
    assert "{} comes out as 0x".format(name) in told(b"\x00" if value != 0 else b"\x07")
    assert "put before {}".format(name) in told(b"\xee" + bytes([value])) or value == 0xEE


def test_a_terminal_in_between_is_recognized():
    data = product.hello("far", {"host": "h"})
    with pytest.raises(WireError, match="changes what passes: a byte 0x0d is put before 0x0a"):
        read_hello(data.replace(b"\n", b"\r\n"))


def test_another_version_is_refused_with_both_named():
    data = product.hello("far", {}).replace(b'"version": 2', b'"version": 99')
    with pytest.raises(WireError, match=r"speaks version 99 of its protocol, this one 2") as raised:
        read_hello(data)
    assert raised.value.error == product.VERSIONS


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b"[" * 9000, b'{"version": 2, "received": -1}']
)
def test_a_hello_that_makes_no_sense_is_refused(line):
    with pytest.raises(WireError):
        read_hello(product.MARKS["far"] + line + b"\n" + product.ALL_BYTES + product.END + b"\n")


@pytest.mark.parametrize("received", [3, 10**30])
def test_a_side_that_claims_to_have_what_was_never_sent_is_refused(received):
    wire = Wire("near")
    wire.send(DATA, 1, b"x")
    wire.attach({})
    with pytest.raises(WireError, match="claims to have"):
        wire.feed(product.hello("far", {"received": received}))


def test_a_side_that_has_forgotten_what_it_acknowledged_is_refused():
    pair = Pair()
    pair.connect()
    pair.near.send(DATA, 1, b"x")
    pair.settle()
    pair.near.attach({})
    with pytest.raises(WireError, match="claims to have 0"):
        pair.near.feed(product.hello("far", {"received": 0}))


# -- hostile and corrupt input


def test_corrupt_input_raises_one_error_only_and_stays_in_bounds():
    for seed in range(SEEDS):
        draw = random.Random(seed)
        pair = Pair()
        near, far = Channels(pair.near, 1), Channels(pair.far, 2)
        got = []
        far.on_open = lambda stream, facts, got=got: got.append(stream)
        near.on_open = lambda stream, facts: stream.resume()
        pair.connect()
        pair.settle()
        for _ in range(3):
            stream = near.open(1, {"host": "x", "port": 3})
            stream.write(os.urandom(draw.randrange(300)))
        pair.settle()
        for stream in got:
            stream.write(os.urandom(draw.randrange(3000)))
            if draw.random() < 0.3:
                stream.finish()
        far.control(told="x")
        pair.write(pair.far)
        data = pair.under_way[pair.near]
        for _ in range(draw.randrange(1, 6)):
            at = draw.randrange(len(data))
            change = draw.random()
            if change < 0.5:
                data[at] = draw.randrange(256)
            elif change < 0.8:
                del data[at : at + draw.randrange(1, 40)]
            else:
                data[at:at] = os.urandom(draw.randrange(1, 40))
            if not data:
                break
        try:
            while pair.read(pair.near, draw.randrange(1, 400)):
                pass
        except WireError as error:
            assert error.text and "\n" not in error.text
        assert len(pair.near.rest) <= HEAD_LENGTH + BODY + SUM.size


def test_hostile_frames_raise_one_error_only(monkeypatch):
    monkeypatch.setattr(product, "parcel", lambda: (b"", b""))
    bodies = [b"", b"{}", b'{"kernel": 1}', b"[" * 5000, b"\0" * 4, b"\xff" * 4, b"\xff", os.urandom(100)]
    for told in ("ports", "started", "exit", "ended", "over", "note", None, []):
        for kernel in (1, 2, True, [], {}, None):
            for more in ({"code": 1}, {"code": "1", "ports": [1, 0]}, {"text": "\ud800\n", "listener": 1}):
                bodies.append(json.dumps(dict(more, told=told, kernel=kernel)).encode())
    for seed in range(SEEDS):
        draw = random.Random(seed)
        near = product.Near(product.PollLoop())
        near.wire.attach({}, fresh=True)
        near.start(["kernel"], 6)
        near.on_open = lambda kernel, listener, end: end.resume()
        near.on_note = near.on_over = lambda text, *_: text.encode("utf-8")
        near.wire.feed(product.hello("far", {"received": 0}))
        number = 0
        try:
            for _ in range(20):
                number += 1
                kind = draw.choice(b"odcfrjtapq")
                body = draw.choice(bodies)
                near.wire.feed(frame(kind, draw.randrange(6), number * (kind in product.NUMBERED), 0, body))
                number -= kind not in product.NUMBERED
        except WireError as error:
            assert error.text and "\n" not in error.text
        assert len(near.channels.streams) < 30


IMPOSSIBLE = [
    b"x",
    b"\0",
    frame(DATA, 1, 1, 0, bytes(BODY + 1)),
    frame(DATA, 1, 2),
    frame(DATA, 1, 0),
    frame(product.ACK, 0, 0, 1),
    frame(product.PING, 0, 0, 1 << 60),
    frame(DATA, 1, 1, 0, b"x"),
    frame(product.OPEN, 4, 1, 0, b'{"kernel": 1}'),
    frame(product.OPEN, 2, 1, 0, b'{"kernel":"1"}'),
    frame(CONTROL, 0, 1, 0, b"[]"),
    product.farewell("ab12"),
]


@pytest.mark.parametrize("data", IMPOSSIBLE)
def test_a_frame_that_cannot_be_ends_the_connection(data):
    wire = Wire("near")
    Channels(wire, 1)
    wire.attach({}, fresh=True)
    wire.feed(product.hello("far", {}))
    with pytest.raises(WireError):
        wire.feed(data)


@pytest.mark.parametrize("numbers", [(2,), (1, 1), (1, 3), (0,)])
def test_a_frame_that_is_missing_or_doubled_ends_the_connection(numbers):
    wire = Wire("near")
    wire.attach({}, fresh=True)
    wire.feed(product.hello("far", {}))
    with pytest.raises(WireError, match="was due"):
        for number in numbers:
            wire.feed(frame(TEXT, 1, number, 0, b"x") + b"\n")


@pytest.mark.parametrize("kind", sorted(b"odcfrjtapq"))
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_side_takes_only_the_kinds_of_frames_that_the_other_may_send(side, kind):
    wire, got = Wire(side), []
    other = "far" if side == "near" else "near"
    wire.on_frame = lambda *each: got.append(each)
    wire.on_noise = lambda data: got.append(data)
    said = frame(kind, 1, 1 if kind in product.NUMBERED else 0)
    wire.attach({}, fresh=True)
    wire.feed(said)
    assert wire.received == 0 and all(isinstance(each, bytes) for each in got), "before the hello it is noise"
    del got[:]
    wire.feed(product.hello(other, {}))
    if kind in product.SENDS[other]:
        wire.feed(said)
        assert wire.received == (kind in product.NUMBERED)
    else:
        assert kind == ord("g") or (other, kind) == ("near", TEXT)
        with pytest.raises(WireError, match="unknown kind"):
            wire.feed(said)
        assert wire.received == 0 and not [each for each in got if isinstance(each, tuple)]


STRAY = sorted(set(b"odcfrjtapqgh-\r #"))


@pytest.mark.parametrize("side", ["near", "far"])
def test_a_line_from_elsewhere_is_never_taken_for_a_frame_nor_for_a_part_of_one(side):
    """As a start-up job's, or a command's, that writes into the stream while a kernel runs."""
    for first in STRAY:
        line = bytes([first]) + b"ood morning, this line is longer than the head of a frame is, and was not sent\n"
        for at in range(0, 400, 7):
            pair = connected()
            wire = getattr(pair, side)
            sent = [(DATA, 1, bytes([65 + number]) * 90) for number in range(4)]
            for each in sent:
                pair.other(wire).send(*each)
            pair.write(pair.other(wire))
            pair.under_way[wire][at:at] = line
            with pytest.raises(WireError):
                while pair.read(wire, 50):
                    pass
            assert pair.got[wire] == sent[: len(pair.got[wire])], "what was taken had come whole"
            pair.cut()
            pair.connect()
            pair.settle()
            assert pair.got[wire] == sent


# -- time


def test_an_idle_connection_is_pinged_every_5_s_and_wakes_nobody_twice_a_second():
    pair = connected()
    wakes, due = {pair.near: 0, pair.far: 0}, {}
    for wire in wakes:
        due[wire] = pair.clock.monotonic + wire.tick()
    end = pair.clock.monotonic + 600
    silence = {wire: 0.0 for wire in wakes}
    while pair.clock.monotonic < end:
        wire = min(due, key=due.get)
        pair.clock.pass_by(due[wire] - pair.clock.monotonic)
        wakes[wire] += 1
        wait = wire.tick()
        assert wait is not None
        due[wire] = pair.clock.monotonic + wait
        silence[wire] = max(silence[wire], pair.clock.monotonic - wire.heard)
        while pair.write(pair.near) + pair.write(pair.far):
            for each in wakes:
                wakes[each] += pair.read(each) > 0
    assert max(wakes.values()) < 600 and 4 <= max(silence.values()) <= 5.1
    assert pair.moved < 600 / 5 * 4 * 60


def dies_after(pair, wire, most=60.0):
    """Seconds of silence after which ``wire`` takes its connection for dead; nothing is passed on meanwhile."""
    start = pair.clock.monotonic
    while pair.clock.monotonic - start < most:
        wait = wire.tick()
        if wait is None:
            return pair.clock.monotonic - start
        assert wait <= 5
        pair.clock.pass_by(wait)
    return None


def test_a_silent_connection_is_dead_within_20_s():
    for name in ("near", "far"):
        pair = connected()
        assert 15 < dies_after(pair, getattr(pair, name)) <= 20


def test_before_the_hello_nothing_is_taken_for_dead():
    pair = Pair()
    pair.near.attach({})
    assert dies_after(pair, pair.near) is None


@pytest.mark.parametrize("kind", ["suspended", "stopped"])
def test_a_side_that_has_slept_probes_and_gives_3_s(kind):
    for answered in (True, False):
        pair = connected()
        wire = pair.near
        wait = wire.tick()
        pair.clock.pass_by(wait)
        if kind == "suspended":  # Linux and macOS: the monotonic clock has slept too
            pair.clock.wall += 3600
        else:
            pair.clock.pass_by(3600)
        assert wire.tick() is not None, "silence while asleep says nothing"
        assert product.PING in wire.want
        if answered:
            pair.write(wire)
            pair.read(pair.far)
            pair.write(pair.far)
            pair.clock.pass_by(0.2)
            pair.read(wire)
            assert 15 < dies_after(pair, wire) <= 20.2
        else:
            assert 2.5 < dies_after(pair, wire) <= 3.5


def test_a_wall_clock_that_is_set_back_does_no_harm():
    pair = connected()
    pair.clock.wall -= 1e6
    assert 15 < dies_after(pair, pair.near) <= 20


# -- channels


class Board:
    """Channels on both sides of a pair; what the far side is told to open is kept as a sink."""

    def __init__(self, reading=True):
        self.pair = Pair()
        self.near, self.far = Channels(self.pair.near, 1), Channels(self.pair.far, 2)
        self.opened = []
        for side in (self.near, self.far):
            side.on_open = lambda stream, facts: self.opened.append(Sink(stream, reading))
        self.pair.connect()

    def channel(self, kernel=1, side=None):
        """A channel; returns its near end and what comes out at the far one (of ``side``: the other way round)."""
        stream = (side or self.near).open(kernel, {})
        self.pair.settle()
        return stream, self.opened[-1]


def use_a_channel(draw, end, sink, left):
    """Write a little to an end, or finish it, or start or stop reading at the other."""
    act = draw.random()
    if act < 0.6:
        size = draw.choice((1, 100, 70000))
        if left:
            end.write(bytes(left[:size]))
            del left[:size]
        else:
            end.finish()
    elif act < 0.9:
        sink.end.resume()
    else:
        sink.end.pause()


def use_a_connection(draw, pair):
    """Move some bytes, or, now and then, cut it."""
    act = draw.random()
    if not pair.connected:
        pair.connect()
    elif act < 0.495:
        pair.write(draw.choice((pair.near, pair.far)), draw.choice((1, 1000, 1 << 20)))
    elif act < 0.99:
        pair.read(draw.choice((pair.near, pair.far)), draw.choice((1, 1000, 1 << 20)))
    else:
        pair.cut()


def test_channels_carry_everything_both_ways_over_cut_connections_half_closes_included():
    for seed in range(SEEDS // 5):
        draw = random.Random(seed)
        board = Board(reading=False)
        pair = board.pair
        sinks = []
        for number in range(3):
            stream, far = board.channel(side=(board.near, board.far)[number % 2])
            near = Sink(stream, reading=False)
            sinks += [(stream, far), (far.end, near)]
        sent = [os.urandom(draw.choice((0, 10, 3000, 200000))) for _ in sinks]
        left = [bytearray(data) for data in sent]
        while any(sink.finished == 0 for _, sink in sinks):
            position = draw.randrange(len(sinks))
            if draw.random() < 0.5:
                use_a_channel(draw, *sinks[position], left[position])
            else:
                use_a_connection(draw, pair)
        assert [bytes(sink.data) for _, sink in sinks] == sent, seed
        if not pair.connected:
            pair.connect()
        pair.settle()
        assert not board.near.streams and not board.far.streams, seed


def fill(board, stream, most=8 << 20):
    """Write as long as there is room; returns how much was taken."""
    count = 0
    while count < most:
        room = stream.write(bytes(BODY))
        count += BODY
        board.pair.settle()
        if not room:
            break
    return count


def test_a_channel_nobody_reads_takes_1_mib_and_holds_up_no_other():
    board = Board(reading=False)
    stuck, sink = board.channel()
    sink.end.resume()
    stuck.write(bytes(BODY))  # in use: its credit grows
    board.pair.settle()
    sink.end.pause()
    sink.data.clear()
    fill(board, stuck)
    assert sink.end.held <= WINDOW and len(sink.end.inbox) <= 17
    assert sum(map(len, stuck.pending)) <= 2 * BODY
    other, out = board.channel()
    out.end.resume()
    for _ in range(64):
        assert other.write(bytes(BODY)) or not out.end.paused
        board.pair.settle()
    assert len(out.data) == 64 * BODY
    room = []
    stuck.on_room = lambda: room.append(1)
    sink.end.resume()
    board.pair.settle()
    assert room == [1] and not stuck.pending


def test_a_channel_begins_with_64_kib_and_gets_1_mib_when_it_is_used():
    board = Board(reading=False)
    stream, sink = board.channel()
    assert fill(board, stream) <= 2 * BODY + BODY
    sink.end.resume()
    board.pair.settle()
    assert stream.credit > WINDOW // 2


def test_hundreds_of_channels_share_their_credit():
    board = Board(reading=False)
    channels = [board.channel() for _ in range(256)]
    for stream, sink in channels:
        sink.end.resume()
        stream.write(bytes(BODY))
        board.pair.settle()
        sink.end.pause()
        sink.data.clear()
        fill(board, stream)
    held = sum(sink.end.held for _, sink in channels)
    assert held <= product.POOL * 2 and min(sink.end.held for _, sink in channels) >= BODY // 2


def test_more_than_its_credit_ends_the_connection():
    board = Board(reading=False)
    stream, _ = board.channel()
    stream.credit = 1 << 30
    with pytest.raises(WireError, match="more than its credit"):
        fill(board, stream)


def test_a_channel_that_is_given_up_is_given_up_on_the_other_side_after_its_data():
    board = Board(reading=False)
    stream, sink = board.channel()
    stream.write(b"last words")
    stream.close()
    board.pair.settle()
    assert not sink.closed and not sink.data
    sink.end.resume()
    assert sink.data == b"last words" and sink.closed == 1 and sink.finished == 0
    assert not board.near.streams and not board.far.streams
    assert sink.end.write(b"to nobody")
    board.pair.settle()


def test_a_channel_that_is_given_up_sends_what_waits_for_credit_first():
    board = Board()
    sink = None
    stream = board.near.open(1, {})
    stream.write(bytes(5 * BODY))
    stream.close()
    board.pair.settle()
    sink = board.opened[-1]
    assert len(sink.data) == 5 * BODY and sink.closed == 1


def test_data_for_a_channel_that_was_given_up_is_dropped():
    board = Board()
    stream, sink = board.channel()
    sink.end.write(bytes(BODY))
    stream.close()
    board.pair.settle()
    assert sink.closed == 1 and not board.near.streams and not board.far.streams


def test_closing_and_finishing_at_both_sides_at_once_is_no_error():
    for seed in range(300):
        draw = random.Random(seed)
        board = Board()
        stream, sink = board.channel()
        near = Sink(stream)
        for _ in range(20):
            end = draw.choice((stream, sink.end))
            act = draw.randrange(7)
            if act < 2:
                end.write(os.urandom(draw.choice((1, 100000))))
            elif act == 2:
                end.finish()
            elif act == 3 and draw.random() < 0.3:
                end.close()
            elif act == 4:
                draw.choice((end.pause, end.resume))()
            else:
                board.pair.write(draw.choice((board.pair.near, board.pair.far)), 1 << draw.randrange(18))
                board.pair.read(draw.choice((board.pair.near, board.pair.far)), 1 << draw.randrange(18))
        for end in (stream, sink.end):
            end.resume()
            end.finish()
        board.pair.settle()
        for end in (stream, sink.end):
            end.resume()
        board.pair.settle()
        assert not board.near.streams and not board.far.streams, seed
        assert max(near.finished, near.closed, sink.finished, sink.closed) <= 1, seed


def test_without_room_in_the_wire_sources_wait_and_take_turns():
    board = Board()
    channels = [board.channel() for _ in range(3)]
    for stream, sink in channels:  # let their credit grow
        stream.write(bytes(BODY))
        board.pair.settle()
        sink.data.clear()
    turns = []
    for number, (stream, _) in enumerate(channels):
        stream.on_room = lambda number=number: turns.append(number)
    board.pair.cut()
    assert [stream.write(bytes(2 * BODY)) for stream, _ in channels] == [True, False, False]
    board.pair.connect()
    board.pair.settle()
    assert turns == [1, 2] and all(len(sink.data) == 2 * BODY for _, sink in channels)


def test_a_kernels_channels_can_be_dropped_without_a_word():
    board = Board()
    stream, _ = board.channel(kernel=5)
    board.channel(kernel=6)
    board.near.drop(5)
    assert board.near.of(5) == [] and len(board.near.of(6)) == 1 and stream.write(b"x")
    board.opened[0].end.write(b"late")
    board.pair.settle()


def test_memory_of_one_end_with_every_buffer_full_stays_below_40_mb():
    import tracemalloc

    board = Board(reading=False)
    gc.collect()
    tracemalloc.start()
    try:
        channels = [board.channel() for _ in range(12)]
        for stream, sink in channels:
            sink.end.resume()
            stream.write(bytes(BODY))
            board.pair.settle()
            sink.end.pause()
            sink.data.clear()
            fill(board, stream)
        board.pair.cut()
        for side in (board.near, board.far):
            for stream in side.streams.values():
                stream.write(os.urandom(product.READ))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sink.end.held for _, sink in channels) > 8 << 20
    assert peak < 60 << 20, "both ends together, without the interpreters"


# -- ends


class Bench:
    """A loop that turns until something is so."""

    def __init__(self):
        self.loop = product.PollLoop()

    def until(self, condition, seconds=10):
        late = []
        timer = self.loop.after(seconds, lambda: late.append(1))
        while not condition():
            assert not late, "waited {} s in vain".format(seconds)
            self.loop.step()
        self.loop.cancel(timer)


def pairs(loop):
    outer, inner = socket.socketpair()
    outer.setblocking(False)
    return outer, product.KernelSocket(loop, inner)


def test_joined_sockets_pass_everything_on_with_half_closes():
    bench = Bench()
    (a, one), (b, other) = pairs(bench.loop), pairs(bench.loop)
    product.join(one, other)
    data = os.urandom(3 << 20)
    left, got = memoryview(data), bytearray()

    def feed():
        nonlocal left
        if left:
            try:
                left = left[a.send(left) :]
            except BlockingIOError:
                pass
            if not left:
                a.shutdown(socket.SHUT_WR)

    def drain():
        try:
            more = b.recv(1 << 16)
        except BlockingIOError:
            return False
        got.extend(more)
        return not more

    def done():
        feed()
        return drain()

    bench.loop.after(0.001, lambda: None)
    late = bench.loop.after(20, lambda: pytest.fail("too slow"))
    while not done():
        bench.loop.after(0.0005, lambda: None)
        bench.loop.step()
    bench.loop.cancel(late)
    assert bytes(got) == data
    b.sendall(b"answer")
    b.close()
    bench.until(lambda: one.socket is None and other.socket is None)
    assert a.recv(100) == b"answer" and a.recv(100) == b""
    assert not bench.loop.readers and not bench.loop.writers
    a.close()


def test_a_socket_that_takes_nothing_makes_its_source_wait():
    bench = Bench()
    (a, one), (b, other) = pairs(bench.loop), pairs(bench.loop)
    product.join(one, other)
    sent = 0
    while True:
        try:
            sent += a.send(bytes(65536))
        except BlockingIOError:
            if not one.reading:
                break
            bench.loop.step()
    assert sum(map(len, other.pending)) <= product.READ
    got = 0
    while got < sent:
        try:
            got += len(b.recv(1 << 20))
        except BlockingIOError:
            bench.loop.step()
    for each in (a, b):
        each.close()
    bench.until(lambda: one.socket is None and other.socket is None)


def test_what_came_before_a_reset_is_passed_on():
    bench = Bench()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    client = socket.create_connection(listener.getsockname())
    end = product.KernelSocket(bench.loop, listener.accept()[0])
    sink = Sink(end, reading=False)
    client.sendall(b"last words")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    end.write(b"unread")
    client.shutdown(socket.SHUT_WR)
    client.close()  # with a reset, since it has not read
    end.write(b"more")
    end.write(bytes(1 << 20))
    end.resume()
    bench.until(lambda: sink.finished)
    assert sink.data in (b"last words", b"") and end.socket is None
    listener.close()


def test_small_writes_are_not_held_back():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with socket.create_connection(listener.getsockname()) as connection:
            product.KernelSocket(product.PollLoop(), connection)
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="needs Linux")
def test_a_peer_that_writes_twice_does_not_wait_for_an_acknowledgement():
    bench, pauses = Bench(), []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with socket.create_connection(listener.getsockname()) as client:
            end = product.KernelSocket(bench.loop, listener.accept()[0])
            sink = Sink(end)
            for number in range(1, 31):
                begin = time.monotonic()
                client.sendall(b"o")
                client.sendall(b"k")  # held back until the first is acknowledged, which Linux delays for 40 ms
                bench.until(lambda number=number: len(sink.data) == 2 * number)
                pauses.append(time.monotonic() - begin)
                end.write(b"!")  # in a conversation acknowledgements wait for the answer
                assert client.recv(1) == b"!"
    assert sorted(pauses)[15] < 0.02
    end.abort()


def test_a_loop_follows_descriptors_that_are_closed_and_used_again():
    bench = Bench()
    for _ in range(50):
        one, other = socket.socketpair()
        got = []
        bench.loop.readers[one] = lambda one=one, got=got: got.append(one.recv(10))
        other.send(b"x")
        bench.until(lambda got=got: got)
        bench.loop.readers.pop(one)
        if random.random() < 0.5:
            bench.loop.after(0, lambda: None)
            bench.loop.step()
        one.close()
        other.close()
    bench.loop.after(0, lambda: None)
    bench.loop.step()
    assert not bench.loop.names and not bench.loop.numbers and not bench.loop.changed


def test_a_connection_that_is_refused_is_told():
    bench = Bench()
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex(probe.getsockname())
    probe.close()
    end = product.KernelSocket(bench.loop, connection, connecting=True)
    sink = Sink(end)
    end.write(b"x")
    bench.until(lambda: sink.closed)
    assert end.socket is None and not bench.loop.timers


def lines(bench, near, far, **options):
    """Two wires over real pipes; returns their lines, the descriptors, and what ended them."""
    to_far, to_near = os.pipe(), os.pipe()
    ended = []
    near.attach({}, fresh=True)
    far.attach({})
    one = product.Line(bench.loop, near, to_near[0], to_far[1], lambda e: ended.append(("near", e.text)))
    other = product.Line(
        bench.loop, far, to_far[0], to_near[1], lambda e: ended.append(("far", e.text)), **options
    )
    one.flush()
    other.flush()
    return one, other, to_far + to_near, ended


def test_a_line_carries_frames_over_pipes_and_acknowledges_within_half_a_second():
    bench = Bench()
    near, far = Wire("near"), Wire("far")
    got = []
    far.on_frame = lambda kind, channel, body: got.append(bytes(body))
    one, _, descriptors, ended = lines(bench, near, far)
    bench.until(lambda: near.greeted and far.greeted)
    near.send(DATA, 1, b"x" * 1000)
    near.flush()
    bench.until(lambda: got and not near.kept, 0.5)
    for _ in range(500):
        near.send(DATA, 1, bytes(BODY))
        near.flush()
    bench.until(lambda: len(got) == 501 and not near.kept)
    os.close(descriptors[1])
    bench.until(lambda: ended)
    assert ended == [("far", "the connection was closed")]
    one.close()
    for descriptor in (descriptors[0],) + descriptors[2:]:
        os.close(descriptor)
    assert not bench.loop.readers and not bench.loop.writers and not bench.loop.timers


def test_a_goodbye_is_understood_wherever_its_sender_has_died():
    word = product.farewell("ab12")
    near = Wire("near")
    near.attach({}, fresh=True)
    for size in (0, 3, 200):
        near.send(DATA, 1, bytes(size))
    said = b"".join(near.pull())
    for position in range(len(said) - 300, len(said)):
        bench = Bench()
        far = Wire("far")
        reader, writer = os.pipe()
        back = os.pipe()
        ended = []
        far.attach({})
        line = product.Line(bench.loop, far, reader, back[1], ended.append, word.strip())
        os.write(writer, said[:position] + word[:7])
        bench.loop.step()
        os.write(writer, word[7:])
        os.close(writer)
        bench.until(lambda ended=ended: ended)
        assert line.said_goodbye, position
        for descriptor in (reader,) + back:
            os.close(descriptor)


def test_a_goodbye_is_heard_though_nothing_can_be_written_any_more():
    word = product.farewell("ab12")
    bench = Bench()
    far = Wire("far")
    to_far, back = os.pipe(), os.pipe()
    ended = []
    far.attach({})
    line = product.Line(bench.loop, far, to_far[0], back[1], ended.append, word.strip())
    os.close(back[0])
    line.flush()
    bench.loop.after(0, lambda: None)
    bench.loop.step()
    assert not ended
    os.write(to_far[1], word)
    os.close(to_far[1])
    bench.until(lambda: ended, 1)
    assert line.said_goodbye
    os.close(to_far[0])
    os.close(back[1])


def test_a_connection_that_takes_nothing_is_given_up_though_it_stays_open():
    bench = Bench()
    far = Wire("far")
    to_far, back = os.pipe(), os.pipe()
    ended = []
    far.attach({})
    product.Line(bench.loop, far, to_far[0], back[1], ended.append).flush()
    far.send(TEXT, 1, b"x")
    os.close(back[0])
    far.ready = True
    far.flush()
    bench.until(lambda: ended, 4)
    assert "the connection broke" in ended[0].text
    for descriptor in to_far + back[1:]:
        os.close(descriptor)


def test_a_goodbye_ends_a_connection_that_stays_open():
    word = product.farewell("ab12")
    for cut in range(1, len(word)):
        bench = Bench()
        far = Wire("far")
        to_far, back = os.pipe(), os.pipe()
        ended = []
        far.attach({})
        line = product.Line(bench.loop, far, to_far[0], back[1], ended.append, word.strip())
        os.write(to_far[1], product.hello("near", {}) + word[:cut])
        bench.loop.step()
        os.write(to_far[1], word[cut:])
        bench.until(lambda ended=ended: ended, 1)
        assert line.said_goodbye, cut
        for descriptor in to_far + back:
            os.close(descriptor)


def test_an_end_without_a_goodbye_is_none():
    bench = Bench()
    far = Wire("far")
    reader, writer = os.pipe()
    back = os.pipe()
    ended = []
    far.attach({})
    line = product.Line(bench.loop, far, reader, back[1], ended.append, product.farewell("ab12").strip())
    os.write(writer, product.hello("near", {}) + product.farewell("cd34"))
    os.close(writer)
    bench.until(lambda: ended)
    assert not line.said_goodbye
    for descriptor in (reader,) + back:
        os.close(descriptor)
