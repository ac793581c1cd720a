"""A stand-in for the front end and for the parallel tools: creates links and launches kernels."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading

import rig
import standin_kernel as wire

CHANNELS = [
    "{} {}".format(link, kind)
    for link in ("main link", "preemptive link", "service link")
    for kind in ("data", "message")
]


def listening_pair(host="127.0.0.1", ports=(0, 0)):
    listeners = []
    for port in ports:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(8)
        listener.settimeout(30)
        listeners.append(listener)
    return listeners


def quiet_pair():
    """Listeners below the ephemeral ports: a classic kernel listens on the four ports after these, which
    connections on its machine could have otherwise, its own included."""
    while True:
        port = random.randrange(10001, 32000, 10)
        try:
            return listening_pair(ports=(port, port + 1))
        except OSError:
            pass  # somebody has one of them


def name_of(listeners, host="127.0.0.1"):
    data, message = (listener.getsockname()[1] for listener in listeners)
    return "{0}@{2},{1}@{2}".format(data, message, host)


class FrontEnd:
    """Holds the front end's ends of one kernel's links, and its launcher.

    :param role: ``classic`` or ``callback`` for a controller kernel, ``compute`` for a compute kernel
    :param host: the host in link names, and what is listened on
    """

    def __init__(self, role="callback", host="127.0.0.1", ports=(0, 0)):
        self.role, self.host = role, host
        address = "127.0.0.1" if host == "localhost" else host
        self.main = listening_pair(address, ports) if any(ports) or role != "classic" else quiet_pair()
        self.others = [listening_pair(address), listening_pair(address)] if role == "callback" else []
        self.link = name_of(self.main, host)
        self.channels, self.launcher, self.failure = [], None, None
        self._thread = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.quit()
        self.close_listeners()
        if self.launcher:
            if self.launcher.poll() is None:
                self.launcher.terminate()
            self.launcher.wait(10)
            for pipe in (self.launcher.stdout, self.launcher.stderr):
                pipe.close()

    def close_listeners(self):
        for listener in self.main + [each for pair in self.others for each in pair]:
            listener.close()

    def launch(self, *arguments, environment=None, script=None, command=None):
        """Start a launcher with ``arguments`` and this front end's link name, as a front end does."""
        name = "tunnel_sub.py" if self.role == "compute" else "tunnel.py"
        command = command or [sys.executable, script or os.path.join(rig.LAUNCHERS, name)]
        self.launcher = subprocess.Popen(
            command + list(arguments) + [self.link],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(os.environ, **(environment or {})),
            universal_newlines=True,
        )
        return self

    def accept(self):
        """Play the front end's part until all channels stand; returns them in the order of CHANNELS."""
        main = wire.handshake_listening(self.main)
        self.channels = list(main)
        if self.role == "callback":
            names = [name_of(pair, self.host).encode("ascii") for pair in self.others]
            main[0].sendall(wire.packet(b"EvaluatePacket", *names))
            for pair in self.others:
                self.channels += wire.handshake_listening(pair)
            wire.read_strings(main[0], 1)
        elif self.role == "classic":
            for name in wire.read_strings(main[0], 2):
                self.channels += wire.handshake_connecting(wire.ends_of(name))
        for channel in self.channels:
            channel.settimeout(30)
        return self.channels

    def echo(self, size=4096):
        """Send ``size`` random bytes down every channel at once, and fail unless all come back."""
        results = [None] * len(self.channels)

        def one(position, channel):
            sent = os.urandom(size)
            sender = threading.Thread(target=channel.sendall, args=(sent,), daemon=True)
            sender.start()
            received = b""
            while len(received) < size:
                more = channel.recv(1 << 18)
                if not more:
                    break
                received += more
            sender.join(30)
            results[position] = received == sent

        threads = [threading.Thread(target=one, args=each) for each in enumerate(self.channels)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        expected = 2 if self.role == "compute" else 6
        assert results == [True] * expected, results

    def tell(self, line):
        self.channels[0].sendall(line)

    def quit(self):
        """Close all links, as a front end does when it quits."""
        for channel in self.channels:
            channel.close()
        self.channels = []

    def wait(self, seconds=20):
        """Wait for the launcher; returns its exit code and what it wrote to stderr."""
        _, errors = self.launcher.communicate(timeout=seconds)
        return self.launcher.returncode, errors

    def signal(self, number=signal.SIGTERM):
        self.launcher.send_signal(number)
