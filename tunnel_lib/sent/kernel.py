"""A kernel on its machine: the ports on which the relay listens for it, its process in a terminal, its sockets."""

import os
import socket
import struct
from collections import deque

from .line import BUFFER
from .wire import BODY, READ, nothing

SMALL_WRITE = (
    4096  # bytes; a peer that writes less at once, and again, may be waiting for the first to be acknowledged
)


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
    """One kernel of the far end: its listeners, its terminal, its sockets, its end.

    :param channels: those to the launcher
    :param limits: the limits on open files that the kernel shall have
    :param on_ended: called once with this kernel when it has ended and all its data has been sent, from within
        the loop's steps or a call of the owner's; it may call nothing here any more
    """

    def __init__(self, loop, channels, number, limits, on_ended):
        self.loop, self.channels, self.number = loop, channels, number
        self.limits, self.on_ended = limits, on_ended
        self.listeners, self.ends = [], {}  # the socket of each channel
        self.path = self.pid = self.terminal = self.verdict = self.code = self.killer = self.drain = None
        self.printed, self.omitted, self.tail = 0, 0, b""
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
            self.pid, self.terminal, self.verdict = spawn_in_terminal(argv, self.limits)
        except OSError as error:
            self.decline("the kernel cannot be started: {}".format(error.strerror or error))
            return
        os.set_blocking(self.terminal, False)
        self.loop.readers[self.terminal] = self._print
        self.path = argv[0]
        self.loop.readers[self.verdict] = self._judge

    def decline(self, text):
        """Start nothing, and say why."""
        self.say(text)
        self._exited(126)

    def say(self, text):
        self.channels.text(self.number, text.encode("utf-8", "replace")[: BODY - 1] + b"\n")

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
            self._look_whether_over()
            return
        shown = data[: max(0, TEXT_LIMIT - self.printed)]
        self.printed += len(data)
        if shown:
            self.channels.text(self.number, shown)
        self.tail = (self.tail + data[len(shown) :])[-TEXT_TAIL:]
        self.omitted += len(data) - len(shown)

    def _close_terminal(self):
        if self.terminal is not None:
            self.loop.readers.pop(self.terminal, None)
            os.close(self.terminal)
            self.terminal = None
        if self.omitted:
            text = "\n[{} bytes are left out]\n".format(self.omitted - len(self.tail)).encode("ascii")
            self.channels.text(self.number, text + self.tail)
            self.omitted = 0

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

    def changed(self, stream):
        """A channel to the launcher has changed: something has been sent, or it has been given up."""
        if stream.number not in self.channels.streams:
            self.ends.pop(stream, None)
        if self.code is not None:
            self._look_whether_over()

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
        self._look_whether_over()

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
        self._look_whether_over()

    def _look_whether_over(self):
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
        self.on_ended(self)
