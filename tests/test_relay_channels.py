"""Channels in a relay's wire: each with a credit of its own, so that one which nobody reads holds up no other."""

import gc
import os
import random

import pytest
from rig import product
from rig.product import BODY, WINDOW, Channels, WireError
from rig.wires import SEEDS, Pair, Sink


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
