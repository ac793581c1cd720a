"""What a launch holds while it lives: no descriptor of its caller's, no listener longer than it is needed, no
processor, nobody else's time, and no more of the disk than a log may take."""

import errno
import fcntl
import re
import resource
import signal
import socket
import time

import pytest
import rig
from rig import frontend
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


def test_the_client_ignores_no_signals_that_python_ignores(desk, machine, tmp_path):
    """It would inherit that."""
    seen = tmp_path / "seen"
    wrapper = machine.write(
        "ssh-signals",
        '#!/bin/sh\ngrep SigIgn /proc/$$/status > "{}"\nexec {} "$@"\n'.format(seen, machine.ssh),
        0o755,
    )
    end = desk.launch(machine, "callback", env={"TUNNEL_SSH": wrapper})
    end.accept()
    ignored = int(seen.read_text().split()[1], 16)
    assert [number for number in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> (number - 1) & 1] == []


# -- listeners


@roles
def test_nothing_listens_any_more_once_all_channels_stand(desk, machine, role):
    end = desk.launch(machine, role)
    end.accept()
    end.echo()
    assert listens_at(supervisor(desk, end)) == set()


def asking(machine, role, desk, gate, **options):
    """A launch with a password whose client is started as soon as the file ``gate`` exists."""
    wrapper = machine.write(
        "ssh-gate",
        '#!/bin/sh\nif [ "$1" != -G ]; then while ! [ -e "{}" ]; do sleep 0.02; done; fi\nexec {} "$@"\n'.format(
            gate, machine.make_keyless_ssh()
        ),
        0o755,
    )
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    return desk.launch(machine, role, host=host, env={"TUNNEL_SSH": wrapper}, **options)


def password_port(desk):
    """Where the launcher can be asked for the password, as its client has been told."""

    def found():
        for pid in desk.processes():
            try:
                with open("/proc/{}/environ".format(pid), "rb") as stream:
                    match = re.search(rb"TUNNEL_ASKPASS=(\d+):", stream.read())
            except OSError:
                continue
            if match:
                return int(match.group(1))
        return None

    return rig.wait_until(found, 5, "the client with its password helper")


def test_nobody_can_ask_for_the_password_once_it_has_been_used(desk, machine, tmp_path):
    """Not even while the kernel boots."""
    gate = tmp_path / "gate"
    end = asking(machine, "compute", desk, gate, kernel=machine.slow_classic)
    port = password_port(desk)
    assert port in rig.listening_ports()
    gate.write_text("")
    rig.wait_until(lambda: machine.kernels(), 10, "the kernel")
    assert not end.channels
    assert port not in rig.listening_ports()
    end.accept()
    end.echo()


@pytest.mark.parametrize(
    "number, said", [(20, b""), (20, b"x" * 200000), (1100, b"")], ids=["say nothing", "say much", "are many"]
)
def test_strangers_who_ask_for_the_password_delay_nothing(desk, machine, tmp_path, number, said):
    gate = tmp_path / "gate"
    end = asking(machine, "compute", desk, gate)
    port = password_port(desk)
    callers = []
    try:
        while len(callers) < number:
            caller = socket.socket()
            caller.settimeout(0.005)
            error = caller.connect_ex(("127.0.0.1", port))
            assert error != errno.ECONNREFUSED, end.wait()
            if error:  # so many at once are not let in: try again
                caller.close()
                continue
            callers.append(caller)
            caller.settimeout(5)
            try:
                caller.sendall(said)
            except OSError:
                pass  # it has been hung up on
        begin = time.monotonic()
        gate.write_text("")
        end.accept()
        assert time.monotonic() - begin < 4
        assert "the password prompt has been answered" in desk.logs()[0]
        assert len(descriptors(supervisor(desk, end))) < 40
    finally:
        for caller in callers:
            caller.close()


# -- nothing waits for somebody else

SLOW_NAMES = (
    "import _socket\n"
    "real = _socket.getaddrinfo\n"
    "def look_up(host, port, family=0, type=0, proto=0, flags=0):\n"
    "    if host != 'slow.example':\n"
    "        return real(host, port, family, type, proto, flags)\n"
    "    if flags & _socket.AI_NUMERICHOST:\n"
    "        raise _socket.gaierror(-2, 'no number')\n"
    "    time.sleep({})\n"
    "    return real('127.0.0.1', port, family, type, proto, flags)\n"
    "_socket.getaddrinfo = look_up\n"
    "stay()\n"
)


def test_a_name_server_that_takes_its_time_is_waited_for(desk, machine):
    end = launch_through(desk, machine, "callback", SLOW_NAMES.format(1), host_of_links="slow.example")
    end.accept()
    end.echo()
    end.tell(b"!quit 3\n")
    assert end.wait()[0] == 3


def test_a_signal_ends_a_launch_that_waits_for_a_name_server(desk, machine):
    end = launch_through(desk, machine, "callback", SLOW_NAMES.format(60), host_of_links="slow.example")
    rig.wait_until(lambda: machine.kernels(), 10, "the kernel")
    rig.wait_until(lambda: "kernel: started" in log_of(desk, end), 5, "its connection")
    time.sleep(0.3)  # nobody tells when it looks up a name
    end.signal()
    assert end.wait(3)[0] == 143
    all_gone(desk)
    rig.wait_until(lambda: not machine.kernels(), 5, "the end of the kernel")


def full_pair():
    """Two sockets at which whoever connects now gets no answer, and what keeps them so."""
    listeners, callers = [socket.socket(), socket.socket()], []
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        while len(callers) < 20:
            caller = socket.socket()
            callers.append(caller)
            caller.settimeout(0.2)
            try:
                caller.connect(listener.getsockname())
            except OSError:
                break
    return listeners, callers


def test_a_front_end_that_does_not_accept_holds_up_no_signal(desk, machine):
    main, callers = full_pair()
    before = dialled(main[0])
    end = launch_through(desk, machine, "callback", "run()", main=main)
    try:
        rig.wait_until(lambda: dialled(main[0]) > before, 10, "a connection of the launcher's")
        end.signal()
        assert end.wait(3)[0] == 143
        all_gone(desk)
    finally:
        for each in callers:
            each.close()


def dialled(listener):
    """How many have asked for a connection there, and have got no answer yet."""
    with open("/proc/net/tcp") as stream:
        words = [line.split() for line in stream]
    port = ":{:04X}".format(listener.getsockname()[1])
    return len([line for line in words if line[3] == "02" and line[2].endswith(port)])


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


# -- room on the disk


@pytest.mark.parametrize("terminal, size", [("yes", 6000000), ("no", 30000000)])
def test_a_kernel_that_prints_much_leaves_a_log_of_bounded_size(desk, machine, terminal, size):
    end = desk.launch(machine, "callback", "-o", "RequestTTY={}".format("force" if terminal == "yes" else "no"))
    end.accept()
    end.tell("!print {}\n".format(size).encode("ascii"))  # on stdout, and as much on stderr
    end.channels[0].settimeout(60)
    assert end.channels[0].recv(7) == b"printed"
    end.echo()
    end.tell(b"!quit 5\n")
    assert end.wait()[0] == 5
    (log,) = desk.logs()
    assert len(log) < 4 << 20
    assert "what comes from here on is not logged" in log
    assert log.splitlines()[-1].endswith("with exit code 5")  # what the launcher itself says is there all the same


def test_many_short_connections_leave_a_log_of_bounded_size(desk, machine):
    desk.alter(LOG_BYTES=1 << 16)
    end = desk.launch(machine, "classic")
    end.accept()
    port = end.block.first
    code = (
        "import socket\n"
        "for _ in range(400):\n"
        "    try: socket.create_connection(('127.0.0.1', {}), 5).close()\n"
        "    except OSError: pass\n"
    ).format(port)
    machine.shell("{} -c '{}'".format(rig.kernel_python(), code.replace("'", '"')))
    end.echo()
    end.tell(b"!quit 5\n")
    assert end.wait()[0] == 5
    (log,) = desk.logs()
    assert "what comes from here on is not logged" in log
    assert len(log) < 4 << 16
    assert log.splitlines()[-1].endswith("with exit code 5")
