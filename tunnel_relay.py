"""The relay: carries all links of any number of kernels over one stream that survives its connection.

A launcher starts an SSH client without any forward. What runs on the kernel machine is the upper part of this very
file, sent over the client's standard input and run by the Python found there. The layers, from the bottom:

- the *wire*: numbered frames over connections that come and go; what the other side has not acknowledged is kept,
  and sent again on the next connection;
- *channels* in the wire, each with a credit of its own, so that one which nobody reads holds up no other;
- *ends*: a channel's two ends and sockets look alike, so that any two of them can be joined;
- on the kernel machine the *far end*, which listens for kernels, starts them and reports their ends, in a *keeper*
  that outlives the login; and the *bootstrap*, which hands a login's descriptors over to the keeper;
- with ``--via`` a *job* in place of each kernel: a command that the keeper runs, such as ``srun``, and beyond it
  another far end, which is reached through the command's standard input and output by a wire of its own;
- on the front end's machine the *near end*, to which connections are attached.

Frames: kind (1 byte), channel (4), number (8), acknowledged number (8), length of the body (4), a checksum of all
that (4), big endian, then the body, and, behind a body, the checksum once more. So a line that some other program
writes into the stream is never taken for a frame, nor for a part of one. Between frames any number of newlines may
stand; one ends every flush, since programs in between may hold back what is not a whole line.
"""

import json
import os
import socket
import struct
import sys
import time
from collections import deque
from zlib import crc32

PROTOCOL = 2
BODY = 65536  # the most that one frame carries
READ = 1 << 18  # the most that is read at once
KEEP = 1 << 22  # what is not acknowledged, and kept, before the sources have to wait
QUEUE = 1 << 18  # what is not even written: more would only make the next key press wait
VECTOR = 500  # buffers in one call of the system, which allows 1024
SMALL_WRITE = (
    4096  # bytes; a peer that writes less at once, and again, may be waiting for the first to be acknowledged
)
COST = 200  # of a frame apart from its body, so that many small ones are bounded too
WINDOW = 1 << 20  # the credit of a channel in use
INITIAL = 1 << 16  # the credit that each channel begins with
POOL = 12 << 20  # the credit of all channels together, as long as there are not too many for it
CHANNELS = 8192
HELLO_LIMIT = 16384
NOISE_LIMIT = 1 << 20  # what a login may print
ACK_FRAMES, ACK_BYTES, ACK_SECONDS = 16, 1 << 18, 0.05
PING_SECONDS = 5.0
DEAD_SECONDS = 19.5  # a silent connection is noticed within 20
PROBE_SECONDS = 3.0  # what a connection gets after this side has been asleep
LAST_WORDS_SECONDS = 4.0  # from a connection that takes nothing any more until it is given up
ASLEEP_SECONDS = 4.0  # a clock that is off by more has stood still

OPEN, DATA, CREDIT, FINISH, RESET, CONTROL, TEXT = b"odcfrjt"  # numbered
ACK, PING, PONG = b"apq"  # not numbered
NUMBERED = frozenset(b"odcfrjt")
# The kinds of frames that each side may send once it has said hello. Before its hello a side sends none; the near
# side's goodbye is a line, not a frame, and nothing follows it.
SENDS = {"near": frozenset(b"odcfrjapq"), "far": frozenset(b"odcfrjtapq")}

HEADER = struct.Struct(">BIQQI")
SUM = struct.Struct(">I")
HEAD_LENGTH = HEADER.size + SUM.size
ALL_BYTES = bytes(range(256))
MARKS = {"near": b"--tunnel-relay-near--", "far": b"--tunnel-relay-far--"}
END = b"--tunnel-relay-end--"

# Why a session cannot go on:
GONE, ELSEWHERE, VERSIONS, ALTERED, REFUSED = "gone", "elsewhere", "versions", "altered", "refused"
NOISY = "noisy"  # which only the first login's noise does


class WireError(Exception):
    """A connection cannot go on.

    :param text: one line that says why
    :param error: why the session cannot either, where another connection would not help
    """

    def __init__(self, text, error=None):
        super().__init__(text)
        self.text, self.error = text, error


def one_line(text):
    """What the other side says, as one line that can be logged."""
    return " ".join(str(text)[:2000].encode("utf-8", "replace").decode("utf-8").split())


def nothing(*_):
    """What happens where nobody has asked to be told."""


# ------------------------------------------------------------------------------------------------- wire


def head(kind, channel, number, acknowledged, length):
    """The bytes that come before a frame's body; the last ``SUM.size`` of them stand behind the body too.

    :param kind: one of the bytes in :data:`SENDS`
    :param number: 0 for a kind that is not numbered
    :param length: of the body, in bytes
    """
    start = HEADER.pack(kind, channel, number, acknowledged, length)
    return start + SUM.pack(crc32(start))


def hello(side, facts):
    """What a side says first on each connection: a mark, a line of facts, and every byte there is.

    :param side: whose hello it is, ``near`` or ``far``
    """
    line = json.dumps(dict(facts, version=PROTOCOL)).encode("ascii")
    return b"\n" + MARKS[side] + line + b"\n" + ALL_BYTES + END + b"\n"


def altered(got):
    """One line that says how bytes have been changed on the way; None where they have not.

    :param got: what has become of all 256 byte values
    """
    for value in range(256):
        if got[value : value + 1] == ALL_BYTES[value : value + 1]:
            continue
        if got[value + 1 : value + 2] == ALL_BYTES[value : value + 1]:
            what = "a byte 0x{:02x} is put before 0x{:02x}".format(got[value], value)
        elif got[value : value + 2] == ALL_BYTES[value + 1 : value + 3]:
            what = "byte 0x{:02x} does not come through".format(value)
        else:
            what = "byte 0x{:02x} comes out as 0x{}".format(value, got[value : value + 1].hex() or "(nothing)")
        return "a program between the two machines changes what passes: {}; no terminal may be in between".format(
            what
        )
    return None if len(got) == 256 else "a program between the two machines adds bytes to what passes"


class HelloReader:
    """Finds the other side's hello in what arrives, after whatever a login prints."""

    def __init__(self, side):
        self.mark = MARKS[side]
        self.data, self.found, self.skipped = bytearray(), False, 0

    def feed(self, data):
        """Take the next bytes.

        :returns: what stood before the hello, the facts (None while there are none), what stands after it
        :raises WireError: no hello, an altered one, or one of another version
        """
        self.data += data
        noise = b""
        if not self.found:
            at = self.data.find(self.mark)
            self.found = at >= 0
            end = at if self.found else len(self.data) - self._held()
            noise = bytes(self.data[:end])
            del self.data[: end + len(self.mark) if self.found else end]
            self.skipped += len(noise)
            if self.skipped > NOISE_LIMIT:
                raise WireError("the login prints without end: more than {} bytes".format(NOISE_LIMIT), NOISY)
        end = self.data.find(END) if self.found else -1
        if end < 0:
            if self.found and len(self.data) > HELLO_LIMIT:
                raise WireError("the relay's first words arrive altered: they do not end", ALTERED)
            return noise, None, b""
        return noise, self._facts(bytes(self.data[:end])), bytes(self.data[end + len(END) :])

    def _held(self):
        """How many bytes at the end may be the beginning of the mark."""
        for count in range(min(len(self.mark) - 1, len(self.data)), 0, -1):
            if self.data.endswith(self.mark[:count]):
                return count
        return 0

    @staticmethod
    def _facts(text):
        line, _, rest = text.partition(b"\n")
        try:
            facts = json.loads(line.decode("ascii"))
            version, received = facts["version"], facts.get("received", 0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise WireError("the relay's first words arrive altered: {!r}".format(line[:80]), ALTERED) from None
        if version != PROTOCOL:
            text = "the relay over there speaks version {!r:.20} of its protocol, this one {}; start a new session"
            raise WireError(text.format(version, PROTOCOL), VERSIONS)
        if type(received) is not int or received < 0:
            raise WireError("the relay's first words make no sense: received {!r:.40}".format(received), ALTERED)
        problem = altered(rest)
        if problem:
            raise WireError(problem, ALTERED)
        return facts


class Wire:
    """Numbered frames, of which none is lost or doubled, over connections that come and go. It does no input and
    output: bytes that have arrived are fed to it, and what it wants written is pulled from it.

    :param side: ``near`` or ``far``
    :param pace: the longest time, in seconds, between two looks at the clocks
    :param patience: for how many seconds the other side may be silent; by default as long as a network may be
    """

    def __init__(self, side, pace=PING_SECONDS, clock=time.monotonic, wall=time.time, patience=None):
        self.side, self.pace, self.clock, self.wall_clock = side, pace, clock, wall
        self.patience = patience
        self.heard_kinds = SENDS["far" if side == "near" else "near"]
        self.on_frame = self.on_hello = self.on_noise = self.on_room = self.on_output = self.on_settled = nothing
        self.queue, self.unacked = deque(), deque()  # not yet written on this connection, and written
        self.kept = self.queued = 0  # bytes in both, and in the queue alone
        self.acked = self.received = self.told = 0
        self.waiting = False  # whether sources have been told to wait
        self.connection = 0  # counts them
        self.reader = None
        self._reset()

    def _reset(self):
        self.out, self.rest, self.need = [], bytearray(), 0
        self.ready = self.greeted = False
        self.want = set()
        self.unsaid_frames = self.unsaid_bytes = 0
        self.now = self.heard = self.pinged = self.due = self.clock()
        self.wall, self.deadline = self.wall_clock(), None

    # -- sending

    def send(self, kind, channel, body=b""):
        """Add a frame. It is never refused: sources look at :attr:`room`."""
        self.queue.append((kind, channel, body))
        self.kept += len(body) + COST
        self.queued += len(body) + COST

    def flush(self):
        self.on_output()

    @property
    def room(self):
        """Whether sources may send; when it has been denied, ``on_room()`` tells when there is some again."""
        self.waiting = self.waiting or self.kept >= KEEP or self.queued >= QUEUE
        return not self.waiting

    def _look_for_room(self):
        if self.waiting and self.kept < KEEP * 3 // 4 and self.queued < QUEUE // 2:
            self.waiting = False
            self.on_room()

    def attach(self, facts, before=b"", other=None, fresh=False):
        """Begin on a new connection, with a hello.

        :param facts: what this side says of itself
        :param before: bytes that come before the hello
        :param other: the facts of the other side's hello, where it has been read already
        :param fresh: whether frames may go out before the other side's hello, since it cannot have any
        """
        self.detach()
        self.reader = HelloReader("far" if self.side == "near" else "near")
        self.out = [before + hello(self.side, dict(facts, received=self.received))]
        self.ready = fresh and not self.acked
        if other is not None:
            self._greet(other)

    def detach(self):
        """The connection is no more."""
        self.connection += 1
        self.queue.extendleft(reversed(self.unacked))
        self.unacked.clear()
        self.queued = self.kept
        self._reset()

    def _greet(self, facts):
        count = facts.get("received", 0)
        if not self.acked <= count <= self.acked + len(self.unacked) + len(self.queue):
            text = "the other side claims to have {} messages of this session; {} to {} are possible"
            raise WireError(text.format(count, self.acked, self.acked + len(self.unacked) + len(self.queue)))
        written = self.unacked if self.ready else self.queue
        if count - self.acked > len(written):
            raise WireError("the other side claims to have messages that were never sent")
        self._drop(count, written)
        self.greeted = self.ready = True
        self.heard = self.now = self.pinged = self.due = self.clock()
        self.wall, self.deadline = self.wall_clock(), self.now + (self.patience or DEAD_SECONDS)

    def _drop(self, count, frames):
        for _ in range(count - self.acked):
            size = len(frames.popleft()[2]) + COST
            self.kept -= size
            if frames is self.queue:
                self.queued -= size
        self.acked = count

    def pull(self):
        """Buffers to write, at most some 320 KiB; :meth:`wrote` then says how much of it went out."""
        if not self.out:
            if self.ready and self.queue:
                self.want.discard(ACK)  # which every message is, too
            for kind in (PONG, PING, ACK) if self.want else ():
                if kind in self.want:
                    self.out.append(head(kind, 0, 0, self.received, 0))
            self.want.clear()
            size, number = 0, self.acked + len(self.unacked)
            while self.ready and self.queue and size < READ and len(self.out) < VECTOR:
                frame = self.queue.popleft()
                kind, channel, body = frame
                self.unacked.append(frame)
                number += 1
                start = head(kind, channel, number, self.received, len(body))
                self.out += [start, body, start[HEADER.size :]] if body else [start]
                size += len(body) + COST
            self.queued -= size
            if self.out:
                self.told, self.unsaid_frames, self.unsaid_bytes = self.received, 0, 0
                if not self.queue or not self.ready:
                    self.out.append(b"\n")
        return self.out

    def wrote(self, count):
        """``count`` bytes of what was pulled have been written."""
        done = 0
        for buffer in self.out:
            if count < len(buffer):
                break
            count -= len(buffer)
            done += 1
        del self.out[:done]
        if count:
            self.out[0] = memoryview(self.out[0])[count:]
        self._look_for_room()

    # -- receiving

    def feed(self, data):
        """Take bytes that have arrived; call ``on_noise(bytes)``, ``on_hello(facts)`` and
        ``on_frame(kind, channel, body)`` for what is in them. A body is valid during the call only.

        :raises WireError: what has arrived cannot be
        """
        connection = self.connection
        self.heard = self.clock()
        if self.greeted:
            self.deadline = self.heard + (self.patience or DEAD_SECONDS)
        else:
            noise, facts, data = self.reader.feed(data)
            if noise:
                self.on_noise(noise)
            if facts is None or connection != self.connection:
                return
            self.reader = None
            if "error" not in facts:
                self._greet(facts)
            self.on_hello(facts)
        self._parse(memoryview(data), connection)
        if self.unsaid_frames >= ACK_FRAMES or self.unsaid_bytes >= ACK_BYTES:
            self.want.add(ACK)
        self._look_for_room()

    def _parse(self, view, connection):
        at, end = 0, len(view)
        while at < end and connection == self.connection:
            if self.rest:
                # Only the frame that reads have cut in two is copied.
                more = min(self.need - len(self.rest), end - at)
                self.rest += view[at : at + more]
                at += more
                if len(self.rest) == self.need:
                    self._cut_frame()
                continue
            if view[at] == 10:
                at += 1
                continue
            size = self._size(view, at, end)
            if size is None or at + size > end:
                self.rest += view[at:end]
                self.need = size or HEAD_LENGTH
                return
            self._frame(view[at : at + size])
            at += size

    def _cut_frame(self):
        self.need = self._size(self.rest, 0, len(self.rest)) or HEAD_LENGTH
        if len(self.rest) == self.need:
            frame, self.rest = memoryview(bytes(self.rest)), bytearray()
            self._frame(frame)

    def _size(self, view, at, end):
        """How many bytes the frame that begins at ``at`` has, all told; None while its head is not complete.

        :raises WireError: no frame begins like this
        """
        start = bytes(view[at : min(end, at + HEAD_LENGTH)])
        if start[0] not in self.heard_kinds:
            raise WireError("a message of unknown kind 0x{:02x} has arrived".format(start[0]))
        if len(start) < HEAD_LENGTH:
            return None
        if SUM.unpack_from(start, HEADER.size)[0] != crc32(start[: HEADER.size]):
            raise WireError("bytes have arrived that are no message: {!r}".format(start[:40]))
        length = HEADER.unpack_from(start)[4]
        if length > BODY:
            raise WireError("a message of {} bytes has arrived, over the limit".format(length))
        return HEAD_LENGTH + (length + SUM.size if length else 0)

    def _frame(self, frame):
        body = frame[HEAD_LENGTH : max(HEAD_LENGTH, len(frame) - SUM.size)]
        if body and frame[len(frame) - SUM.size :] != frame[HEADER.size : HEAD_LENGTH]:
            raise WireError("bytes have been put into a message, or are missing from it")
        kind, channel, number, acked, _ = HEADER.unpack_from(frame)
        if acked != self.acked:
            if not self.acked < acked <= self.acked + len(self.unacked):
                raise WireError("the other side acknowledges message {}, which was not sent".format(acked))
            self._drop(acked, self.unacked)
            if not self.kept:
                self.on_settled()
        if kind in NUMBERED:
            if number != self.received + 1:
                raise WireError("message {} has arrived where {} was due".format(number, self.received + 1))
            self.received = number
            self.unsaid_frames += 1
            self.unsaid_bytes += len(body)
            self.on_frame(kind, channel, body)
        elif kind == PING:
            self.want.add(PONG)

    # -- time

    def acknowledge(self):
        """Whether there is something to acknowledge; it is then put out."""
        if self.received > self.told:
            self.want.add(ACK)
        return ACK in self.want

    def probe(self):
        """Ask the other side for a sign of life, soon: this side has slept."""
        self.pinged = self.clock()
        self.want.add(PING)
        self.deadline = self.pinged + (self.patience or PROBE_SECONDS)

    def tick(self):
        """Look at the clocks: ping a silent connection, and notice a dead one.

        This side may have been asleep meanwhile, and then silence says nothing: either the wall clock has gone on
        and the other has not (Linux and macOS do not count the time of a suspend), or this look comes too late.

        :returns: seconds until the next look; None when the connection is dead
        """
        now, wall = self.clock(), self.wall_clock()
        slept = max((wall - self.wall) - (now - self.now), now - self.due) > ASLEEP_SECONDS
        self.now, self.wall = now, wall
        wait = self.pace
        if self.greeted:
            if slept:
                self.probe()
            elif now >= self.deadline:
                return None
            elif now - max(self.heard, self.pinged) >= PING_SECONDS:
                self.pinged = now
                self.want.add(PING)
            wait = min(wait, self.deadline - now, PING_SECONDS - (now - max(self.heard, self.pinged)))
        wait = max(wait, 0.01)
        self.due = now + wait
        return wait


# ------------------------------------------------------------------------------------------------- channels


class Channels:
    """The channels of a wire, and what else its frames carry: control messages, and text that kernels print.

    :param first: the number of the first channel that this side opens: 1 on the near side, 2 on the far one
    """

    def __init__(self, wire, first):
        self.wire, self.next, self.expected = wire, first, 3 - first
        self.streams, self.blocked = {}, {}  # those that a source waits for; in the order of their turns
        self.on_open = self.on_control = self.on_text = self.on_change = nothing
        wire.on_frame, wire.on_room = self.frame, self.room

    def open(self, kernel, facts):
        """Open a channel.

        :param kernel: the kernel's number
        :param facts: what the other side needs to know of it
        """
        stream = self.streams[self.next] = Stream(self, self.next, kernel)
        self.wire.send(OPEN, self.next, json.dumps(dict(facts, kernel=kernel)).encode("ascii"))
        self.next += 2
        self.wire.flush()
        return stream

    def control(self, **message):
        self.wire.send(CONTROL, 0, json.dumps(message).encode("ascii"))
        self.wire.flush()

    def of(self, kernel):
        return [stream for stream in self.streams.values() if stream.kernel == kernel]

    def drop(self, kernel):
        """Forget the channels of a kernel that is no more, without a word to the other side."""
        for stream in self.of(kernel):
            stream.forget()

    def window(self):
        """The credit of a channel: with many of them a share of what all may have."""
        return min(WINDOW, max(INITIAL, POOL // max(1, len(self.streams))))

    def room(self):
        for stream in list(self.blocked):
            if not self.wire.room:
                break
            stream.unblock()

    def frame(self, kind, channel, body):
        """:raises WireError: a frame that cannot be"""
        if kind == CONTROL:
            self.on_control(message_in(body))
        elif kind == TEXT:
            self.on_text(channel, bytes(body))
        elif kind == OPEN:
            if len(self.streams) >= CHANNELS:
                raise WireError("more than {} channels are opened".format(CHANNELS))
            if channel != self.expected:
                raise WireError("channel {} is opened where {} was due".format(channel, self.expected))
            facts = message_in(body)
            if type(facts.get("kernel")) is not int:
                raise WireError("a channel of no kernel is opened")
            self.expected += 2
            stream = self.streams[channel] = Stream(self, channel, facts["kernel"])
            self.on_open(stream, facts)
        elif channel in self.streams:
            self.streams[channel].frame(kind, body)
        elif channel >= (self.next if (channel - self.next) % 2 == 0 else self.expected) or not channel:
            raise WireError("a message for channel {} has arrived, which was never opened".format(channel))


def message_in(body):
    """The JSON object in a frame's body."""
    try:
        message = json.loads(bytes(body).decode("ascii"))
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise WireError("a control message makes no sense: {!r}".format(bytes(body[:80])))
    return message


class Stream:
    """One channel, seen from one side: an end like :class:`SocketEnd`, and to be used like it.

    It begins paused. ``on_data(data)`` gets what arrives (valid during the call only), ``on_finish()`` tells that
    no more will, ``on_room()`` that :meth:`write` may be called again after it has denied room, ``on_close()``
    that the other side has given the channel up; each comes after all that was sent before it.
    """

    def __init__(self, channels, number, kernel):
        self.channels, self.wire, self.number, self.kernel = channels, channels.wire, number, kernel
        self.on_data = self.on_finish = self.on_room = self.on_close = nothing
        self.credit = self.allowance = self.window = (
            INITIAL  # to send; to receive; how much the latter is renewed to
        )
        self.pending = deque()
        self.inbox, self.held = deque(), 0  # what has arrived while paused
        self.paused, self.handing = True, False
        self.finishing = self.closing = False  # asked for, after what is pending
        self.sent_finish = self.got_finish = self.got_reset = self.gone = False

    # -- what the end's owner calls

    def write(self, data):
        """Send ``data``, all of it, as the other side gives credit.

        :returns: whether there is room for more at once; else ``on_room()`` will tell
        """
        if self.finishing or self.closing or self.gone:
            return True
        if self.pending:
            self.pending.append(bytes(data))
            return False
        view = memoryview(data)
        sent = self._send(view)
        if sent < len(view):
            self.pending.append(bytes(view[sent:]))
        self.wire.flush()
        if self.pending or not self.wire.room:
            self.channels.blocked[self] = None
            return False
        return True

    def finish(self):
        """No more will be written."""
        if not (self.finishing or self.closing or self.gone):
            self.finishing = True
            self._go_on()
            self.wire.flush()

    def close(self):
        """Give the channel up, both ways, as soon as what is pending has gone. Nothing is called back any more."""
        if self.gone or self.closing:
            return
        self.closing = True
        self.on_data = self.on_finish = self.on_room = self.on_close = nothing
        self.inbox.clear()
        self.held = 0
        self._go_on()
        self.wire.flush()
        if not self.gone:
            self.channels.on_change(self)

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False
        if not self.handing:
            self._hand_out()
            self.wire.flush()

    @property
    def done(self):
        """Whether all that the other side has sent has been handed out."""
        return self.gone or self.closing or (self.got_finish and not self.inbox)

    @property
    def silent(self):
        """Whether all that this side will ever send has been sent."""
        return self.gone or self.sent_finish

    def forget(self):
        self.gone = True
        self.on_data = self.on_finish = self.on_room = self.on_close = nothing
        self.pending.clear()
        self.inbox.clear()
        self.channels.streams.pop(self.number, None)
        self.channels.blocked.pop(self, None)

    # -- sending

    def _send(self, view):
        at = 0
        while at < len(view) and self.credit:
            size = min(BODY, self.credit, len(view) - at)
            self.wire.send(DATA, self.number, bytes(view[at : at + size]))
            self.credit -= size
            at += size
        return at

    def _go_on(self):
        """Send what is pending, and then what was asked for."""
        while self.pending and self.credit:
            view = memoryview(self.pending.popleft())
            sent = self._send(view)
            if sent < len(view):
                self.pending.appendleft(view[sent:])
        if self.pending:
            return
        if self.closing:
            if not (self.sent_finish and self.got_finish):
                self.wire.send(RESET, self.number)
            self.forget()
            self.channels.on_change(self)
        elif self.finishing and not self.sent_finish:
            self.sent_finish = True
            self.wire.send(FINISH, self.number)
            self._look_whether_over()
            self.channels.on_change(self)

    def unblock(self):
        if not self.pending:
            self.channels.blocked.pop(self, None)
            self.on_room()

    # -- receiving

    def frame(self, kind, body):
        if self.got_reset:
            raise WireError("channel {} goes on after it was given up".format(self.number))
        if kind == CREDIT:
            if len(body) != 4:
                raise WireError("a credit of {} bytes' length has arrived".format(len(body)))
            self.credit += struct.unpack(">I", body)[0]
            if self.credit > WINDOW:
                raise WireError("channel {} gets more credit than there is".format(self.number))
            self._go_on()
            if self in self.channels.blocked and self.wire.room:
                self.unblock()
        elif self.got_finish and kind != RESET:
            raise WireError("channel {} goes on after its end".format(self.number))
        elif kind == DATA:
            self.allowance -= len(body)
            if self.allowance < 0:
                raise WireError("channel {} has sent more than its credit".format(self.number))
            self._arrived(kind, body)
        else:
            self.got_finish = True
            self.got_reset = kind == RESET
            self._arrived(kind, b"")

    def _arrived(self, kind, body):
        if kind == RESET:
            self.pending.clear()  # nobody takes it any more
            self.finishing = self.sent_finish = True
            if self.closing:
                self.forget()
                self.channels.on_change(self)
                return
        if self.closing:
            self._renew()  # dropped, but the other side may have to get rid of more before it can close too
            return
        if self.paused or self.inbox or self.handing:
            self.inbox.append((kind, bytes(body)))
            self.held += len(body)
        else:
            self._hand(kind, body)

    def _hand_out(self):
        self.handing = True
        while self.inbox and not self.paused:
            kind, body = self.inbox.popleft()
            self.held -= len(body)
            self._hand(kind, body)
        self.handing = False

    def _hand(self, kind, body):
        if kind == DATA:
            self.on_data(body)
            self._renew()
        elif kind == FINISH:
            self.on_finish()
            self._look_whether_over()
            self.channels.on_change(self)
        else:
            on_close = self.on_close
            self.forget()
            on_close()
            self.channels.on_change(self)

    def _renew(self):
        """Give the other side new credit when it has used up half of what it had."""
        left = self.allowance + self.held
        if left > self.window // 2 or self.got_finish or self.gone:
            return
        self.window = self.channels.window()
        if self.window > left:
            self.wire.send(CREDIT, self.number, struct.pack(">I", self.window - left))
            self.allowance += self.window - left

    def _look_whether_over(self):
        if self.sent_finish and self.got_finish and not self.inbox and not self.gone:
            self.channels.streams.pop(self.number, None)
            self.channels.blocked.pop(self, None)


# ------------------------------------------------------------------------------------------------- ends


class Watched(dict):
    """What a loop waits for: descriptors or sockets, and what to do then. It notes which have changed."""

    def __init__(self, loop):
        super().__init__()
        self.loop = loop

    def __setitem__(self, each, action):
        super().__setitem__(each, action)
        number = each if isinstance(each, int) else each.fileno()
        self.loop.names[number] = each
        self.loop.changed.add(number)
        self.loop.numbers[each] = number

    def __delitem__(self, each):
        super().__delitem__(each)
        self.loop.changed.add(self.loop.numbers[each])
        if each not in self.loop.readers and each not in self.loop.writers:
            del self.loop.numbers[each]

    def pop(self, each, default=None):
        if each not in self:
            return default
        action = self[each]
        del self[each]
        return action


class PollLoop:
    """Waits for whatever comes first: something to read, room to write, or a moment in time.

    It is what ``tunnel.Loop`` is, to the outside; but on Linux its steps do not take the longer the more there is
    to wait for, and descriptors may be 1024 and above.
    """

    def __init__(self):
        import select

        self.select = select
        self.names, self.numbers, self.changed = {}, {}, set()
        self.readers, self.writers, self.timers = Watched(self), Watched(self), []
        self.count = 0  # makes each timer unique, so that their actions are never compared
        self.epoll = select.epoll() if hasattr(select, "epoll") else None

    def after(self, seconds, action):
        """Have ``action()`` called once, ``seconds`` from now; returns the timer, for :meth:`cancel`."""
        self.count += 1
        timer = (time.monotonic() + seconds, self.count, action)
        self.timers.append(timer)
        return timer

    def cancel(self, timer):
        if timer in self.timers:
            self.timers.remove(timer)

    def step(self):
        """Wait for the next event and handle it."""
        seconds = max(0, min(self.timers)[0] - time.monotonic()) if self.timers else None
        readable, writable = self._wait(seconds)
        for ready, actions in ((writable, self.writers), (readable, self.readers)):
            for each in ready:
                if each in actions:
                    actions[each]()
        for timer in [timer for timer in self.timers if timer[0] <= time.monotonic()]:
            if timer in self.timers:
                self.timers.remove(timer)
                timer[2]()

    def _wait(self, seconds):
        while self.changed:
            self._change(self.changed.pop())
        if not self.epoll:
            return self.select.select(list(self.readers), list(self.writers), [], seconds)[:2]
        readable, writable = [], []
        for number, event in self.epoll.poll(seconds):
            if number in self.names:
                if event & ~self.select.EPOLLOUT:
                    readable.append(self.names[number])
                if event & ~self.select.EPOLLIN:
                    writable.append(self.names[number])
        return readable, writable

    def _change(self, number):
        """Tell the system what is to be waited for at a descriptor, which may be another than before."""
        each = self.names[number]
        mask = 0
        if self.epoll:
            mask |= self.select.EPOLLIN if each in self.readers else 0
            mask |= self.select.EPOLLOUT if each in self.writers else 0
            try:
                if not mask:
                    self.epoll.unregister(number)
                else:
                    self.epoll.modify(number, mask)
            except OSError:
                if mask:
                    self.epoll.register(number, mask)
        if each not in self.readers and each not in self.writers:
            del self.names[number]


BUFFER = memoryview(bytearray(READ))  # one for all that is read: what is left of it is copied


class KernelSocket:
    """A connected socket as an end. It begins paused; see :class:`Stream` for what is called back.

    :param connecting: whether it has not connected yet; it is given up after 15 s
    """

    def __init__(self, loop, connection, connecting=False):
        self.loop, self.socket = loop, connection
        self.on_data = self.on_finish = self.on_room = self.on_close = nothing
        self.pending = deque()
        self.count = 0  # of bytes read
        self.reading = self.read_all = self.finishing = self.wrote_all = self.closing = self.denied = False
        self.connecting = self.quick = None
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.quick = getattr(socket, "TCP_QUICKACK", None)  # Linux
        if connecting:
            self.connecting = loop.after(15, self.abort)
            loop.writers[connection] = self._connected

    def write(self, data):
        """Send ``data``, all of it.

        :returns: whether there is room for more at once; else ``on_room()`` will tell
        """
        if self.finishing or self.closing or self.wrote_all or self.socket is None:
            return True
        sent = 0
        if not self.pending and not self.connecting:
            try:
                sent = self.socket.send(data)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self._broken()
                return True
            if sent == len(data):
                return True
        self.pending.append(memoryview(bytes(data[sent:])))
        if not self.connecting:
            self.loop.writers[self.socket] = self._write
        self.denied = True
        return False

    def finish(self):
        """No more will be written: the other end is told so after what is pending."""
        self.finishing = True
        self._look_whether_over()

    def close(self):
        """Close it as soon as what is pending has gone. Nothing is called back any more."""
        self.on_data = self.on_finish = self.on_room = self.on_close = nothing
        self.closing = self.finishing = True
        self.pause()
        self._look_whether_over()

    def abort(self):
        """Close it at once, and call ``on_close()``."""
        on_close = self.on_close
        self._shut()
        on_close()

    def pause(self):
        self.reading = False
        if self.socket is not None:
            self.loop.readers.pop(self.socket, None)

    def resume(self):
        if self.socket is not None and not self.read_all and not self.closing:
            self.reading = True
            if not self.connecting:
                self.loop.readers[self.socket] = self._read

    def _connected(self):
        self.loop.cancel(self.connecting)
        del self.loop.writers[self.socket]
        if self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort()
            return
        self.connecting = None
        if self.pending:
            self.loop.writers[self.socket] = self._write
        elif self.finishing:
            self._look_whether_over()
        if self.reading:
            self.resume()

    def _read(self):
        # With many channels each takes less at once, so that all together stay within bounds.
        size = READ if len(self.loop.readers) < 32 else BODY
        try:
            count = self.socket.recv_into(BUFFER, size)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
            self.wrote_all = True
        if count:
            self.count += count
            if count < SMALL_WRITE and self.quick:
                self.socket.setsockopt(socket.IPPROTO_TCP, self.quick, 1)  # holds for this once
            self.on_data(BUFFER[:count])
            return
        self.read_all = True
        self.pause()
        self.on_finish()
        if self.socket is not None:
            self._look_whether_over()

    def _write(self):
        while self.pending:
            try:
                sent = self.socket.send(self.pending[0])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._broken()
                return
            if sent < len(self.pending[0]):
                self.pending[0] = self.pending[0][sent:]
                return
            self.pending.popleft()
        del self.loop.writers[self.socket]
        if self.denied:
            self.denied = False
            self.on_room()
        if self.socket is not None:
            self._look_whether_over()

    def _broken(self):
        """Nothing can be written any more; but what the other end has sent before can still be read."""
        self.pending.clear()
        self.wrote_all = True
        self.loop.writers.pop(self.socket, None)
        self._look_whether_over()
        if self.denied:
            self.denied = False
            self.on_room()

    def _look_whether_over(self):
        if self.socket is None or self.pending or self.connecting:
            return
        if self.finishing and not self.wrote_all:
            self.wrote_all = True
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the other end is not connected any more
        if self.closing or (self.wrote_all and self.read_all):
            self._shut()

    def _shut(self):
        if self.socket is not None:
            self.loop.cancel(self.connecting)
            self.loop.readers.pop(self.socket, None)
            self.loop.writers.pop(self.socket, None)
            self.socket.close()
            self.socket, self.reading = None, False
            self.pending.clear()


def join(one, other):
    """Pass on what comes from either of two ends to the other, half-closes included."""
    for source, sink in ((one, other), (other, one)):
        source.on_data = lambda data, source=source, sink=sink: sink.write(data) or source.pause()
        source.on_finish, source.on_close, sink.on_room = sink.finish, sink.close, source.resume
    one.resume()
    other.resume()


def widen(descriptor):
    """Let a pipe hold 1 MiB, where the system can (Linux, F_SETPIPE_SZ)."""
    try:
        import fcntl

        fcntl.fcntl(descriptor, 1031, 1 << 20)
    except (ImportError, OSError, TypeError):
        pass  # no pipe, another system, or its limit is lower: it works, if slower


CONNECTION_CLOSED = "the connection was closed"


class Line:
    """One connection of a wire: two descriptors (or sockets) in a loop, and the wire's times.

    :param on_end: called once with the :class:`WireError` that says why the connection is no more
    :param goodbye: what the other side's watchdog says last, when there is nobody any more
    """

    def __init__(self, loop, wire, source, sink, on_end, goodbye=b""):
        self.loop, self.wire, self.source, self.sink, self.on_end = loop, wire, source, sink, on_end
        self.goodbye, self.tail = goodbye, b""
        self.failed = None  # the error after which this line only waits for the rest of a goodbye
        self.closed = self.blocked = self.silent = False
        self.ack_timer = self.timer = None
        for each in {source, sink}:
            if isinstance(each, int):
                os.set_blocking(each, False)
                widen(each)
            else:
                each.setblocking(False)
        wire.on_output = self.flush
        loop.readers[source] = self._read
        self._tick()

    def close(self):
        """Leave the loop; the descriptors stay open, and the wire keeps what has not been acknowledged."""
        if self.closed:
            return
        self.closed = True
        self.loop.readers.pop(self.source, None)
        self.loop.writers.pop(self.sink, None)
        self.loop.cancel(self.ack_timer)
        self.loop.cancel(self.timer)
        self.wire.on_output = nothing
        self.wire.detach()

    def _end(self, text, error=None):
        if not self.closed:
            self.close()
            self.on_end(WireError(text, error))

    @property
    def said_goodbye(self):
        """Whether the last that came was a goodbye, be it in the middle of a message that its sender died over."""
        return bool(self.goodbye) and self.goodbye in self.tail

    @property
    def _may_say_goodbye(self):
        """Whether the last bytes that came may be the beginning of a goodbye."""
        return any(self.tail.endswith(self.goodbye[:count]) for count in range(1, len(self.goodbye)))

    def _take(self):
        if isinstance(self.source, int):
            return os.readv(self.source, [BUFFER])
        return self.source.recv_into(BUFFER)

    def _read(self):
        try:
            count = self._take()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end("the connection broke: {}".format(error.strerror or error))
            return
        if not count:
            self._end(CONNECTION_CLOSED)
            return
        self.feed(BUFFER[:count])

    def read_ahead(self):
        """Take all that has come already, before anything of it is acted upon: if the other side has gone since,
        nothing is."""
        data = bytearray()
        while len(data) < 2 * KEEP:
            try:
                count = self._take()
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                count = 0
            if not count:
                self._end(CONNECTION_CLOSED)
                return
            data += BUFFER[:count]
        if data:
            self.feed(bytes(data))

    def feed(self, data):
        """Take bytes that have arrived."""
        self.tail = (self.tail + bytes(data[-64:]))[-64:]
        if self.said_goodbye:  # then nothing that it has asked for before is begun any more
            self._end("the other side has said goodbye")
            return
        try:
            if not self.failed:
                self.wire.feed(data)
        except WireError as error:
            self.failed = error
        if self.failed and not self._may_say_goodbye:
            self._end(self.failed.text, self.failed.error)
        elif self.failed and not self.closed:
            self._await_goodbye()
        elif not self.closed:
            self.flush()
            if self.wire.received > self.wire.told and self.ack_timer is None:
                self.ack_timer = self.loop.after(ACK_SECONDS, self._acknowledge)

    def _await_goodbye(self):
        self.loop.cancel(self.timer)
        self.timer = self.loop.after(LAST_WORDS_SECONDS, lambda: self._end(self.failed.text, self.failed.error))

    def _acknowledge(self):
        self.ack_timer = None
        if self.wire.acknowledge():
            self.flush()

    def _tick(self):
        wait = self.wire.tick()
        if wait is None:
            self.silent = True
            self._end("nothing has come for {:.0f} s".format(self.wire.now - self.wire.heard))
            return
        self.timer = self.loop.after(wait, self._tick)
        if self.wire.want:
            self.flush()

    def flush(self):
        """Write what there is to write, as far as it goes at once."""
        if self.blocked or self.closed:
            return
        for _ in range(4):
            buffers = self.wire.pull()
            if not buffers:
                return
            try:
                count = self._write(buffers)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._break(error)
                return
            whole = count == sum(map(len, buffers))
            self.wire.wrote(count)
            if not whole:
                break
        self.blocked = True
        self.loop.writers[self.sink] = self._writable

    def _break(self, error):
        """Nothing can be written any more. What the other side has said before is still read, to its end: it may
        have been a goodbye. Who writes is not called back from here, either."""
        self.blocked = True
        self.loop.cancel(self.timer)
        text = "the connection broke: {}".format(error.strerror or error)
        self.timer = self.loop.after(LAST_WORDS_SECONDS, lambda: self._end(text))

    def _write(self, buffers):
        if isinstance(self.sink, int):
            return os.writev(self.sink, buffers)
        if hasattr(self.sink, "sendmsg"):
            return self.sink.sendmsg(buffers)
        return self.sink.send(b"".join(buffers))

    def say_last(self, word):
        """Close this line, and say goodbye as soon as it can be said: it is understood in the middle of a message,
        too."""
        before = [] if self.closed else list(self.wire.out)
        self.close()
        self.loop.readers[self.source] = self._discard
        self._part(before, word)

    def _discard(self):
        """A client ends only when what has come for it has been taken."""
        try:
            more = self._take()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            more = 0
        if not more:
            self.loop.readers.pop(self.source, None)

    def _part(self, before, word):
        self.loop.writers.pop(self.sink, None)
        try:
            count = self._write(before + [word])
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError:
            return  # nobody hears it
        word = word[max(0, count - sum(map(len, before))) :]
        if word:
            self.loop.writers[self.sink] = lambda: self._part([], word)

    def hush(self):
        """The descriptors are about to be closed."""
        self.loop.readers.pop(self.source, None)
        self.loop.writers.pop(self.sink, None)

    def _writable(self):
        self.loop.writers.pop(self.sink, None)
        self.blocked = False
        self.flush()


# ------------------------------------------------------------------------------------------------- far end

HANG_UP_SECONDS = 5.0  # from SIGHUP to SIGKILL
DRAIN_SECONDS = 2.0  # a kernel's socket that its children hold open says nothing after its end: given up then
TEXT_LIMIT, TEXT_TAIL = 1 << 18, 4096  # what a kernel may print before only its last words count
BLOCKS = 50  # of ports that are tried


def draw_block():
    """The first port of a block of ten, from 10000 to 32759: below every system's ephemeral ports."""
    return 10000 + 10 * (int.from_bytes(os.urandom(4), "big") % 2276)


def listen_on(ports):
    """Sockets that listen on these ports of the loopback; None where one of them is taken.

    :raises OSError: no more sockets are to be had
    """
    import errno

    listeners = []
    for port in ports:
        listener = socket.socket()
        listeners.append(listener)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(8)
            listener.setblocking(False)
        except OSError as error:
            for each in listeners:
                each.close()
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return None
            raise
    return listeners


def listen_in_block(count):
    """Listeners for ``count`` ports of a block: the main link's two, then four that stay free, since kernels up to
    11.0 listen there with ``tunnel.m``, then the others.

    :raises OSError: there is no such block
    """
    for _ in range(BLOCKS):
        base = draw_block()
        free = listen_on(range(base + 2, base + 6))
        if free is None:
            continue
        for each in free:
            each.close()
        listeners = listen_on(([base, base + 1] + list(range(base + 6, base + 10)))[:count])
        if listeners is not None:
            return listeners
    raise OSError(98, "no block of ports is free in {} tries".format(BLOCKS))


def owner_of(peer, port):
    """The user whose process holds the other end of a connection within this machine (Linux).

    :param peer: address and port of the other end
    :param port: the port that it has connected to
    :returns: the user's number; -1 when the connection is not to be found; None where the system does not tell
    """
    address = struct.unpack("=I", socket.inet_aton(peer[0]))[0]
    ends = "{:08X}:{:04X}".format(address, peer[1]), ":{:04X}".format(port)
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as stream:
                lines = stream.readlines()
        except OSError:
            return None
        for line in lines:
            words = line.split()
            if words[1].endswith(ends[0]) and words[2].endswith(ends[1]):
                orphan = words[3] != "01" and words[7] == "0"  # closed: the system has forgotten whose it was
                return -1 if orphan and os.getuid() else int(words[7])
    return -1


def expanded(path):
    """A kernel's path with a leading ``~/`` or ``$HOME/`` resolved, as a shell would."""
    for start in ("~/", "$HOME/"):
        if path.startswith(start):
            home = os.environ.get("HOME") or os.path.expanduser("~")
            return os.path.join(home, path[len(start) :])
    return path


def spawn_in_terminal(argv, limits):
    """Start a program in a session and a terminal of its own: who closes the terminal hangs up on it.

    :param limits: the limits on open files that it shall have
    :returns: process id, the terminal, and a pipe that says why the program could not be started, or just ends
    """
    import fcntl
    import signal
    import termios

    master, slave = os.openpty()
    reader, writer = os.pipe()
    try:
        modes = termios.tcgetattr(slave)
        modes[1] &= ~termios.OPOST
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, modes)
    except termios.error:
        pass  # its output then has carriage returns
    pid = os.fork()
    if pid:
        os.close(slave)
        os.close(writer)
        return pid, master, reader
    try:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(slave, number)
        signal.set_wakeup_fd(-1)
        for name in ("SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGTERM", "SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        set_limits(limits)
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            if error.errno != 8 or not is_text(argv[0]):  # ENOEXEC: a script without #!, which a shell runs itself
                raise
            os.execv("/bin/sh", ["sh"] + argv)
    except OSError as error:
        os.write(writer, "{} {}".format(error.errno, error.strerror).encode("utf-8", "replace"))
    finally:
        os._exit(127)


def is_text(program):
    """Whether a shell would take a program that the system does not for a script, as they all look for it: by a
    first line without a zero byte."""
    folders = [""] if "/" in program else os.get_exec_path()
    paths = [os.path.join(folder, program) for folder in folders]
    try:
        with open(next(path for path in paths if os.access(path, os.X_OK)), "rb") as stream:
            return b"\0" not in stream.read(80).partition(b"\n")[0]
    except (OSError, StopIteration):
        return True  # the shell will say why it cannot be read


def set_limits(limits):
    if limits:
        import resource

        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        except (OSError, ValueError):
            pass  # it then runs with what there is


def raise_limits():
    """Allow this process as many open files as it may have; returns the limits from before."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = limits[1] if 0 <= limits[1] < 65536 else 65536
    if most > limits[0] >= 0:
        set_limits((most, limits[1]))
    return limits


class KernelProcess:
    """One kernel of the far end: its listeners, its terminal, its sockets, its end."""

    def __init__(self, far, number):
        self.far, self.loop, self.channels, self.number = far, far.loop, far.channels, number
        self.listeners, self.ends = [], {}  # the socket of each channel
        self.path = self.pid = self.terminal = self.verdict = self.code = self.killer = self.drain = None
        self.printed, self.left_out, self.tail = 0, 0, b""
        self.counts, self.unwanted = {}, False

    def start(self, argv, count):
        """:param argv: ``{0}`` to ``{5}`` in its words stand for the ports that are listened on
        :param count: how many ports
        """
        try:
            self.listeners = listen_in_block(count) if count else []
            ports = [listener.getsockname()[1] for listener in self.listeners]
            for position, listener in enumerate(self.listeners):
                self.loop.readers[listener] = lambda position=position: self._accept(position)
            for position, port in enumerate(ports):
                argv = argv[:1] + [word.replace("{{{}}}".format(position), str(port)) for word in argv[1:]]
            self.channels.control(told="ports", kernel=self.number, ports=ports)
            argv = [expanded(argv[0])] + argv[1:]
            self.pid, self.terminal, self.verdict = spawn_in_terminal(argv, self.far.limits)
        except OSError as error:
            self.say("the kernel cannot be started: {}".format(error.strerror or error))
            self._exited(126)
            return
        os.set_blocking(self.terminal, False)
        self.loop.readers[self.terminal] = self._print
        self.path = argv[0]
        self.loop.readers[self.verdict] = self._judge

    def say(self, text):
        self.channels.wire.send(TEXT, self.number, text.encode("utf-8", "replace")[: BODY - 1] + b"\n")
        self.channels.wire.flush()

    def _judge(self):
        """Whether the program runs."""
        words = os.read(self.verdict, 200).decode("utf-8", "replace").split(None, 1)
        del self.loop.readers[self.verdict]
        os.close(self.verdict)
        self.verdict = None
        if not words:
            self.channels.control(told="started", kernel=self.number, pid=self.pid)
            return
        missing = words[0] == "2" and os.path.exists(self.path)  # that of a script
        self.say("{}: {}{}".format(self.path, "bad interpreter: " if missing else "", words[1]))
        self.code = 127 if words[0] == "2" else 126  # as a shell has it: ENOENT, and all else

    def _print(self):
        try:
            data = os.read(self.terminal, 16384)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""  # EIO: nobody has the terminal any more
        if not data:
            self._close_terminal()
            self.look_whether_over()
            return
        shown = data[: max(0, TEXT_LIMIT - self.printed)]
        self.printed += len(data)
        if shown:
            self.channels.wire.send(TEXT, self.number, shown)
            self.channels.wire.flush()
        self.tail = (self.tail + data[len(shown) :])[-TEXT_TAIL:]
        self.left_out += len(data) - len(shown)

    def _close_terminal(self):
        if self.terminal is not None:
            self.loop.readers.pop(self.terminal, None)
            os.close(self.terminal)
            self.terminal = None
        if self.left_out:
            text = "\n[{} bytes are left out]\n".format(self.left_out - len(self.tail)).encode("ascii")
            self.channels.wire.send(TEXT, self.number, text + self.tail)
            self.left_out = 0

    def _accept(self, position):
        listener = self.listeners[position]
        try:
            connection, peer = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError:  # no descriptor is left: not again at once
            del self.loop.readers[listener]
            self.loop.after(1, lambda: self._listen_again(position))
            return
        owner = owner_of(peer, listener.getsockname()[1])
        if owner is None:
            self._close_listener(listener)  # the first one only
        elif owner != os.getuid():
            connection.close()
            self.say("a connection of another user (number {}) was turned away".format(owner))
            return
        self._carry(self.channels.open(self.number, {"listener": position}), KernelSocket(self.loop, connection))

    def _listen_again(self, position):
        if position < len(self.listeners) and self.listeners[position].fileno() >= 0:
            self.loop.readers[self.listeners[position]] = lambda: self._accept(position)

    def _close_listener(self, listener):
        self.loop.readers.pop(listener, None)
        listener.close()

    def connect(self, stream, host, port):
        """Connect a channel that the near side has opened."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)[0]
            connection = socket.socket(family, kind, protocol)
            connection.setblocking(False)
            connection.connect_ex(address)
        except (OSError, ValueError, TypeError, OverflowError) as error:
            self.say("cannot connect to {}@{}: {}".format(port, host, error))
            stream.close()
            return
        end = KernelSocket(self.loop, connection, connecting=True)
        self._carry(stream, end)

    def _carry(self, stream, end):
        self.ends[stream] = end
        join(end, stream)

    def hang_up(self):
        """End the kernel: it gets a SIGHUP, as from a terminal that is gone, and has 5 s. (The WSTP library
        catches SIGTERM.)"""
        import signal

        self.unwanted = True
        if self.pid is not None and self.code is None and self.killer is None:
            self._signal(signal.SIGHUP)
            self._signal(signal.SIGCONT)  # one that is stopped hears nothing
            self.killer = self.loop.after(HANG_UP_SECONDS, lambda: self._signal(signal.SIGKILL))

    def _signal(self, number):
        if self.pid is not None:
            try:
                os.killpg(self.pid, number)
            except OSError:
                pass  # it has ended meanwhile

    def reap(self):
        """Look whether the process has ended."""
        if self.pid is None:
            return
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid:
            if self.verdict is not None:
                self._judge()
            self.loop.cancel(self.killer)
            self.pid = None
            self._exited(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))

    def _exited(self, code):
        self.code = code if self.code is None else self.code
        for position, listener in enumerate(self.listeners):
            if listener.fileno() >= 0:
                self._accept(position)  # what had connected already
                self._close_listener(listener)
        self.listeners = []
        self.channels.control(told="exit", kernel=self.number, code=self.code)
        self.drain = self.loop.after(DRAIN_SECONDS, self._stop_draining)
        self.look_whether_over()

    def _stop_draining(self):
        """What has said nothing since the last look, though it was listened to, is not waited for; nor is anything
        of a kernel that was hung up on."""
        for stream, end in list(self.ends.items()):
            if self.unwanted:
                stream.forget()
            elif end.reading and self.counts.get(stream) == end.count:
                end.abort()
                stream.finish()
            self.counts[stream] = end.count
        self._close_terminal()
        self.drain = self.loop.after(DRAIN_SECONDS / 2, self._stop_draining)
        self.look_whether_over()

    def look_whether_over(self):
        """The kernel's end is told when all its data has been sent."""
        if self.code is None or self.pid is not None or self.terminal is not None or self.drain is None:
            return
        if not all(stream.silent for stream in self.channels.of(self.number)):
            return
        self.loop.cancel(self.drain)
        self.drain = None
        for end in self.ends.values():
            end.close()
        self.channels.drop(self.number)
        self.far.ended(self)


class Far:
    """The far end: any number of kernels, as control messages ask for them.

    :param wire: what carries them
    :param limits: the limits on open files that kernels shall have
    :param on_over: called when there is no kernel any more, and the near side will start none
    """

    def __init__(self, loop, wire, limits, on_over):
        self.loop, self.limits, self.on_over = loop, limits, on_over
        self.channels = Channels(wire, 2)
        self.channels.on_control, self.channels.on_open = self._control, self._open
        self.channels.on_change = self._change
        self.kernels, self.linger, self.timer, self.over = {}, 0, None, False

    def _control(self, message):
        do, number = message.get("do"), message.get("kernel")
        number = number if type(number) is int else None
        kernel = self.kernels.get(number)
        if do == "start" and kernel is None and number is not None:
            self._start(number, message)
        elif do == "hang up" and kernel:
            kernel.hang_up()
        elif do == "end":
            self.end()
        elif do == "linger":
            self._set_linger(message.get("seconds"))
        elif do not in ("hang up", "start"):
            raise WireError("the near side asks for {!r:.40}, which this relay does not know".format(do))

    def _set_linger(self, seconds):
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e6:
            raise WireError("a session is to linger for {!r:.40} s".format(seconds))
        self.linger = seconds
        self.loop.cancel(self.timer)
        self.timer = None
        self._look_whether_over()

    def _start(self, number, message):
        argv, count = message.get("argv"), message.get("listen", 0)
        if not (
            isinstance(argv, list) and argv and all(isinstance(word, str) and "\0" not in word for word in argv)
        ):
            raise WireError("a kernel without a command is to be started")
        if type(count) is not int or not 0 <= count <= 6:
            raise WireError("a kernel with {!r:.20} listeners is to be started".format(count))
        via = message.get("via")
        if via is not None and not isinstance(via, str):
            raise WireError("a kernel is to be started through {!r:.40}".format(via))
        self.loop.cancel(self.timer)
        self.timer = None
        kernel = self.kernels[number] = Job(self, number, via) if via else KernelProcess(self, number)
        if self.over:
            kernel.say("the session is over: no kernel is started any more")
            kernel._exited(126)
        else:
            kernel.start(argv, count)

    def _open(self, stream, facts):
        kernel = self.kernels.get(stream.kernel)
        if kernel is None or kernel.code is not None:
            stream.close()
        else:
            kernel.connect(stream, facts.get("host"), facts.get("port"))

    def _change(self, stream):
        kernel = self.kernels.get(stream.kernel)
        if kernel and stream.number not in self.channels.streams:
            kernel.ends.pop(stream, None)
        if kernel and kernel.code is not None:
            kernel.look_whether_over()

    def end(self):
        """Hang up on all kernels; when they are gone, that is all."""
        self.over, self.linger = True, 0
        for kernel in list(self.kernels.values()):
            kernel.hang_up()
        self.loop.cancel(self.timer)
        self.timer = None
        self._look_whether_over()

    def reap(self):
        for kernel in list(self.kernels.values()):
            kernel.reap()

    def ended(self, kernel):
        del self.kernels[kernel.number]
        self.channels.control(told="ended", kernel=kernel.number, code=kernel.code)
        self._look_whether_over()

    def _look_whether_over(self):
        if not self.kernels and self.timer is None:
            self.timer = self.loop.after(self.linger, self._stop)

    def _stop(self):
        self.over = True
        self.on_over()


# ------------------------------------------------------------------------------------------------- jobs

ENTERED = b"--tunnel-relay-shell--"  # what the login shell says when it comes to a command
SHELL_SECONDS = 30  # from its start until then
READY = b"--tunnel-relay-ready--"  # what the far end beyond a command says first
BEGIN_SECONDS = 60  # from there until its hello
COMMAND_SECONDS = 15.0  # from SIGTERM to SIGKILL: a scheduler's command that is killed cannot take its job back
LINE_COST = 64  # bytes that a line of a command counts for besides its own: each is a message of its own
SUSPENDED_SECONDS = 20.0  # a far end beyond a command that says nothing for so long is spoken of
ORPHAN_SECONDS = 300.0  # the same, seen from there: then nobody is left
JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "JOB_ID")  # where Slurm, LSF and SGE say which job this is


def login_shell():
    """The user's shell, as sshd has it from the accounts."""
    return os.environ.get("SHELL") or "/bin/sh"


def shell_line(command):
    """What the login shell is told; all shells read it alike. PATH may be another where the command leads."""
    return "echo {}; {} /bin/sh".format(ENTERED.decode("ascii"), command)


def spawn_command(command, limits):
    """Start what leads to a far end beyond it, in a session of its own, with pipes.

    It is read by the user's own shell, as a login shell, which is what a name that begins with a dash makes of
    any (a bash may have been built to want ``-l`` besides): only such a one reads ``/etc/profile`` and what that
    names, where clusters define ``module``. One that sshd runs for a command reads none of it; what such a one
    does read, the file that ``BASH_ENV`` names, is read here too. What all that prints comes before the far end's
    first word, and is skipped. The shell says when it comes to the command, and gets nothing to read before: a
    start-up file may run another shell in its place, which would take what it reads for its own.

    The command runs ``sh``, without any argument, and that reads what it is to do from its standard input: some
    commands join the arguments that follow, and have a shell read them again.
    """
    import signal
    import subprocess

    def prepare():
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        set_limits(limits)

    shell = login_shell()
    name = os.path.basename(shell)
    return subprocess.Popen(
        ["-" + name] + (["-l"] if name == "bash" else []) + ["-c", shell_line(command)],
        executable=shell,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        preexec_fn=prepare,
    )


class Job:
    """One kernel of a keeper that runs elsewhere, through a command, beyond which there is a far end for it alone.
    To the keeper it is what :class:`KernelProcess` is. Besides, it tells

    - ``via``: the command has been started
    - ``said``: what the command prints, and what there is to say of it
    - ``node``: the far end beyond has said hello, with its facts
    - ``failed``: the command has ended before the kernel: how far it had come, its exit code, and why
    """

    def __init__(self, far, number, command):
        self.far, self.loop, self.channels, self.number = far, far.loop, far.channels, number
        self.command = command
        self.wire = Wire("near", patience=float("inf"))
        self.wire.on_hello, self.wire.on_noise = self._hello, self._noise
        self.inner = Channels(self.wire, 1)
        self.inner.on_control, self.inner.on_open, self.inner.on_text = self._control, self._open, self._text
        self.ends, self.timers = {}, {}
        self.process = self.line = self.result = self.failure = self.code = None
        self.entered = self.runs = self.unwanted = self.done = self.gone = self.over = False
        self.before = self.noise = b""  # the last of standard output, until the far end has said hello
        self.part, self.printed, self.last = b"", 0, b""  # a line so far; bytes; what is told in the end

    # -- what the keeper's far end calls

    def start(self, argv, count):
        self.inner.control(do="start", kernel=1, argv=argv, listen=count)
        try:
            self.process = spawn_command(self.command, self.far.limits)
        except OSError as error:
            self.failure = "start", "{}: {}".format(login_shell(), error.strerror or error)
            self._conclude()
            return
        self.out, self.err = self.process.stdout.fileno(), self.process.stderr.fileno()
        for descriptor in (self.out, self.err):
            os.set_blocking(descriptor, False)
        self.loop.readers[self.out], self.loop.readers[self.err] = self._await, self._hear
        self._within("shell", SHELL_SECONDS, lambda: self._fail("shell", ""))
        self._tell("via", pid=self.process.pid)

    def hang_up(self):
        """End the kernel; one that does not run yet never will."""
        if self.unwanted or self.gone:
            return
        self.unwanted = True
        if self.runs:
            self.inner.control(do="hang up", kernel=1)
            self._within("end", HANG_UP_SECONDS + 2, self._kill)
        else:
            self._kill()

    def connect(self, stream, host, port):
        join(stream, self.inner.open(1, {"host": host, "port": port}))

    def say(self, text):
        self._tell("said", text=one_line(text)[:1000])

    def reap(self):
        """Look whether the command has ended."""
        if self.process is None or self.gone or self.process.poll() is None:
            return
        self.gone = True
        for name in list(self.timers):
            self._disarm(name)
        for _ in range(8):  # what it has left in its pipes, which do not hold more
            self._hear()
            if self.line is None:
                self._await()
            elif not self.line.closed:
                self.line._read()
        if self.line:
            self.line.close()
        for descriptor in (self.out, self.err):
            self.loop.readers.pop(descriptor, None)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        self._print((b"\n" + self.before if self.line is None else b"") + b"\n" + self.last)
        if self._signal("SIGTERM"):  # what else it has started
            self._within("kill", COMMAND_SECONDS, lambda: self._signal("SIGKILL"))
            self._within("left", COMMAND_SECONDS + 2, self._conclude)
            self._look_whether_gone()
        else:
            self._conclude()

    def look_whether_over(self):
        """The end is told when all that has come before it has been passed on."""
        streams = self.channels.of(self.number)
        if self.code is None or self.over or not (self.unwanted or all(stream.silent for stream in streams)):
            return
        self.over = True
        self.channels.drop(self.number)
        self.far.ended(self)

    # -- what the command prints

    def _await(self):
        """Wait for the login shell to come to the command, then for the far end's first word."""
        self.before += self._take(self.out)
        if not self.entered and self._skip_to(ENTERED):
            self.entered = True
            self._disarm("shell")
            try:
                self.process.stdin.write(beyond_command())
            except OSError:
                pass  # it has ended: that is told in a moment
        if not self.entered or not self._skip_to(READY):
            return
        if self.gone:
            return
        self._within("begin", BEGIN_SECONDS, lambda: self._fail("silent", ""))
        self.wire.attach({"beyond": True}, before=bytes(globals()["sent"]), fresh=True)
        self.line = Line(self.loop, self.wire, self.out, self.process.stdin.fileno(), self._broken)
        self.line.feed(self.before)

    def _skip_to(self, mark):
        """Pass on what comes before a mark; returns whether that has come."""
        at = self.before.find(mark)
        if at < 0:
            at = self.before.rfind(b"\n") + 1
            self._print(self.before[:at])
            self.before = self.before[at:][-TEXT_LIMIT:]
            if self.printed > NOISE_LIMIT:
                self._fail("noise", "")
            return False
        self._print(self.before[:at] + b"\n")
        self.before = self.before[at + len(mark) :]
        return True

    def _hear(self):
        self._print(self._take(self.err))

    def _take(self, descriptor):
        """What there is to read."""
        try:
            data = os.read(descriptor, 65536)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            data = b""
        if not data:
            self.loop.readers.pop(descriptor, None)
        return data

    def _print(self, data):
        """Pass on whole lines; of very much only the last one, in the end."""
        self.printed += len(data) + LINE_COST * data.count(b"\n")
        lines = (self.part + data).replace(b"\r", b"\n").split(b"\n")
        self.part = lines.pop()[-TEXT_TAIL:]
        lines = [line for line in lines if line.strip()]
        if lines and self.printed > TEXT_LIMIT and not self.gone:
            self.last, lines = lines[-1][-TEXT_TAIL:] + b"\n", []
        for line in lines:
            self.say(line.decode("utf-8", "replace"))

    # -- what the far end beyond says

    def _noise(self, data):
        self.noise = (self.noise + data)[-TEXT_TAIL:]
        if READY in self.noise:
            self._fail("twice", "")
        self._print(data)

    def _hello(self, facts):
        if "error" in facts:
            self._fail("altered", one_line(facts.get("text")))
            return
        self._disarm("begin")
        self.runs = True
        told = {name: one_line(facts.get(name) or "") for name in ("host", "pid", "python", "job")}
        self._tell("node", **told)
        self._within("quiet", SUSPENDED_SECONDS, self._look_whether_quiet)

    def _look_whether_quiet(self):
        left = SUSPENDED_SECONDS - (self.wire.clock() - self.wire.heard)
        if left <= 0:
            text = "nothing has come for {:.0f} s: the job is suspended, or its node down"
            self.say(text.format(SUSPENDED_SECONDS - left))
        self._within("quiet", max(left, 0.1) if left > 0 else 10 * SUSPENDED_SECONDS, self._look_whether_quiet)

    def _control(self, message):
        told, code = message.get("told"), message.get("code")
        if told in ("ports", "started"):
            self.channels.control(**dict(message, kernel=self.number))
        elif told == "exit" and type(code) is int:
            self.result = code
        elif told == "stopped":
            self.failure = self.failure or ("stopped", one_line(message.get("text")))
        elif told == "note":
            self.say(message.get("text"))
        elif told == "over":
            self.done = True
            self.loop.after(0, self._let_go)

    def _open(self, stream, facts):
        join(stream, self.channels.open(self.number, {"listener": facts.get("listener")}))

    def _text(self, _, data):
        self.channels.wire.send(TEXT, self.number, data)
        self.channels.wire.flush()

    def _broken(self, error):
        """The line to the far end beyond is no more."""
        if error.text == CONNECTION_CLOSED:
            self._within("end", COMMAND_SECONDS, self._kill)
        else:
            self._drain()
            self._fail("twice" if "0x2d" in error.text else "altered", error.text)

    # -- the end

    def _let_go(self):
        """The far end beyond has done; that its input ends tells it that this is known."""
        if not self.gone:
            self.line.close()
            self._drain()
            self.process.stdin.close()
            self._within("end", HANG_UP_SECONDS, self._kill)

    def _drain(self):
        """Read on: a command that cannot write does not end."""
        if not self.gone:
            self.loop.readers[self.out] = lambda: self._take(self.out)

    def _tell(self, told, **facts):
        self.channels.control(told=told, kernel=self.number, **facts)

    def _within(self, name, seconds, action):
        self._disarm(name)
        self.timers[name] = self.loop.after(seconds, action)

    def _disarm(self, name):
        self.loop.cancel(self.timers.pop(name, None))

    def _fail(self, stage, text):
        self.failure = self.failure or (stage, text)
        self._kill()

    def _kill(self):
        """End the command."""
        if not self.gone and "kill" not in self.timers:
            self._signal("SIGTERM" if self.entered else "SIGHUP")  # which a shell that waits does not ignore
            self._signal("SIGCONT")  # one that is stopped hears nothing
            self._within("kill", COMMAND_SECONDS, lambda: self._signal("SIGKILL"))

    def _signal(self, name):
        """Returns whether anything is left of what the command has started."""
        import signal

        try:
            os.killpg(self.process.pid, getattr(signal, name, 0))
        except OSError:
            return False
        return True

    def _look_whether_gone(self):
        if self._signal("nothing"):
            self._within("look", 0.1, self._look_whether_gone)
        else:
            self._conclude()

    def _conclude(self):
        """Nothing is left of the command: tell how it has ended."""
        if self.code is not None:
            return
        for name in list(self.timers):
            self._disarm(name)
        self.gone, code = True, self.result
        if self.unwanted:
            code = 129 if code is None else code
        elif self.failure or not self.done:
            stage, text = self.failure or ("runs" if self.runs else "begun" if self.line else "before", "")
            self._tell("failed", stage=stage, text=text, code=self.process and self.process.returncode)
            code = 255
        for stream in self.inner.of(1):  # what it has sent is still passed on
            if not stream.got_finish:
                stream.frame(FINISH, b"")
        self._exited(255 if code is None else code)

    def _exited(self, code):
        self.code = code
        self._tell("exit", code=code)
        self.look_whether_over()


# ------------------------------------------------------------------------------------------------- keeper

FIRST_SECONDS = 60.0  # a session that nobody has ever used is given up then
LAST_SECONDS = 30.0  # how long a session that is over waits for the near side to say that it has heard so
PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - local to a machine, and there without a login
# Exit codes of the bootstrap; 101 and 102 are the shell's.
NO_PYTHON, OLD_PYTHON, CUT_SHORT, BAD_HELLO, NO_SESSION, ENDED, TERMINAL = range(101, 108)
UNHEARD, OTHER_SHELL, TAKEN = range(108, 111)


def session_name(secret):
    """The name of a session's socket, which does not tell the secret."""
    import hashlib

    return hashlib.sha256(b"name" + secret.encode("ascii")).hexdigest()[:16]


def farewell(secret):
    """The line that a watchdog writes when its launcher has died: nobody will come back, end at once."""
    import hashlib

    return (
        b"goodbye-" + hashlib.sha256(b"goodbye" + secret.encode("ascii")).hexdigest()[:32].encode("ascii") + b"\n"
    )


def private(folder):
    """Whether a folder is this user's, and nobody else may look into it."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return found.st_uid == os.getuid() and found.st_mode & 0o170077 == 0o040000


def folders():
    return [os.path.join(place, "tunnel-relay-{}".format(os.getuid())) for place in PLACES]


def abstract_name(name):
    """The name of a socket outside of all file systems (Linux), for a machine whose disks are full."""
    return "\0tunnel-relay-{}-{}".format(os.getuid(), name)


def owned(connection):
    """Whether the process at the other end of a Unix socket is this user's, where the system tells (Linux)."""
    number = getattr(socket, "SO_PEERCRED", None)
    if number is None:
        return True
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, number, 12))[1] == os.getuid()


def connect_to(name):
    """A connection to the keeper of that name; None where there is none."""
    addresses = [os.path.join(folder, "relay-" + name) for folder in folders() if private(folder)]
    if sys.platform.startswith("linux"):
        addresses.append(abstract_name(name))
    for address in addresses:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            if owned(connection):
                return connection
        except OSError:
            pass  # nobody listens there
        connection.close()
    return None


def listen_as(name):
    """Unix sockets that listen under a name: one in a private folder, and, on Linux, one outside of all file
    systems, since somebody may clear the folder away.

    :returns: those that could be made, and the path of the first, if it has one
    """
    listeners, path = [], None
    for folder in folders():
        if path:
            break
        try:
            os.mkdir(folder, 0o700)
        except OSError:
            pass  # it is there, or cannot be made: then it is not private either
        if not private(folder):
            continue
        draft = os.path.join(folder, "new-{}".format(os.getpid()))
        listener = socket.socket(socket.AF_UNIX)
        try:
            remove_stale(folder)
            listener.bind(draft)
            listener.listen(8)
            os.rename(draft, os.path.join(folder, "relay-" + name))  # who finds it finds it listening
            listeners, path = [listener], os.path.join(folder, "relay-" + name)
        except OSError:
            listener.close()
            remove(draft)
    if sys.platform.startswith("linux"):
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(abstract_name(name))
            listener.listen(8)
            listeners.append(listener)
        except OSError:
            listener.close()
    return listeners, path


def remove_stale(folder):
    """Remove the sockets of keepers that were killed."""
    for name in sorted(os.listdir(folder))[:100]:
        probe = socket.socket(socket.AF_UNIX)
        probe.setblocking(False)
        try:
            probe.connect(os.path.join(folder, name))
        except ConnectionRefusedError:
            if name.startswith("relay-"):
                remove(os.path.join(folder, name))
        except OSError:
            pass  # a busy one
        probe.close()


def remove(path):
    try:
        os.unlink(path)
    except OSError:
        pass  # it is gone


class Guest:
    """One login: the bootstrap's end of a Unix socket, and the descriptors that it hands over."""

    def __init__(self, keeper, connection):
        self.keeper, self.loop, self.socket = keeper, keeper.loop, connection
        self.data, self.descriptors = b"", []
        connection.setblocking(False)
        self.loop.readers[connection] = self._read

    def _read(self):
        size = struct.calcsize("2i")
        try:
            data, ancillary, _, _ = self.socket.recvmsg(HELLO_LIMIT, socket.CMSG_SPACE(size))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, ancillary = b"", []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = struct.unpack("{}i".format(len(content) // 4), content[: len(content) // 4 * 4])
                self.descriptors += found
                for descriptor in found:
                    os.set_inheritable(descriptor, False)
        self.data += data
        if not data or len(self.data) > HELLO_LIMIT:
            self.keeper.left(self)
        elif self.data.endswith(b"\n") and len(self.descriptors) in (0, 2):
            line, self.data = self.data, b""
            try:
                self.keeper.welcome(self, message_in(line))
            except WireError:
                self.keeper.dismiss(self, NO_SESSION)

    def close(self, code=0):
        """Let the login go; its process ends with ``code``."""
        if self.socket is not None:
            self.loop.readers.pop(self.socket, None)
            for descriptor in self.descriptors:
                os.close(descriptor)
            try:
                self.socket.send(bytes([code]))
            except OSError:
                pass  # it has ended already
            self.socket.close()
            self.socket, self.descriptors = None, []


class Keeper:
    """Holds a session: the wire, what it carries, and the login that it is attached to, if any.

    :param control: a Unix socket whose other end the first login's bootstrap holds
    :param secret: the session's secret, in hexadecimal
    """

    def __init__(self, loop, control, secret):
        self.loop, self.secret = loop, secret
        self.host = socket.gethostname()
        self.wire = Wire("far")
        self.wire.on_settled = self._settled
        self.far = Far(loop, self.wire, raise_limits(), self._over)
        self.guest = self.line = None
        self.guests = set()
        self.minutes, self.used, self.done, self.over = 60.0, False, False, False
        self.number = 0  # of the latest login that has been attached to
        self.timer = loop.after(FIRST_SECONDS, self._abandoned)
        self.listeners, self.path = listen_as(session_name(secret))
        for listener in self.listeners:
            listener.setblocking(False)
            loop.readers[listener] = lambda listener=listener: self._accept(listener)
        if not self.listeners:
            self.far.channels.control(
                told="note", text="a lost connection cannot be resumed: no socket can be made"
            )
        self.guests.add(Guest(self, control))

    def _accept(self, listener):
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        if owned(connection):
            self.guests.add(Guest(self, connection))
        else:
            connection.close()

    def welcome(self, guest, facts):
        """A login has said who it is, and handed its descriptors over."""
        if facts.get("session") != self.secret:
            self.dismiss(guest, NO_SESSION)
        elif facts.get("end"):
            self.dismiss(guest)
            self.stop("ended by another launch")
        elif guest.descriptors and facts.get("version") != PROTOCOL:
            text = "the relay that runs over there speaks version {} of its protocol, this one {!r:.20}"
            refuse(guest.descriptors[1], VERSIONS, text.format(PROTOCOL, facts.get("version")))
            self.dismiss(guest, NO_SESSION)
        elif guest.descriptors and facts.get("number", 0) < self.number:
            self.dismiss(guest, NO_SESSION)  # it had hung, and was given up: what it brings is out of date
        elif guest.descriptors:
            self.number = facts.get("number", 0)
            self._attach(guest, facts)

    def dismiss(self, guest, code=0):
        self.guests.discard(guest)
        guest.close(code)

    def _attach(self, guest, facts):
        if self.guest:  # the server still believes in the old one: the new one is right
            self.line.close()
            self.dismiss(self.guest)
        self.loop.cancel(self.timer)
        self.guest, self.timer = guest, None
        self.used = self.used or not facts.get("new")
        minutes = facts.get("minutes")
        self.minutes = minutes if type(minutes) in (int, float) and minutes >= 0 else self.minutes
        try:
            own = {"host": self.host, "pid": os.getpid(), "python": ".".join(map(str, sys.version_info[:3]))}
            self.wire.attach(own, other=facts)
        except WireError as error:
            self.guest = None
            self.wire.detach()
            refuse(guest.descriptors[1], REFUSED, error.text)
            self.dismiss(guest, NO_SESSION)
            self._wait()
            return
        source, sink = guest.descriptors
        self.line = Line(self.loop, self.wire, source, sink, self._lost, farewell(self.secret).strip())
        if not self.used:
            self.line.read_ahead()
            if self.line.closed and not self.over:  # nobody has stayed to hear a hello
                self.loop.cancel(self.timer)
                self._abandoned()
        self.line.flush()

    def left(self, guest):
        """A login's process has ended."""
        if guest is self.guest:
            self.line.close()
            self._lost(None)
        else:
            self.dismiss(guest)

    def _lost(self, _):
        self.used = self.used or self.wire.acked > 0
        unheard = self.line.silent and not self.used  # what is said here does not get there
        self.dismiss(self.guest, UNHEARD if unheard else 0)
        self.guest = None
        if self.line.said_goodbye or unheard:
            self._abandoned()
        else:
            self._wait()

    def _wait(self):
        """Wait for the next connection, but not for ever: long only for who is known to have heard a hello."""
        seconds = 60 * self.minutes if self.used else min(FIRST_SECONDS, 60 * self.minutes)
        self.timer = self.loop.after(seconds, self._abandoned)

    def _abandoned(self):
        """Nobody comes back."""
        self.timer = None
        if self.over:
            self.done = True
        else:
            self.over = True
            self.far.end()

    def stop(self, text):
        """End the session, from here."""
        self.far.channels.control(told="note", text=text)
        self.over = self.over or not self.guest  # then nobody waits for more
        self.far.end()

    def _over(self):
        if not self.guest and (self.over or not self.wire.kept):  # nobody, or nothing to tell
            self.done = True
            return
        self.over = True
        self.far.channels.control(told="over")
        if self.guest:
            self.loop.after(LAST_SECONDS, lambda: self.guest and self._finish())

    def _settled(self):
        if self.far.over and self.over:
            self.loop.after(0, self._finish)

    def _finish(self):
        self.done = True

    def close(self):
        """Leave nothing behind."""
        if self.line:
            self.line.flush()
            self.line.close()
        for guest in list(self.guests):
            self.dismiss(guest)
        for listener in self.listeners:
            listener.close()
        if self.path:
            remove(self.path)
            try:
                os.rmdir(os.path.dirname(self.path))
            except OSError:
                pass  # others use it


def notice_signals(loop, names, reap, stop):
    """Have ``reap()`` called when a child has ended, and ``stop(text)`` when one of the signals has come."""
    import signal

    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(writer)
    stopped = []
    signal.signal(signal.SIGCHLD, nothing)
    for name in names:
        signal.signal(getattr(signal, name), lambda *_, name=name: stopped.append("ended by " + name))

    def wake():
        os.read(reader, 4096)
        reap()
        if stopped:
            stop(stopped.pop())

    loop.readers[reader] = wake


def run_keeper(control, secret):
    """Be the keeper of a session, to its end."""
    import signal

    loop = PollLoop()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keeper = Keeper(loop, control, secret)
    notice_signals(loop, ["SIGTERM"], keeper.far.reap, keeper.stop)
    try:
        while not keeper.done:
            loop.step()
    except Exception as error:
        keeper.far.channels.control(told="note", text="a defect of the relay ended it: {!r}".format(error))
        raise
    finally:
        keeper.close()


def serve_beyond(facts):
    """Be the far end beyond a command, for one kernel, to its end; returns the exit code.

    It ends with its standard input: then the command, or the keeper, is no more.

    :param facts: those of the keeper's hello
    """
    import signal

    signal.alarm(0)
    loop, over = PollLoop(), []
    wire = Wire("far", patience=ORPHAN_SECONDS)

    def done():
        far.channels.control(told="over")
        if line.closed:
            over.append(True)
        else:
            loop.after(LAST_SECONDS, lambda: over.append(True))  # the keeper closes the input before

    def lost(_):
        far.end()
        if far.over:
            over.append(True)

    def stop(text):
        far.channels.control(told="stopped", text=text)
        far.end()

    far = Far(loop, wire, raise_limits(), done)
    notice_signals(loop, ["SIGTERM", "SIGHUP", "SIGINT"], far.reap, stop)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "python": ".".join(map(str, sys.version_info[:3]))}
    own["job"] = ([os.environ[name] for name in JOBS if os.environ.get(name)] + [""])[0]
    wire.attach(own, other=facts)
    line = Line(loop, wire, 0, 1, lost)
    line.flush()
    while not over:
        loop.step()
    return 0


# ------------------------------------------------------------------------------------------------- bootstrap

PYTHONS = (
    "python3 /usr/bin/python3 /usr/local/bin/python3 /opt/homebrew/bin/python3 /usr/libexec/platform-python"
    " python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 python3.7 python3.6"
)

# What is sent begins with this: a shell that a start-up file runs in the place of ours takes it for its first
# command, and executes nothing of what follows. (An exit would have csh go on with its next block.)
OPENING = 'exec /bin/sh -c "exit {}"\n'.format(OTHER_SHELL).encode("ascii")
HEAD = len(OPENING) + 8

# Neither quotes nor a backslash, a dollar, a backtick, an exclamation mark or a line break: this stands in double
# quotes in single quotes, in a login shell that may be any. Standard input is read unbuffered, for what follows is
# the keeper's, and until complete, for reads come up short on slow lines. An exception after that must not start
# the next Python. What it reads begins with OPENING, which is skipped, and a length in eight digits.
FIRST = (
    "import sys;sys.version_info<(3,6) and sys.exit(102);import os,zlib;sent=bytearray();"
    "sys.excepthook=lambda*a:[sys.__excepthook__(*a),sys.stderr.flush(),os._exit(106)];"
    "r=lambda n:list(iter(lambda:len(sent)<n and [sent.extend(os.read(0,n-len(sent)) or sys.exit(103))],False));"
    "r({head});n=sent[{start}:];n.isdigit() or sys.exit({taken});r({head}+int(n));"
    "exec(zlib.decompress(sent[{head}:]))"
)
for name, number in (("{start}", len(OPENING)), ("{head}", HEAD), ("{taken}", TAKEN)):
    FIRST = FIRST.replace(name, str(number))

# The same beyond a command, which may give it a terminal (srun -u does so for the output, and that one changes
# nothing), or never say that nobody is there any more. That it is ready is said in a way that an echo of these
# words does not.
BEYOND = (
    "import sys;sys.version_info<(3,6) and sys.exit(102);import os,signal;signal.alarm({seconds});"
    "os.isatty(0) and sys.exit({terminal});"
    "print();print('--tunnel-relay-'+'ready--',flush=True);"
) + FIRST


def find_python(program):
    """What a shell runs: the program, by the first Python that takes it.

    It ends with 101 where there is no Python 3, 102 where it is too old, else as :data:`LOGIN_ENDS` says.
    """
    return (
        "c=101;for p in {};do command -v $p >/dev/null 2>&1||continue;"
        '$p -SEsc "{}";r=$?;case $r in 102)c=102;;1|126|127);;*)exit $r;;esac;done;exit $c'
    ).format(PYTHONS, program)


def bootstrap_command():
    """The command line for the login shell over there, be it sh, bash, zsh, csh, tcsh or fish."""
    return "exec /bin/sh -c '{}'".format(find_python(FIRST))


def beyond_command():
    """What a shell beyond a command reads from its standard input. It has to outlive what it runs: when the first
    process of a task ends, schedulers end all others at once, and nobody hears why."""
    program = BEYOND.replace("{seconds}", str(BEGIN_SECONDS)).replace("{terminal}", str(TERMINAL))
    return ("trap : HUP INT TERM;" + find_python(program) + "\n").encode("ascii")


def refuse(descriptor, error, text):
    """Say that a session cannot go on, in place of a hello."""
    data = hello("far", {"error": error, "text": text, "host": socket.gethostname()})
    os.set_blocking(descriptor, True)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError:
            return  # nobody hears it


def read_hello(descriptor, seconds):
    """The near side's hello, and not a byte more, for what follows is the keeper's.

    :raises WireError: it does not come, or altered
    """
    import select

    reader, facts = HelloReader("near"), None
    end = time.monotonic() + seconds
    while facts is None:
        ready = select.select([descriptor], [], [], max(0, end - time.monotonic()))[0]
        data = os.read(descriptor, 1) if ready else b""
        if not data:
            raise WireError("the connection ended before it began" if ready else "the near side says nothing")
        facts = reader.feed(data)[1]
    return facts


def start_keeper(secret):
    """Start a keeper, in a session of its own and out of this one's sight; returns a socket to it."""
    here, there = socket.socketpair(socket.AF_UNIX)
    child = os.fork()
    if child:
        there.close()
        os.waitpid(child, 0)
        return here
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        here.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        run_keeper(there, secret)
    except Exception:
        import traceback

        try:
            there.send(traceback.format_exc()[-8192:].encode("utf-8", "replace"))
        except OSError:
            pass  # nobody hears it
    finally:
        os._exit(0)


def hand_streams_over(control, facts):
    """Hand standard input and output over to a keeper, and wait until it has done with them.

    :returns: an exit code, and what the keeper had to say if a defect has ended it
    """
    line = json.dumps(facts).encode("ascii") + b"\n"
    descriptors = struct.pack("2i", 0, 1)
    try:
        control.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        told = b""
        while True:
            data = control.recv(16384)
            if not data:
                break
            told = (told + data)[-16384:]
    except OSError as error:
        return ENDED, "the keeper is gone: {}".format(error)
    if len(told) == 1:
        return told[0], ""
    return ENDED, told.decode("utf-8", "replace")


def end_others(names):
    """End sessions whose launchers are known to be dead."""
    for secret in names if isinstance(names, list) else ():
        control = connect_to(session_name(secret)) if isinstance(secret, str) and secret.isalnum() else None
        if control:
            control.sendall(json.dumps({"session": secret, "end": True}).encode("ascii") + b"\n")
            control.settimeout(5)
            try:
                control.recv(1)
            except OSError:
                pass  # it has not answered in time
            control.close()


def leads_back(descriptor):
    """Whether what is written there may reach somebody: it does not in a file, nor where nothing is open."""
    try:
        kind = os.fstat(descriptor).st_mode & 0o170000
    except OSError:
        return False
    return kind != 0o100000 and (kind != 0o020000 or os.isatty(descriptor))  # a file, a device


def far_main():
    """What a login runs: attach its standard input and output to the session that the near side names."""
    host = socket.gethostname()
    if not leads_back(1):
        return UNHEARD
    try:
        facts = read_hello(0, FIRST_SECONDS)
        if facts.get("beyond"):
            return serve_beyond(facts)
        secret = facts["session"]
        name = session_name(secret)
    except (WireError, KeyError, ValueError, TypeError, AttributeError) as error:
        text = getattr(error, "text", "the near side names no session")
        refuse(1, getattr(error, "error", None) or REFUSED, text)
        return BAD_HELLO
    control = connect_to(name)
    if control is None and not facts.get("new"):
        before = facts.get("host")
        if before and before != host:
            text = "the session is on {}, but this login has come to {}: name {} as the host to come back to it"
            refuse(1, ELSEWHERE, text.format(before, host, before))
        else:
            text = (
                "the relay on {} is gone: killed, or the machine was restarted, or nobody came back to it for {} "
                "min; where systemd has KillUserProcesses=yes it ends what outlives a login, unless its "
                "administrator sets KillUserProcesses=no, or your name in KillExcludeUsers, in logind.conf"
            )
            refuse(1, GONE, text.format(host, facts.get("minutes")))
        return NO_SESSION
    end_others(facts.get("end"))
    facts["end"] = None
    code, text = hand_streams_over(control or start_keeper(secret), facts)
    if text:
        sys.stderr.write("tunnel: a defect of the relay ended it: {}\n".format(text))
    return code


# ------------------------------------------------------------------------------------------------- near end
# What follows is not sent to the kernel machine.

LOGIN_ENDS = {
    NO_PYTHON: "no Python 3 was found there: the relay needs 3.6 or later,"
    " in the PATH of a login without a terminal",
    OLD_PYTHON: "the Python 3 found there is older than 3.6, which the relay needs",
    CUT_SHORT: "the connection ended while the relay was being sent",
    BAD_HELLO: "what was sent to the relay arrived altered, or not at all",
    NO_SESSION: "the session that the relay was asked for is not there",
    ENDED: "the relay was ended over there, or a defect stopped it",
    UNHEARD: "nothing of what the relay says comes back: a start-up file of the login closes standard output, or"
    " redirects it; let it do so in interactive logins only",
    OTHER_SHELL: "a start-up file of the login runs another shell, which got what the relay was sent; let it do so"
    " in interactive logins only",
    TAKEN: "a start-up file of the login reads standard input, and got what the relay was sent; let it do so in"
    " interactive logins only",
}


def sent_source(path=None):
    """What is sent over standard input first: what stops a shell, and the upper part of this file, compressed, its
    length before it."""
    import zlib

    with open(path or __file__, "rb") as stream:
        text = stream.read().replace(b"\r\n", b"\n")  # as git may have it on Windows
    text = text[: text.index(b"- near end\n")]
    packed = zlib.compress(text[: text.rindex(b"\n")] + b"\nsys.exit(far_main())\n", 9)
    return opened(packed)


def opened(packed):
    return OPENING + "{:08d}".format(len(packed)).encode("ascii") + packed


# When the pipe at its standard input ends without a word, its launcher is dead. The goodbye that the pipe began
# with then goes to its standard output, the client's standard input, and the client has 5 s to pass it on. That
# pipe has been set to never block, and has stayed so: while it is full the word has to be said again.
WATCHDOG = (
    'read -r word;read -r _&&exit;(i=0;while [ $i -lt 5 ]&&kill -0 "$1";do sleep 1;i=$((i+1));done;'
    'kill -s TERM -- "-$1";sleep 1;kill -s KILL -- "-$1")>/dev/null 2>&1& i=0;'
    'until printf "%s\\n" "$word"||[ $i -ge 5 ];do sleep 1;i=$((i+1));done'
)


def watchdog_command(pid):
    """The arguments of a watchdog for an SSH client that leads process group ``pid``."""
    return ["/bin/sh", "-c", WATCHDOG, "tunnel-watchdog", str(pid)]


def explain_start(code, text):
    """One line on why a login has ended before the relay said hello; None where its exit code does not tell.

    :param code: the SSH client's exit code
    :param text: what the login has printed, on either stream
    """
    if "'exec'" in text:  # cmd.exe and PowerShell do not know it, in any language
        return (
            "the kernel machine has no sh: the relay needs Linux or macOS there; without --relay Windows will do"
        )
    if "xcode-select" in text:
        return "the python3 of that Mac is none yet: run `xcode-select --install` there, or install one"
    return LOGIN_ENDS.get(code)


class Near:
    """The near end of a session, which survives its connections.

    A connection is attached when an SSH client runs :func:`bootstrap_command`; when ``on_lost`` has told that it
    is no more, that client is to be ended and another attached. All of this may be called at any time, attached or
    not: what cannot be sent yet is kept.

    :param loop: a loop such as ``tunnel.Loop``
    :param minutes: how long the kernels wait for a lost connection to come back
    :param end: secrets of sessions whose launchers are dead: ended by the way

    Called back, each to be set by the owner:

    - ``on_noise(text)``: what the login prints
    - ``on_attached(facts, again)``: the far end has said hello (``host``, ``python``, ``pid``); whether once more
    - ``on_note(text)``: what the keeper has to say
    - ``on_ports(kernel, ports)``: what is listened on over there
    - ``on_started(kernel)``: the program runs
    - ``on_text(kernel, text)``: what it prints
    - ``on_job(kernel, message)``: what a :class:`Job` tells of its command
    - ``on_open(kernel, listener, end)``: it has connected to the port at that position
    - ``on_exit(kernel, code)``: it has ended; data may still be on the way
    - ``on_arrived(kernel)``: all its data has arrived here
    - ``on_ended(kernel, code)``: all its data has been handed out; its ends are no more
    - ``on_lost(text)``: the connection is no more; attach another
    - ``on_elsewhere(text)``: the login has come to another machine than that of the session; attach another
    - ``on_over(text, error)``: the session is no more. ``error`` is None after its last kernel, else GONE,
      VERSIONS, ALTERED, REFUSED or NOISY
    """

    def __init__(self, loop, minutes=60, end=()):
        self.loop, self.minutes, self.end_others = loop, minutes, list(end)
        self.secret = os.urandom(16).hex()
        self.wire = Wire("near", pace=2.0)
        self.channels = Channels(self.wire, 1)
        self.channels.on_control, self.channels.on_open = self._control, self._open
        self.channels.on_text, self.channels.on_change = self._text, self._change
        self.wire.on_hello, self.wire.on_noise = self._hello, self._noise
        self.on_noise = self.on_attached = self.on_note = self.on_ports = self.on_started = self.on_text = nothing
        self.on_open = self.on_exit = self.on_arrived = self.on_ended = self.on_lost = self.on_over = nothing
        self.on_job = nothing
        self.on_elsewhere = nothing
        self.kernels, self.codes = set(), {}  # those that have not ended; exit codes, while there is data left
        self.unwanted, self.finished = set(), False
        self.count, self.tries, self.host, self.line, self.over = 0, 0, None, None, False
        self.parting = None  # a line on which the last word has still to be said
        self.echo, self.heard = False, b""  # whether what is sent comes back; the last of what a login prints
        self.source = sent_source()  # once: an update of the file must not reach a session that runs

    @property
    def farewell(self):
        """The line that a watchdog has to write to the client's standard input when the launcher has died."""
        return farewell(self.secret)

    def attach(self, source, sink):
        """Begin on a new connection.

        :param source: the client's standard output: a descriptor, or, on Windows, a socket
        :param sink: its standard input
        """
        self.detach()
        facts = {"session": self.secret, "new": self.host is None, "host": self.host, "minutes": self.minutes}
        facts.update(end=self.end_others, number=self.tries)
        self.wire.attach(facts, before=self.source, fresh=not self.tries)
        self.tries += 1
        self.line = Line(self.loop, self.wire, source, sink, self._lost)
        self.line.flush()

    def detach(self):
        """The connection is no more, the caller knows."""
        if self.line:
            self.line.close()
            self.line = None
        if self.parting:
            self.parting.hush()
            self.parting = None

    @property
    def attached(self):
        """Whether the far end has said hello on the connection that there is."""
        return self.line is not None and self.wire.greeted

    def probe(self):
        """Make sure, within 3 s, that the connection lives: there is reason to doubt."""
        if self.attached:
            self.wire.probe()
            self.line.flush()

    def start(self, argv, listen, via=None):
        """Start a kernel.

        :param argv: its command; ``{0}`` to ``{5}`` in its words stand for the ports that are listened on there
        :param listen: how many ports: 2 for the main link, 6 with those of links that the front end listens for
        :param via: the command through which it runs, if any
        :returns: its number
        """
        self.count += 1
        self.kernels.add(self.count)
        self.channels.control(do="start", kernel=self.count, argv=argv, listen=listen, via=via)
        return self.count

    def open(self, kernel, host, port):
        """An end that leads to a port on which a kernel listens, over there. It begins paused."""
        return self.channels.open(kernel, {"host": host, "port": port})

    def hang_up(self, kernel):
        """End a kernel; ``on_ended`` will tell."""
        self.unwanted.add(kernel)
        self.channels.control(do="hang up", kernel=kernel)

    def linger(self, seconds):
        """How long the session outlives its last kernel."""
        self.channels.control(do="linger", seconds=seconds)

    def end(self):
        """Hang up on all kernels; ``on_over`` will tell that it is done."""
        self.unwanted |= self.kernels
        self.channels.control(do="end")

    def abandon(self):
        """Say goodbye: the far end then ends all by itself. Where much is on its way that takes a moment; until
        then the loop has to go on, and the client's standard input has to stay open."""
        if self.line:
            self._part_from(self.line)

    def _part_from(self, line):
        self.detach()
        self.parting = line
        line.say_last(self.farewell)

    def _hello(self, facts):
        if "error" in facts:
            self.detach()
            text, error = one_line(facts.get("text")), one_line(facts["error"])
            self.on_elsewhere(text) if error == ELSEWHERE else self._is_over(text, error)
            return
        again, self.host = self.host is not None, one_line(facts.get("host"))
        self.end_others = []
        self.on_attached(facts, again)

    def _noise(self, data):
        if self.echo:
            return
        start = self.source[:HEAD]
        at = (self.heard + data).find(start)
        if at >= 0:
            self.echo, data = True, data[: max(0, at - len(self.heard))]
        self.heard = (self.heard + data)[-len(start) :]
        if data.strip():
            self.on_noise(data.decode("utf-8", "replace"))

    def _lost(self, reason):
        line, self.line = self.line, None
        if reason.error and (reason.error != NOISY or self.host is None):
            self._part_from(line)
            self._is_over(reason.text, reason.error)
        else:
            self.on_lost(reason.text)

    def _is_over(self, text, error):
        if not self.over:
            self.over = True
            self.on_over(text, error)

    def _control(self, message):
        told, kernel, code = message.get("told"), message.get("kernel"), message.get("code")
        if told == "note":
            self.on_note(one_line(message.get("text")))
        elif told == "over":
            self._finish()
        elif type(kernel) is not int or kernel not in self.kernels:
            raise WireError("the far end tells {!r:.40} of a kernel that was not started".format(told))
        elif told == "ports":
            ports = message.get("ports")
            if not (isinstance(ports, list) and all(type(port) is int and 0 < port < 65536 for port in ports)):
                raise WireError("the far end tells ports that are none: {!r:.80}".format(ports))
            self.on_ports(kernel, ports)
        elif told == "started":
            self.on_started(kernel)
        elif told in ("via", "said", "node", "failed"):
            self.on_job(kernel, message)
        elif told in ("exit", "ended") and type(code) is int:
            if told == "exit":
                self.on_exit(kernel, code)
            else:
                self.codes[kernel] = code
                self.on_arrived(kernel)
                self._look_whether_ended(kernel)

    def _finish(self):
        """The far end has done; what it has sent before is still handed out."""
        self.abandon()
        self.finished = True
        for kernel in self.kernels - set(self.codes):
            self._text(kernel, b"the session ended before the kernel was started")
            self.codes[kernel] = 255
        for kernel in list(self.codes):
            self._look_whether_ended(kernel)
        self._look_whether_finished()

    def _look_whether_finished(self):
        if self.finished and not self.kernels:
            self._is_over("the session is over", None)

    def _text(self, kernel, data):
        if kernel in self.kernels:
            self.on_text(kernel, data.decode("utf-8", "replace"))

    def _open(self, stream, facts):
        listener = facts.get("listener")
        if stream.kernel not in self.kernels or type(listener) is not int:
            raise WireError("the far end opens a channel of no kernel")
        self.on_open(stream.kernel, listener, stream)

    def _change(self, stream):
        if stream.kernel in self.codes:
            self._look_whether_ended(stream.kernel)

    def _look_whether_ended(self, kernel):
        if kernel not in self.codes:
            return
        if kernel in self.unwanted or all(stream.done for stream in self.channels.of(kernel)):
            self.channels.drop(kernel)
            self.kernels.discard(kernel)
            self.unwanted.discard(kernel)
            self.on_ended(kernel, self.codes.pop(kernel))
            self._look_whether_finished()


# ------------------------------------------------------------------------------------------------- launcher

# Before each attempt to come back but the first: a tenth of the time since the connection was lost, within bounds.
PAUSE_PART, LEAST_PAUSE_SECONDS, PAUSE_SECONDS = 0.1, 0.25, 10
ANSWER_PART, ANSWER_SECONDS = 0.25, 1.0  # the same for how long a server may take to answer one, at least
SETTLED_SECONDS = 5  # a connection that lasted longer is tried again at once
ASKING_SECONDS = 60  # the same for a login that was refused: servers shut out whoever tries too often
LEAVE_SECONDS = 2.0  # for the last words of a launcher that was told to end, or gives up


class NoForwards:
    """What a client runs for a relay: no forwards, the bootstrap."""

    forwards = pairs = ()

    def __init__(self):
        self.forward_words, self.command = [], bootstrap_command()


class Served:
    """One kernel of a session, and the links of its front end.

    :param tunnel: the launcher's module
    :param log: where what concerns this kernel is noted
    :param on_started: called when its program runs
    :param on_over: called once with its exit code and whether it has connected
    """

    def __init__(self, tunnel, session, request, log, on_started, on_over):
        self.tunnel, self.session, self.request, self.log = tunnel, session, request, log
        self.on_started, self.on_over = on_started, on_over
        self.loop, self.near = session.loop, session.near
        self.board = self.code = self.delivery = None
        self.is_over = self.delivered = False
        self.stands = False  # whether a launch that handed it over has been told that it runs
        self.begin = time.monotonic()
        self.printed, self.timers = [], tunnel.Timers(self.loop)
        self.said, self.failure, self.gone = [], "", False  # of a command; why it failed; of the front end
        words = tunnel.kernel_words(request.kernel, request.role, LINK)
        count = 6 if request.callback else 2
        self.number = self.near.start([request.kernel.path] + words, count, request.via)
        session.kernels[self.number] = self
        if request.share:  # no try watches the front end of a launch that others wait for, too
            self._watch_front_end()
        self.way = tunnel.Forwards(self.loop, log, 0, 4 if request.inward else 0)
        self.way.open = lambda host, port, done: done(self.near.open(self.number, host, port))

    @property
    def seconds(self):
        return time.monotonic() - self.begin

    def listening(self, ports):
        """The far end listens for this kernel."""
        tunnel, request = self.tunnel, self.request
        told, pairs = LINK.format(*ports), zip(ports[2::2], ports[3::2])
        self.board = tunnel.Switchboard(self.loop, self.log, request.link, told, pairs, self.way)
        self.board.on_connected, self.board.on_lost = self._connected, self._lost
        self.way.serve(self.board)
        self._watch_front_end()
        self.log.write("the relay listens on {} for the kernel".format(", ".join(map(str, ports))))
        if not self.session.launch.check:  # which looks for itself
            self.timers.within("connect", tunnel.CALLBACK_SECONDS, self._no_connection)

    def text(self, text):
        for line in text.splitlines():
            self.tunnel.keep_last(self.printed, line)
            self.log.quote("kernel", line)

    def job(self, message):
        """What is told of the command through which the kernel runs."""
        told, text = message.get("told"), one_line(message.get("text") or "")
        if told == "said":
            self.tunnel.keep_last(self.said, text)
            self.log.quote("via", text)
            if self.session.launch.check:  # somebody looks on while it waits in its queue
                self.session.launch.check.report("via", text)
        elif told == "failed":
            self.failure = explain_job(self.request.via, message, self.said)
        elif told == "via":
            self._step("via", "{}, process {}".format(self.request.via, message.get("pid")))
            self._watch_front_end()
        else:
            words = [one_line(message.get(name) or "") for name in ("python", "pid", "host", "job")]
            text = "Python {}, process {} on {}".format(*words) + (", job " + words[3] if words[3] else "")
            self._step("node", text)
            if self.session.launch.check:
                self.session.launch.current.expect_kernel()

    def _step(self, name, text):
        if self.session.launch.check:
            self.session.launch.step(name, text)
        else:
            self.log.write("{:.2f} s: {}: {}".format(self.seconds, name, text))

    def _watch_front_end(self):
        """Notice a front end that goes before its kernel has connected: while the kernel boots, for instance, or
        while its job waits in a queue."""
        self.tunnel.watch_front_end(self.timers, self.request.link, self._front_end_gone, first=0)

    def _front_end_gone(self):
        self.log.write("the front end has closed the main link: nothing is run for it any more")
        self.gone = True
        self.near.hang_up(self.number)

    def _connected(self):
        self.timers.disarm("connect", "front end")
        self.log.write("the kernel has called back after {:.1f} s".format(self.seconds))

    def _no_connection(self):
        self.log.write("the kernel has not called back within {} s".format(self.tunnel.CALLBACK_SECONDS))

    def _lost(self):
        if self.code is None:
            self.timers.within("lost", self.tunnel.LOST_SECONDS, self._hang_up)

    def _hang_up(self):
        self.log.write("the front end has closed the main link: the kernel is hung up on")
        self.near.hang_up(self.number)

    def exited(self, code):
        """The kernel has ended; what it has sent may still be on its way."""
        self.timers.disarm("lost", "connect", "front end")

    def arrived(self):
        """All that the kernel has sent has arrived here: now the front end has to take it, or to give it up."""
        if self.board and not self.is_over:
            self.delivery = self.tunnel.Delivery(self.loop, self.board, self._delivered)

    def _delivered(self):
        self.delivered = True
        self.board.close()  # which ends the kernel's channels, if a front end that takes nothing has not
        if self.code is not None and not self.is_over:
            self._over()

    def ended(self, code):
        """The kernel has ended, and all that it has sent has been handed on."""
        self.timers.disarm("lost", "connect")
        self.code = code
        if not self.is_over and (self.delivered or not self.delivery):
            self._over()

    def _over(self):
        connected = self.gone or bool(self.board and self.board.connected)
        self.close()
        self.on_over(self.code, connected)

    def close(self):
        self.is_over = True
        self.timers.disarm()
        if self.delivery:
            self.delivery.stop()
        if self.board:
            self.board.close()
        self.way.close()
        self.session.kernels.pop(self.number, None)
        if not self.session.kernels:
            self.session.on_idle()


class Session:
    """A launcher's relay: a near end, the connections that come and go below it, the kernels above.

    :param tunnel: the launcher's module
    :param launch: its :class:`Launch`, which makes the connections
    """

    def __init__(self, tunnel, launch):
        self.tunnel, self.launch, self.loop, self.log = tunnel, launch, launch.loop, launch.log
        self.dead = self._of_the_dead()
        # Who looks at a check does not wait for an hour.
        self.minutes = min(1, launch.request.relay) if launch.check else launch.request.relay
        self.near = Near(launch.loop, self.minutes, end=list(self.dead.values()))
        self.plan, self.kernels = NoForwards(), {}
        self.attached = self.leaving = self.checked = self.silent = False
        self.settled = True  # whether nothing of the session is left over there
        self.lost_at = self.attached_at = self.reason = None
        self.error = None  # why the session is no more, where that is no success
        self.noise = []
        self.on_idle = nothing  # called when the last kernel has gone
        self.is_idle = lambda: False  # whether it is not worth coming back
        near = self.near
        near.on_noise, near.on_note = self._noise, lambda text: self.tell("relay: " + text)
        near.on_attached, near.on_lost, near.on_over = self._attached, self._lost, self._over
        near.on_elsewhere = self._elsewhere
        near.on_ports = lambda kernel, ports: self.kernels[kernel].listening(ports)
        near.on_started = lambda kernel: self.kernels[kernel].on_started()
        near.on_text = lambda kernel, text: self.kernels[kernel].text(text)
        near.on_job = lambda kernel, message: self.kernels[kernel].job(message)
        near.on_open = self._open
        near.on_exit = lambda kernel, code: self.kernels[kernel].exited(code)
        near.on_arrived = lambda kernel: self.kernels[kernel].arrived()
        near.on_ended = lambda kernel, code: self.kernels[kernel].ended(code)

    def _of_the_dead(self):
        """The secrets of sessions whose launchers on this machine are no more, by what they are noted under."""
        known = self.launch.memory.read()
        keys = [key for key in known if key.startswith("relay ") and not self.tunnel.is_running(int(key[6:]))]
        return {key: known[key] for key in keys[:100]}

    def _forget_the_dead(self, values):
        for key, secret in self.dead.items():
            if values.get(key) == secret:
                del values[key]

    @property
    def key(self):
        """What this session is noted under, for who comes after a launcher that was killed."""
        return "relay {}".format(os.getpid())

    def tell(self, text):
        """Write a line into the log of each kernel."""
        for log in {id(log): log for log in [self.log] + [each.log for each in self.kernels.values()]}.values():
            log.write(text)

    def _open(self, kernel, listener, end):
        served = self.kernels.get(kernel)
        if served and served.board:
            served.board.arrived(listener, end)
        else:
            end.close()

    # -- what a connection calls

    @property
    def line(self):
        return watchdog_command, self.near.farewell

    def attach(self, client):
        if self.leaving:  # a signal has come before there was anything to say goodbye to
            self.launch.current.end("signal")
            return
        if not self.attached:
            self.launch.memory.keep(self.key, self.near.secret)
        self.near.attach(client.source, client.sink)

    # -- what the near end calls

    def _noise(self, text):
        for line in text.splitlines():
            self.tunnel.keep_last(self.noise, line)
            self.log.quote("login", line)

    def _attached(self, facts, again):
        self.launch.current.answered()
        self.attached_at = time.monotonic()
        if again:
            self.tell("the connection is back after {:.1f} s".format(self.attached_at - (self.lost_at or 0)))
            if self.launch.check:
                self.launch.step("relay", "the connection was cut, and is back")
                self.checked = True
                self.near.end()
        else:
            self.launch.memory.change(self._forget_the_dead)
            self.launch.step(
                "relay",
                "Python {}, process {} on {}".format(facts.get("python"), facts.get("pid"), facts.get("host")),
            )
        self.attached, self.lost_at, self.reason = True, None, None

    def _lost(self, text):
        if self.attached and self.lost_at is None:
            self.lost_at = time.monotonic()
            self.tell("the connection is lost: {}".format(text))
        current = self.launch.current
        if current and text == CONNECTION_CLOSED:
            self._expect_end("connection lost")
        elif current:
            current.end("connection lost")

    def _elsewhere(self, text):
        """A name that stands for several machines may lead to the right one next time."""
        if text != self.reason:
            self.reason = text
            self.tell("relay: {}; trying again".format(text))
        self._expect_end("connection lost")

    def _expect_end(self, why):
        """The client ends by itself now: with an exit code that tells more, and after its last words."""
        current = self.launch.current
        if current:
            current.timers.within("gone", self.tunnel.LATE_SECONDS, lambda: current.end(why))

    def give_up(self):
        """No relay has answered. One may only be late, and would start a kernel for nobody: say goodbye, unless
        there is a session already, to which the next login comes back."""
        if self.near.host is None:
            self.near.abandon()
            self.launch.current.leave(LEAVE_SECONDS, "no relay")
        else:
            self.launch.current.end("no relay")

    def _over(self, text, error):
        self.reason, self.error = text, error
        if error:
            self.tell("relay: " + text)
        self._expect_end("session over")

    def cut(self):
        """Cut the connection, to see whether it comes back."""
        if self.minutes:
            self.launch.current.client.end(force=True)
        else:
            self.launch.step("relay", "with 0 minutes no lost connection comes back")
            self.checked = True
            self.near.end()

    # -- the connections

    def run(self, settings):
        """Keep a connection until the session is over.

        :returns: None, or facts and settings of the try that was the last one
        """
        trouble = None  # since when no connection has lasted
        while True:
            self.settled = False
            timer = self.lost_at is not None and self.loop.after(self._left, self._end_late_try)
            facts, settings = self.launch.follow(settings, session=self)
            self.loop.cancel(timer)
            self.near.detach()
            while self.near.finished and not (self.near.over or self.launch.signal):
                self.loop.step()  # a busy front end takes its time with what the last kernel has left
            if self.near.over or self.leaving or self.launch.signal:
                self.settled = self.error == GONE or self._is_settled(facts)
                self.silent = facts.stopped_by == "no kernel"
                return None
            if not self.attached:
                self.settled = self._is_settled(facts)
                return facts, settings
            if self.lost_at is None:
                self._lost("the client ended with exit code {}".format(facts.code))
            if self.is_idle():
                return None
            lasted = facts.connected and self.lost_at - self.attached_at > SETTLED_SECONDS
            if self._left <= 0:
                self._give_up()
                return None
            pause = 0
            if lasted or trouble is None:
                trouble = self.lost_at
            else:
                passed = PAUSE_PART * (time.monotonic() - trouble)
                pause = min(PAUSE_SECONDS, max(LEAST_PAUSE_SECONDS, passed))
            if facts.obstacle in ("asked", "refused"):
                pause = ASKING_SECONDS
                text = "the login was refused: if it needs a person, log in by hand; next attempt in {} s"
                self.log.write(text.format(pause))
            self._wait(min(pause, self._left))

    @property
    def patience(self):
        """How many seconds a server may take to answer. Who asks while the network is down asks again ever more
        rarely, so that a new attempt is answered sooner when it is back."""
        most = self.launch.connect_seconds
        if self.lost_at is None:
            return most
        seconds = max(ANSWER_SECONDS, ANSWER_PART * (time.monotonic() - self.lost_at))
        return min(seconds, most) if most else seconds

    @property
    def _left(self):
        """How many seconds there are left to come back."""
        return 60 * self.minutes - (time.monotonic() - self.lost_at)

    def _end_late_try(self):
        if self.lost_at is not None and self.launch.current:
            self.launch.current.end("connection lost")

    def _is_settled(self, facts):
        """Whether nothing is left over there after the last connection, whose client has ended by itself then."""
        if self.attached:
            return facts.connected and not facts.killed
        return facts.stage < self.tunnel.STARTED or not facts.killed

    def _give_up(self):
        text = "the connection has not come back within {} min, and the kernel is hung up on"
        text = text.format(self.minutes)
        self.error, self.reason = LOST, "{}; {}".format(text, self.reason) if self.reason else text
        self.tell("relay: " + self.reason)

    def _wait(self, seconds):
        """Let time pass; at once over when the machine has been asleep meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.launch.signal:
            before, wall = time.monotonic(), time.time()
            self.launch.pause(min(1.0, end - before))
            if abs((time.time() - wall) - (time.monotonic() - before)) > ASLEEP_SECONDS:
                return

    def leave(self):
        """The launcher is to end: say goodbye, so that the far end ends all by itself."""
        self.leaving = True
        self.near.abandon()
        current = self.launch.current
        if current:
            current.leave(LEAVE_SECONDS)


class Handed:
    """A kernel that a hub runs, and the launch that waits for it.

    :param watched: whether the launch at the other end of ``teller`` may go before it has been told
    """

    def __init__(self, hub, request, log, teller, watched):
        self.hub, self.request, self.log, self.teller, self.watched = hub, request, log, teller, watched
        hub.waiting.append(self)
        # What waits in a queue goes on to do so; the parallel tools wait for all else.
        self.timer = None if request.via else hub.loop.after(hub.tunnel.RELAY_SECONDS, self._late)
        if watched:
            hub.loop.readers[teller.descriptor] = self._left
        self.served = Served(hub.tunnel, hub.session, request, log, self._started, self._over)

    def tell(self, code, text):
        """Tell the launch; it then says so itself, in the log too."""
        hub = self.hub
        hub.loop.cancel(self.timer)
        if self.watched:
            hub.loop.readers.pop(self.teller.descriptor, None)
        self.served.stands = code == 0
        self.teller.tell(code, text)
        if self in hub.waiting:
            hub.waiting.remove(self)

    def _give_up(self, text):
        self.tell(255, text)
        self.served.gone = True
        self.hub.session.near.hang_up(self.served.number)

    def _left(self):
        self.log.write("the launch has been ended: nothing is run for it any more")
        self._give_up("")

    def _late(self):
        if self.hub.session.lost_at is not None:
            text = "launching {} on {}: the connection of those before it is lost, and has not come back"
            self._give_up(text.format(self.request.role, self.request.destination))

    def _started(self):
        work = self.hub.work
        self.log.write("{:.2f} s: kernel: started".format(self.served.seconds))
        work._recall()  # how one has ended that was handed over before
        self.tell(0, work.died)
        work.died = ""

    def _over(self, code, connected):
        work, log = self.hub.work, self.log
        if connected and not self.served.failure:
            log.write("the kernel has ended after {:.0f} s with exit code {}".format(self.served.seconds, code))
            self.tell(code, "")  # where the front end has gone before it could connect
        else:
            text = explain_end(self.hub.tunnel, work, self.served, code, self.request)
            if self.teller.told or not self.watched:
                log.write(text)
            if self.teller.told and not connected:
                work.remember_death(text, self.request)
            self.tell(code or 1, text)
        if log is not work.log and log.descriptor is not None:
            os.close(log.descriptor)
            log.descriptor = None


class Hub:
    """The one process for all compute kernels of a destination: launches hand theirs over to it.

    :param path: where ``listener``, a Unix socket, can be found
    """

    def __init__(self, tunnel, work, session, listener, path):
        self.tunnel, self.work, self.session, self.path = tunnel, work, session, path
        self.loop, self.listener, self.timer = work.loop, listener, None
        self.spare = os.open(os.devnull, os.O_RDONLY)
        self.callers = {}  # who has not said all yet, with a timer
        self.waiting = []  # those that have not been told
        self.loop.readers[listener] = self._accept
        session.near.linger(tunnel.SHARE_SECONDS + 30)
        session.on_idle, session.is_idle = self._idle, self.is_idle

    def _accept(self):
        """Hear who has called.

        :returns: whether anybody has
        """
        try:
            caller = self.tunnel.accept(self.listener)
        except OSError as error:  # no descriptor is left
            self.session.tell("a launch was refused: {}".format(error.strerror))
            self._refuse()
            return False
        if caller is None:
            return False
        heard = [b""]
        self.callers[caller] = self.loop.after(10, lambda: self._drop(caller))

        def read():
            try:
                more = caller.recv(65536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                more = b""
            heard[0] += more
            if heard[0].endswith(b"\n"):
                self._forget(caller)
                self._serve(caller, heard[0])
            elif not more or len(heard[0]) > HELLO_LIMIT:
                self._drop(caller)

        self.loop.readers[caller] = read
        return True

    def _refuse(self):
        """Tell a launch that there is no room for it, with a descriptor that has been spared for that."""
        os.close(self.spare)
        try:
            caller = self.tunnel.accept(self.listener)
        except OSError:  # the whole system has none: not again at once
            caller = None
            self.loop.readers.pop(self.listener, None)
            self.loop.after(1, self._listen_again)
        if caller:
            text = "{} the process that runs the kernels of this host has as many files open as it may (ulimit -n)"
            try:
                caller.send(text.format(self.tunnel.EX_UNAVAILABLE).encode("ascii"))
            except OSError:
                pass  # it has gone
            caller.close()
        self.spare = os.open(os.devnull, os.O_RDONLY)

    def _listen_again(self):
        if self.listener:
            self.loop.readers[self.listener] = self._accept

    def _forget(self, caller):
        self.loop.cancel(self.callers.pop(caller, None))
        self.loop.readers.pop(caller, None)

    def _drop(self, caller):
        self._forget(caller)
        caller.close()
        self._look_whether_idle()

    def _serve(self, caller, text):
        """Start the kernel of another launch, and tell that whether it runs."""
        import copy

        try:
            link, path, links, log, via = text.decode("utf-8", "surrogateescape")[:-1].split("\0")
            request = copy.copy(self.work.request)
            request.link, request.links = self.tunnel.LinkName.parse(link), links
            request.kernel, request.via = self.tunnel.Kernel(path), via or None
        except (ValueError, self.tunnel.Fatal):
            self._drop(caller)
            return
        try:
            caller.send(b" ")  # it is in good hands
        except OSError:
            pass  # it has gone: that is seen in a moment
        self.start(request, self.tunnel.Log.at(log), self.tunnel.Teller(caller.detach()), watched=True)

    def start(self, request, log, teller, watched=False):
        """Start a kernel, and say through ``teller`` whether it runs; see :class:`Handed`."""
        self.loop.cancel(self.timer)
        return Handed(self, request, log, teller, watched).served

    def serve_own(self):
        """Start the kernel of this very launch. As long as it waits, with others, what asks the launch to end ends
        that kernel only: the others' jobs would lose their places in a queue."""
        own = self.start(self.work.request, self.work.log, self.work.teller)

        def spared(number):
            if self.work.teller.told or len(self.session.kernels) < 2 or own.gone:
                return False
            self.work.log.write("ended by signal {}; kernels of other launches go on".format(number))
            self.work.teller.tell(128 + number, "")
            own.gone = True
            own.near.hang_up(own.number)
            return True

        self.work.spared = spared

    def fail(self, code, text):
        """Tell all launches that still wait that nothing becomes of theirs."""
        for each in list(self.waiting):
            each.tell(code, text)

    def is_idle(self):
        """Whether nobody needs the connection; then nobody is let in any more."""
        if self.session.kernels or self.callers:
            return False
        self.close()
        return not self.callers

    def _idle(self):
        self.loop.cancel(self.timer)
        self.timer = self.loop.after(self.tunnel.SHARE_SECONDS if self.listener else 0, self._look_whether_idle)

    def _look_whether_idle(self):
        if not self.session.kernels and self.is_idle():
            self.session.near.end()

    def close(self):
        """Take no more kernels but of those that have called already."""
        listener, self.listener = self.listener, None
        if listener is None:
            return
        self.tunnel.remove_if_there(self.path)
        self.loop.readers.pop(listener, None)
        self.listener = listener
        while self._accept():
            pass
        self.listener = None
        listener.close()


LOST = "lost"
LINK = "{0}@127.0.0.1,{1}@127.0.0.1"  # as a kernel is told, but for the ports


def ended_kernel(tunnel, code, printed):
    """The facts about a kernel that has ended before it connected."""
    facts = tunnel.Facts()
    facts.stage, facts.ended, facts.status, facts.printed = tunnel.STARTED, True, code, printed
    return facts


def explain_end(tunnel, work, served, code, request=None):
    """One line on a kernel that has ended before it connected, or with the command through which it ran."""
    if served.failure:
        request = request or work.request
        return "launching {} on {}: {}".format(request.role, request.destination, served.failure)
    return tunnel.explain(work, ended_kernel(tunnel, code, served.printed), None, request)


# What schedulers print, and what that means.
JOB_ENDS = (
    ("TIME LIMIT", "the job's time limit is over"),
    ("PREEMPT", "the job was preempted"),
    ("NODE FAIL", "the node has failed"),
    ("OOM|OUT OF MEMORY", "the job has taken more memory than it may"),
    ("CANCELLED|REVOKED|FORCE TERMINATED", "the job was cancelled"),
)
JOB_STAGES = {
    "start": "the login shell there cannot be run",
    "shell": "the login shell there does not come to it: a start-up file runs another shell, waits for something,"
    " or sends its output elsewhere",
    "before": "it ended{code} before the relay ran through it",
    "begun": "it ended{code} while the relay was being sent through it",
    "runs": "it ended{code}, and the kernel with it",
    "stopped": "the kernel's end was asked for from there",
    "silent": "the relay was sent through it, and has not answered; it has to pass standard input on",
    "noise": "it prints without end on standard output",
    "twice": "it runs the relay more than once; have it run one task, as srun does with -n1",
    "altered": "it changes what passes, or prints on standard output while the kernel runs",
}
NO_WAY_BACK = "its standard output does not come back; it has to pass that on"
JOB_CODES = {
    126: "it cannot be run",
    127: "there is no such command",
    NO_PYTHON: "no Python 3 was found where it leads: the relay needs 3.6 or later there",
    OLD_PYTHON: "the Python 3 where it leads is older than 3.6, which the relay needs",
    CUT_SHORT: "its standard input ended while the relay was being sent; it has to pass standard input on",
    BAD_HELLO: "what was sent through it arrived altered, or not at all",
    TAKEN: "what was sent through it arrived altered, or not at all",
    ENDED: "what was sent through it arrived altered, or a defect stopped the relay there",
    -14: NO_WAY_BACK,
    142: NO_WAY_BACK,
    TERMINAL: "it gives the relay a terminal, which changes what passes; leave out --pty, -t or what asks for it",
}


def explain_job(command, message, said):
    """One line on a command that has ended before the kernel: the stage, and what it has said.

    :param message: what was told of it
    :param said: the lines that it has printed
    """
    import re

    stage, code, text = message.get("stage"), message.get("code"), one_line(message.get("text") or "")
    line, why = (said or [""])[-1], None
    for pattern, meaning in JOB_ENDS if stage in ("before", "begun", "runs", "stopped") else ():
        found = [each for each in said if re.search(pattern, each, re.IGNORECASE)]
        if found and why is None:
            line, why = found[-1], meaning
    if why is None and stage in ("before", "begun"):
        why = JOB_CODES.get(code)
    ending = " by signal {}".format(-code) if type(code) is int and code < 0 else " with exit code {}".format(code)
    why = why or JOB_STAGES.get(stage, "it failed{code}").format(code=ending)
    about = "; ".join([each for each in (text, line) if each]) or "it said nothing"
    return "--via {}: {} ({})".format(command, why, about)


def preview(tunnel, request):
    """What ``--dry-run`` says of a relay."""
    words = tunnel.kernel_words(request.kernel, request.role, LINK)
    return (
        "sent over standard input: {} bytes, the compressed source of the relay, then its messages\n"
        "{}"
        "run there: {}\n"
        "link name for the kernel: its ports are chosen over there\n"
    ).format(
        len(sent_source()),
        "the relay is run by the login shell there through: {}\n".format(shell_line(request.via))
        if request.via
        else "",
        tunnel.printable_command([request.kernel.path] + words),
    )


def many_files(work):
    """Have a launcher wait in a way that hundreds of kernels do not slow down, with as many open files."""
    loop = PollLoop()
    for watched, old in ((loop.readers, work.loop.readers), (loop.writers, work.loop.writers)):
        for each, action in old.items():
            watched[each] = action
    loop.timers, loop.count = work.loop.timers, work.loop.count
    work.loop = loop
    if loop.epoll:
        raise_limits()


def launch_through_relay(tunnel, work, settings, listener=None, path=None):
    """Launch through a relay.

    :param tunnel: the launcher's module
    :param work: its :class:`Launch`
    :param listener, path: where other launches hand over their kernels, if they may
    :returns: the exit code
    :raises tunnel.Fatal: the launch failed
    """
    if listener:
        many_files(work)
    session = Session(tunnel, work)
    outcome = []

    def started():
        work.step("kernel", "started")
        work.teller.tell(0, work.died)

    def over(code, connected):
        outcome.append((code, connected))
        session.near.end()

    hub = served = last = None
    ended = "the process that carried this kernel's links has ended"
    if listener:
        hub = Hub(tunnel, work, session, listener, path)
        hub.serve_own()
    else:
        served = Served(tunnel, session, work.request, work.log, started, over)
    try:
        last = session.run(settings)
        while any(each.delivery for each in session.kernels.values()) and not work.signal:
            work.loop.step()  # a front end that is busy has not got everything yet
        return session_verdict(tunnel, work, session, last, outcome and outcome[0] + (served,))
    except tunnel.Fatal as error:
        ended = error.text
        if hub:
            hub.fail(error.code, error.text)
        raise
    finally:
        if session.settled:
            work.memory.keep(session.key, None)
        if hub:
            hub.close()
        for each in list(session.kernels.values()):
            if each.log is not work.log and each.stands:
                each.log.write(ended)
            each.close()


def no_relay(tunnel, work, session, facts):
    """One line on a login in which something else ran than the relay."""
    said = [line.strip() for line in session.noise + facts.aside + facts.printed if line.strip()]
    words = tunnel.words_for(work, facts, None, work.request)
    found = tunnel.diagnose(tunnel.ACCOUNT_DIAGNOSES + tunnel.LOST_DIAGNOSES, said + facts.said, words)
    if found:
        return found
    nothing = "it said nothing"
    if facts.stopped_by == "no relay":
        nothing += " within {} s; a file system may hang there".format(tunnel.RELAY_SECONDS)
    last = ([nothing] + said)[-1][: tunnel.QUOTED_LENGTH]
    if session.near.echo:
        last = "which sends back what it is sent, as cat does; it may be a command in authorized_keys"
    host = work.request.destination.host
    return "the login ran, but no relay: a start-up file or the server runs something else ({}); see {}".format(
        last, "what `ssh {} 'exec /bin/sh -c true'` says".format(host)
    )


def session_verdict(tunnel, work, session, last, outcome):
    """The exit code of a session that is over.

    :param last: facts and settings of its only connection, where that has failed
    :param outcome: exit code of its only kernel, whether that had connected, and the kernel
    :raises tunnel.Fatal: it has failed
    """
    if work.signal:
        session.tell("ended by signal {}".format(work.signal))
        return 128 + work.signal
    if session.checked:
        return 0
    tried = "launching {} on {}: ".format(work.request.role, work.request.destination)
    if last:
        facts, settings = last
        text = explain_start(facts.code, "\n".join(session.noise + facts.aside + facts.printed))
        if facts.stage == tunnel.STARTED and facts.stopped_by in (None, "no relay"):
            raise tunnel.Fatal(tried + (text or no_relay(tunnel, work, session, facts)), 255)
        raise tunnel.Fatal(tunnel.explain(work, facts, settings), tunnel.verdict(work.dialect, facts))
    if session.silent:
        facts = tunnel.Facts()
        facts.stopped_by = "no kernel"
        raise tunnel.Fatal(tunnel.explain(work, facts, None), 255)
    if outcome:
        code, connected, served = outcome
        if connected and not served.failure:
            work.log.write("the kernel has ended after {:.0f} s with exit code {}".format(work.seconds, code))
            return code
        text = explain_end(tunnel, work, served, code)
        if work.teller.told and not connected:
            work.remember_death(text, work.request)
        raise tunnel.Fatal(text, code or 1)
    if session.error or not session.is_idle():
        raise tunnel.Fatal(tried + (session.reason or "the session ended"), 255)
    return 0
