"""A kernel that runs through a command, such as ``srun``: the command's process, and what passes through it.

Beyond the command a door opens once more, and behind it a far end of its own serves the kernel. That far end is
reached through the command's standard input and output, by a wire of its own.
"""

import os

from .bootstrap import BEGIN_SECONDS, beyond_command
from .channels import Channels
from .door import NOISE_LIMIT
from .kernel import HANG_UP_SECONDS, TEXT_LIMIT, TEXT_TAIL, join, set_limits
from .line import CONNECTION_CLOSED, Line
from .wire import FINISH, TEXT, Wire, one_line

ENTERED = b"--tunnel-relay-shell--"  # what the login shell says when it comes to a command
SHELL_SECONDS = 30  # from its start until then
READY = b"--tunnel-relay-ready--"  # what the far end beyond a command says first
COMMAND_SECONDS = 15.0  # from SIGTERM to SIGKILL: a scheduler's command that is killed cannot take its job back
LINE_COST = 64  # bytes that a line of a command counts for besides its own: each is a message of its own
SUSPENDED_SECONDS = 20.0  # a far end beyond a command that says nothing for so long is spoken of


def login_shell():
    """The user's shell, as sshd has it from the accounts."""
    return os.environ.get("SHELL") or "/bin/sh"


def shell_line(command):
    """What the login shell is told; all shells read it alike. PATH may be another where the command leads."""
    return "echo {}; {} /bin/sh".format(ENTERED.decode("ascii"), command)


def spawn_command(command, limits):
    """Start what leads to a far end beyond it, in a session of its own, with pipes.

    It is read by the user's own shell, as a login shell, which is what a name that begins with a dash makes of
    any (a bash may have been built to want ``-l`` besides): only such a one reads ``/etc/profile`` and what that
    names, where clusters define ``module``. One that sshd runs for a command reads none of it; what such a one
    does read, the file that ``BASH_ENV`` names, is read here too. What all that prints comes before the far end's
    first word, and is skipped. The shell says when it comes to the command, and gets nothing to read before: a
    start-up file may run another shell in its place, which would take what it reads for its own.

    The command runs ``sh``, without any argument, and that reads what it is to do from its standard input: some
    commands join the arguments that follow, and have a shell read them again.
    """
    import signal
    import subprocess

    def prepare():
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        set_limits(limits)

    shell = login_shell()
    name = os.path.basename(shell)
    return subprocess.Popen(
        ["-" + name] + (["-l"] if name == "bash" else []) + ["-c", shell_line(command)],
        executable=shell,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        preexec_fn=prepare,
    )


class Job:
    """One kernel of a keeper that runs elsewhere, through a command, beyond which there is a far end for it alone.
    To the keeper it is what :class:`KernelProcess` is. Besides, it tells

    - ``via``: the command has been started
    - ``said``: what the command prints, and what there is to say of it
    - ``node``: the far end beyond has said hello, with its facts
    - ``failed``: the command has ended before the kernel: how far it had come, its exit code, and why
    """

    def __init__(self, far, number, command):
        self.far, self.loop, self.channels, self.number = far, far.loop, far.channels, number
        self.command = command
        self.wire = Wire("near", patience=float("inf"))
        self.wire.on_hello, self.wire.on_noise = self._hello, self._noise
        self.inner = Channels(self.wire, 1)
        self.inner.on_control, self.inner.on_open, self.inner.on_text = self._control, self._open, self._text
        self.ends, self.timers = {}, {}
        self.process = self.line = self.result = self.failure = self.code = None
        self.entered = self.runs = self.unwanted = self.done = self.gone = self.over = False
        self.before = self.noise = b""  # the last of standard output, until the far end has said hello
        self.part, self.printed, self.last = b"", 0, b""  # a line so far; bytes; what is told in the end

    # -- what the keeper's far end calls

    def start(self, argv, count):
        self.inner.control(do="start", kernel=1, argv=argv, listen=count)
        try:
            self.process = spawn_command(self.command, self.far.limits)
        except OSError as error:
            self.failure = "start", "{}: {}".format(login_shell(), error.strerror or error)
            self._conclude()
            return
        self.out, self.err = self.process.stdout.fileno(), self.process.stderr.fileno()
        for descriptor in (self.out, self.err):
            os.set_blocking(descriptor, False)
        self.loop.readers[self.out], self.loop.readers[self.err] = self._await, self._hear
        self._within("shell", SHELL_SECONDS, lambda: self._fail("shell", ""))
        self._tell("via", pid=self.process.pid)

    def hang_up(self):
        """End the kernel; one that does not run yet never will."""
        if self.unwanted or self.gone:
            return
        self.unwanted = True
        if self.runs:
            self.inner.control(do="hang up", kernel=1)
            self._within("end", HANG_UP_SECONDS + 2, self._kill)
        else:
            self._kill()

    def connect(self, stream, host, port):
        join(stream, self.inner.open(1, {"host": host, "port": port}))

    def say(self, text):
        self._tell("said", text=one_line(text)[:1000])

    def reap(self):
        """Look whether the command has ended."""
        if self.process is None or self.gone or self.process.poll() is None:
            return
        self.gone = True
        for name in list(self.timers):
            self._disarm(name)
        for _ in range(8):  # what it has left in its pipes, which do not hold more
            self._hear()
            if self.line is None:
                self._await()
            elif not self.line.closed:
                self.line._read()
        if self.line:
            self.line.close()
        for descriptor in (self.out, self.err):
            self.loop.readers.pop(descriptor, None)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        self._print((b"\n" + self.before if self.line is None else b"") + b"\n" + self.last)
        if self._signal("SIGTERM"):  # what else it has started
            self._within("kill", COMMAND_SECONDS, lambda: self._signal("SIGKILL"))
            self._within("left", COMMAND_SECONDS + 2, self._conclude)
            self._look_whether_gone()
        else:
            self._conclude()

    def look_whether_over(self):
        """The end is told when all that has come before it has been passed on."""
        streams = self.channels.of(self.number)
        if self.code is None or self.over or not (self.unwanted or all(stream.silent for stream in streams)):
            return
        self.over = True
        self.channels.drop(self.number)
        self.far.ended(self)

    # -- what the command prints

    def _await(self):
        """Wait for the login shell to come to the command, then for the far end's first word."""
        self.before += self._take(self.out)
        if not self.entered and self._skip_to(ENTERED):
            self.entered = True
            self._disarm("shell")
            try:
                self.process.stdin.write(beyond_command())
            except OSError:
                pass  # it has ended: that is told in a moment
        if not self.entered or not self._skip_to(READY):
            return
        if self.gone:
            return
        self._within("begin", BEGIN_SECONDS, lambda: self._fail("silent", ""))
        first, rest = self.far.parcel
        self.wire.attach({"beyond": True, "rest": len(rest)}, before=first, fresh=True, after=rest)
        self.line = Line(self.loop, self.wire, self.out, self.process.stdin.fileno(), self._broken)
        self.line.feed(self.before)

    def _skip_to(self, mark):
        """Pass on what comes before a mark; returns whether that has come."""
        at = self.before.find(mark)
        if at < 0:
            at = self.before.rfind(b"\n") + 1
            self._print(self.before[:at])
            self.before = self.before[at:][-TEXT_LIMIT:]
            if self.printed > NOISE_LIMIT:
                self._fail("noise", "")
            return False
        self._print(self.before[:at] + b"\n")
        self.before = self.before[at + len(mark) :]
        return True

    def _hear(self):
        self._print(self._take(self.err))

    def _take(self, descriptor):
        """What there is to read."""
        try:
            data = os.read(descriptor, 65536)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            data = b""
        if not data:
            self.loop.readers.pop(descriptor, None)
        return data

    def _print(self, data):
        """Pass on whole lines; of very much only the last one, in the end."""
        self.printed += len(data) + LINE_COST * data.count(b"\n")
        lines = (self.part + data).replace(b"\r", b"\n").split(b"\n")
        self.part = lines.pop()[-TEXT_TAIL:]
        lines = [line for line in lines if line.strip()]
        if lines and self.printed > TEXT_LIMIT and not self.gone:
            self.last, lines = lines[-1][-TEXT_TAIL:] + b"\n", []
        for line in lines:
            self.say(line.decode("utf-8", "replace"))

    # -- what the far end beyond says

    def _noise(self, data):
        self.noise = (self.noise + data)[-TEXT_TAIL:]
        if READY in self.noise:
            self._fail("twice", "")
        self._print(data)

    def _hello(self, facts):
        if "error" in facts:
            self._fail("altered", one_line(facts.get("text")))
            return
        self._disarm("begin")
        self.runs = True
        told = {name: one_line(facts.get(name) or "") for name in ("host", "pid", "python", "job")}
        self._tell("node", **told)
        self._within("quiet", SUSPENDED_SECONDS, self._look_whether_quiet)

    def _look_whether_quiet(self):
        left = SUSPENDED_SECONDS - (self.wire.clock() - self.wire.heard)
        if left <= 0:
            text = "nothing has come for {:.0f} s: the job is suspended, or its node down"
            self.say(text.format(SUSPENDED_SECONDS - left))
        self._within("quiet", max(left, 0.1) if left > 0 else 10 * SUSPENDED_SECONDS, self._look_whether_quiet)

    def _control(self, message):
        told, code = message.get("told"), message.get("code")
        if told in ("ports", "started"):
            self.channels.control(**dict(message, kernel=self.number))
        elif told == "exit" and type(code) is int:
            self.result = code
        elif told == "stopped":
            self.failure = self.failure or ("stopped", one_line(message.get("text")))
        elif told == "note":
            self.say(message.get("text"))
        elif told == "over":
            self.done = True
            self.loop.after(0, self._let_go)

    def _open(self, stream, facts):
        join(stream, self.channels.open(self.number, {"listener": facts.get("listener")}))

    def _text(self, _, data):
        self.channels.wire.send(TEXT, self.number, data)
        self.channels.wire.flush()

    def _broken(self, error):
        """The line to the far end beyond is no more."""
        if error.text == CONNECTION_CLOSED:
            self._within("end", COMMAND_SECONDS, self._kill)
        else:
            self._drain()
            self._fail("twice" if "0x2d" in error.text else "altered", error.text)

    # -- the end

    def _let_go(self):
        """The far end beyond has done; that its input ends tells it that this is known."""
        if not self.gone:
            self.line.close()
            self._drain()
            self.process.stdin.close()
            self._within("end", HANG_UP_SECONDS, self._kill)

    def _drain(self):
        """Read on: a command that cannot write does not end."""
        if not self.gone:
            self.loop.readers[self.out] = lambda: self._take(self.out)

    def _tell(self, told, **facts):
        self.channels.control(told=told, kernel=self.number, **facts)

    def _within(self, name, seconds, action):
        self._disarm(name)
        self.timers[name] = self.loop.after(seconds, action)

    def _disarm(self, name):
        self.loop.cancel(self.timers.pop(name, None))

    def _fail(self, stage, text):
        self.failure = self.failure or (stage, text)
        self._kill()

    def _kill(self):
        """End the command."""
        if not self.gone and "kill" not in self.timers:
            self._signal("SIGTERM" if self.entered else "SIGHUP")  # which a shell that waits does not ignore
            self._signal("SIGCONT")  # one that is stopped hears nothing
            self._within("kill", COMMAND_SECONDS, lambda: self._signal("SIGKILL"))

    def _signal(self, name):
        """Returns whether anything is left of what the command has started."""
        import signal

        try:
            os.killpg(self.process.pid, getattr(signal, name, 0))
        except OSError:
            return False
        return True

    def _look_whether_gone(self):
        if self._signal("nothing"):
            self._within("look", 0.1, self._look_whether_gone)
        else:
            self._conclude()

    def _conclude(self):
        """Nothing is left of the command: tell how it has ended."""
        if self.code is not None:
            return
        for name in list(self.timers):
            self._disarm(name)
        self.gone, code = True, self.result
        if self.unwanted:
            code = 129 if code is None else code
        elif self.failure or not self.done:
            stage, text = self.failure or ("runs" if self.runs else "begun" if self.line else "before", "")
            self._tell("failed", stage=stage, text=text, code=self.process and self.process.returncode)
            code = 255
        for stream in self.inner.of(1):  # what it has sent is still passed on
            if not stream.got_finish:
                stream.frame(FINISH, b"")
        self._exited(255 if code is None else code)

    def _exited(self, code):
        self.code = code
        self._tell("exit", code=code)
        self.look_whether_over()
