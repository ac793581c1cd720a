"""The wire: numbered frames over connections that come and go.

What the other side has not acknowledged is kept, and sent again on the next connection. The launcher's end and the
kernel machine's end are of one class.

A frame is: kind (1 byte), channel (4), number (8), acknowledged number (8), length of the body (4), a checksum of
all that (4), big endian, then the body, and, behind a body, the checksum once more. So a line that some other
program writes into the stream is never taken for a frame, nor for a part of one. Between frames any number of
newlines may stand; one ends every flush, since programs in between may hold back what is not a whole line.
"""

import struct
import time
from collections import deque
from zlib import crc32

from .door import HelloReader, WireError, hello

BODY = 65536  # the most that one frame carries
READ = 1 << 18  # the most that is read at once
KEEP = 1 << 22  # what is not acknowledged, and kept, before the sources have to wait
QUEUE = 1 << 18  # what is not even written: more would only make the next key press wait
VECTOR = 500  # buffers in one call of the system, which allows 1024
COST = 200  # of a frame apart from its body, so that many small ones are bounded too
ACK_FRAMES, ACK_BYTES, ACK_SECONDS = 16, 1 << 18, 0.05
PING_SECONDS = 5.0
DEAD_SECONDS = 19.5  # a silent connection is noticed within 20
PROBE_SECONDS = 3.0  # what a connection gets after this side has been asleep
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


def one_line(text):
    """What the other side says, as one line that can be logged."""
    return " ".join(str(text)[:2000].encode("utf-8", "replace").decode("utf-8").split())


def nothing(*_):
    """What happens where nobody has asked to be told."""


def head(kind, channel, number, acknowledged, length):
    """The bytes that come before a frame's body; the last ``SUM.size`` of them stand behind the body too.

    :param kind: one of the bytes in :data:`SENDS`
    :param number: 0 for a kind that is not numbered
    :param length: of the body, in bytes
    """
    start = HEADER.pack(kind, channel, number, acknowledged, length)
    return start + SUM.pack(crc32(start))


class FrameReader:
    """Cuts what arrives after a hello into frames.

    :param known: the kinds of frames that the other side may send
    :param on_frame: called with kind, channel, number, acknowledged number and body of each frame, in the order of
        the frames, from within :meth:`feed`. The body is valid during the call only. The call may :meth:`stop`
        this reader, which then hands out nothing more.
    """

    def __init__(self, known, on_frame):
        self.known, self.on_frame = known, on_frame
        self.rest, self.need = bytearray(), 0  # the beginning of a frame, and how long it is to be
        self.stopped = False

    def stop(self):
        """The connection is no more."""
        self.stopped = True

    def feed(self, view):
        """Take the next bytes.

        :raises WireError: they are no frame, or one of a kind that the other side may not send
        """
        at, end = 0, len(view)
        while at < end and not self.stopped:
            if self.rest:
                # Only the frame that reads have cut in two is copied.
                more = min(self.need - len(self.rest), end - at)
                self.rest += view[at : at + more]
                at += more
                if len(self.rest) == self.need:
                    self._feed_cut_frame()
                continue
            if view[at] == 10:
                at += 1
                continue
            size = self._size(view, at, end)
            if size is None or at + size > end:
                self.rest += view[at:end]
                self.need = size or HEAD_LENGTH
                return
            self._hand_out(view[at : at + size])
            at += size

    def _feed_cut_frame(self):
        self.need = self._size(self.rest, 0, len(self.rest)) or HEAD_LENGTH
        if len(self.rest) == self.need:
            frame, self.rest = memoryview(bytes(self.rest)), bytearray()
            self._hand_out(frame)

    def _size(self, view, at, end):
        """How many bytes the frame that begins at ``at`` has, all told; None while its head is not complete.

        :raises WireError: no frame begins like this
        """
        start = bytes(view[at : min(end, at + HEAD_LENGTH)])
        if start[0] not in self.known:
            raise WireError("a message of unknown kind 0x{:02x} has arrived".format(start[0]))
        if len(start) < HEAD_LENGTH:
            return None
        if SUM.unpack_from(start, HEADER.size)[0] != crc32(start[: HEADER.size]):
            raise WireError("bytes have arrived that are no message: {!r}".format(start[:40]))
        length = HEADER.unpack_from(start)[4]
        if length > BODY:
            raise WireError("a message of {} bytes has arrived, over the limit".format(length))
        return HEAD_LENGTH + (length + SUM.size if length else 0)

    def _hand_out(self, frame):
        body = frame[HEAD_LENGTH : max(HEAD_LENGTH, len(frame) - SUM.size)]
        if body and frame[len(frame) - SUM.size :] != frame[HEADER.size : HEAD_LENGTH]:
            raise WireError("bytes have been put into a message, or are missing from it")
        kind, channel, number, acknowledged, _ = HEADER.unpack_from(frame)
        self.on_frame(kind, channel, number, acknowledged, body)


class Wire:
    """Numbered frames, of which none is lost or doubled, over connections that come and go. It does no input and
    output: bytes that have arrived are fed to it, and what it wants written is pulled from it.

    :param side: ``near`` or ``far``
    :param pace: the longest time, in seconds, between two looks at the clocks
    :param patience: for how many seconds the other side may be silent; by default as long as a network may be

    Called back, each to be set by the owner:

    - ``on_noise(bytes)``, ``on_hello(facts)``, ``on_frame(kind, channel, body)``: what :meth:`feed` finds, from
      within that; each may send, and attach or detach this wire
    - ``on_settled()``: the other side has acknowledged all that was sent; from within :meth:`feed`; may send
    - ``on_room()``: sources may send again after :attr:`room` has been denied; from within :meth:`feed` and
      :meth:`wrote`; may send
    - ``on_output()``: there is something to pull; from within :meth:`flush`; may pull, attach and detach
    """

    def __init__(self, side, pace=PING_SECONDS, clock=time.monotonic, wall=time.time, patience=None):
        self.side, self.pace, self.clock, self.wall_clock = side, pace, clock, wall
        self.patience = patience
        self.heard_kinds = SENDS["far" if side == "near" else "near"]
        self.on_frame = self.on_hello = self.on_noise = self.on_room = self.on_output = self.on_settled = nothing
        self.queue, self.unconfirmed = deque(), deque()  # not yet written on this connection, and written
        self.kept = self.queued = 0  # bytes in both, and in the queue alone
        # Numbers of frames: the last one of this side that the other side has acknowledged; the last one of the
        # other side that has arrived; and, of those, the last one that this side has acknowledged.
        self.confirmed = self.received = self.acknowledged = 0
        self.waiting = False  # whether sources have been told to wait
        self._reset()

    def _reset(self):
        self.out = []
        self.hellos = HelloReader("far" if self.side == "near" else "near")
        self.frames = FrameReader(self.heard_kinds, self._frame)
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

    def attach(self, facts, before=b"", other=None, fresh=False, after=b""):
        """Begin on a new connection, with a hello.

        :param facts: what this side says of itself
        :param before: bytes that come before the hello
        :param after: bytes that come after the hello
        :param other: the facts of the other side's hello, where it has been read already
        :param fresh: whether frames may go out before the other side's hello, since it cannot have any
        """
        self.detach()
        self.out = [before + hello(self.side, dict(facts, received=self.received)) + after]
        self.ready = fresh and not self.confirmed
        if other is not None:
            self._greet(other)

    def detach(self):
        """The connection is no more."""
        self.frames.stop()
        self.queue.extendleft(reversed(self.unconfirmed))
        self.unconfirmed.clear()
        self.queued = self.kept
        self._reset()

    def _greet(self, facts):
        count = facts.get("received", 0)
        if not self.confirmed <= count <= self.confirmed + len(self.unconfirmed) + len(self.queue):
            text = "the other side claims to have {} messages of this session; {} to {} are possible"
            raise WireError(
                text.format(count, self.confirmed, self.confirmed + len(self.unconfirmed) + len(self.queue))
            )
        written = self.unconfirmed if self.ready else self.queue
        if count - self.confirmed > len(written):
            raise WireError("the other side claims to have messages that were never sent")
        self._drop(count, written)
        self.greeted = self.ready = True
        self.heard = self.now = self.pinged = self.due = self.clock()
        self.wall, self.deadline = self.wall_clock(), self.now + (self.patience or DEAD_SECONDS)

    def _drop(self, count, frames):
        for _ in range(count - self.confirmed):
            size = len(frames.popleft()[2]) + COST
            self.kept -= size
            if frames is self.queue:
                self.queued -= size
        self.confirmed = count

    def pull(self):
        """Buffers to write, at most some 320 KiB; :meth:`wrote` then says how much of it went out."""
        if not self.out:
            if self.ready and self.queue:
                self.want.discard(ACK)  # which every message is, too
            for kind in (PONG, PING, ACK) if self.want else ():
                if kind in self.want:
                    self.out.append(head(kind, 0, 0, self.received, 0))
            self.want.clear()
            size, number = 0, self.confirmed + len(self.unconfirmed)
            while self.ready and self.queue and size < READ and len(self.out) < VECTOR:
                frame = self.queue.popleft()
                kind, channel, body = frame
                self.unconfirmed.append(frame)
                number += 1
                start = head(kind, channel, number, self.received, len(body))
                self.out += [start, body, start[HEADER.size :]] if body else [start]
                size += len(body) + COST
            self.queued -= size
            if self.out:
                self.acknowledged, self.unsaid_frames, self.unsaid_bytes = self.received, 0, 0
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
        """Take bytes that have arrived, and call back for what is in them. A body is valid during the call only.

        :raises WireError: what has arrived cannot be
        """
        frames = self.frames
        self.heard = self.clock()
        if self.greeted:
            self.deadline = self.heard + (self.patience or DEAD_SECONDS)
        else:
            noise, facts, data = self.hellos.feed(data)
            if noise:
                self.on_noise(noise)
            if facts is None or frames.stopped:
                return
            if "error" not in facts:
                self._greet(facts)
            self.on_hello(facts)
        frames.feed(memoryview(data))
        if self.unsaid_frames >= ACK_FRAMES or self.unsaid_bytes >= ACK_BYTES:
            self.want.add(ACK)
        self._look_for_room()

    def _frame(self, kind, channel, number, confirmed, body):
        if confirmed != self.confirmed:
            if not self.confirmed < confirmed <= self.confirmed + len(self.unconfirmed):
                raise WireError("the other side acknowledges message {}, which was not sent".format(confirmed))
            self._drop(confirmed, self.unconfirmed)
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
        if self.received > self.acknowledged:
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
