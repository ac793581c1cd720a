"""A stand-in for the Mathematica kernel, as far as a launcher can tell: it takes the kernel's switches,
connects to the link it is named, opens or awaits the further links, and then echoes on every channel.

It runs on the kernel machine, with nothing but the standard library. It takes 1.5 s before it connects, as
real ones do: a launcher has to cope with a kernel that is there long before it can be heard, and whatever
depends on the order of the two shows only so. Where neither order nor time matter, a test says ``boot=0``.

A file ``behaviour`` beside it says what else it does, in words and assignments; those of a text have a line each:

``boot=SECONDS``        how long it takes before it connects, or does one of the next three
``unlicensed``          say so, and end with exit code 1
``early``, ``exit=N``   end before it calls back, with exit code 3 or N
``silent``              run, but never call back
``stdout=TEXT``         print a line first, at once; may be given several times
``stderr=TEXT``         the same on stderr, such as what looks like a line of ssh's
``classic``             listen for the further links, as up to 11.0
``computing``           look at no link once all stand, and go on at SIGTERM, which the WSTP library catches

The three that end or stay silent do so at once unless ``boot`` is given. Each start adds a line with the process
id to a file ``starts`` beside it, if there is one.

Then it echoes what comes on each channel, but for lines on the data channel of the main link:

``!quit N``             end with exit code N
``!compute``            answer ``busy`` and look at no link any more
``!flood N``            write N bytes (those of ``pattern``) on this channel, and end at once with exit code 0
``!flood-all N``        the same on every channel, all at the same time
``!print N``            print N bytes on each of stdout and stderr, in lines, then answer ``printed``
``!orphan``             end, but leave a process behind that keeps the links, stdout and stderr open, and that
                        neither SIGTERM nor SIGHUP ends
"""

import _signal  # as the modules above these take longer to import than all else here
import _socket
import _thread
import os
import sys
import time

BOOT_SECONDS = 1.5
COMMANDS = (b"!quit ", b"!compute\n", b"!flood ", b"!flood-all ", b"!print ", b"!orphan\n")
HELLO = (
    b"-numericsid boxer -tokens 33,98,100,102,116,118,120 -textid 'Jan 27 2023, 10:57:24'"
    b" -formats 1,2,3,4,5,6,7\n-envid ''\n-symboldicts 1 -stringdicts 1\nSupport6digitAsciiUnicode\n"
)
LIBRARY = b"\n-libraryid '!&*' -decoders 0\n"
GREETING = b"Math Link 6" + LIBRARY + HELLO

PATIENCE = 120  # seconds; the parallel tools look at their links only when all launches have returned


def pattern(size, channel=0):
    """The bytes that ``!flood`` writes on a channel; none looks like any other, nor can they be compressed."""
    import hashlib  # which takes longer than all that follows a start

    return hashlib.shake_128(b"channel %d" % channel).digest(size)


def read_until(connection, end):
    data = b""
    while not data.endswith(end):
        more = connection.recv(1)
        if not more:
            raise EOFError(data)
        data += more
    return data


def connect(address, seconds):
    connection = _socket.socket()
    connection.settimeout(seconds)
    connection.connect(address)
    return connection


def accept(listener):
    """A connection of the listener's own class."""
    descriptor, _ = listener._accept()
    return type(listener)(fileno=descriptor)


def in_thread(act, *arguments):
    """Call a function in a thread; returns a lock that is free when it has returned."""
    over = _thread.allocate_lock()
    over.acquire()

    def run():
        try:
            act(*arguments)
        except OSError:
            pass  # nobody is there any more
        finally:
            over.release()

    _thread.start_new_thread(run, ())
    return over


def handshake_connecting(ends, connect=connect):
    """What the connecting side of a link does (recorded from the WSTP library); both channels."""
    data_end, message_end = ends
    data = connect(data_end, PATIENCE)
    data.sendall(b"need_msg_portN")
    read_until(data, b"OKY")
    message = connect(message_end, PATIENCE)
    data.sendall(b"Math Link")
    read_until(data, b"Math Link")
    data.sendall(b" 6")
    read_until(data, b" 6")
    data.sendall(LIBRARY)
    read_until(data, LIBRARY)
    data.sendall(HELLO)
    read_until(data, HELLO)
    return data, message


def handshake_listening(listeners):
    """What the listening side does; both channels, which wait as long as the listeners do."""
    data = accept(listeners[0])
    data.settimeout(listeners[0].gettimeout())
    read_until(data, b"need_msg_portN")
    data.sendall(b"OK")
    data.sendall(b"Y")
    message = accept(listeners[1])
    message.settimeout(listeners[1].gettimeout())
    read_until(data, b"Math Link")
    data.sendall(b"Math Link")
    read_until(data, b" 6")
    data.sendall(b" 6")  # the other side waits for this before it goes on
    read_until(data, LIBRARY)
    data.sendall(LIBRARY)
    read_until(data, HELLO)
    data.sendall(HELLO)
    return data, message


def string_token(text):
    """A string as it stands in the data channel: a token, its length in bytes of six bits, its bytes."""
    length = len(text)
    digits = bytes([64 + length]) if length < 64 else bytes([64 + length // 64, 64 + length % 64])
    return b'"bD~' + digits + text + b"\n"


def packet(head, *strings):
    return b"FB#Q" + b"A~" + bytes([64 + len(head)]) + head + b"\n" + b"".join(map(string_token, strings))


def read_strings(connection, count):
    """The strings of a packet with ``count`` of them; their lengths say where they end."""
    read_until(connection, b"\n")
    found = []
    for _ in range(count):
        read_until(connection, b'"bD~')
        length = connection.recv(1)[0] - 64
        if length < 2:  # no link name is that short: a second digit follows
            length = 64 * length + connection.recv(1)[0] - 64
        text = b""
        while len(text) < length:
            text += connection.recv(length - len(text))
        if connection.recv(1) != b"\n":
            raise ValueError("a string does not end where its length says")
        found.append(text.decode("ascii"))
    return found


def ends_of(link_name):
    ends = []
    for part in link_name.split(","):
        port, _, host = part.partition("@")
        ends.append((host, int(port)))
    return ends


class Kernel:
    def __init__(self, argv):
        self.argv = argv
        self.running = _thread.allocate_lock()
        self.running.acquire()
        self.computing = False
        self.code = 0
        self.channels, self.behaviour = [], []
        beside = os.path.dirname(os.path.abspath(__file__))
        try:
            with open(os.path.join(beside, "behaviour"), encoding="utf-8") as stream:
                for line in stream.read().split("\n"):
                    self.behaviour += [line] if line.startswith(("stdout=", "stderr=")) else line.split()
        except OSError:
            pass  # it has none
        if os.path.exists(os.path.join(beside, "starts")):
            with open(os.path.join(beside, "starts"), "a") as stream:
                stream.write("{}\n".format(os.getpid()))

    def given(self, name):
        """The values of ``name=value`` among what it is told to do."""
        return [line[len(name) + 1 :] for line in self.behaviour if line.startswith(name + "=")]

    def run(self):
        for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
            for text in self.given(name):
                stream.buffer.write(text.encode("utf-8") + b"\n")
                stream.flush()
        connects = not {"unlicensed", "early", "silent"} & set(self.behaviour) and not self.given("exit")
        time.sleep(float((self.given("boot") or [BOOT_SECONDS if connects else 0])[0]))
        if "unlicensed" in self.behaviour:
            print("Mathematica cannot find a valid password.\nNo valid password found.")
            return 1
        if "early" in self.behaviour or self.given("exit"):
            return int((self.given("exit") or [3])[0])
        _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
        if "silent" in self.behaviour:
            _signal.pause()
        link = self.argv[self.argv.index("-LinkName") + 1]
        main = handshake_connecting(ends_of(link))
        self.channels = list(main)
        if "-subkernel" not in self.argv:
            self.channels += self.listen(main, link) if "classic" in self.behaviour else self.call_back(main)
        self.computing = "computing" in self.behaviour
        for channel in self.channels:
            in_thread(self.echo, channel, channel is main[0])
        while not self.running.acquire(timeout=3600):
            pass
        return self.code

    def call_back(self, main):
        """11.1 and later: the front end listens, and says where."""
        names = read_strings(main[0], 2)
        channels = [channel for name in names for channel in handshake_connecting(ends_of(name))]
        main[0].sendall(packet(b"ReturnPacket", b"ok"))
        return channels

    def listen(self, main, link):
        """Up to 11.0 with tunnel.m: the kernel listens on the ports after the highest of the main link's."""
        base = max(port for _, port in ends_of(link))
        names, waiting = [], []
        for first in (base + 1, base + 3):
            listeners = []
            for port in (first, first + 1):
                listener = _socket.socket()
                listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
                listener.listen(1)
                listeners.append(listener)
            waiting.append(listeners)
            names.append("{}@127.0.0.1,{}@127.0.0.1".format(first, first + 1).encode("ascii"))
        main[0].sendall(packet(b"CallPacket", *names))
        return [channel for listeners in waiting for channel in handshake_listening(listeners)]

    def echo(self, channel, is_main):
        while not self.computing:
            try:
                data = channel.recv(1 << 18)
            except OSError:
                data = b""
            if not data:
                break
            if is_main and data.startswith(COMMANDS):
                self.obey(channel, *data.decode("ascii").split())
            else:
                channel.sendall(data)
        if is_main and not self.computing:
            self.stop()

    def obey(self, channel, command, number="0"):
        size = int(number)
        if command == "!quit":
            self.end(size)
        elif command == "!compute":
            self.computing = True
            channel.sendall(b"busy")
        elif command == "!flood":
            channel.sendall(pattern(size))
            self.end(0)
        elif command == "!flood-all":
            writers = [
                in_thread(each.sendall, pattern(size, position)) for position, each in enumerate(self.channels)
            ]
            for writer in writers:
                writer.acquire()
            self.end(0)
        elif command == "!print":
            self.print_lines(size)
            channel.sendall(b"printed")
        elif command == "!orphan":
            self.leave_orphan()
            self.end(0)

    def stop(self):
        if self.running.locked():
            self.running.release()

    def end(self, code):
        self.code = code
        self.stop()
        _signal.pause()  # not a byte more is read or written until the process ends

    @staticmethod
    def print_lines(size):
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            written = 0
            while written < size:
                line = "{} {:>9} ".format(name, written).ljust(79, ".")[: size - written - 1] + "\n"
                stream.write(line)
                written += len(line)
            stream.flush()

    def leave_orphan(self):
        # Before this process ends, which hangs up on the other.
        _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGHUP, _signal.SIGTERM})
        if os.fork():
            return
        for channel in self.channels:
            os.set_inheritable(channel.fileno(), True)
        os.execv("/bin/sleep", ["orphan", "600"])


if __name__ == "__main__":
    exit_code = Kernel(sys.argv[1:]).run()
    sys.stdout.flush()
    os._exit(exit_code)  # wherever the threads are
