"""Signals to launchers and clients at any moment, and the watchdog, which acts when a launcher cannot."""

import os
import random
import signal
import socket
import sys
import time

import pytest
import rig
from rig.desk import make_machine
from rig.launches import clients, launch_through, log_of
from rig.processes import Before, all_gone, supervisor
from rig.servers import silent_server


@clients
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_client_and_kernel(desk, machine, client, number):
    end = desk.launch(machine, "classic", client=client)
    end.accept()
    end.signal(number)
    assert end.wait(2)[0] == 128 + number
    desk.no_process()
    rig.wait_until(lambda: not machine.kernels(), 5)


def test_launcher_killed_while_it_logs_in(desk, machine):
    port, end_server = silent_server()
    try:
        for name in ("SIGTERM", "SIGKILL"):
            before = Before(desk, machine)
            end = desk.launch(machine, "compute", host="john@127.0.0.1:{}".format(port))
            desk.wait_until(end, lambda end=end: "Connection established" in log_of(desk, end), 5, "the client")
            pid = supervisor(desk, end)
            before.watch(end)
            os.kill(pid, getattr(signal, name))
            end.launcher.wait(5)
            before.again(end)
    finally:
        end_server()


def launch_and_send(desk, machine, number, moments, **options):
    """Launch one kernel for each of ``moments`` and send its launcher a signal that many seconds later, whatever
    it is doing then.

    :returns: the front ends
    """
    ends = []
    for moment in moments:
        role = ("classic", "callback", "compute")[len(ends) % 3]
        end = desk.launch(machine, role, host="john:{}@{}".format(rig.PASSWORD, machine.address), **options)
        time.sleep(moment)  # any moment will do
        end.signal(number)
        ends.append(end)
    return ends


def test_launchers_killed_at_any_moment_leave_nothing(desk, request):
    machine = make_machine(request, password=True, sshd_options=["MaxStartups 100"])
    before = Before(desk, machine)
    draw = random.Random(3)
    moments = [draw.uniform(0.02, 0.6) for _ in range(12)]
    ends = launch_and_send(desk, machine, signal.SIGKILL, moments, env={"TUNNEL_SSH": machine.make_keyless_ssh()})
    for pid in [pid for end in ends for pid in desk.processes() if end.link in rig.command_line(pid)]:
        os.kill(pid, signal.SIGKILL)  # what the launchers of compute kernels leave behind
    for end in ends:
        end.launcher.wait(5)
    last = desk.launch(machine, "classic")  # takes away a named pipe to which there was no time before
    last.accept()
    last.quit()
    for end in ends:
        end.close_listeners()
    before.again(last)


def run_code(code, *arguments, **environ):
    """Run Python code that uses the launchers; returns its completed process."""
    environment = dict(os.environ, PYTHONPATH=rig.TESTS, **environ)
    return rig.run(sys.executable, "-c", code, *map(str, arguments), env=environment)


KILLED_BETWEEN = """
import os, signal, sys
from rig import product

fork, forks = os.fork, []

def fork_once():
    forks.append(fork()) if not forks else os.kill(os.getpid(), signal.SIGKILL)
    return forks[0]

os.fork = fork_once
product.Client(product.Loop(), ["/bin/sh", "-c", "echo runs >" + sys.argv[1]], dict(os.environ), {})
"""


def test_a_client_does_not_start_before_what_watches_it(tmp_path):
    """The launcher is killed between the two."""
    there = tmp_path / "there"
    done = run_code(KILLED_BETWEEN, there, TUNNEL_TEST=str(tmp_path))
    assert done.returncode == -signal.SIGKILL
    rig.wait_until(lambda: not rig.processes_with("TUNNEL_TEST=" + str(tmp_path)), 5, "the end of all")
    assert not there.exists()


DEAF = """
import os, signal
from rig import product

def heard(data):
    os.kill(os.getpid(), signal.SIGKILL)

loop = product.Loop()
argv = ["/bin/sh", "-c", "trap '' TERM; echo; exec sleep 600"]
client = product.Client(loop, argv, dict(os.environ), {"out": heard, "err": print})
while True:
    loop.step()
"""


def test_the_watchdog_ends_a_client_that_hears_no_signal(tmp_path):
    done = run_code(DEAF, TUNNEL_TEST=str(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    rig.wait_until(lambda: not rig.processes_with("TUNNEL_TEST=" + str(tmp_path)), 5, "the client's end")


SIGNALLED = """
import os, signal, sys, time
from rig import product

def catches(pid):
    with open("/proc/{}/status".format(pid)) as stream:
        (mask,) = [int(line.split()[1], 16) for line in stream if line.startswith("SigCgt")]
    return mask >> signal.SIGTERM - 1 & 1

keep = product.catch_signals(product.Loop(), print)
gate = os.pipe()
argv = ["/bin/sh", "-c", "echo runs >" + sys.argv[1]]
pid = product.spawn(argv, dict(os.environ), (None, None, None), (), gate[:1], gate[1:])
end = time.monotonic() + 5
while (os.getpgid(pid) != pid or catches(pid)) and time.monotonic() < end:
    pass
os.killpg(pid, signal.SIGTERM)
os.write(gate[1], b".")
sys.exit(os.WTERMSIG(os.waitpid(pid, 0)[1]))
"""


def test_a_signal_that_comes_before_the_client_runs_is_not_lost(tmp_path):
    there = tmp_path / "there"
    done = run_code(SIGNALLED, there)
    assert (done.returncode, done.stderr) == (signal.SIGTERM, "")
    assert not there.exists()


BLOCKED = """
import os, signal, sys
from rig import product

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])
loop, heard = product.Loop(), []
keep = product.catch_signals(loop, heard.append)
loop.after(5, lambda: sys.exit("nothing has been heard"))
os.kill(os.getpid(), signal.SIGTERM)
while not heard:
    loop.step()
"""


def test_signals_that_the_caller_has_blocked_are_heard():
    done = run_code(BLOCKED)
    assert (done.returncode, done.stderr) == (0, "")


DETACHED = """
import os, signal, sys
import tunnel

fork = os.fork

def fork_and_signal():
    child = fork()
    if bool(child) == (sys.argv[1] == "parent"):
        os.kill(os.getpid(), signal.SIGTERM)
    return child

def work(teller):
    loop, heard = tunnel.Loop(), []
    keep = tunnel.catch_signals(loop, heard.append)
    loop.after(5, lambda: heard.append(0))
    while not heard:
        loop.step()
    teller.tell(128 + heard[0], "")

os.fork = fork_and_signal
sys.exit(tunnel.detach(work))
"""


@pytest.mark.parametrize("process", ["parent", "child"])
def test_a_signal_that_comes_while_a_launch_goes_into_the_background_ends_it(process):
    """The signal comes before either process has said what it does for one."""
    done = run_code(DETACHED, process)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("name, count", [("SIGTERM", 15), ("SIGHUP", 6)])
def test_launchers_that_get_a_signal_at_any_moment_end_with_it(desk, request, name, count):
    """Also those whose next try is about to begin, since their ports are taken."""
    machine = make_machine(request, password=True, sshd_options=["MaxStartups 100"])
    before = Before(desk, machine)
    number = getattr(signal, name)
    draw = random.Random(4)
    moments = [draw.uniform(0.02, 0.6) for _ in range(count)]
    ends = launch_and_send(desk, machine, number, moments, env={"TUNNEL_SSH": machine.make_keyless_ssh()})
    for end in ends:
        code, errors = end.wait()
        # Before Python has begun to listen, the signal ends it.
        assert code in (128 + number, -number) or (code == 0 and end.role == "compute"), errors
        assert errors == ""
        if code == 0:
            end.quit()  # it had returned before
        end.close_listeners()
    before.again(ends[0])


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
