"""The hub: one process that runs the kernels of many launches behind one relay."""

import os

from tunnel import (
    COMPUTE,
    CONNECT_SECONDS,
    EX_UNAVAILABLE,
    LOGIN_SECONDS,
    Fatal,
    Kernel,
    LinkName,
    Log,
    Teller,
    accept,
    catch_signals,
    listen,
    parse_number,
    remove_if_there,
    say,
)
from tunnel_lib.notes import lock_soon
from tunnel_lib.relay import (
    RELAY_SECONDS,
    RelaySession,
    Served,
    explain_end,
    launch_through_relay,
    see_session_to_its_end,
)
from tunnel_lib.sent.door import HELLO_LIMIT
from tunnel_lib.sent.kernel import raise_limits
from tunnel_lib.sent.line import PollLoop
from tunnel_lib.share import SHARE_SECONDS, SHARES_NOTHING, share_path

CALLS = 3  # how often a hub that makes no sense is called
CALL_PAUSE_SECONDS = 0.5  # how much longer each pause between such calls is than the one before
ANSWER_BYTES = 1 << 16  # the most that a hub answers to a launch


class Handed:
    """A kernel that a hub runs, and the launch that waits for it.

    :param watched: whether the launch at the other end of ``teller`` may go before it has been told
    """

    def __init__(self, hub, request, log, teller, watched):
        self.hub, self.request, self.log, self.teller, self.watched = hub, request, log, teller, watched
        hub.waiting.append(self)
        # What waits in a queue goes on to do so; the parallel tools wait for all else.
        self.timer = None if request.via else hub.loop.after(RELAY_SECONDS, self._late)
        if watched:
            hub.loop.readers[teller.descriptor] = self._launch_gone
        self.served = Served(hub.session, request, log, self._started, self._over)

    def tell(self, code, text):
        """Tell the launch how it has gone; the launch shows the line to its user, and writes it into its log."""
        hub = self.hub
        hub.loop.cancel(self.timer)
        if self.watched:
            hub.loop.readers.pop(self.teller.descriptor, None)
        self.served.stands = code == 0
        self.teller.tell(code, text)
        if self in hub.waiting:
            hub.waiting.remove(self)

    def _give_up(self, text):
        self.tell(255, text)
        self.served.gone = True
        self.hub.session.near.hang_up(self.served.number)

    def _launch_gone(self):
        self.log.write("the launch has been ended: nothing is run for it any more")
        self._give_up("")

    def _late(self):
        if self.hub.session.lost_at is not None:
            text = "launching {} on {}: the connection of those before it is lost, and has not come back"
            self._give_up(text.format(self.request.role, self.request.destination))

    def _started(self):
        launch = self.hub.launch
        self.log.write("{:.2f} s: kernel: started".format(self.served.seconds))
        launch.recall()  # how one has ended that was handed over before
        self.tell(0, launch.died)
        launch.died = ""

    def _over(self, code, connected):
        launch, log = self.hub.launch, self.log
        if connected and not self.served.failure:
            log.write("the kernel has ended after {:.0f} s with exit code {}".format(self.served.seconds, code))
            self.tell(code, "")  # where the front end has gone before it could connect
        else:
            text = explain_end(launch, self.served, code, self.request)
            if self.teller.has_told or not self.watched:
                log.write(text)
            if self.teller.has_told and not connected:
                launch.remember_death(text, self.request)
            self.tell(code or 1, text)
        if log is not launch.log and log.descriptor is not None:
            os.close(log.descriptor)
            log.descriptor = None


class Hub:
    """The one process for all compute kernels of a destination: launches hand theirs over to it.

    :param path: where ``listener``, a Unix socket, can be found
    """

    def __init__(self, launch, session, listener, path):
        self.launch, self.session, self.path = launch, session, path
        self.loop, self.listener, self.timer = launch.loop, listener, None
        self.spare = os.open(os.devnull, os.O_RDONLY)
        self.callers = {}  # who has not said all yet, with a timer
        self.waiting = []  # those that have not been told
        self.loop.readers[listener] = self._accept
        session.near.linger(SHARE_SECONDS + 30)
        session.on_idle, session.is_idle = self._idle, self.is_idle

    def _accept(self):
        """Hear who has called.

        :returns: whether anybody has
        """
        try:
            caller = accept(self.listener)
        except OSError as error:  # no descriptor is left
            self.session.tell("a launch was refused: {}".format(error.strerror))
            self._refuse()
            return False
        if caller is None:
            return False
        heard = [b""]
        self.callers[caller] = self.loop.after(10, lambda: self._drop(caller))

        def read():
            try:
                more = caller.recv(65536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                more = b""
            heard[0] += more
            if heard[0].endswith(b"\n"):
                self._forget(caller)
                self._serve(caller, heard[0])
            elif not more or len(heard[0]) > HELLO_LIMIT:
                self._drop(caller)

        self.loop.readers[caller] = read
        return True

    def _refuse(self):
        """Tell a launch that there is no room for it, with a descriptor that has been spared for that."""
        os.close(self.spare)
        try:
            caller = accept(self.listener)
        except OSError:  # the whole system has none: not again at once
            caller = None
            self.loop.readers.pop(self.listener, None)
            self.loop.after(1, self._listen_again)
        if caller:
            text = "{} the process that runs the kernels of this host has as many files open as it may (ulimit -n)"
            try:
                caller.send(text.format(EX_UNAVAILABLE).encode("ascii"))
            except OSError:
                pass  # it has gone
            caller.close()
        self.spare = os.open(os.devnull, os.O_RDONLY)

    def _listen_again(self):
        if self.listener:
            self.loop.readers[self.listener] = self._accept

    def _forget(self, caller):
        self.loop.cancel(self.callers.pop(caller, None))
        self.loop.readers.pop(caller, None)

    def _drop(self, caller):
        self._forget(caller)
        caller.close()
        self._look_whether_idle()

    def _serve(self, caller, text):
        """Start the kernel of another launch, and tell that whether it runs."""
        import copy

        try:
            link, path, links, log, via = text.decode("utf-8", "surrogateescape")[:-1].split("\0")
            request = copy.copy(self.launch.request)
            request.link, request.links = LinkName.parse(link), links
            request.kernel, request.via = Kernel(path), via or None
        except (ValueError, Fatal):
            self._drop(caller)
            return
        try:
            caller.send(b" ")  # it is in good hands
        except OSError:
            pass  # it has gone: that is seen in a moment
        self.start(request, log_at(log), Teller(caller.detach()), watched=True)

    def start(self, request, log, teller, watched=False):
        """Start a kernel, and say through ``teller`` whether it runs; see :class:`Handed`."""
        self.loop.cancel(self.timer)
        return Handed(self, request, log, teller, watched).served

    def serve_own(self):
        """Start the kernel of this very launch. As long as it waits, with others, what asks the launch to end ends
        that kernel only: the others' jobs would lose their places in a queue."""
        own = self.start(self.launch.request, self.launch.log, self.launch.teller)

        def spared(number):
            if self.launch.teller.has_told or len(self.session.kernels) < 2 or own.gone:
                return False
            self.launch.log.write("ended by signal {}; kernels of other launches go on".format(number))
            self.launch.teller.tell(128 + number, "")
            own.gone = True
            own.near.hang_up(own.number)
            return True

        self.launch.spared = spared

    def fail(self, code, text):
        """Tell all launches that still wait that nothing becomes of theirs."""
        for each in list(self.waiting):
            each.tell(code, text)

    def is_idle(self):
        """Whether nobody needs the connection; then nobody is let in any more."""
        if self.session.kernels or self.callers:
            return False
        self.close()
        return not self.callers

    def _idle(self):
        self.loop.cancel(self.timer)
        self.timer = self.loop.after(SHARE_SECONDS if self.listener else 0, self._look_whether_idle)

    def _look_whether_idle(self):
        if not self.session.kernels and self.is_idle():
            self.session.near.end()

    def close(self):
        """Take no more kernels but of those that have called already."""
        listener, self.listener = self.listener, None
        if listener is None:
            return
        remove_if_there(self.path)
        self.loop.readers.pop(listener, None)
        self.listener = listener
        while self._accept():
            pass
        self.listener = None
        listener.close()


def many_files(launch):
    """Have a launcher wait in a way that hundreds of kernels do not slow down, with as many open files."""
    loop = PollLoop()
    for watched, old in ((loop.readers, launch.loop.readers), (loop.writers, launch.loop.writers)):
        for each, action in old.items():
            watched[each] = action
    loop.timers, loop.count = launch.loop.timers, launch.loop.count
    launch.loop = loop
    if loop.epoll:
        raise_limits()


def call_hub(path):
    """A connection to the process that runs the kernels of a destination; None where there is none."""
    import _socket

    if not path or not os.path.exists(path):
        return None
    caller = _socket.socket(_socket.AF_UNIX)
    caller.settimeout(LOGIN_SECONDS)
    try:
        caller.connect(path)
    except OSError:
        caller.close()
        return None
    return caller


def become_hub(path):
    """Listen for launches to come, unless another launch does by now.

    :returns: a connection to that one, or None, and the listening socket, or None
    :raises OSError: something is in the way
    """
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_soon(lock)
        caller = call_hub(path)
        if caller:
            return caller, None
        remove_if_there(path)
        return None, listen(path, 128)
    finally:
        os.close(lock)


def hub_path(launch):
    """Where the one process for all compute kernels of this destination listens; None without one."""
    request = launch.request
    shared = request.share and request.role is COMPUTE and request.relay is not None and not request.check
    path = share_path(launch.memory.path) if shared else None
    return path and path + "-hub"


def ask_hub(launch, caller, words):
    """What the hub answers to the words of a launch; None where it does not.

    A blank comes at once, and the rest when the kernel runs, which may take long: the wait ends with that process.
    An answer longer than :data:`ANSWER_BYTES` is none.
    """
    heard, over = [], []

    def read():
        try:
            heard.append(caller.recv(65536))
        except BlockingIOError:
            return
        except OSError:
            heard.append(b"")  # it has gone
        launch.loop.cancel(timer)
        if not heard[-1] or sum(map(len, heard)) > ANSWER_BYTES:
            over.append(True)

    try:
        caller.sendall(("\0".join(words) + "\n").encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # it has gone
    launch.caught = launch.caught or catch_signals(launch.loop, launch.on_signal)
    caller.setblocking(False)
    timer = launch.loop.after(CONNECT_SECONDS, lambda: over.append(False))
    launch.loop.readers[caller] = read
    while not over and not launch.signal:
        launch.loop.step()
    del launch.loop.readers[caller]
    caller.close()
    return b"".join(heard) if over and over[0] else None


def hand_kernel_over(launch, caller):
    """Have the hub run the kernel.

    :param caller: a connection to it
    :returns: the exit code; None where it has gone without a word
    :raises Fatal: the kernel has not been started
    :raises TimeoutError: it is there, but does not answer
    """
    request = launch.request
    words = (str(request.link), request.kernel.path, request.links, launch.log.path or os.devnull)
    answer = ask_hub(launch, caller, words + (request.via or "",))
    if launch.signal:
        launch.log.write("ended by signal {}".format(launch.signal))
        return 128 + launch.signal
    if answer is None:
        raise TimeoutError("the process that runs the kernels of this host does not answer")
    if answer == b" " and request.via:
        raise Fatal("the process that ran the kernels of this host has ended before this one's job ran", 255)
    answer = answer.lstrip()
    if not answer:
        launch.log.write("the process that runs the kernels of this host has hung up without an answer")
        return None
    code, _, text = answer.decode("utf-8", "replace").partition(" ")
    number = parse_number(code)
    if number is None or number > 255 or len(answer) > ANSWER_BYTES:
        launch.log.write(
            "the process that runs the kernels of this host answers nonsense: {!r:.80}".format(answer)
        )
        return None
    if text and number != 0:
        raise Fatal(text, number)
    if number != 0:
        return number
    launch.teller.tell(0, text)
    if text and launch.teller.descriptor is None:
        say(text)
    return 0


def join_hub(launch):
    """Have the hub run the kernel, where there is one that does.

    :returns: the exit code, or None
    :raises Fatal: the kernel has not been started
    """
    caller = call_hub(hub_path(launch))
    try:
        return hand_kernel_over(launch, caller) if caller else None
    except TimeoutError as error:
        launch.log.write("{}: this kernel gets a relay of its own".format(error))
        launch.request.share = False
        return None


def launch_through_hub(launch):
    """Have the hub run the kernel, or become the hub; where neither can be, launch through a relay of its own.

    :returns: the exit code
    :raises Fatal: the launch failed
    """
    listener, path, calls = None, hub_path(launch), 0
    if path is None and launch.request.role is COMPUTE and not launch.request.check:
        launch.log.write(SHARES_NOTHING)
    while path and listener is None:
        code = None
        if calls == CALLS:
            launch.log.write("{} calls have led to nothing: this kernel gets a relay of its own".format(calls))
            break
        launch.pause(CALL_PAUSE_SECONDS * calls)
        calls += 1
        try:
            caller, listener = become_hub(path)
            code = hand_kernel_over(launch, caller) if caller else None
        except OSError as error:
            launch.log.write("nothing can be shared: {}".format(error))
            path = None
        if code is not None:
            return code
    if listener is None:
        launch.request.share = False  # nobody else waits for this kernel's session
        return launch_through_relay(launch)
    settings = launch.first_settings()
    many_files(launch)
    session = RelaySession(launch)
    hub = Hub(launch, session, listener, path)
    hub.serve_own()
    return see_session_to_its_end(session, settings, lambda error: hub.fail(error.code, error.text), hub.close)


def log_at(path):
    """The log that another launch has begun."""
    log = Log.__new__(Log)
    log.path, log.room = path, {}
    try:
        log.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError:
        log.descriptor = None
    return log
