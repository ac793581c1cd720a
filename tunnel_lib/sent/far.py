"""The far end: any number of kernels, started and ended as the launcher's control messages ask for."""

import os
import socket
import sys

from .channels import Channels
from .door import WireError
from .job import Job
from .kernel import KernelProcess, raise_limits
from .line import Line, PollLoop, notice_signals
from .wire import Wire


class Far:
    """The far end: any number of kernels, as control messages ask for them.

    :param wire: what carries them
    :param limits: the limits on open files that kernels shall have
    :param on_over: called when there is no kernel any more, and the near side will start none
    :param parcel: the bytes with which the relay was sent, for what is run through a command
    """

    def __init__(self, loop, wire, limits, on_over, parcel=None):
        self.loop, self.limits, self.on_over, self.parcel = loop, limits, on_over, parcel
        self.channels = Channels(wire, 2)
        self.channels.on_control, self.channels.on_open = self._control, self._open
        self.channels.on_change = self._change
        self.kernels, self.linger, self.timer, self.over = {}, 0, None, False

    def _control(self, message):
        do, number = message.get("do"), message.get("kernel")
        number = number if type(number) is int else None
        kernel = self.kernels.get(number)
        if do == "start" and kernel is None and number is not None:
            self._start(number, message)
        elif do == "hang up" and kernel:
            kernel.hang_up()
        elif do == "end":
            self.end()
        elif do == "linger":
            self._set_linger(message.get("seconds"))
        elif do not in ("hang up", "start"):
            raise WireError("the near side asks for {!r:.40}, which this relay does not know".format(do))

    def _set_linger(self, seconds):
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e6:
            raise WireError("a session is to linger for {!r:.40} s".format(seconds))
        self.linger = seconds
        self.loop.cancel(self.timer)
        self.timer = None
        self._look_whether_over()

    def _start(self, number, message):
        argv, count = message.get("argv"), message.get("listen", 0)
        if not (
            isinstance(argv, list) and argv and all(isinstance(word, str) and "\0" not in word for word in argv)
        ):
            raise WireError("a kernel without a command is to be started")
        if type(count) is not int or not 0 <= count <= 6:
            raise WireError("a kernel with {!r:.20} listeners is to be started".format(count))
        via = message.get("via")
        if via is not None and not isinstance(via, str):
            raise WireError("a kernel is to be started through {!r:.40}".format(via))
        self.loop.cancel(self.timer)
        self.timer = None
        common = self.loop, self.channels, number
        if via:
            kernel = Job(*common, via, self.limits, self.parcel, self._ended)
        else:
            kernel = KernelProcess(*common, self.limits, self._ended)
        self.kernels[number] = kernel
        if self.over:
            kernel.decline("the session is over: no kernel is started any more")
        else:
            kernel.start(argv, count)

    def _open(self, stream, facts):
        kernel = self.kernels.get(stream.kernel)
        if kernel is None or kernel.code is not None:
            stream.close()
        else:
            kernel.connect(stream, facts.get("host"), facts.get("port"))

    def _change(self, stream):
        kernel = self.kernels.get(stream.kernel)
        if kernel:
            kernel.changed(stream)

    def end(self):
        """Hang up on all kernels; when they are gone, that is all."""
        self.over, self.linger = True, 0
        for kernel in list(self.kernels.values()):
            kernel.hang_up()
        self.loop.cancel(self.timer)
        self.timer = None
        self._look_whether_over()

    def reap(self):
        for kernel in list(self.kernels.values()):
            kernel.reap()

    def _ended(self, kernel):
        del self.kernels[kernel.number]
        self.channels.control(told="ended", kernel=kernel.number, code=kernel.code)
        self._look_whether_over()

    def _look_whether_over(self):
        if not self.kernels and self.timer is None:
            self.timer = self.loop.after(self.linger, self._stop)

    def _stop(self):
        self.over = True
        self.on_over()


ORPHAN_SECONDS = 300.0  # a far end beyond a command that hears nothing for so long takes its keeper for dead
JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "JOB_ID")  # where Slurm, LSF and SGE say which job this is
LAST_SECONDS = 30.0  # how long a session that is over waits for the near side to say that it has heard so


def serve_beyond(facts):
    """Be the far end beyond a command, for one kernel, to its end; returns the exit code.

    It ends with its standard input: then the command, or the keeper, is no more.

    :param facts: those of the keeper's hello
    """
    import signal

    signal.alarm(0)
    loop, over = PollLoop(), []
    wire = Wire("far", patience=ORPHAN_SECONDS)

    def done():
        far.channels.control(told="over")
        if line.closed:
            over.append(True)
        else:
            loop.after(LAST_SECONDS, lambda: over.append(True))  # the keeper closes the input before

    def lost(_):
        far.end()
        if far.over:
            over.append(True)

    def stop(text):
        far.channels.control(told="stopped", text=text)
        far.end()

    far = Far(loop, wire, raise_limits(), done)
    notice_signals(loop, ["SIGTERM", "SIGHUP", "SIGINT"], far.reap, stop)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "python": ".".join(map(str, sys.version_info[:3]))}
    own["job"] = ([os.environ[name] for name in JOBS if os.environ.get(name)] + [""])[0]
    wire.attach(own, other=facts)
    line = Line(loop, wire, 0, 1, lost)
    line.flush()
    while not over:
        loop.step()
    return 0
