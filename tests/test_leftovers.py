"""Nothing is left behind, however a launch ends: no process, listener, socket, pipe or file, on either side, but
for what launches tell later ones."""

import os
import random
import signal
import sys
import time

import pytest
import rig
from rig import product
from rig.desk import make_machine
from rig.launches import log_of
from rig.processes import (
    BOUND,
    Before,
    all_gone,
    client_of,
    compute,
    left_in_runtime_folder,
    still_running,
    supervisor,
)
from rig.servers import silent_server

# Each role and each client; what is most common has each with each.
ways = pytest.mark.parametrize("role, client", [("classic", "ssh"), ("callback", "plink"), ("compute", "ssh")])


def launched(desk, machine, role, client, kernel_does="idle"):
    before = Before(desk, machine)
    end = desk.launch(machine, role, client=client)
    end.accept()
    if role == "compute":
        assert end.wait()[0] == 0
    before.watch(end)
    if kernel_does == "computing":
        compute([end])
    return before, end


@pytest.mark.parametrize("client", ["ssh", "plink"])
@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
def test_normal_end(desk, machine, role, client):
    before, end = launched(desk, machine, role, client)
    end.quit()
    before.again(end)


@ways
def test_kernel_quits_before_the_front_end_closes_its_links(desk, machine, role, client):
    before, end = launched(desk, machine, role, client)
    end.tell(b"!quit 0\n")
    before.again(end)


@ways
def test_the_front_end_of_a_computing_kernel_dies(desk, machine, role, client):
    desk.alter(LOST_SECONDS=1)
    before, end = launched(desk, machine, role, client, "computing")
    end.die()
    before.again(end)


@ways
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_launcher_killed_while_the_kernel_computes(desk, machine, role, client, name):
    before, end = launched(desk, machine, role, client, "computing")
    os.kill(supervisor(desk, end), getattr(signal, name))
    before.again(end)


@pytest.mark.parametrize("name, client", [("SIGTERM", "plink"), ("SIGKILL", "ssh")])
def test_launcher_killed_while_the_kernel_is_idle(desk, machine, client, name):
    before, end = launched(desk, machine, "callback", client)
    os.kill(supervisor(desk, end), getattr(signal, name))
    before.again(end)


@ways
def test_kernel_killed(desk, machine, role, client):
    before, end = launched(desk, machine, role, client, "computing")
    (kernel,) = machine.kernels()
    os.kill(kernel, signal.SIGKILL)
    before.again(end)


@ways
def test_server_session_killed(desk, machine, role, client):
    before, end = launched(desk, machine, role, client, "computing")
    for pid in machine.sessions():
        if "sshd:" in str(rig.command_line(pid)):
            rig.end_process(pid)
    before.again(end)


def test_a_client_that_hears_no_signal_is_ended_all_the_same(desk, machine):
    """Frozen, as in the middle of a call to a file system that hangs."""
    before, end = launched(desk, machine, "classic", "ssh", "computing")
    os.kill(client_of(desk, end), signal.SIGSTOP)
    os.kill(supervisor(desk, end), signal.SIGTERM)
    before.again(end)


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


def test_network_cut(desk, own_machine):
    """Without a word to either side: noticed by ServerAliveInterval here, and by the server's own there."""
    own_machine.restart_server("ClientAliveInterval 1", "ClientAliveCountMax 2")
    before = Before(desk, own_machine)
    quick = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    end = desk.launch(own_machine, "callback", *quick)
    end.accept()
    before.watch(end)
    own_machine.cut()
    code, errors = end.wait(10)
    assert code == 255
    assert "the connection was lost" in errors
    before.again(end, 15)


def test_a_frozen_server_is_noticed(desk, own_machine):
    end = desk.launch(own_machine, "callback", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    end.accept()
    own_machine.freeze()
    try:
        code, errors = end.wait(10)
        assert code == 255
        assert "the connection was lost" in errors
        all_gone(desk)
    finally:
        own_machine.thaw()
    rig.wait_until(lambda: not own_machine.kernels(), BOUND, "the end of the kernel")


def test_a_silent_server_is_noticed_within_a_minute_by_default():
    request = product.parse_arguments(product.COMPUTE, ["h", "k", "1@h,2@h"])
    values = dict(product.OpenSSH.defaults(request, product.Settings((1, 2))))
    assert int(values["ServerAliveInterval"]) * (int(values["ServerAliveCountMax"]) + 1) <= 60


def test_a_shared_connection_goes_a_while_after_its_last_kernel(desk, machine):
    desk.alter(SHARE_SECONDS=1)
    before = Before(desk, machine)
    ends = [desk.launch(machine, "compute", "--share") for _ in range(2)]
    for end in ends:
        end.accept()
    ends[0].quit()
    rig.wait_until(lambda: len(machine.kernels()) == 1, BOUND, "the end of the first kernel")
    time.sleep(1.5)  # longer than it outlives its last kernel, which this one is not
    ends[1].echo()
    ends[1].quit()
    rig.wait_until(lambda: not still_running(desk) and not desk.processes(), BOUND + 1, "the end of all")
    assert [path for path in left_in_runtime_folder(desk) if not path.name.endswith(".lock")] == []
    assert set(machine.listeners()) <= before.there
