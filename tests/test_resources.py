"""What the system gives to a launch: descriptors, processes, memory, time of the processor. None is kept for
longer than it is needed, and whatever is missing is said in one line."""

import errno
import fcntl
import os
import re
import resource
import subprocess
import sys
import time

import pytest
import rig
from rig import frontend, product
from rig.launches import launch_through, log_of, roles
from rig.processes import (
    LAUNCHES,
    all_gone,
    client_of,
    descriptors,
    launch_all,
    listens_at,
    supervisor,
    watchdog_of,
)

# -- descriptors


@pytest.mark.parametrize("role, way", [("callback", "ssh"), ("compute", "ssh"), ("compute", "share")])
def test_nothing_of_the_callers_is_kept_open(desk, machine, tmp_path, role, way):
    """Neither a lock that it holds nor the sockets that its links listen with, which are not close-on-exec."""
    path = str(tmp_path / "lock")
    code = (
        "import fcntl\n"
        "lock = open({!r}, 'w'); fcntl.flock(lock, fcntl.LOCK_EX); os.set_inheritable(lock.fileno(), True)\n"
        "listener = socket.socket(); listener.bind(('127.0.0.1', 0)); listener.listen(1)\n"
        "open({!r}, 'w').write(str(listener.getsockname()[1]))\n"
        "listener.set_inheritable(True)\n"
        "pipe = os.pipe()[1]; os.set_inheritable(pipe, True)\n"
        "open({!r}, 'w').write(os.readlink('/proc/self/fd/%d' % pipe))\n"
        "run()\n"
    ).format(path, path + "-port", path + "-pipe")
    end = launch_through(desk, machine, role, code, *(["--share"] if way == "share" else []))
    end.accept()
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path + "-port") as stream:
        assert int(stream.read()) not in rig.listening_ports()
    launcher = supervisor(desk, end)
    started = [launcher, client_of(desk, end), watchdog_of(desk, end)]
    started += [pid for pid in desk.processes() if "ControlPersist=60" in rig.command_line(pid)]
    assert len(started) == (4 if way == "share" else 3)
    with open(path + "-pipe") as stream:
        pipe = stream.read()
    for pid in started:
        assert not {path, pipe} & set(descriptors(pid).values()), rig.command_line(pid)


@roles
def test_eleven_hundred_descriptors_of_the_callers_do_no_harm(desk, machine, role):
    code = "for _ in range(1100):\n    os.set_inheritable(os.open('/dev/null', os.O_RDONLY), True)\nrun()\n"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard == resource.RLIM_INFINITY or hard > 1200, "raise the hard limit of open files for this test"
    code = "resource.setrlimit(resource.RLIMIT_NOFILE, (1200, {}))\n".format(hard) + code
    end = launch_through(desk, machine, role, code)
    end.accept()
    end.echo()
    assert max(descriptors(supervisor(desk, end))) < 100
    end.tell(b"!quit 0\n")
    assert end.wait()[0] == 0


@roles
def test_no_standard_streams_do_no_harm(desk, machine, role):
    end = launch_through(desk, machine, role, "os.closerange(0, 3)\nrun()\n")
    end.accept()
    end.echo()
    assert "/dev/null" in descriptors(client_of(desk, end))[0]
    end.tell(b"!quit 7\n")
    assert end.launcher.wait(10) == (0 if role == "compute" else 7)
    all_gone(desk)
    assert log_of(desk, end).splitlines()[-1].endswith("with exit code 7")


@roles
def test_a_low_limit_of_open_files_is_enough_or_said_at_once(desk, machine, role):
    """In one clear line, and without running in circles."""
    for limit in (12, 16, 19, 20, 24, 26, 28, 32):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        code = "resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))\nrun()\n".format(limit)
        end = launch_through(desk, machine, role, code)
        try:
            end.accept()
        except frontend.LauncherEnded as error:
            assert re.search(r"with exit code 69: tunnel: too many open files: [^\n]*$", str(error))
        else:
            end.echo()
            end.tell(b"!quit 0\n")
            assert end.wait()[0] == 0
        end.quit()
        all_gone(desk)
        assert time.monotonic() - begin < 5
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


CHILD = """
import os, resource, sys
sys.path.insert(0, {tests!r})
from rig import product
out = os.dup2(os.open({out!r}, os.O_WRONLY | os.O_CREAT), 999)
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, most))
for _ in range(1100):
    os.open(os.devnull, os.O_RDWR)
for number in {closed!r}:
    os.close(number)
product.let_go_of_descriptors()
left = sorted(int(name) for name in os.listdir("/dev/fd"))
report = os.open({out!r}, os.O_WRONLY)
os.write(report, repr((report, [os.fstat(number).st_rdev for number in range(3)], len(left))).encode())
"""


@pytest.mark.parametrize("closed", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_launcher_lets_go_of_what_its_caller_had_open(tmp_path, closed):
    """The next descriptor is the fourth: all three standard streams are there, and nothing else is."""
    out = str(tmp_path / "out")
    code = CHILD.format(tests=rig.TESTS, out=out, closed=closed)
    with open(os.devnull, "r+") as null:
        ended = subprocess.run([sys.executable, "-c", code], stdin=null, stdout=null, stderr=null, close_fds=True)
    assert ended.returncode == 0
    with open(out) as stream:
        text = stream.read()
    assert text.startswith("(3, ["), text
    assert text.endswith(", 4)")  # and what lists them
    null = os.stat(os.devnull).st_rdev
    assert text == "(3, {!r}, 4)".format([null] * 3)


@roles
def test_nothing_listens_any_more_once_all_channels_stand(desk, machine, role):
    end = desk.launch(machine, role)
    end.accept()
    end.echo()
    assert listens_at(supervisor(desk, end)) == set()


# -- what is not there


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_the_system_does_not_give_is_no_defect(number):
    def fail():
        raise OSError(number, os.strerror(number), "/run/x")

    assert product.guarded(fail) == (69, "no room is left below /run/x: " + os.strerror(number))

    def fail_without_a_name():  # as mkfifo and write do
        raise OSError(number, os.strerror(number))

    line = "no room is left below {}: ".format(product.private_folder(os.environ)) + os.strerror(number)
    assert product.guarded(fail_without_a_name) == (69, line)


def test_no_further_process_is_no_defect(monkeypatch):
    def fail():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fail)
    code, text = product.guarded(lambda: product.spawn(["/bin/true"], {}, (None, None, None)))
    assert (code, text[:37]) == (69, "no further process can be started (Re")


def test_too_little_memory_is_no_defect():
    def fail():
        raise MemoryError

    assert product.guarded(fail) == (69, "there is not enough memory: raise the limit (ulimit -v)")


def test_no_client(desk, machine):
    end = desk.launch(machine, "classic", "--client", "/no/such/ssh")
    code, errors = end.wait()
    assert code == 69
    assert "looked for /no/such/ssh" in errors


# -- time of the processor


def wakeups(pid):
    """How often a process has waited, and how long it has computed."""
    with open("/proc/{}/status".format(pid)) as stream:
        switches = int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", stream.read(), re.MULTILINE).group(1))
    with open("/proc/{}/stat".format(pid)) as stream:
        return switches, stream.read().rpartition(")")[2].split()[11:15]


def test_an_idle_launcher_sleeps(desk, machine, users):
    ends = launch_all(desk, machine, LAUNCHES + [("compute", "ssh"), ("compute", "share")], users)
    for end in ends:
        end.echo(1000)
    launchers = [supervisor(desk, end) for end in ends]

    def settled():
        before = {pid: wakeups(pid) for pid in launchers}
        time.sleep(0.5)
        return {pid: wakeups(pid) for pid in launchers} == before

    rig.wait_until(settled, 5, "the launchers to have nothing more to do")
    before = {pid: wakeups(pid) for pid in launchers}
    time.sleep(3)
    assert {pid: wakeups(pid) for pid in launchers} == before
    for end in ends:
        end.echo(1000)
