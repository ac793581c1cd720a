"""A launch through a relay: one SSH connection without a forward carries all links, and is made again if lost."""

import os
import time

from tunnel import (
    CALLBACK_SECONDS,
    LATE_SECONDS,
    NOTICE_SECONDS,
    SHARED_SECONDS,
    STARTED,
    Delivery,
    Facts,
    Fatal,
    Forwards,
    Switchboard,
    Timers,
    Try,
    explain,
    keep_last,
    kernel_words,
    names_room,
    printable_command,
    verdict,
    watch_front_end,
)
from tunnel_lib.near import Near, parcel
from tunnel_lib.notes import is_running
from tunnel_lib.sent.bootstrap import bootstrap_command
from tunnel_lib.sent.door import (
    BAD_HELLO,
    CUT_SHORT,
    ENDED,
    GONE,
    NO_PYTHON,
    NO_SESSION,
    OLD_PYTHON,
    OTHER_SHELL,
    TAKEN,
    TERMINAL,
    UNHEARD,
)
from tunnel_lib.sent.job import shell_line
from tunnel_lib.sent.line import CONNECTION_CLOSED
from tunnel_lib.sent.wire import ASLEEP_SECONDS, nothing, one_line

LOGIN_ENDS = {
    NO_PYTHON: "no Python 3 was found there: the relay needs 3.6 or later,"
    " in the PATH of a login without a terminal",
    OLD_PYTHON: "the Python 3 found there is older than 3.6, which the relay needs",
    CUT_SHORT: "the connection ended while the relay was being sent",
    BAD_HELLO: "what was sent to the relay arrived altered, or not at all",
    NO_SESSION: "the session that the relay was asked for is not there",
    ENDED: "the relay was ended over there, or a defect stopped it",
    UNHEARD: "nothing of what the relay says comes back: a start-up file of the login closes standard output, or"
    " redirects it; let it do so in interactive logins only",
    OTHER_SHELL: "a start-up file of the login runs another shell, which got what the relay was sent; let it do so"
    " in interactive logins only",
    TAKEN: "a start-up file of the login reads standard input, and got what the relay was sent; let it do so in"
    " interactive logins only",
}
# The watchdog of a relay's client. The launcher first writes the relay's goodbye into the watchdog's standard
# input. Where that pipe ends without another line, the launcher has died: the watchdog writes the goodbye to its
# standard output, which is the client's standard input, and the client has 5 s to pass the goodbye on. That pipe
# never blocks, as the launcher has set it: while it is full, the goodbye is written again.
WATCHDOG = (
    'read -r word;read -r _&&exit;(i=0;while [ $i -lt 5 ]&&kill -0 "$1";do sleep 1;i=$((i+1));done;'
    'kill -s TERM -- "-$1";sleep 1;kill -s KILL -- "-$1" "$1")>/dev/null 2>&1& i=0;'
    'until printf "%s\\n" "$word"||[ $i -ge 5 ];do sleep 1;i=$((i+1));done'
)


def watchdog_command(pid):
    """The arguments of a watchdog for an SSH client that leads process group ``pid``."""
    return ["/bin/sh", "-c", WATCHDOG, "tunnel-watchdog", str(pid)]


def explain_start(code, text):
    """One line on why a login has ended before the relay said hello; None where its exit code does not tell.

    :param code: the SSH client's exit code
    :param text: what the login has printed, on either stream
    """
    if "'exec'" in text:  # cmd.exe and PowerShell do not know it, in any language
        return (
            "the kernel machine has no sh: the relay needs Linux or macOS there; without --relay Windows will do"
        )
    if "xcode-select" in text:
        return "the python3 of that Mac is none yet: run `xcode-select --install` there, or install one"
    return LOGIN_ENDS.get(code)


# Before each attempt to come back but the first: a tenth of the time since the connection was lost, within bounds.
PAUSE_PART, LEAST_PAUSE_SECONDS, PAUSE_SECONDS = 0.1, 0.25, 10
# How long a server may take to answer an attempt: a part of the time since the loss, or so many seconds at least.
ANSWER_PART, ANSWER_SECONDS = 0.25, 1.0
RELAY_SECONDS = 60  # until a relay that has been sent has to answer
SETTLED_SECONDS = 5  # a connection that lasted longer is tried again at once
ASKING_SECONDS = 60  # the pause after a login that was refused: servers shut out whoever tries too often
LEAVE_SECONDS = 2.0  # for the last words of a launcher that was told to end, or gives up


class NoForwards:
    """What a client runs for a relay: no forwards, the bootstrap."""

    forwards = pairs = ()

    def __init__(self):
        self.forward_words, self.command = [], bootstrap_command()


class Served:
    """One kernel of a session, and the links of its front end.

    :param log: where what concerns this kernel is noted
    :param on_started: called when its program runs
    :param on_over: called once with its exit code and whether it has connected
    """

    def __init__(self, session, request, log, on_started, on_over):
        self.session, self.request, self.log = session, request, log
        self.on_started, self.on_over = on_started, on_over
        self.loop, self.near = session.loop, session.near
        self.board = self.code = self.delivery = None
        self.is_over = self.delivered = False
        self.stands = False  # whether a launch that handed it over has been told that it runs
        self.begin = time.monotonic()
        self.printed, self.timers = [], Timers(self.loop)
        self.said, self.failure, self.gone = [], "", False  # of a command; why it failed; of the front end
        words = kernel_words(request.kernel, request.role, LINK)
        count = 6 if request.callback else 2
        self.number = self.near.start([request.kernel.path] + words, count, request.via)
        session.kernels[self.number] = self
        if request.share:  # no try watches the front end of a launch that others wait for, too
            self._watch_front_end()
        self.way = Forwards(self.loop, log, 0, 4 if request.inward else 0)
        self.way.open = lambda host, port, done: done(self.near.open(self.number, host, port))
        self.names = names_room(request)

    @property
    def seconds(self):
        return time.monotonic() - self.begin

    def listening(self, ports):
        """The far end listens for this kernel."""
        link = self.request.link
        if self.names:
            name, pairs = LINK.format(*ports), zip(ports[2::2], ports[3::2])
            self.board = self.names.NamingSwitchboard(self.loop, self.log, link, self.way, name, pairs)
        else:
            self.board = Switchboard(self.loop, self.log, link, self.way)
        self.board.on_connected, self.board.on_front_end_gone = self._connected, self._front_end_left
        self.way.serve(self.board)
        self._watch_front_end()
        self.log.write("the relay listens on {} for the kernel".format(", ".join(map(str, ports))))
        if not self.session.launch.check:  # which looks for itself
            self.timers.within("connect", CALLBACK_SECONDS, self._no_connection)

    def text(self, text):
        for line in text.splitlines():
            keep_last(self.printed, line)
            self.log.quote("kernel", line)

    def job(self, message):
        """What is told of the command through which the kernel runs."""
        told, text = message.get("told"), one_line(message.get("text") or "")
        if told == "said":
            keep_last(self.said, text)
            self.log.quote("via", text)
        elif told == "failed":
            self.failure = explain_job(self.request.via, message, self.said)
        elif told == "via":
            self._step("via", "{}, process {}".format(self.request.via, message.get("pid")))
            self._watch_front_end()
        else:
            words = [one_line(message.get(name) or "") for name in ("python", "pid", "host", "job")]
            text = "Python {}, process {} on {}".format(*words) + (", job " + words[3] if words[3] else "")
            self._step("node", text)
            if self.session.launch.check:
                self.session.launch.current.expect_kernel()

    def _step(self, name, text):
        if self.session.launch.check:
            self.session.launch.step(name, text)
        else:
            self.log.write("{:.2f} s: {}: {}".format(self.seconds, name, text))

    def _watch_front_end(self):
        """Notice a front end that goes before its kernel has connected: while the kernel boots, for instance, or
        while its job waits in a queue."""
        watch_front_end(self.timers, self.request.link, self._front_end_gone, first=0)

    def _front_end_gone(self):
        self.log.write("the front end has closed the main link: nothing is run for it any more")
        self.gone = True
        self.near.hang_up(self.number)

    def _connected(self):
        self.timers.disarm("connect", "front end")
        self.log.write("the kernel has called back after {:.1f} s".format(self.seconds))

    def _no_connection(self):
        self.log.write("the kernel has not called back within {} s".format(CALLBACK_SECONDS))

    def _front_end_left(self):
        if self.code is None:
            self.timers.within("notice", NOTICE_SECONDS, self._hang_up)

    def _hang_up(self):
        self.log.write("the front end has closed the main link: the kernel is hung up on")
        self.near.hang_up(self.number)

    def exited(self, code):
        """The kernel has ended; what it has sent may still be on its way."""
        self.timers.disarm("notice", "connect", "front end")

    def arrived(self):
        """All that the kernel has sent has arrived here: now the front end has to take it, or to give it up."""
        if self.board and not self.is_over:
            self.delivery = Delivery(self.loop, self.board, self._delivered)

    def _delivered(self):
        self.delivered = True
        self.board.close()  # which ends the kernel's channels, if a front end that takes nothing has not
        if self.code is not None and not self.is_over:
            self._over()

    def ended(self, code):
        """The kernel has ended, and all that it has sent has been handed on."""
        self.timers.disarm("notice", "connect")
        self.code = code
        if not self.is_over and (self.delivered or not self.delivery):
            self._over()

    def _over(self):
        connected = self.gone or bool(self.board and self.board.connected)
        self.close()
        self.on_over(self.code, connected)

    def close(self):
        self.is_over = True
        self.timers.disarm()
        if self.delivery:
            self.delivery.stop()
        if self.board:
            self.board.close()
        self.way.close()
        self.session.kernels.pop(self.number, None)
        if not self.session.kernels:
            self.session.on_idle()


class RelaySession:
    """What a launcher knows of its relay: a near end, the connections below it that come and go, kernels above.

    :param launch: its :class:`Launch`, which makes the connections
    """

    def __init__(self, launch):
        self.launch, self.loop, self.log = launch, launch.loop, launch.log
        self.dead = self._of_the_dead()
        # Who looks at a check does not wait for an hour.
        self.minutes = min(1, launch.request.relay) if launch.check else launch.request.relay
        self.near = Near(launch.loop, self.minutes, end=list(self.dead.values()))
        self.plan, self.kernels = NoForwards(), {}
        self.attached = self.leaving = self.checked = self.silent = False
        self.settled = True  # whether nothing of the session is left over there
        self.lost_at = self.attached_at = self.reason = None
        self.error = None  # why the session is no more, where that is no success
        self.outcome = None  # exit code of its only kernel, whether that had connected, and the kernel
        self.noise, self.unheeded = [], []  # lines of the login; those of a kernel that has not connected
        self.on_idle = nothing  # called when the last kernel has gone
        self.is_idle = lambda: False  # whether it is not worth coming back
        near = self.near
        near.on_noise, near.on_note = self._noise, lambda text: self.tell("relay: " + text)
        near.on_attached, near.on_lost, near.on_over = self._attached, self._lost, self._over
        near.on_elsewhere = self._elsewhere
        near.on_ports = lambda kernel, ports: self.kernels[kernel].listening(ports)
        near.on_started = lambda kernel: self.kernels[kernel].on_started()
        near.on_text = lambda kernel, text: self.kernels[kernel].text(text)
        near.on_job = lambda kernel, message: self.kernels[kernel].job(message)
        near.on_open = self._open
        near.on_exit = lambda kernel, code: self.kernels[kernel].exited(code)
        near.on_arrived = lambda kernel: self.kernels[kernel].arrived()
        near.on_ended = lambda kernel, code: self.kernels[kernel].ended(code)

    def _of_the_dead(self):
        """The secrets of sessions whose launchers on this machine are no more, by what they are noted under."""
        known = self.launch.memory.read()
        keys = [key for key in known if key.startswith("relay ") and not is_running(int(key[6:]))]
        return {key: known[key] for key in keys[:100]}

    def _forget_the_dead(self, values):
        for key, secret in self.dead.items():
            if values.get(key) == secret:
                del values[key]

    @property
    def key(self):
        """What this session is noted under, for who comes after a launcher that was killed."""
        return "relay {}".format(os.getpid())

    def tell(self, text):
        """Write a line into the log of each kernel."""
        for log in {id(log): log for log in [self.log] + [each.log for each in self.kernels.values()]}.values():
            log.write(text)

    def _open(self, kernel, listener, end):
        served = self.kernels.get(kernel)
        if served and served.board:
            served.board.arrived(listener, end)
        else:
            end.close()

    # -- what a connection calls

    @property
    def line(self):
        """What the client's process needs; see :class:`Client`."""
        return watchdog_command, self.near.farewell

    def attach(self, client):
        if self.leaving:  # a signal has come before there was anything to say goodbye to
            self.launch.current.end("signal")
            return
        if not self.attached:
            self.launch.memory.remember(self.key, self.near.secret)
        self.near.attach(client.source, client.sink)

    @property
    def patience(self):
        """How many seconds a server may take to answer. Who asks while the network is down asks again ever more
        rarely, so that a new attempt is answered sooner when it is back."""
        most = self.launch.connect_seconds
        if self.lost_at is None:
            return most
        seconds = max(ANSWER_SECONDS, ANSWER_PART * (time.monotonic() - self.lost_at))
        return min(seconds, most) if most else seconds

    def new_try(self, launch, settings):
        """A try at the next connection of this session."""
        return RelayedTry(launch, settings, self)

    # -- what the near end calls

    def _noise(self, text):
        for line in text.splitlines():
            keep_last(self.noise, line)
            self.log.quote("login", line)

    def _attached(self, facts, again):
        self.launch.current.answered()
        self.attached_at = time.monotonic()
        if again:
            self.tell("the connection is back after {:.1f} s".format(self.attached_at - (self.lost_at or 0)))
            if self.launch.check:
                self.launch.step("relay", "the connection was cut, and is back")
                self.checked = True
                self.near.end()
        else:
            self.launch.memory.change(self._forget_the_dead)
            self.launch.step(
                "relay",
                "Python {}, process {} on {}".format(facts.get("python"), facts.get("pid"), facts.get("host")),
            )
        self.attached, self.lost_at, self.reason = True, None, None

    def connection_ended(self, text):
        """The connection is no more; ``text`` says why."""
        if self.attached and self.lost_at is None:
            self.lost_at = time.monotonic()
            self.tell("the connection is lost: {}".format(text))

    def _lost(self, text):
        self.connection_ended(text)
        current = self.launch.current
        if current and text == CONNECTION_CLOSED:
            current.expect_end("connection lost")
        elif current:
            current.end("connection lost")

    def _elsewhere(self, text):
        """A name that stands for several machines may lead to the right one next time."""
        if text != self.reason:
            self.reason = text
            self.tell("relay: {}; trying again".format(text))
        if self.launch.current:
            self.launch.current.expect_end("connection lost")

    def give_up(self):
        """No relay has answered. One may only be late, and would start a kernel for nobody: say goodbye, unless
        there is a session already, to which the next login comes back."""
        if self.near.host is None:
            self.near.abandon()
            self.launch.current.leave("no relay")
        else:
            self.launch.current.end("no relay")

    def _over(self, text, error):
        self.reason, self.error = text, error
        if error:
            self.tell("relay: " + text)
        if self.launch.current:
            self.launch.current.expect_end("session over")

    def cut(self):
        """Cut the connection, to see whether it comes back."""
        if self.minutes:
            self.launch.current.client.end(force=True)
        else:
            self.launch.step("relay", "with 0 minutes no lost connection comes back")
            self.checked = True
            self.near.end()

    def is_settled(self, facts):
        """Whether nothing is left over there after the last connection, whose client has ended by itself then."""
        if self.attached:
            return facts.connected and not facts.killed
        return facts.stage < STARTED or not facts.killed

    def leave(self):
        """The launcher has been asked to end: say goodbye, upon which the relay ends its kernels and itself."""
        self.leaving = True
        self.near.abandon()
        current = self.launch.current
        if current:
            current.leave()


class Comeback:
    """Keeps a connection below a session until the session is over: one after the other, with growing pauses."""

    def __init__(self, session):
        self.session, self.launch, self.loop = session, session.launch, session.loop

    def run(self, settings):
        """See the session to its end.

        :param settings: those of the first connection
        :returns: None, or facts and settings of the try that was the last one
        """
        session, launch = self.session, self.launch
        trouble = None  # since when no connection has lasted
        while True:
            session.settled = False
            timer = session.lost_at is not None and self.loop.after(self._seconds_left, self._end_late_try)
            facts, settings = launch.follow(settings, session.new_try)
            self.loop.cancel(timer)
            session.near.detach()
            while session.near.finished and not (session.near.over or launch.signal):
                self.loop.step()  # a busy front end takes its time with what the last kernel has left
            if session.near.over or session.leaving or launch.signal:
                session.settled = session.error == GONE or session.is_settled(facts)
                session.silent = facts.stopped_by == "no kernel"
                return None
            if not session.attached:
                session.settled = session.is_settled(facts)
                return facts, settings
            session.connection_ended("the client ended with exit code {}".format(facts.code))
            if session.is_idle():
                return None
            if self._seconds_left <= 0:
                self._give_up()
                return None
            lasted = facts.connected and session.lost_at - session.attached_at > SETTLED_SECONDS
            pause = 0 if lasted or trouble is None else self._pause_after(trouble)
            trouble = session.lost_at if lasted or trouble is None else trouble
            if facts.obstacle in ("asked", "refused"):
                pause = ASKING_SECONDS
                text = "the login was refused: if it needs a person, log in by hand; next attempt in {} s"
                session.log.write(text.format(pause))
            self._wait(min(pause, self._seconds_left))

    @staticmethod
    def _pause_after(trouble):
        passed = PAUSE_PART * (time.monotonic() - trouble)
        return min(PAUSE_SECONDS, max(LEAST_PAUSE_SECONDS, passed))

    @property
    def _seconds_left(self):
        """How many seconds there are left to come back."""
        return 60 * self.session.minutes - (time.monotonic() - self.session.lost_at)

    def _end_late_try(self):
        if self.session.lost_at is not None and self.launch.current:
            self.launch.current.end("connection lost")

    def _give_up(self):
        session = self.session
        text = "the connection has not come back within {} min, and the kernel is hung up on"
        text = text.format(session.minutes)
        session.error, session.reason = NOT_BACK, "{}; {}".format(text, session.reason) if session.reason else text
        session.tell("relay: " + session.reason)

    def _wait(self, seconds):
        """Wait for some seconds; return at once when the machine turns out to have been asleep."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.launch.signal:
            before, wall = time.monotonic(), time.time()
            self.launch.pause(min(1.0, end - before))
            if abs((time.time() - wall) - (time.monotonic() - before)) > ASLEEP_SECONDS:
                return


class RelayedTry(Try):
    """A try at a connection of a relay's session: no forwards, a client whose input and output are the wire's."""

    ends_client = False  # its relay has to hear a goodbye first

    def __init__(self, launch, settings, session):
        super().__init__(launch, settings, session.plan)
        self.session, self.client_options = session, {"line": session.line}

    def begin(self):
        launch, request = self.launch, self.launch.request
        self.session.attach(self.client)
        if launch.check and not request.via:
            self.expect_kernel()
        if not (self.session.attached or request.share):  # a kernel that waits watches its front end itself
            watch_front_end(self.timers, request.link, lambda: self.end("front end gone"))

    def expect_kernel(self):
        """From now on the kernel has a while to connect; only ``--check`` waits for that here."""
        self.timers.within("connect", CALLBACK_SECONDS, self._no_connection)

    def _no_connection(self):
        self.facts.stopped_by = "no kernel"
        self.session.unheeded = [line for each in self.session.kernels.values() for line in each.printed]
        self.session.leave()

    def answer_seconds(self):
        seconds = self.session.patience
        return seconds and seconds + 0.5

    def answered(self):
        """The relay over there has said hello."""
        self.timers.disarm("relay", "login", "front end")
        self.facts.connected = True

    def expect_end(self, why):
        """The client ends by itself now: with an exit code that tells more, and after its last words."""
        self.timers.within("client's end", LATE_SECONDS, lambda: self.end(why))

    def checked(self):
        """``--check`` has seen the kernel connect."""
        self.session.cut()

    def shares(self):
        self.timers.within("login", SHARED_SECONDS, lambda: self.end("no login"))

    def started(self):
        if super().started():
            self.timers.within("relay", RELAY_SECONDS, self.session.give_up)

    def interrupt(self):
        self.session.leave()

    def leave(self, why="signal"):
        """End the client once it has passed on the last words, after a while at the latest."""
        self.facts.stopped_by = self.facts.stopped_by or why
        self.timers.within("leave", LEAVE_SECONDS, lambda: self.end(why))


NOT_BACK = "not back"  # a lost connection has not come back in time
LINK = "{0}@127.0.0.1,{1}@127.0.0.1"  # as a kernel is told, but for the ports


def ended_kernel(code, printed, unanswered=None):
    """The facts about a kernel that has ended before it was joined to its front end.

    :param unanswered: the line on a front end that did not answer
    """
    facts = Facts()
    facts.unanswered = unanswered
    facts.stage, facts.ended, facts.status, facts.printed = STARTED, True, code, printed
    return facts


def explain_end(launch, served, code, request=None):
    """One line on a kernel that has ended before it connected, or with the command through which it ran."""
    if served.failure:
        request = request or launch.request
        return "launching {} on {}: {}".format(request.role, request.destination, served.failure)
    unanswered = served.board and served.board.unanswered
    return explain(launch, ended_kernel(code, served.printed, unanswered), None, request)


# What schedulers print, and what that means.
JOB_ENDS = (
    ("TIME LIMIT", "the job's time limit is over"),
    ("PREEMPT", "the job was preempted"),
    ("NODE FAIL", "the node has failed"),
    ("OOM|OUT OF MEMORY", "the job has taken more memory than it may"),
    ("CANCELLED|REVOKED|FORCE TERMINATED", "the job was cancelled"),
)
JOB_STAGES = {
    "start": "the login shell there cannot be run",
    "shell": "the login shell there does not come to it: a start-up file runs another shell, waits for something,"
    " or sends its output elsewhere",
    "before": "it ended{code} before the relay ran through it",
    "begun": "it ended{code} while the relay was being sent through it",
    "runs": "it ended{code}, and the kernel with it",
    "stopped": "the kernel's end was asked for from there",
    "silent": "the relay was sent through it, and has not answered; it has to pass standard input on",
    "noise": "it prints without end on standard output",
    "twice": "it runs the relay more than once; have it run one task, as srun does with -n1",
    "altered": "it changes what passes, or prints on standard output while the kernel runs",
}
NOT_APPENDED = (
    "it ended with exit code 0 before the relay ran through it: it did not run what was appended to it; one that"
    " only prepares ends with `;`; or it does not pass standard input on"
)
NO_WAY_BACK = "its standard output does not come back; it has to pass that on"
JOB_CODES = {
    126: "it cannot be run",
    127: "there is no such command",
    NO_PYTHON: "no Python 3 was found where it leads: the relay needs 3.6 or later there",
    OLD_PYTHON: "the Python 3 where it leads is older than 3.6, which the relay needs",
    CUT_SHORT: "its standard input ended while the relay was being sent; it has to pass standard input on",
    BAD_HELLO: "what was sent through it arrived altered, or not at all",
    TAKEN: "what was sent through it arrived altered, or not at all",
    ENDED: "what was sent through it arrived altered, or a defect stopped the relay there",
    -14: NO_WAY_BACK,
    142: NO_WAY_BACK,
    TERMINAL: "it gives the relay a terminal, which changes what passes; leave out --pty, -t or what asks for it",
}


def explain_job(command, message, said):
    """One line on a command that has ended before the kernel: the stage, and what it has said.

    :param message: what was told of it
    :param said: the lines that it has printed
    """
    import re

    stage, code, text = message.get("stage"), message.get("code"), one_line(message.get("text") or "")
    line, why = (said or [""])[-1], None
    for pattern, meaning in JOB_ENDS if stage in ("before", "begun", "runs", "stopped") else ():
        found = [each for each in said if re.search(pattern, each, re.IGNORECASE)]
        if found and why is None:
            line, why = found[-1], meaning
    if why is None and stage == "before" and code == 0:
        why = NOT_APPENDED
    if why is None and stage in ("before", "begun"):
        why = JOB_CODES.get(code)
    ending = " by signal {}".format(-code) if type(code) is int and code < 0 else " with exit code {}".format(code)
    why = why or JOB_STAGES.get(stage, "it failed{code}").format(code=ending)
    about = "; ".join([each for each in (text, line) if each]) or "it said nothing"
    return "--via {}: {} ({})".format(command, why, about)


def preview(request):
    """What ``--dry-run`` says of a relay."""
    words = kernel_words(request.kernel, request.role, LINK)
    return (
        "sent over standard input: {} bytes, the compressed source of the relay, then its messages\n"
        "{}"
        "run there: {}\n"
        "link name for the kernel: its ports are chosen over there\n"
    ).format(
        sum(map(len, parcel())),
        "the relay is run by the login shell there through: {}\n".format(shell_line(request.via))
        if request.via
        else "",
        printable_command([request.kernel.path] + words),
    )


def launch_through_relay(launch):
    """Launch one kernel through a relay of its own.

    :returns: the exit code
    :raises Fatal: the launch failed
    """
    settings, session = launch.first_settings(), RelaySession(launch)

    def started():
        launch.step("kernel", "started")
        launch.teller.tell(0, launch.died)

    def over(code, connected):
        session.outcome = code, connected, served
        session.near.end()

    served = Served(session, launch.request, launch.log, started, over)
    return see_session_to_its_end(session, settings)


def see_session_to_its_end(session, settings, on_failure=nothing, on_end=nothing):
    """Keep a session connected until it is over.

    :param settings: those of the first connection
    :param on_failure: called with the :class:`Fatal` that has ended the session, before it is raised
    :param on_end: called when the session is over, however it ended
    :returns: the exit code of the launch
    """
    launch, ended = session.launch, "the process that carried this kernel's links has ended"
    try:
        last = Comeback(session).run(settings)
        while any(each.delivery for each in session.kernels.values()) and not launch.signal:
            session.loop.step()  # a front end that is busy has not got everything yet
        return session_verdict(session, last)
    except Fatal as error:
        ended = error.text
        on_failure(error)
        raise
    finally:
        if session.settled:
            launch.memory.remember(session.key, None)
        on_end()
        for each in list(session.kernels.values()):
            if each.log is not launch.log and each.stands:
                each.log.write(ended)
            each.close()


def no_relay(session, facts):
    """One line on a login in which something else ran than the relay."""
    from tunnel_lib import why

    launch = session.launch
    said = [line.strip() for line in session.noise + facts.aside + facts.printed if line.strip()]
    words = why.words_for(launch, facts, None, launch.request)
    found = why.diagnose(why.ACCOUNT_DIAGNOSES + why.LOST_DIAGNOSES, said + facts.said, words)
    if found:
        return found
    nothing = "it said nothing"
    if facts.stopped_by == "no relay":
        nothing += " within {} s; a file system may hang there".format(RELAY_SECONDS)
    last = ([nothing] + said)[-1][: why.QUOTED_LENGTH]
    if session.near.echo:
        last = "which sends back what it is sent, as cat does; it may be a command in authorized_keys"
    host = launch.request.destination.host
    return "the login ran, but no relay: a start-up file or the server runs something else ({}); see {}".format(
        last, "what `ssh {} 'exec /bin/sh -c true'` says".format(host)
    )


def session_verdict(session, last):
    """The exit code of a session that is over.

    :param last: facts and settings of its only connection, where that has failed
    :raises Fatal: it has failed
    """
    launch = session.launch
    if launch.signal:
        session.tell("ended by signal {}".format(launch.signal))
        return 128 + launch.signal
    if session.checked:
        return 0
    tried = "launching {} on {}: ".format(launch.request.role, launch.request.destination)
    if last:
        facts, settings = last
        text = explain_start(facts.code, "\n".join(session.noise + facts.aside + facts.printed))
        if facts.stage == STARTED and facts.stopped_by in (None, "no relay"):
            raise Fatal(tried + (text or no_relay(session, facts)), 255)
        raise Fatal(explain(launch, facts, settings), verdict(launch.dialect, facts))
    if session.silent:
        facts = Facts()
        facts.stopped_by, facts.printed = "no kernel", session.unheeded
        raise Fatal(explain(launch, facts, None), 255)
    if session.outcome:
        code, connected, served = session.outcome
        if connected and not served.failure:
            launch.log.write("the kernel has ended after {:.0f} s with exit code {}".format(launch.seconds, code))
            return code
        text = explain_end(launch, served, code)
        if launch.teller.has_told and not connected:
            launch.remember_death(text, launch.request)
        raise Fatal(text, code or 1)
    if session.error or not session.is_idle():
        raise Fatal(tried + (session.reason or "the session ended"), 255)
    return 0
