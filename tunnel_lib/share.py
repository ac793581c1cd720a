"""One login for many compute kernels: connections that launches to one destination share."""

import os
import time

from tunnel import (
    LOGGED_IN,
    LOGIN_SECONDS,
    STARTED,
    Fatal,
    OpenSSH,
    Plan,
    Try,
    client_class,
    explain,
    parse_number,
    private_folder,
    remove_if_there,
    verdict,
    watch_front_end,
)
from tunnel_lib.notes import is_running

SHARE_SECONDS = 60  # how long a shared connection outlives its last kernel
HUNG_SECONDS = 3.0  # until a shared connection that gives no session is given up
NEW_SECONDS = 60  # seconds after a login in which the server may still be busy with it (PAM, start-up files)


SHARES_NOTHING = (
    "--share needs OpenSSH on Linux or macOS, and a private folder: this kernel gets its own connection"
)


def share_path(path):
    """Where control sockets can be: ssh takes 104 characters, adds 17 while it makes one, and reads more
    into some characters.

    :param path: where they would be, if it suits; None for no such place
    :returns: the path; None where the folder of shorter paths is not this user's own
    """
    if path is None:
        return None
    plain = not path.strip("/._-+,@=" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    if len(path) > 78 or not plain:
        try:
            path = os.path.join(private_folder({}), os.path.basename(path))
        except OSError:
            return None
    return path


def quietly(launch, argv):
    """Run a command that ends by itself, 5 s at most.

    :returns: its exit code and what it printed
    """
    said, before = [], launch.signal  # what is put in order after a signal takes its time all the same
    sinks = {"out": said.append, "err": said.append}
    client = client_class()(launch.loop, argv, launch.environment, sinks, watched=False)
    timer = launch.loop.after(5, lambda: client.end(force=True))
    while not client.poll():
        if launch.signal != before:
            client.end(force=True)
        launch.loop.step()
    launch.loop.cancel(timer)
    return client.code, b"".join(said).decode("utf-8", "replace")


def ask_connection(launch, command, settings, words=()):
    """Have the process behind a shared connection do something; returns ssh's exit code."""
    return quietly(launch, launch.asking(command, settings, words))[0]


def take_forwards_back(launch, facts, settings, plan):
    """Forwards stay on a shared connection when the session that asked for them ends: take them off it, and learn
    by that whether the connection is still there."""
    code = ask_connection(launch, "cancel", settings, plan.forward_words)
    launch.log.write("forwards taken back from the shared connection: exit code {}".format(code))
    if code == 0 and facts.code == 255 and facts.stage == STARTED and not facts.killed:
        facts.ended = True  # the connection is still there, so 255 is the kernel's exit code
    elif code != 0 and facts.connected and not facts.killed:
        facts.code = 255  # nobody is there any more: the connection was lost before all had come


class SharedConnections:
    """Connections that all compute kernels of one destination share; the next is made when one is full.

    :param launch: whose kernel is to go over one
    :param memory: knows how many sessions a connection takes, and who has one
    :param path: where their control sockets are, but for a number at the end
    """

    def __init__(self, launch, memory, path):
        self.launch, self.memory, self.path = launch, memory, path
        self.login_said = []  # what the server has said at the login of the latest that this launch has made
        self.settings = None  # with which this launch logs in
        self.number = None  # of the connection that is ours to use
        self.socket = None  # what stands at its control socket's path
        self.made = set()  # those that this launch has made
        self.full = set()  # those that have refused it
        self.pipe = None  # through which one speaks that this launch has made, until its kernel has connected

    def take(self, settings):
        """Find room on a connection, and make that where there is none.

        :returns: the path of its control socket; None when this launch needs a connection of its own
        :raises Fatal: the login failed, so one of its own would fail too
        """
        self.release()
        self.settings = settings
        known = self.memory.change(self._choose)
        if "refused" in known and self._users_own():
            self.release()
            return None
        path = self._path
        lock = self._lock(path)
        if lock is None:
            return None
        try:
            # Whether anybody answers there, the try itself will tell.
            self.socket = identity(path)
            if self.socket is None:
                # -f and -N say themselves what the options of 8.7 would.
                if not self._log_in(settings.but(share=path, modern=False)):
                    self.release()
                    return None
                self.made.add(self.number)
                self.socket = identity(path)
        finally:
            os.close(lock)
        return path

    @property
    def patience(self):
        """How many seconds a session on our connection may take to come."""
        age = time.time() - self.socket[1] / 1e9 if self.socket else NEW_SECONDS
        return max(HUNG_SECONDS, NEW_SECONDS - abs(age))

    @property
    def _path(self):
        return "{}-{}".format(self.path, self.number)

    def _choose(self, values):
        sessions = {}
        for key in [key for key in values if key.startswith("session ")]:
            number, _, pid = key[len("session ") :].partition(" ")
            if number.isdecimal() and pid.isdecimal() and is_running(int(pid)):
                sessions[int(number)] = sessions.get(int(number), 0) + 1
            else:
                del values[key]
        if not sessions:
            values.pop("room", None)  # it may be another server by now
        room = self._room(values) or 1 << 20
        self.number = 0
        while self.number in self.full or sessions.get(self.number, 0) >= room:
            self.number += 1
        values["session {} {}".format(self.number, os.getpid())] = "asked"

    def _lock(self, path, seconds=LOGIN_SECONDS):
        """Wait for our turn to look for, or make, the connection at ``path``. The other launch may be waiting for
        somebody to type a second factor.

        :returns: a descriptor, ours until it is closed; None where this launch has to do without
        """
        import fcntl

        try:
            lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self.launch.log.write("nothing can be shared: {}".format(error))
            return None
        end = time.monotonic() + seconds
        while not self.launch.signal:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                if time.monotonic() >= end:
                    break
                self.launch.pause(0.01)
        os.close(lock)
        if seconds and not self.launch.signal:
            self.launch.log.write("another launch has been logging in for too long: this one does without")
        return None

    def _log_in(self, settings):
        """Log in and leave a connection in the background.

        :returns: whether there is one; where the login needs a person, one that the user has made may serve
        :raises Fatal: that failed
        """
        facts, settings = self.launch.follow(settings, LoginTry, "shared connection")
        if facts.code == 0 or self.launch.signal:
            return True
        if facts.obstacle in ("asked", "refused") and self._users_own():
            self.memory.remember("refused", "yes")  # and not tried again as long as that one is there
            return False
        raise Fatal(explain(self.launch, facts, settings), verdict(self.launch.dialect, facts))

    def _users_own(self):
        """Whether there is a connection to share that the user has made."""
        found = ask_connection(self.launch, "check", self.settings.but(share=None)) == 0
        if found:
            self.launch.log.write("a connection that you share yourself is used: --share has no login of its own")
        else:
            self.memory.remember("refused", None)
        return found

    def started(self):
        """The kernel of this launch has a session."""
        if self.number is None:
            return

        def alter(values):
            values[self._key] = "started"
            there = "session {} ".format(self.number)
            if values.get("room") == str(sum(key.startswith(there) for key in values)):
                self.launch.loop.after(0, self._prepare)

        self.memory.change(alter)

    def learn(self, facts, settings):
        """A try over our connection has ended: what it has found out concerns that connection too."""
        facts.aside[:0] = self.login_said  # who goes over that connection has been told so, too
        if facts.obstacle == "full" and not self.refused():
            facts.obstacle = "no session"
        if facts.obstacle == "family":
            ask_connection(self.launch, "exit", settings)
        if facts.obstacle in ("stale", "family"):
            self.gone()
        if facts.obstacle == "stale" and self.number in self.made:
            facts.obstacle = "lost"  # another one would be
        if facts.stage == STARTED and self.number in self.made:
            self.memory.remember("exposed", "yes" if facts.exposed else None)

    def overhear(self, pipe):
        """Go on listening to a connection that this launch has made: only the process behind the connection says
        what becomes of the forwards on it.

        :param pipe: a :class:`LogPipe`
        """
        self.hush()
        self.pipe = pipe
        pipe.lines.on_line = self._overheard

    def _overheard(self, line):
        event = OpenSSH.read(line, LOGGED_IN)
        if self.launch.current and event and event[0] in ("exposed", "family", "no forwarding"):
            self.launch.current.hear(event, line)

    def hush(self):
        """Listen no longer; harmless when that is over."""
        if self.pipe:
            self.pipe.close()
            self.pipe = None

    def _prepare(self):
        """The last place is taken: log in for the next launch, which is likely to follow at once."""
        path = "{}-{}".format(self.path, self.number + 1)
        lock = self._lock(path, 0)
        if lock is None:
            return
        try:
            if not os.path.exists(path):
                self._log_in(self.settings.but(share=path, modern=False))
        except (Fatal, OSError) as error:  # the kernel that runs is not concerned
            self.launch.log.write("no connection for the next launch: {}".format(error))
        finally:
            os.close(lock)

    def refused(self):
        """The connection takes no more: as many sessions as are on it are what a connection takes, unless another
        launch has asked for one and does not know yet.

        :returns: whether there is any use in trying another
        """
        self.full.add(self.number)
        others = []

        def alter(values):
            there = "session {} ".format(self.number)
            others[:] = [value for key, value in values.items() if key.startswith(there) and key != self._key]
            known = self._room(values) if "asked" in others else 1
            if known:
                values["room"] = str(max(others.count("started"), known))

        self.memory.change(alter)
        return bool(others) or self.number not in self.made

    @staticmethod
    def _room(values):
        """How many sessions a connection takes, as far as that is known; 0 where it is not."""
        return parse_number(values.get("room", "")) or 0

    def gone(self):
        """Nobody answers any more at the control socket: it is in the way, unless there is a new one by now."""
        lock = self._lock(self._path)
        if lock is None:
            return
        if identity(self._path) == self.socket:
            remove_if_there(self._path)
        os.close(lock)

    def release(self):
        """This launch's session is over."""
        self.hush()
        if self.number is not None:
            self.memory.remember(self._key, None)
            self.number = None

    @property
    def _key(self):
        return "session {} {}".format(self.number, os.getpid())


def identity(path):
    """What tells a file from any other that had its path before; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class LoginTry(Try):
    """A try at the login of a shared connection, which goes into the background and stays there."""

    ignored = ("stale",)  # the control socket is not there yet

    def __init__(self, launch, settings):
        super().__init__(launch, settings, Plan(launch.request, settings, ()))

    def openssh_words(self, log):
        extra = [
            ("ControlMaster", "auto"),
            ("ControlPersist", str(SHARE_SECONDS)),
            ("ClearAllForwardings", "yes"),
        ]
        own = ["-v"] + (["-E", log] if log else []) + ["-f", "-N"]
        return own + OpenSSH.login(self.launch.request, self.settings, extra)

    def begin(self):
        watch_front_end(self.timers, self.launch.request.link, lambda: self.end("front end gone"))

    def clean_up(self):
        if self.pipe and self.client and self.client.code == 0:
            self.launch.shared.overhear(self.pipe)
            self.pipe = None
        super().clean_up()

    def learn(self):
        self.launch.shared.login_said = self.facts.said_by_others
