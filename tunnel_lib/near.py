"""The near end of a relay: the launcher's side of a session that survives its connections."""

import os

from tunnel_lib.sent.bootstrap import HEAD, OPENING
from tunnel_lib.sent.channels import Channels
from tunnel_lib.sent.door import ELSEWHERE, NOISY, WireError, farewell
from tunnel_lib.sent.line import Line
from tunnel_lib.sent.wire import Wire, nothing, one_line

# The files of tunnel_lib/sent that follow a first hello, in the order in which they are loaded. The door comes
# before that hello; a login that comes back to its session needs nothing but the door.
SENT_FILES = ("bootstrap", "wire", "channels", "line", "kernel", "job", "far", "keeper")


def parcel():
    """What is sent to the kernel machine: the files of ``tunnel_lib/sent``, as they lie there.

    :returns: the bytes that come first on each connection: what stops a shell, and the door; and the bytes that
        follow the first hello: all other files
    """
    import json
    import zlib

    first = opened(zlib.compress(text_of_sent("door").encode("utf-8"), 9))
    rest = json.dumps([(name, text_of_sent(name)) for name in SENT_FILES]).encode("ascii")
    return first, zlib.compress(rest, 9)


def opened(packed):
    """What stops a shell, the length of a compressed program, and that program."""
    return OPENING + "{:08d}".format(len(packed)).encode("ascii") + packed


def text_of_sent(name):
    """The text of a file of ``tunnel_lib/sent``."""
    import os

    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "sent", name + ".py"), encoding="utf-8") as stream:
        return stream.read()


class Connections:
    """The connections of a session, one after the other, seen from the near end: each takes a login, and is lost
    one day.

    :param wire: what they carry
    :param secret: the session's secret
    :param minutes: how long the far end waits for the next connection
    :param end: secrets of sessions that the next login is to end

    Called back, each to be set by the owner, from within the loop's steps; each may call anything here:

    - ``on_noise(text)``: what a login prints
    - ``on_attached(facts, again)``: the far end has said hello; whether once more
    - ``on_lost(text)``: the connection is no more
    - ``on_elsewhere(text)``: the login has come to another machine than that of the session
    - ``on_refused(text, error)``: the session cannot go on; another connection would not help
    """

    def __init__(self, loop, wire, secret, minutes, end):
        self.loop, self.wire, self.secret, self.minutes, self.end_others = loop, wire, secret, minutes, list(end)
        self.on_noise = self.on_attached = self.on_lost = self.on_elsewhere = self.on_refused = nothing
        wire.on_hello, wire.on_noise = self._hello, self._noise
        self.tries, self.host, self.line = 0, None, None
        self.parting = None  # a line on which the last word has still to be said
        self.echo, self.heard = False, b""  # whether what is sent comes back; the last of what a login prints
        self.source, self.rest = parcel()  # once: an update of the files must not reach a session that runs

    def attach(self, source, sink):
        """Begin on a new connection; see :meth:`Near.attach`."""
        self.detach()
        facts = {"session": self.secret, "new": self.host is None, "host": self.host, "minutes": self.minutes}
        facts.update(end=self.end_others, number=self.tries, rest=len(self.rest) if facts["new"] else None)
        rest = self.rest if facts["new"] else b""
        self.wire.attach(facts, before=self.source, fresh=not self.tries, after=rest)
        self.tries += 1
        self.line = Line(self.loop, self.wire, source, sink, self._line_ended)
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

    def abandon(self):
        """Say goodbye; see :meth:`Near.abandon`."""
        if self.line:
            self._part_from(self.line)

    def _part_from(self, line):
        self.detach()
        self.parting = line
        line.say_last(farewell(self.secret))

    def _hello(self, facts):
        if "error" in facts:
            self.detach()
            text, error = one_line(facts.get("text")), one_line(facts["error"])
            self.on_elsewhere(text) if error == ELSEWHERE else self.on_refused(text, error)
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

    def _line_ended(self, reason):
        line, self.line = self.line, None
        if reason.error and (reason.error != NOISY or self.host is None):
            self._part_from(line)
            self.on_refused(reason.text, reason.error)
        else:
            self.on_lost(reason.text)


class Near:
    """The near end of a session: kernels over there, which survive the connections below them.

    A connection is attached when an SSH client runs :func:`bootstrap_command`; when ``on_lost`` has told that it
    is no more, that client is to be ended and another attached. All of this may be called at any time, attached or
    not: what cannot be sent yet is kept.

    :param loop: a loop such as ``tunnel.Loop``
    :param minutes: how long the kernels wait for a lost connection to come back
    :param end: secrets of sessions whose launchers are dead: ended by the way

    Called back, each to be set by the owner, from within the loop's steps; each may call anything here:

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
        self.secret = os.urandom(16).hex()
        # The line that a watchdog has to write to the client's standard input when the launcher has died.
        self.farewell = farewell(self.secret)
        self.wire = Wire("near", pace=2.0)
        self.channels = Channels(self.wire, 1)
        self.channels.on_control, self.channels.on_open = self._control, self._open
        self.channels.on_text, self.channels.on_change = self._text, self._change
        self.on_noise = self.on_attached = self.on_note = self.on_ports = self.on_started = self.on_text = nothing
        self.on_open = self.on_exit = self.on_arrived = self.on_ended = self.on_lost = self.on_over = nothing
        self.on_job = self.on_elsewhere = nothing
        self.connections = Connections(loop, self.wire, self.secret, minutes, end)
        self.connections.on_noise = lambda text: self.on_noise(text)
        self.connections.on_attached = lambda facts, again: self.on_attached(facts, again)
        self.connections.on_lost = lambda text: self.on_lost(text)
        self.connections.on_elsewhere = lambda text: self.on_elsewhere(text)
        self.connections.on_refused = self._is_over
        self.kernels, self.codes = set(), {}  # those that have not ended; exit codes, while there is data left
        self.unwanted, self.finished = set(), False
        self.count, self.over = 0, False

    def attach(self, source, sink):
        """Begin on a new connection.

        :param source: the client's standard output: a descriptor, or, on Windows, a socket
        :param sink: its standard input
        """
        self.connections.attach(source, sink)

    def detach(self):
        """The connection is no more, the caller knows."""
        self.connections.detach()

    def abandon(self):
        """Say goodbye: the far end then ends all by itself. Where much is on its way that takes a moment; until
        then the loop has to go on, and the client's standard input has to stay open."""
        self.connections.abandon()

    @property
    def host(self):
        """The machine where the session is; None before the far end has said hello."""
        return self.connections.host

    @property
    def echo(self):
        """Whether a login has sent back what it was sent."""
        return self.connections.echo

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
