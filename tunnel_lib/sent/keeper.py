"""The keeper: holds a session on the kernel machine, and outlives the login that has started it."""

import os
import socket
import struct
import sys

from .channels import message_in
from .door import (
    FIRST_SECONDS,
    HELLO_LIMIT,
    NO_SESSION,
    PROTOCOL,
    REFUSED,
    UNHEARD,
    VERSIONS,
    WireError,
    abstract_name,
    farewell,
    folders,
    owned,
    private,
    refuse,
    session_name,
)
from .far import LAST_SECONDS, Far
from .kernel import raise_limits
from .line import Line, PollLoop, notice_signals
from .wire import Wire


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
    """One login: the door's end of a Unix socket, and the descriptors that it hands over.

    :param on_words: called with this guest and what it says of itself, a line each; may :meth:`close` it
    :param on_gone: called once with this guest when the login's process has ended; may :meth:`close` it
    """

    def __init__(self, loop, connection, on_words, on_gone):
        self.loop, self.socket, self.on_words, self.on_gone = loop, connection, on_words, on_gone
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
            self.on_gone(self)
        elif self.data.endswith(b"\n") and len(self.descriptors) in (0, 2):
            line, self.data = self.data, b""
            self.on_words(self, line)

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
    :param parcel: the bytes with which the relay was sent, for what is run through a command
    """

    def __init__(self, loop, control, secret, parcel=None):
        self.loop, self.secret = loop, secret
        self.host = socket.gethostname()
        self.wire = Wire("far")
        self.wire.on_settled = self._settled
        self.far = Far(loop, self.wire, raise_limits(), self._over, parcel)
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
        self._let_in(control)

    def _accept(self, listener):
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        if owned(connection):
            self._let_in(connection)
        else:
            connection.close()

    def _let_in(self, connection):
        self.guests.add(Guest(self.loop, connection, self._hear, self._guest_gone))

    def _hear(self, guest, line):
        """A login has said who it is, and handed its descriptors over."""
        try:
            self._welcome(guest, message_in(line))
        except WireError:
            self._dismiss(guest, NO_SESSION)

    def _welcome(self, guest, facts):
        if facts.get("session") != self.secret:
            self._dismiss(guest, NO_SESSION)
        elif facts.get("end"):
            self._dismiss(guest)
            self.stop("ended by another launch")
        elif guest.descriptors and facts.get("version") != PROTOCOL:
            text = "the relay that runs over there speaks version {} of its protocol, this one {!r:.20}"
            refuse(guest.descriptors[1], VERSIONS, text.format(PROTOCOL, facts.get("version")))
            self._dismiss(guest, NO_SESSION)
        elif guest.descriptors and facts.get("number", 0) < self.number:
            self._dismiss(guest, NO_SESSION)  # it had hung, and was given up: what it brings is out of date
        elif guest.descriptors:
            self.number = facts.get("number", 0)
            self._attach(guest, facts)

    def _dismiss(self, guest, code=0):
        self.guests.discard(guest)
        guest.close(code)

    def _attach(self, guest, facts):
        if self.guest:  # the server still believes in the old one: the new one is right
            self.line.close()
            self._dismiss(self.guest)
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
            self._dismiss(guest, NO_SESSION)
            self._wait()
            return
        source, sink = guest.descriptors
        self.line = Line(self.loop, self.wire, source, sink, self._line_ended, farewell(self.secret).strip())
        if not self.used:
            self.line.read_ahead()
            if self.line.closed and not self.over:  # nobody has stayed to hear a hello
                self.loop.cancel(self.timer)
                self._abandoned()
        self.line.flush()

    def _guest_gone(self, guest):
        """A login's process has ended."""
        if guest is self.guest:
            self.line.close()
            self._line_ended()
        else:
            self._dismiss(guest)

    def _line_ended(self, reason=None):
        self.used = self.used or self.wire.confirmed > 0
        unheard = self.line.silent and not self.used  # what is said here does not get there
        self._dismiss(self.guest, UNHEARD if unheard else 0)
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
            self._dismiss(guest)
        for listener in self.listeners:
            listener.close()
        if self.path:
            remove(self.path)
            try:
                os.rmdir(os.path.dirname(self.path))
            except OSError:
                pass  # others use it


def run_keeper(control, secret, parcel):
    """Be the keeper of a session, to its end."""
    import signal

    loop = PollLoop()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keeper = Keeper(loop, control, secret, parcel)
    notice_signals(loop, ["SIGTERM"], keeper.far.reap, keeper.stop)
    try:
        while not keeper.done:
            loop.step()
    except Exception as error:
        keeper.far.channels.control(told="note", text="a defect of the relay ended it: {!r}".format(error))
        raise
    finally:
        keeper.close()
