"""Relays without a kernel machine: logins without an SSH client, cables that can be cut, and a launcher.

A *login* is what an SSH client would be: a shell that runs the bootstrap, with pipes. A *cable* stands between it
and the near end, and loses what is in it when it is cut, as a network does. The *launcher* does with the near end
what ``tunnel.py`` does, in a thread, so that a front end's stand-in can be used from a test.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import rig
from rig import frontend, product

PYENV = os.path.expanduser("~/.pyenv/versions")


class Machine:
    """A kernel machine that is this one: a home, a PATH with one Python, stand-in kernels, and its processes.

    :param folder: where it lies, if it is another process's
    """

    def __init__(self, python=None, shell="/bin/sh", folder=None):
        self.folder = folder or os.path.realpath(tempfile.mkdtemp(prefix="relay-rig-"))
        self.python, self.shell = python or sys.executable, shell
        self.logins = []
        self.names = []  # where keepers may put their sockets
        self.sequence = 0
        if folder:
            return
        os.mkdir(self.path("bin"))
        self.write("bin/python3", '#!/bin/sh\nexec {} "$@"\n'.format(self.python), 0o755)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for login in self.logins:
            login.kill()
        left = [(pid, rig.command_line(pid)[-3:]) for pid in self.processes()]
        for pid, _ in left:
            rig.end_process(pid)
        rig.wait_until(lambda: not self.processes(), 10, "the end of what was killed")
        sockets = [name for name in self.names if os.path.exists(name)]
        for name in sockets:
            os.unlink(name)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert left or not sockets, "sockets are left: {}".format(sockets)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def write(self, name, text, mode=0o644):
        with open(self.path(name), "w") as stream:
            stream.write(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def kernel(self, *behaviour):
        """A stand-in kernel that behaves as told; returns its path."""
        self.sequence += 1
        folder = self.path("kernel-{}".format(self.sequence))
        os.mkdir(folder)
        with open(os.path.join(rig.HERE, "standin_kernel.py")) as stream:
            text = stream.read()
        name = os.path.relpath(os.path.join(folder, "WolframKernel"), self.folder)
        self.write(os.path.join(os.path.dirname(name), "behaviour"), " ".join(("boot=0",) + behaviour))
        return self.write(name, "#!{} -SEs\n{}".format(rig.kernel_python(), text), 0o755)

    def script(self, text, python=True):
        """A kernel that is this Python (or shell) program; returns its path."""
        self.sequence += 1
        first = "#!{} -SEs\n".format(rig.kernel_python()) if python else "#!/bin/sh\n"
        return self.write("script-{}".format(self.sequence), first + text, 0o755)

    def environment(self, **more):
        return dict(
            {"PATH": self.path("bin") + ":/usr/bin:/bin", "HOME": self.folder, "RELAY_RIG": self.folder}, **more
        )

    def login(self, command=None, shell=None, **environment):
        login = Login(self, command or product.bootstrap_command(), shell or self.shell, environment)
        self.logins.append(login)
        return login

    def processes(self):
        """All that logins have started and that still runs."""
        return rig.processes_with("RELAY_RIG=" + self.folder)

    def keepers(self):
        """The processes that hold sessions."""
        return [pid for pid in self.processes() if is_keeper(pid)]

    def no_process(self, seconds=10):
        try:
            rig.wait_until(lambda: not self.processes(), seconds, "the end of all that was started")
        except AssertionError as error:
            left = [describe(pid) for pid in self.processes()]
            raise AssertionError("{}; left: {}".format(error, left)) from None


def describe(pid):
    """A process in the message of a test that fails."""
    files, facts = {}, []
    try:
        with open("/proc/{}/stat".format(pid)) as stream:
            facts = stream.read().rpartition(")")[2].split()[:2]
        for name in os.listdir("/proc/{}/fd".format(pid)):
            files[int(name)] = os.readlink("/proc/{}/fd/{}".format(pid, name))
    except OSError:
        pass  # it has just ended
    return pid, [word[:60] for word in rig.command_line(pid)[:4]], facts, sorted(files.items())


def is_keeper(pid):
    """Whether a process has handed its standard streams to /dev/null, as keepers do."""
    try:
        return "-SEsc" in rig.command_line(pid) and os.readlink("/proc/{}/fd/1".format(pid)) == "/dev/null"
    except OSError:
        return False


class Login:
    """One login: the shell and what it runs, in a process group of their own."""

    def __init__(self, machine, command, shell, environment):
        self.process = subprocess.Popen(
            [shell, "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=machine.environment(**environment),
            cwd=machine.folder,
            bufsize=0,
            start_new_session=True,
        )
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()

    def kill(self):
        """End it, as a server does with a session whose connection is gone."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except OSError:
            pass
        self.process.wait()
        self.close()

    def close(self):
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()

    def errors(self):
        return self.process.stderr.read().decode("utf-8", "replace")


class Cable:
    """Pipes between a near end and a login, which lose what is in them when they are cut."""

    def __init__(self, login):
        self.login = login
        out_near, self.out = os.pipe()
        self.into, in_near = os.pipe()
        self.source, self.sink = out_near, in_near
        self.frozen, self.ended = threading.Event(), False
        self.frozen.set()
        self.moved = 0
        self.threads = [
            threading.Thread(target=self._copy, args=each, daemon=True)
            for each in ((login.stdout, self.out), (self.into, login.stdin))
        ]
        for thread in self.threads:
            thread.start()

    def _copy(self, source, sink):
        try:
            while not self.ended:
                data = os.read(source, 65536)
                self.frozen.wait()
                if not data or self.ended:
                    break
                self.moved += len(data)
                while data:
                    data = data[os.write(sink, data) :]
        except OSError:
            pass
        try:
            os.close(sink) if sink == self.out else self.login.process.stdin.close()
        except OSError:
            pass

    def freeze(self):
        """Let nothing pass, and say nothing."""
        self.frozen.clear()

    def thaw(self):
        self.frozen.set()

    def cut(self):
        """Lose what is under way, and end the login."""
        self.ended = True
        self.frozen.set()
        self.login.kill()

    def close_near(self):
        for descriptor in (self.source, self.sink):
            os.close(descriptor)


NAME = re.compile(rb"(\d{5})@127\.0\.0\.1,(\d{5})@127\.0\.0\.1")


class Kernel:
    """One kernel of a launcher, with the front end's links."""

    def __init__(self, link=None, classic=False):
        self.link, self.classic = link, classic
        self.targets = [(host, port) for host, port in frontend.wire.ends_of(link)] if link else []
        self.ports, self.code, self.exit, self.started = [], None, None, False
        self.text, self.ends, self.listeners = "", [], []
        self.told = {}  # of the command through which it runs
        self.names, self.replacing = 0, False


CALLBACKS = ["noise", "attached", "note", "ports", "started", "text", "open", "exit", "ended", "lost"]
CALLBACKS += ["job", "elsewhere", "over"]


class Launcher:
    """Runs a near end in a thread.

    :param machine: where it logs in
    :param cable: whether a cable stands between
    """

    def __init__(
        self, machine, cable=False, reconnect=True, command=None, shell=None, small_buffers=False, **options
    ):
        self.machine, self.with_cable, self.reconnect = machine, cable, reconnect
        self.small_buffers = small_buffers  # so that little of what is passed on is on its way to the front end
        self.login_options = {"command": command, "shell": shell}
        self.loop = product.PollLoop()
        self.near = product.Near(self.loop, **options)
        name = "relay-" + product.session_name(self.near.secret)
        machine.names += [os.path.join(folder, name) for folder in product.folders()]
        self.kernels, self.notes, self.noise, self.lost = {}, [], "", []
        self.over = self.elsewhere = None
        self.attached = 0
        self.facts = None
        self.connection = None
        self.failure = None
        self.pause = 0
        for name in CALLBACKS:
            setattr(self.near, "on_" + name, getattr(self, "_" + name))
        self.calls = []
        self.waker, self.ear = socket.socketpair()
        self.ear.setblocking(False)
        self.loop.readers[self.ear] = self._wake
        self.stopped = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        self.call(self.connect)
        return self

    def __exit__(self, *_):
        if self.thread.is_alive():
            self.call(self._stop)
        self.thread.join(10)
        self._disconnect()
        self.waker.close()
        self.ear.close()
        for kernel in self.kernels.values():
            for listener in kernel.listeners:
                listener.close()
        if self.failure:
            raise self.failure

    def _stop(self):
        self.near.abandon()
        self.stopped = True

    def _run(self):
        try:
            while not self.stopped:
                self.loop.step()
        except BaseException as error:
            self.failure = error

    def call(self, action, *arguments):
        """Have something done in the loop's thread; returns its result."""
        done, result = threading.Event(), []

        def act():
            try:
                result.append(action(*arguments))
            finally:
                done.set()

        self.calls.append(act)
        self.waker.send(b"x")
        end = time.monotonic() + 20
        while not done.wait(0.05):
            if self.failure:
                raise self.failure
            assert time.monotonic() < end, "the loop does not turn"
        return result[0]

    def _wake(self):
        self.ear.recv(4096)
        while self.calls:
            self.calls.pop(0)()

    def connect(self):
        self._disconnect()
        login = self.machine.login(**self.login_options)
        if self.with_cable:
            self.connection = Cable(login)
            self.near.attach(self.connection.source, self.connection.sink)
        else:
            self.connection = login
            self.near.attach(login.stdout, login.stdin)

    def cut(self):
        """Lose the connection, if there is one."""
        self.call(lambda: self.connection and self.connection.cut())

    @property
    def moved(self):
        """How many bytes have passed through the cable that there is."""
        connection = self.connection
        return connection.moved if connection else 0

    def _disconnect(self):
        self.near.detach()
        if self.connection is None:
            return
        if self.with_cable:
            self.connection.cut()
            self.connection.close_near()
        else:
            try:
                self.connection.process.wait(0.5 if self.near.over else 0.001)
            except subprocess.TimeoutExpired:
                pass
            self.connection.kill()
        self.connection = None

    # -- what the near end calls

    def _noise(self, text):
        self.noise += text

    def _attached(self, facts, again):
        assert again == (self.attached > 0)
        self.facts = facts
        self.attached += 1

    def _note(self, text):
        self.notes.append(text)

    def _ports(self, kernel, ports):
        self.kernels[kernel].ports = ports

    def _started(self, kernel):
        self.kernels[kernel].started = True

    def _text(self, kernel, text):
        self.kernels[kernel].text += text

    def _job(self, kernel, message):
        self.kernels[kernel].told.setdefault(message["told"], []).append(message)

    def _exit(self, kernel, code):
        self.kernels[kernel].exit = code

    def _ended(self, kernel, code):
        self.kernels[kernel].code = code
        for end in self.kernels[kernel].ends:
            end.finish()

    def _lost(self, text):
        self.lost.append(text)
        if self.reconnect:
            self.loop.after(self.pause, lambda: self.near.over or self.near.connections.line or self.connect())

    def _elsewhere(self, text):
        self.elsewhere = text

    def _over(self, text, error):
        self.over = (text, error)

    def _open(self, number, position, stream):
        kernel = self.kernels[number]
        if position >= len(kernel.targets):
            stream.close()
            return
        try:
            connection = socket.create_connection(kernel.targets[position], 5)
        except OSError:
            stream.close()
            return
        if self.small_buffers:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end = product.KernelSocket(self.loop, connection)
        kernel.ends.append(end)
        product.join(end, stream)
        if position == 0 and kernel.replacing:
            source = stream if kernel.classic else end
            plain = source.on_data

            def replacing(data):
                data = self._replace(kernel, number, bytes(data))
                if kernel.names == 2:
                    source.on_data = plain
                plain(data)

            source.on_data = replacing

    def _replace(self, kernel, number, data):
        """Link names in the main data channel; here the stand-ins send each packet in one piece."""

        def change(match):
            kernel.names += 1
            ports = [int(port) for port in match.groups()]
            if kernel.classic:
                told = [self._listen(kernel, number, port) for port in ports]
            else:
                told = kernel.ports[len(kernel.targets) : len(kernel.targets) + 2]
                kernel.targets += [("127.0.0.1", port) for port in ports]
            return "{}@127.0.0.1,{}@127.0.0.1".format(*told).encode("ascii")

        return NAME.sub(change, data)

    def _listen(self, kernel, number, port):
        listener = socket.socket()
        while True:
            try:
                listener.bind(("127.0.0.1", product.draw_block() + 7))
                break
            except OSError:
                pass
        listener.listen(1)
        kernel.listeners.append(listener)

        def accept():
            end = product.KernelSocket(self.loop, listener.accept()[0])
            del self.loop.readers[listener]
            kernel.ends.append(end)
            product.join(end, self.near.open(number, "127.0.0.1", port))

        self.loop.readers[listener] = accept
        return listener.getsockname()[1]

    # -- what a test calls

    def start(self, path, link=None, classic=False, listen=None, words=None, via=None):
        """Start a kernel for a link of a front end; returns its record."""
        listen = listen if listen is not None else 0 if link is None else 2 if classic else 6
        name = "{0}@127.0.0.1,{1}@127.0.0.1"
        words = words or (["-LinkName", name] if link else [])

        def act():
            kernel = Kernel(link, classic)
            kernel.number = number = self.near.start([path] + words, listen, via)
            kernel.replacing = classic or listen == 6
            self.kernels[number] = kernel
            return kernel

        return self.call(act)

    def launch(self, path, role, via=None):
        """Start a kernel for a stand-in front end; returns both, with all channels standing."""
        front_end = frontend.FrontEnd(role)
        words = ["-LinkName", "{0}@127.0.0.1,{1}@127.0.0.1"] + (["-subkernel"] if role == "compute" else [])
        kernel = self.start(path, front_end.link, role == "classic", 6 if role == "callback" else 2, words, via)
        try:
            front_end.accept()
        except BaseException as error:
            front_end.close_listeners()
            raise AssertionError(
                "{!r}; kernel printed {!r}, lost {}".format(error, kernel.text, self.lost)
            ) from error
        return front_end, kernel

    def wait(self, condition, what, seconds=15):
        def look():
            if self.failure:
                raise self.failure
            return condition()

        try:
            return rig.wait_until(look, seconds, what)
        except AssertionError as error:
            texts = [kernel.text[-500:] for kernel in self.kernels.values()]
            facts = "lost {}, over {}, noise {!r}, texts {}".format(self.lost, self.over, self.noise[-500:], texts)
            raise AssertionError("{}; {}".format(error, facts)) from None
