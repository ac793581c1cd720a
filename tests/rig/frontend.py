"""A stand-in for the front end and for the parallel tools: creates links and launches kernels."""

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import rig
from rig import standin_kernel as wire

CHANNELS = [
    "{} {}".format(link, kind)
    for link in ("main link", "preemptive link", "service link")
    for kind in ("data", "message")
]


class LauncherEnded(AssertionError):
    """The launcher ended before all channels stood; the text says how, with what it wrote."""


def listening_pair(host="127.0.0.1", ports=(0, 0), receive_buffer=None):
    """Two sockets that listen.

    :param receive_buffer: bytes that the system takes for whoever connects before they are read
    """
    listeners = []
    for port in ports:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Or its port could not be forwarded for a minute after.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if receive_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        bind(listener, host, port)
        listener.listen(8)
        listener.settimeout(30)
        listeners.append(listener)
    return listeners


def bind(listener, host, port):
    def bound():
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not port:
                raise
            return False
        return True

    rig.wait_until(bound, 20, "port {}, which another test may have for a moment".format(port))


def name_of(listeners, host="127.0.0.1"):
    data, message = (listener.getsockname()[1] for listener in listeners)
    return "{0}@{2},{1}@{2}".format(data, message, host)


class FrontEnd:
    """Holds the front end's ends of one kernel's links, and its launcher.

    A front end that holds its links open for ever and reads nothing is one of which no more is asked after
    ``accept``.

    :param role: ``classic`` or ``callback`` for a controller kernel, ``compute`` for a compute kernel
    :param host: the host in link names, and what is listened on
    :param receive_buffer: how many bytes the system takes on each channel before they are read; its default
        otherwise, some megabytes on the loopback. With few the data stays on its way while ``busy``.
    """

    def __init__(self, role="callback", host="127.0.0.1", ports=(0, 0), receive_buffer=None):
        self.role, self.host = role, host
        address = "127.0.0.1" if host == "localhost" else host
        self.block = None
        if role == "classic" and not any(ports):
            # Below the ephemeral ports: a classic kernel listens on the four ports after these, which
            # connections on its machine could have otherwise, its own included.
            self.block = rig.Ports()
            ports = (self.block.first, self.block.first + 1)
        self.main = listening_pair(address, ports, receive_buffer)
        others = 2 if role == "callback" else 0
        self.others = [listening_pair(address, receive_buffer=receive_buffer) for _ in range(others)]
        self.link = name_of(self.main, host)
        self.channels, self.launcher, self._late = [], None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.leave()
        if self.launcher:
            try:
                self.launcher.wait(10)
            finally:
                self.launcher.kill()  # or what it waits for will never end
                self.launcher.wait()
                self._close_pipes()
        if self.block:
            self.block.close()

    def leave(self):
        """Quit, and tell the launcher to end, without waiting for it."""
        if self._late:
            self._late.cancel()
        self.quit()
        self.close_listeners()
        if self.launcher and self.launcher.poll() is None:
            self.launcher.terminate()

    def close_listeners(self):
        for listener in self.main + [each for pair in self.others for each in pair]:
            listener.close()

    def _close_pipes(self):
        for pipe in (self.launcher.stdout, self.launcher.stderr):
            pipe.close()

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
        """Play the front end's part until all channels stand; returns them in the order of CHANNELS.

        Fails as soon as the launcher has ended before, unless that of a compute kernel has done so with 0.
        """
        stands = threading.Event()
        if self.launcher:
            threading.Thread(target=self._hang_up_without_launcher, args=(stands,), daemon=True).start()
        try:
            self._accept()
        except (OSError, EOFError):
            if self._launcher_has_failed(seconds=2):
                raise LauncherEnded(self._last_words()) from None
            raise
        finally:
            stands.set()
        for channel in self.channels:
            channel.settimeout(30)
        return self.channels

    def _accept(self):
        self.channels += wire.handshake_listening(self.main)
        main = self.channels[0]
        if self.role == "callback":
            names = [name_of(pair, self.host).encode("ascii") for pair in self.others]
            main.sendall(wire.packet(b"EvaluatePacket", *names))
            for pair in self.others:
                self.channels += wire.handshake_listening(pair)
            wire.read_strings(main, 1)
        elif self.role == "classic":
            for name in wire.read_strings(main, 2):
                self.channels += wire.handshake_connecting(wire.ends_of(name), socket.create_connection)

    def _hang_up_without_launcher(self, stands):
        """Make ``_accept`` fail, wherever it waits, when the launcher fails before the channels stand."""
        try:
            os.waitid(os.P_PID, self.launcher.pid, os.WEXITED | os.WNOWAIT)
        except OSError:
            pass  # somebody has waited for it already
        if not stands.is_set() and self._launcher_has_failed():
            for each in self.main + [each for pair in self.others for each in pair] + self.channels:
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is closed already

    def _launcher_has_failed(self, seconds=1):
        if not self.launcher:
            return False
        try:
            code = self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return code != 0 or self.role != "compute"

    def _last_words(self):
        try:
            code, errors = self.wait(5)
        except subprocess.TimeoutExpired:  # what it has started holds its stderr
            code, errors = self.launcher.returncode, ""
        return "the launcher ended with exit code {}: {}".format(code, errors.strip())

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

    @staticmethod
    def busy(seconds):
        """Read nothing for a while, as a front end does that formats a large notebook."""
        time.sleep(seconds)

    def expect_flood(self, size, positions=(0,), seconds=60):
        """Read channels to their ends, at once, and fail unless each brings what ``!flood`` writes there."""
        found = {}

        def one(position):
            digest, received = hashlib.sha256(), 0
            self.channels[position].settimeout(seconds)
            try:
                while True:
                    data = self.channels[position].recv(1 << 18)
                    if not data:
                        break
                    digest.update(data)
                    received += len(data)
            except OSError as error:
                found[position] = "{} after {} bytes".format(error, received)
            else:
                found[position] = "{} bytes, {}".format(received, digest.hexdigest())

        threads = [threading.Thread(target=one, args=(position,), daemon=True) for position in positions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
        for position in positions:
            expected = "{} bytes, {}".format(size, hashlib.sha256(wire.pattern(size, position)).hexdigest())
            if found.get(position) != expected:
                text = "{} brought {}, for {}"
                raise AssertionError(text.format(CHANNELS[position], found.get(position), expected))

    def half_close(self, position=0):
        """Say on one channel that nothing more will be sent; it can still be read."""
        self.channels[position].shutdown(socket.SHUT_WR)

    def quit(self, after=None):
        """Close all links, as a front end does when it quits.

        :param after: seconds; then this returns at once, and the links are closed that much later
        """
        if after is not None:
            self._late = threading.Timer(after, self.quit)
            self._late.daemon = True
            self._late.start()
            return
        channels, self.channels = self.channels, []
        for channel in channels:
            channel.close()

    def die(self):
        """End as a front end does that is killed: all at once it listens nowhere, its channels are closed with
        whatever was not read, and nobody reads what the launcher says."""
        self.close_listeners()
        self.quit()
        if self.launcher:
            self._close_pipes()

    def wait(self, seconds=20):
        """Wait for the launcher; returns its exit code and what it wrote to stderr."""
        if self.launcher.stderr.closed:
            return self.launcher.wait(seconds), ""
        _, errors = self.launcher.communicate(timeout=seconds)
        return self.launcher.returncode, errors

    def signal(self, number=signal.SIGTERM):
        self.launcher.send_signal(number)
