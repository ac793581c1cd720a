"""A kernel that runs through a command, such as ``srun``: the command's process, and what passes through it.

Beyond the command a door opens once more, and behind it a far end of its own serves the kernel. That far end is
reached through the command's standard input and output, by a wire of its own.
"""

import os

from .bootstrap import BEGIN_SECONDS, beyond_command
from .channels import Channels
from .door import NOISE_LIMIT
from .kernel import HANG_UP_SECONDS, TEXT_LIMIT, TEXT_TAIL, join, set_limits
from .line import CONNECTION_CLOSED, Line, NamedTimers
from .wire import FINISH, Wire, nothing, one_line

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


class Command:
    """The process of a command, and what it prints, until a door answers beyond it.

    :param command: as the user's shell is to read it
    :param limits: the limits on open files that it shall have

    Called back, each to be set by the owner, from within the loop's steps or a call of the owner's:

    - ``on_line(text)``: the command, or the login shell that is to run it, has printed a line; may call nothing
    - ``on_ready(rest)``: a door beyond the command waits for what it is to be sent; ``rest`` is what has come
      behind that word. From then on standard output is the owner's to read; may call anything
    - ``on_failure(stage)``: it leads to no door: ``shell``, its turn in the login shell never comes; ``noise``, it
      prints without end. May come more than once; may call :meth:`kill`
    - ``on_gone()``: nothing is left of it, nor of what it has started; the last of all
    """

    def __init__(self, loop, command, limits):
        self.loop, self.command, self.limits = loop, command, limits
        self.on_line = self.on_ready = self.on_failure = self.on_gone = nothing
        self.timers = NamedTimers(loop)
        self.process = self.out = self.err = None
        self.entered = self.ready = self.ended = False
        self.before = b""  # the last of standard output, until a door answers
        self.part, self.printed, self.last = b"", 0, b""  # a line so far; bytes; what is told in the end

    @property
    def code(self):
        """The exit code, or a signal's number below 0; None while it runs, and if it never did."""
        return self.process and self.process.returncode

    @property
    def input(self):
        """The descriptor of its standard input."""
        return self.process.stdin.fileno()

    def start(self):
        """:raises OSError: the login shell cannot be run"""
        self.process = spawn_command(self.command, self.limits)
        self.out, self.err = self.process.stdout.fileno(), self.process.stderr.fileno()
        for descriptor in (self.out, self.err):
            os.set_blocking(descriptor, False)
        self.loop.readers[self.out], self.loop.readers[self.err] = self._await, self._hear
        self.timers.within("shell", SHELL_SECONDS, lambda: self.on_failure("shell"))

    # -- what it prints

    def read(self):
        """Take what there is to read, but of standard output nothing that is the owner's."""
        self._hear()
        if not self.ready:
            self._await()

    def print(self, data):
        """Pass output on in whole lines; of too much only the last line, when the command has ended."""
        lines = (self.part + data).replace(b"\r", b"\n").split(b"\n")
        self.part = lines.pop()[-TEXT_TAIL:]
        self.printed += len(data)
        for line in lines:
            self.printed += LINE_COST
            if not line.strip():
                continue
            if self.printed > TEXT_LIMIT and not self.ended:
                self.last = line[-TEXT_TAIL:] + b"\n"
            else:
                self.on_line(line.decode("utf-8", "replace"))

    def drain(self):
        """Read standard output on, and forget it: a command that cannot write does not end."""
        if not self.ended:
            self.loop.readers[self.out] = lambda: self._take(self.out)

    def _await(self):
        """Wait for the login shell to come to the command, then for a door's first word."""
        self.before += self._take(self.out)
        if not self.entered and self._skip_to(ENTERED):
            self.entered = True
            self.timers.disarm("shell")
            try:
                self.process.stdin.write(beyond_command())
            except OSError:
                pass  # it has ended: that is told in a moment
        if self.entered and self._skip_to(READY) and not self.ended:
            self.ready = True
            self.on_ready(self.before)

    def _skip_to(self, mark):
        """Pass on what comes before a mark; returns whether that has come."""
        at = self.before.find(mark)
        if at < 0:
            at = self.before.rfind(b"\n") + 1
            self.print(self.before[:at])
            self.before = self.before[at:][-TEXT_LIMIT:]
            if self.printed > NOISE_LIMIT:
                self.on_failure("noise")
            return False
        self.print(self.before[:at] + b"\n")
        self.before = self.before[at + len(mark) :]
        return True

    def _hear(self):
        self.print(self._take(self.err))

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

    # -- its end

    def kill(self):
        """End it."""
        if not self.ended and "kill" not in self.timers:
            self._signal("SIGTERM" if self.entered else "SIGHUP")  # which a shell that waits does not ignore
            self._signal("SIGCONT")  # one that is stopped hears nothing
            self.timers.within("kill", COMMAND_SECONDS, lambda: self._signal("SIGKILL"))

    def close_input(self):
        self.process.stdin.close()

    def reap(self):
        """Look whether the process has ended.

        :returns: True once; then what it has left in its pipes can be read, until :meth:`clear_away`
        """
        if self.process is None or self.ended or self.process.poll() is None:
            return False
        self.ended = True
        self.timers.disarm()
        return True

    def clear_away(self):
        """Close the pipes of a process that has ended, and end what else it has started."""
        for descriptor in (self.out, self.err):
            self.loop.readers.pop(descriptor, None)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        self.print((b"" if self.ready else b"\n" + self.before) + b"\n" + self.last)
        if self._signal("SIGTERM"):
            self.timers.within("kill", COMMAND_SECONDS, lambda: self._signal("SIGKILL"))
            self.timers.within("give up", COMMAND_SECONDS + 2, self._gone)
            self._look_whether_gone()
        else:
            self._gone()

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
            self.timers.within("look", 0.1, self._look_whether_gone)
        else:
            self._gone()

    def _gone(self):
        self.timers.disarm()
        self.on_gone()


class Job:
    """One kernel of a keeper that runs elsewhere: what passes through a command, beyond which there is a far end
    for that kernel alone. To the keeper's far end it is what :class:`KernelProcess` is. Besides, it tells

    - ``via``: the command has been started
    - ``said``: what the command prints, and what there is to say of it
    - ``node``: the far end beyond has said hello, with its facts
    - ``failed``: the command has ended before the kernel: how far it had come, its exit code, and why

    :param channels: those to the launcher
    :param command: see :class:`Command`
    :param limits: see :class:`Command`
    :param parcel: the bytes with which the relay was sent, for the door beyond
    :param on_ended: as in :class:`KernelProcess`
    """

    def __init__(self, loop, channels, number, command, limits, parcel, on_ended):
        self.loop, self.channels, self.number = loop, channels, number
        self.parcel, self.on_ended = parcel, on_ended
        self.command = Command(loop, command, limits)
        self.command.on_line, self.command.on_ready = self.say, self._enter
        self.command.on_failure, self.command.on_gone = self._fail, self._conclude
        self.wire = Wire("near", patience=float("inf"))
        self.wire.on_hello, self.wire.on_noise = self._hello, self._noise
        self.inner = Channels(self.wire, 1)
        self.inner.on_control, self.inner.on_open = self._control, self._open
        self.inner.on_text = lambda _, data: channels.text(number, data)
        self.timers = NamedTimers(loop)
        self.line = self.result = self.failure = self.code = None
        self.runs = self.unwanted = self.done = self.over = False
        self.noise = b""  # the last of what comes before the hello of the far end beyond

    # -- what the keeper's far end calls

    def start(self, argv, count):
        self.inner.control(do="start", kernel=1, argv=argv, listen=count)
        try:
            self.command.start()
        except OSError as error:
            self.failure = "start", "{}: {}".format(login_shell(), error.strerror or error)
            self._conclude()
            return
        self._tell("via", pid=self.command.process.pid)

    def decline(self, text):
        """Start nothing, and say why."""
        self.say(text)
        self._exited(126)

    def hang_up(self):
        """End the kernel; one that does not run yet never will."""
        if self.unwanted or self.command.ended or self.code is not None:
            return
        self.unwanted = True
        if self.runs:
            self.inner.control(do="hang up", kernel=1)
            self.timers.within("end", HANG_UP_SECONDS + 2, self.command.kill)
        else:
            self.command.kill()

    def connect(self, stream, host, port):
        join(stream, self.inner.open(1, {"host": host, "port": port}))

    def say(self, text):
        self._tell("said", text=one_line(text)[:1000])

    def reap(self):
        """Look whether the command has ended."""
        if not self.command.reap():
            return
        self.timers.disarm()
        for _ in range(8):  # pipes do not hold more
            self.command.read()
            if self.line and not self.line.closed:
                self.line.read()
        if self.line:
            self.line.close()
        self.command.clear_away()

    def changed(self, _=None):
        """A channel to the launcher has changed. The end is told when all before it has been passed on."""
        streams = self.channels.of(self.number)
        if self.code is None or self.over or not (self.unwanted or all(stream.silent for stream in streams)):
            return
        self.over = True
        self.channels.drop(self.number)
        self.on_ended(self)

    # -- what the far end beyond says

    def _enter(self, rest):
        """Send the relay through the command."""
        self.timers.within("begin", BEGIN_SECONDS, lambda: self._fail("silent"))
        first, others = self.parcel
        self.wire.attach({"beyond": True, "rest": len(others)}, before=first, fresh=True, after=others)
        self.line = Line(self.loop, self.wire, self.command.out, self.command.input, self._line_ended)
        self.line.feed(rest)

    def _noise(self, data):
        self.noise = (self.noise + data)[-TEXT_TAIL:]
        if READY in self.noise:
            self._fail("twice")
        self.command.print(data)

    def _hello(self, facts):
        if "error" in facts:
            self._fail("altered", one_line(facts.get("text")))
            return
        self.timers.disarm("begin")
        self.runs = True
        told = {name: one_line(facts.get(name) or "") for name in ("host", "pid", "python", "job")}
        self._tell("node", **told)
        self.timers.within("quiet", SUSPENDED_SECONDS, self._look_whether_quiet)

    def _look_whether_quiet(self):
        seconds = SUSPENDED_SECONDS - (self.wire.clock() - self.wire.heard)
        if seconds <= 0:
            text = "nothing has come for {:.0f} s: the job is suspended, or its node down"
            self.say(text.format(SUSPENDED_SECONDS - seconds))
        wait = max(seconds, 0.1) if seconds > 0 else 10 * SUSPENDED_SECONDS
        self.timers.within("quiet", wait, self._look_whether_quiet)

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

    def _line_ended(self, error):
        """The line to the far end beyond is no more."""
        if error.text == CONNECTION_CLOSED:
            self.timers.within("end", COMMAND_SECONDS, self.command.kill)
        else:
            self.command.drain()
            self._fail("twice" if "0x2d" in error.text else "altered", error.text)

    # -- the end

    def _let_go(self):
        """The far end beyond has done; that its input ends tells it that this is known."""
        if not self.command.ended:
            self.line.close()
            self.command.drain()
            self.command.close_input()
            self.timers.within("end", HANG_UP_SECONDS, self.command.kill)

    def _tell(self, told, **facts):
        self.channels.control(told=told, kernel=self.number, **facts)

    def _fail(self, stage, text=""):
        self.failure = self.failure or (stage, text)
        self.command.kill()

    def _conclude(self):
        """Nothing is left of the command: tell how it has ended."""
        self.timers.disarm()
        code = self.result
        if self.unwanted:
            code = 129 if code is None else code
        elif self.failure or not self.done:
            stage, text = self.failure or ("runs" if self.runs else "begun" if self.line else "before", "")
            self._tell("failed", stage=stage, text=text, code=self.command.code)
            code = 255
        for stream in self.inner.of(1):  # what it has sent is still passed on
            if not stream.got_finish:
                stream.frame(FINISH, b"")
        self._exited(255 if code is None else code)

    def _exited(self, code):
        self.code = code
        self._tell("exit", code=code)
        self.changed()
