"""Channels in a wire, each with a credit of its own, so that a channel which nobody reads holds up no other."""

import json
import struct
from collections import deque

from .door import WireError
from .wire import BODY, CONTROL, CREDIT, DATA, FINISH, OPEN, RESET, TEXT, nothing

WINDOW = 1 << 20  # the credit of a channel in use
INITIAL = 1 << 16  # the credit that each channel begins with
POOL = 12 << 20  # the credit of all channels together, as long as there are not too many for it
CHANNELS = 8192


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

    def text(self, kernel, data):
        """Pass on what a kernel prints."""
        self.wire.send(TEXT, kernel, data)
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
        unused = self.allowance + self.held
        if unused > self.window // 2 or self.got_finish or self.gone:
            return
        self.window = self.channels.window()
        if self.window > unused:
            self.wire.send(CREDIT, self.number, struct.pack(">I", self.window - unused))
            self.allowance += self.window - unused

    def _look_whether_over(self):
        if self.sent_finish and self.got_finish and not self.inbox and not self.gone:
            self.channels.streams.pop(self.number, None)
            self.channels.blocked.pop(self, None)
