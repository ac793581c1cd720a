"""One connection of a wire: the loop that waits for it, and the line that reads and writes its descriptors."""

import os
import time

from .door import WireError
from .wire import ACK_SECONDS, KEEP, READ, nothing

LAST_WORDS_SECONDS = 4.0  # from a connection that takes nothing any more until it is given up


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


class NamedTimers:
    """Timers with names, of which each runs once at a time."""

    def __init__(self, loop):
        self.loop, self.running = loop, {}

    def __contains__(self, name):
        return name in self.running

    def within(self, name, seconds, action):
        """Have ``action()`` called unless the timer is disarmed, or set again, before."""
        self.disarm(name)

        def act():
            del self.running[name]
            action()

        self.running[name] = self.loop.after(seconds, act)

    def disarm(self, *names):
        """Stop timers; without names, all."""
        for name in names or list(self.running):
            self.loop.cancel(self.running.pop(name, None))


BUFFER = memoryview(bytearray(READ))  # one for all that is read: what is left of it is copied


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
        loop.readers[source] = self.read
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

    def read(self):
        """Take what has arrived."""
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
            if self.wire.received > self.wire.acknowledged and self.ack_timer is None:
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
