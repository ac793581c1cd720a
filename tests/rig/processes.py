"""The processes of launches: which there are, what they hold, and whether all of it is gone."""

import os
import re
import stat
import time

import rig
from rig.launches import log_of, parent

# Each role, and each way to the kernel machine: a client, ``share`` for --share, ``users`` for a connection that
# the user's configuration shares.
LAUNCHES = [("classic", "ssh"), ("callback", "plink"), ("compute", "share"), ("callback", "users")]
ALL_LAUNCHES = LAUNCHES + [("callback", "ssh"), ("compute", "ssh"), ("classic", "plink"), ("compute", "plink")]


def launch(desk, machine, role, way, users=None, **options):
    words = ["--share"] if way == "share" else []
    environment = {"TUNNEL_SSH": users} if way == "users" else {}
    return desk.launch(
        machine, role, *words, client="plink" if way == "plink" else "ssh", env=environment, **options
    )


def launch_all(desk, machine, launches, users, **options):
    """Front ends of several launches, all channels standing."""
    ends = [launch(desk, machine, role, way, users, **options) for role, way in launches]
    for end in ends:
        end.accept()
    return ends


def compute(ends):
    """Have the kernels compute: from then on they look at no link."""
    for end in ends:
        end.tell(b"!compute\n")
        assert end.channels[0].recv(4) == b"busy"


def supervisor(desk, end):
    """The process that stays with the client: the launcher, or what it leaves behind where it returns early."""

    def found():
        named = [pid for pid in desk.processes() if end.link in rig.command_line(pid)]
        if end.role == "compute":
            named = [pid for pid in named if pid != end.launcher.pid]
        return [pid for pid in named if parent(pid) not in named]  # not one that is about to run something else

    rig.wait_until(lambda: len(found()) == 1, 5, "the process that stays")
    return found()[0]


def started_by(pid, word):
    """The process with ``word`` in its arguments that a launcher has started."""
    names = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    (child,) = [each for each in names if parent(each) == pid and word in " ".join(rig.command_line(each))]
    return child


def client_of(desk, end):
    return started_by(supervisor(desk, end), "-LinkName")


def watchdog_of(desk, end):
    return started_by(supervisor(desk, end), "tunnel-watchdog")


def still_running(desk):
    """Process ids of all that was launched, but for shared connections, which outlive their kernels."""
    return [pid for pid in desk.processes() if "ControlPersist=60" not in rig.command_line(pid)]


def all_gone(desk, seconds=10):
    rig.wait_until(lambda: not still_running(desk), seconds, "the end of launchers, clients and watchdogs")


def wait_for_end_of(desk, end, seconds=10):
    def runs():
        return [pid for pid in desk.processes() if end.link in rig.command_line(pid)]

    rig.wait_until(lambda: not runs(), seconds, "the end of a launcher")


def ended_with(desk, end, seconds=10):
    """The exit code of a launch, once it is over. That of a launcher which had returned before stands in its log,
    unless there is something to explain."""
    code = end.wait(seconds)[0]
    if end.role != "compute":
        return code
    assert code == 0
    wait_for_end_of(desk, end, seconds)
    last = log_of(desk, end).splitlines()[-1]
    found = re.search(r"the kernel has ended after \d+ s with exit code (\d+)$", last)
    return int(found.group(1)) if found else None


# -- what they hold


def descriptors(pid):
    """What a process has open: descriptor and the name that the system gives it."""
    found = {}
    folder = "/proc/{}/fd".format(pid)
    for name in os.listdir(folder):
        try:
            found[int(name)] = os.readlink(os.path.join(folder, name))
        except OSError:
            pass  # it was the one that listed them, or has been closed
    return found


def listens_at(pid):
    """Ports of the loopback at which a process listens."""
    inodes = {name[len("socket:[") : -1] for name in descriptors(pid).values() if name.startswith("socket:[")}
    found = set()
    with open("/proc/net/tcp") as stream:
        for line in list(stream)[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(int(words[1].partition(":")[2], 16))
    return found


# -- what is left of them

BOUND = 5  # seconds until all is gone, SIGKILL included; the README states it


def temporary_files():
    """What launchers may have left in the temporary folder; other tests have folders of their own there."""
    return {name for name in os.listdir("/tmp") if re.match("tunnel-(?!rig-|run-|demo-|relay-)", name)}


def is_named_leftover(path):
    """Whether a file is what launches to one destination tell later ones: private, small, no socket, no pipe."""
    found = os.lstat(str(path))
    plain = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    return plain and found.st_size < 1000 and re.match(r"[0-9a-f]{8}$", path.name)


def left_in_runtime_folder(desk):
    return [path for path in desk.runtime.glob("**/*") if path.name != "tunnel" and not is_named_leftover(path)]


class Before:
    """What there was before a launch, and whether it is so again."""

    def __init__(self, desk, machine):
        self.desk, self.machine = desk, machine
        self.files = temporary_files()
        self.there = set(machine.listeners())
        self.watchdogs = set()

    def watch(self, end):
        """Look out for the watchdog of a launch: no word of its environment says whose it is."""
        self.watchdogs.add(watchdog_of(self.desk, end))

    def again(self, end, seconds=BOUND):
        """Assert that all is as before within ``seconds``, though the front end may still hold its links."""
        begin = time.monotonic()
        self.desk.no_process(seconds)
        rig.wait_until(lambda: not self.machine.kernels(), seconds, "the end of the kernel")
        rig.wait_until(lambda: not self.machine.sessions(), seconds, "the end of the session there")
        rig.wait_until(lambda: not any(map(rig.command_line, self.watchdogs)), seconds, "the watchdog's end")
        end.close_listeners()
        here = set(self.desk.local_ports())
        rig.wait_until(lambda: not here & set(rig.listening_ports()), seconds, "listeners here")
        rig.wait_until(lambda: set(self.machine.listeners()) <= self.there, seconds, "listeners there")
        assert time.monotonic() - begin < seconds + 1
        assert temporary_files() <= self.files
        assert left_in_runtime_folder(self.desk) == []
        assert self.desk.left_files() == []
