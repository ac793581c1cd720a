"""The relay's wire, without processes: nothing is lost, doubled or held up, whatever happens."""

import json
import os
import random

import pytest
from rig import product
from rig.product import BODY, CONTROL, COST, DATA, HEAD_LENGTH, KEEP, SUM, TEXT, Channels, Wire, WireError
from rig.wires import SEEDS, Pair, connected, frame


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
        assert not pair.near.unconfirmed and not pair.far.unconfirmed, seed


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
        assert len(pair.near.frames.rest) <= HEAD_LENGTH + BODY + SUM.size


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
