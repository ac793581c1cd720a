"""A stand-in for the Mathematica kernel, as far as a launcher can tell: it takes the kernel's switches,
connects to the link it is named, opens or awaits the further links, and then echoes on every channel.

It runs on the kernel machine, with nothing but the standard library. A file ``behaviour`` beside it holds
words that change what it does: ``classic`` (listen for the further links, as up to 11.0), ``silent`` (run,
but never call back), ``unlicensed``, ``early`` (end before it calls back), ``computing`` (look at no link
once all stand, and go on at SIGTERM, which the WSTP library catches).

On the data channel of the main link a line ``!quit N`` ends it with exit code N, and ``!compute`` makes it
look at no link any more.
"""

import os
import signal
import socket
import sys
import threading

HELLO = (
    b"-numericsid boxer -tokens 33,98,100,102,116,118,120 -textid 'Jan 27 2023, 10:57:24'"
    b" -formats 1,2,3,4,5,6,7\n-envid ''\n-symboldicts 1 -stringdicts 1\nSupport6digitAsciiUnicode\n"
)
LIBRARY = b"\n-libraryid '!&*' -decoders 0\n"
GREETING = b"Math Link 6" + LIBRARY + HELLO


PATIENCE = 120  # seconds; the parallel tools look at their links only when all launches have returned


def read_until(connection, end):
    data = b""
    while not data.endswith(end):
        more = connection.recv(1)
        if not more:
            raise EOFError(data)
        data += more
    return data


def handshake_connecting(ends):
    """What the connecting side of a link does (recorded from the WSTP library); both channels."""
    (data_host, data_port), (message_host, message_port) = ends
    data = socket.create_connection((data_host, data_port), PATIENCE)
    data.sendall(b"need_msg_portN")
    read_until(data, b"OKY")
    message = socket.create_connection((message_host, message_port), PATIENCE)
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
    """What the listening side does; both channels."""
    data, _ = listeners[0].accept()
    read_until(data, b"need_msg_portN")
    data.sendall(b"OK")
    data.sendall(b"Y")
    message, _ = listeners[1].accept()
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
        self.ended = threading.Event()
        self.computing = False
        self.code = 0
        try:
            with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "behaviour")) as stream:
                self.behaviour = stream.read().split()
        except OSError:
            self.behaviour = []

    def run(self):
        if "unlicensed" in self.behaviour:
            print("Mathematica cannot find a valid password.\nNo valid password found.")
            return 1
        if "early" in self.behaviour:
            return 3
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "silent" in self.behaviour:
            signal.pause()
        link = self.argv[self.argv.index("-LinkName") + 1]
        main = handshake_connecting(ends_of(link))
        channels = list(main)
        if "-subkernel" not in self.argv:
            channels += self.listen(main, link) if "classic" in self.behaviour else self.call_back(main)
        self.computing = "computing" in self.behaviour
        for channel in channels:
            threading.Thread(target=self.echo, args=(channel, channel is main[0]), daemon=True).start()
        while not self.ended.wait(3600):
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
                listener = socket.socket()
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
            if is_main and data.startswith(b"!quit"):
                self.code = int(data.split()[1])
                self.ended.set()
                return
            if is_main and data.startswith(b"!compute"):
                self.computing = True
                channel.sendall(b"busy")
                return
            channel.sendall(data)
        if is_main and not self.computing:
            self.ended.set()


if __name__ == "__main__":
    sys.exit(Kernel(sys.argv[1:]).run())
