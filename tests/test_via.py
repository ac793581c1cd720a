"""--via, end to end: kernels that a real Slurm runs on a compute node, and other commands before the kernel."""

import os
import re
import shutil
import signal
import sys

import pytest
import relay_rig
import rig
import slurm_rig
from conftest import make_machine
from test_relay import (
    SERVER,
    Bulk,
    alter,
    came_back,
    count,
    kill_client,
    logged,
    nothing_left,
    quits,
    relay_folder,
)

import tunnel_relay as relay

SRUN = "srun -n1 -u"
QUEUED = "queued and waiting for resources"


@pytest.fixture(scope="module")
def machine(request):
    return make_machine(request, sshd_options=list(SERVER))


@pytest.fixture(scope="module")
def cluster(machine):
    """The machine as login node of a Slurm."""
    try:
        cluster = slurm_rig.Cluster(machine).__enter__()
    except rig.Unavailable as reason:
        assert not os.environ.get("CI"), reason
        pytest.skip(str(reason))
    yield cluster
    cluster.__exit__()


@pytest.fixture
def desk(desk, machine, cluster):
    yield desk
    desk.close()
    nothing_remains(desk, machine, cluster)


def nothing_remains(desk, machine, cluster):
    desk.no_process()
    try:
        rig.wait_until(lambda: not cluster.jobs(), 10, "the end of all jobs")
        rig.wait_until(lambda: not cluster.left(), 10, "the end of all on both nodes")
    except AssertionError as error:
        left = [relay_rig.describe(pid) for pid in cluster.left()]
        cluster.ask("scancel", "--user=root")
        for pid in cluster.left():
            rig.end_process(pid)
        shutil.rmtree(relay_folder(machine), ignore_errors=True)
        raise AssertionError("{}; left: {}, {}".format(error, left, cluster.jobs())) from None
    assert desk.left_files() == []


def via(desk, machine, command=SRUN, role="callback", *arguments, **options):
    return desk.launch(machine, role, "--via", command, *arguments, **options)


@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
@pytest.mark.parametrize("command", ["srun -n1 -u", "srun -n1"])
def test_a_kernel_on_a_compute_node(desk, machine, cluster, role, command):
    end = via(desk, machine, command, role)
    assert len(end.accept()) == (2 if role == "compute" else 6)
    assert len(cluster.kernels()) == 1 and not machine.kernels()
    end.echo()
    end.echo(300000)
    end.tell(b"!quit 7\n")
    assert end.wait(15)[0] == (0 if role == "compute" else 7)
    desk.no_process()
    log = desk.logs()[0]
    assert re.search(r"s: via: srun -n1.*, process \d+\n", log)
    assert re.search(r"s: node: Python 3\.\d+\.\d+, process \d+ on node1, job \d+\n", log)
    assert log.splitlines()[-1].endswith("with exit code 7")


# -- other commands


def in_a_box(machine):
    """A container with a network of its own, in which john may make one."""
    words = ["--dev-bind", "/", "/", "--unshare-net", "--die-with-parent"]
    return " ".join([shutil.which("bwrap") or "bwrap"] + words)


@pytest.mark.parametrize("command", ["nice -n 10", "env X=y", "srun -n1 --pty", "bwrap"])
@pytest.mark.parametrize("client", ["ssh", "plink"])
def test_any_command_that_runs_another(desk, machine, command, client):
    end = via(desk, machine, in_a_box(machine) if command == "bwrap" else command, client=client)
    end.accept()
    end.echo(300000)
    kernel = (machine.kernels() + [None])[0]
    if command == "nice -n 10":
        assert os.getpriority(os.PRIO_PROCESS, kernel) == 10
    if command == "env X=y":
        with open("/proc/{}/environ".format(kernel), "rb") as stream:
            assert b"X=y" in stream.read().split(b"\0")
    quits(end, 3)


def test_inside_an_allocation(desk, machine, cluster):
    said = rig.run(machine.ssh, "-o", "StrictHostKeyChecking=no", machine.address, "salloc --no-shell -n2").stderr
    job = re.search("Granted job allocation ([0-9]+)", said).group(1)
    ends = [
        via(desk, machine, "srun --jobid={} --overlap -n1 -u".format(job), role)
        for role in ("callback", "compute")
    ]
    for end in ends:
        end.accept()
        end.echo()
    assert [number for number, _ in cluster.jobs()] == [job]
    for end in ends:
        quits(end)
    assert [number for number, _ in cluster.jobs()] == [job], "what was there before stays"
    cluster.ask("scancel", job)


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/dash", "/bin/tcsh", "/usr/bin/fish", "/bin/zsh"])
def test_what_a_login_shell_reads_is_there(request, desk, shell):
    own = make_machine(request, sshd_options=SERVER, shell=shell)
    if shell == "/bin/tcsh":
        own.write("home/.login", "alias module 'echo loaded \\!*; setenv MODULE \\!:2'\n")
    elif shell == "/usr/bin/fish":
        os.makedirs(own.path("home", ".config", "fish"))
        text = "status is-login; and function module; echo loaded $argv; set -gx MODULE $argv[2]; end\n"
        own.write("home/.config/fish/config.fish", text)
    else:
        text = "module() { echo loaded $*; MODULE=$2; export MODULE; }\n"
        own.write("home/.zprofile" if shell == "/bin/zsh" else "home/.profile", text)
    kernel = own.modern
    end = via(desk, own, "module load mathematica; env", kernel=kernel)
    end.accept()
    with open("/proc/{}/environ".format(own.kernels()[0]), "rb") as stream:
        assert b"MODULE=mathematica" in stream.read().split(b"\0")
    quits(end)
    assert "via: loaded load mathematica" in desk.logs()[0]
    nothing_left(desk, own)


# -- the queue


def waits(cluster):
    """Wait until one more job waits in the queue; returns its number."""
    jobs = rig.wait_until(lambda: [job for job in cluster.jobs() if job[1] == "PENDING"], 10, "a job in the queue")
    return jobs[-1][0]


def test_a_controller_waits_as_long_as_the_queue_does(desk, machine, cluster):
    alter(desk, CALLBACK_SECONDS=0.5)
    with cluster.full():
        end = via(desk, machine)
        job = waits(cluster)
        logged(desk, "via: srun: job {} {}".format(job, QUEUED))
        end.busy(1.5)
        assert end.launcher.poll() is None
        kill_client(desk, machine)
        came_back(desk)
    end.accept()
    end.echo()
    log = desk.logs()[0]
    assert log.index(QUEUED) < log.index("the connection is back") < log.index("s: node: ")
    quits(end)


def test_a_compute_launch_returns_when_its_job_runs(desk, machine, cluster):
    with cluster.full():
        end = via(desk, machine, SRUN, "compute")
        waits(cluster)
        end.busy(0.5)
        assert end.launcher.poll() is None
    assert end.wait(15) == (0, "")
    end.accept()
    end.echo()
    quits(end)


@pytest.mark.parametrize("how", ["signal", "kill", "quit", "die", "compute"])
def test_who_gives_up_while_queued_has_no_job_any_more(desk, machine, cluster, how):
    with cluster.full():
        end = via(desk, machine, SRUN, "compute" if how == "compute" else "callback")
        waits(cluster)
        logged(desk, QUEUED)
        if how in ("quit", "die"):
            end.close_listeners()
            end.quit() if how == "quit" else end.die()
        else:
            end.signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        code = end.wait(8)[0]
        assert code == {"signal": 143, "kill": -9, "compute": 143}.get(how, 129)
        rig.wait_until(lambda: not cluster.jobs(), 10, "the end of the job")
    assert not machine.kernels()
    if how in ("quit", "die"):
        assert count(desk, "the front end has closed the main link") == 1
    if how == "kill":
        desk.no_process(10)
        for path in desk.runtime.glob("tunnel/*"):
            path.unlink()


def test_a_job_that_starts_when_nobody_is_left_ends(desk, machine, cluster):
    with cluster.full():
        end = via(desk, machine)
        waits(cluster)
        for pid in machine.pids():
            if relay_rig.is_keeper(pid):
                rig.end_process(pid)
        code, errors = end.wait(10)
        assert code == 255 and "is gone" in errors
    rig.wait_until(lambda: not cluster.jobs(), 10, "the end of the job")
    assert not cluster.kernels()
    shutil.rmtree(relay_folder(machine))


def test_three_jobs_for_two_processors(desk, machine, cluster):
    ends = [via(desk, machine, "srun -p small -n1 -u", "compute") for _ in range(3)]
    done = rig.wait_until(lambda: [end for end in ends if end.launcher.poll() is not None][1:], 20, "two kernels")
    done = [end for end in ends if end.launcher.poll() is not None]
    (late,) = [end for end in ends if end not in done]
    for end in done:
        end.accept()
        end.echo()
    assert late.launcher.poll() is None and len(cluster.jobs()) == 3
    done[0].tell(b"!quit 0\n")
    assert late.wait(20) == (0, "")
    late.accept()
    for end in (done[1], late):
        end.echo()
        end.tell(b"!quit 0\n")


# -- connections that are lost


def test_a_connection_lost_before_the_job_starts_and_while_it_runs(desk, machine, cluster):
    with cluster.full():
        end = via(desk, machine)
        waits(cluster)
        machine.stop_server()
        for pid in machine.pids():
            if rig.process_name(pid).startswith("sshd"):
                rig.end_process(pid)
        logged(desk, "the connection is lost: ")
    rig.wait_until(cluster.kernels, 10, "the kernel")
    machine.start_server()
    came_back(desk)
    end.accept()
    bulk = Bulk(end)
    for number in (2, 3):
        bulk.reached(0.3 * (number - 1))
        kill_client(desk, machine)
        came_back(desk, number)
    bulk.finish()
    end.echo()
    quits(end)


# -- the end


def running(desk, machine, *arguments):
    end = via(desk, machine, *arguments)
    end.accept()
    end.tell(b"!compute\n")
    assert end.channels[0].recv(4) == b"busy"
    return end


def ends_with(end, *texts):
    code, errors = end.wait(12)
    assert code == 255
    assert errors.count("\n") == 1 and errors.startswith("tunnel: launching ")
    for text in texts:
        assert text in errors, errors


@pytest.mark.parametrize("how", ["signal", "kill", "quit"])
def test_the_launchers_end_is_that_of_the_job(desk, machine, cluster, how):
    alter(desk, LOST_SECONDS=0.5)
    end = running(desk, machine)
    end.quit() if how == "quit" else end.signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
    assert end.wait(10)[0] == {"signal": 143, "kill": -9, "quit": 129}[how]
    rig.wait_until(lambda: not cluster.jobs(), 10, "the end of the job")
    if how == "kill":
        desk.no_process(10)
        for path in desk.runtime.glob("tunnel/*"):
            path.unlink()


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_job_that_is_cancelled(desk, machine, cluster, state):
    if state == "queued":
        with cluster.full():
            end = via(desk, machine)
            cluster.ask("scancel", waits(cluster))
            ends_with(end, "--via srun -n1 -u: the job was cancelled (srun: ")
    else:
        end = running(desk, machine)
        cluster.ask("scancel", cluster.jobs()[0][0])
        ends_with(end, "--via srun -n1 -u: the job was cancelled (ended by SIGTERM; slurmstepd", "CANCELLED AT")


def test_a_node_that_dies(desk, machine, cluster):
    end = running(desk, machine, "srun -p small -n1 -u")
    cluster.kill_node("node2")
    try:
        ends_with(end, "the node has failed (srun: error: Node failure on node2)")
    finally:
        cluster.revive_node("node2")


def test_a_relay_that_is_killed(desk, machine, cluster):
    end = running(desk, machine)
    for pid in machine.pids():
        if relay_rig.is_keeper(pid):
            rig.end_process(pid)
    ends_with(end, "is gone")
    rig.wait_until(lambda: not cluster.jobs(), 10, "the end of the job")
    shutil.rmtree(relay_folder(machine))


def test_a_time_limit(desk, machine, cluster):
    end = running(desk, machine, "srun -n1 -u --time=1")
    job = cluster.jobs()[0][0]
    cluster.ask("scontrol", "update", "JobId=" + job, "EndTime=now")  # it looks every 30 s
    ends_with(end, "the job's time limit is over (ended by SIGTERM; slurmstepd", "DUE TO TIME LIMIT")


# -- commands that do not do


BROKEN = {
    "no-such-command -n1": "there is no such command (",
    "exec /etc/passwd": "it cannot be run (",
    "exit 3;": "it ended with exit code 3 before the relay ran through it (it said nothing)",
    "kill -9 $$;": "it ended by signal 9 before the relay ran through it (it said nothing)",
    "srun --no-such-option": 'before the relay ran through it (Try "srun --help" for more information)',
    "srun -n1 -p nowhere": "(srun: error: Unable to allocate resources: Invalid partition name specified)",
    "test -t 0 || { echo no terminal >&2; exit 1; };": "code 1 before the relay ran through it (no terminal)",
    "script -qec sh /dev/null #": "it gives the relay a terminal",
    "srun -n3 -u": "it runs the relay more than once; have it run one task, as srun does with -n1",
    "</dev/null": "it ended with exit code 0 before the relay ran through it",
    "dd bs=1 count=3000 2>/dev/null |": "its standard input ended while the relay was being sent",
    "yes | head -c 2000000;": "it prints without end on standard output",
    """LC_ALL=C sh -c '"$@" | sed -u "s/\\x11/\\x12/g"' sh""": "byte 0x11 comes out as 0x12",
    """sh -c '"$@" | sed -u "s/$/\\r/"' sh""": "a byte 0x0d is put before 0x0a",
    "(sleep 1.5; echo hello)&": "it changes what passes, or prints on standard output while the kernel runs",
}


@pytest.mark.parametrize("command", sorted(BROKEN))
def test_a_command_that_does_not_do_is_one_line(desk, machine, command):
    end = via(desk, machine, command)
    ends_with(end, "--via {}: ".format(command), BROKEN[command])


def test_a_place_without_python(desk, machine):
    words = [shutil.which("bwrap"), "--dev-bind", "/", "/"]
    found = {
        os.path.realpath(path)
        for path in map(shutil.which, relay.PYTHONS.split())
        if path and "/root/" not in path
    }
    for path in sorted(found):
        words += ["--ro-bind", "/dev/null", path]
    ends_with(via(desk, machine, " ".join(words)), "no Python 3 was found where it leads")


def test_a_command_that_takes_the_relay_and_runs_nothing(desk, machine):
    alter(desk, BEGIN_SECONDS=1)
    text = "sh -c 'echo --tunnel-relay-ready--; cat >/dev/null'"
    ends_with(via(desk, machine, text), "the relay was sent through it, and has not answered")


def test_what_a_command_leaves_behind_is_ended(desk, machine):
    end = via(desk, machine, "sleep 600 & nice")
    end.accept()
    quits(end)


@pytest.mark.parametrize("value", ["", " ", "srun\n-n1", "srun\x7f", "x" * 4097])
@pytest.mark.parametrize("role", ["callback", "compute"])
def test_a_bad_value(desk, machine, value, role):
    code, errors = via(desk, machine, value, role).wait()
    assert code == 2 and "--via: " in errors and errors.count("\n") == 1
    assert not desk.logs()


def test_a_windows_kernel_machine_is_refused(desk, machine):
    path = "C:\\Program Files\\Wolfram Research\\Wolfram\\14.1\\WolframKernel.exe"
    code, errors = via(desk, machine, kernel=path).wait()
    assert code == 2 and "--via" in errors and "Windows" in errors and errors.count("\n") == 1


# -- --check, --dry-run, --share


def run(desk, machine, *arguments, script="tunnel.py"):
    argv = [sys.executable, str(desk.folder / script)] + list(arguments)
    return rig.run(*argv, env=dict(os.environ, **desk.environment(machine)))


@pytest.mark.parametrize("script", ["tunnel.py", "tunnel_sub.py"])
def test_check_names_node_and_job(desk, machine, script):
    done = run(desk, machine, "--check", "--via", SRUN, machine.destination, machine.modern, script=script)
    assert (done.returncode, done.stderr) == (0, "")
    steps = [re.match(r" +\d+\.\d\d s  ok  ([a-z ]+): (\S.*)", line).groups() for line in done.stdout.splitlines()]
    names = [name for name, _ in steps]
    order = ["client", "name", "host key", "login", "relay", "via", "node", "kernel", "data channel"]
    assert names[:9] == order
    assert re.match(r"Python 3\.\d+\.\d+, process \d+ on node1, job \d+$", dict(steps)["node"])
    assert steps[-1] == ("relay", "the connection was cut, and is back")


def test_a_check_waits_for_the_queue_and_then_not_for_ever(desk, machine, cluster):
    alter(desk, CALLBACK_SECONDS=1)
    kernel = machine.install_kernel("silent/10.1/MathKernel", "silent")
    done = run(desk, machine, "--check", "--via", "sleep 2; " + SRUN, machine.destination, kernel)
    assert done.returncode == 255
    assert "has not called back within 1 s" in done.stderr
    assert "  ok  node: " in done.stdout


def test_dry_run(desk, machine):
    words = ("--dry-run", "--via", "module load x; srun -u", "john:secret@there", machine.modern)
    done = run(desk, machine, *(words + ("1234@127.0.0.1,1235@127.0.0.1",)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "through: module load x; srun -u sh\n" in done.stdout
    assert "secret" not in done.stdout


def test_64_compute_kernels_through_one_login(desk, machine, cluster):
    alter(desk, SHARE_SECONDS=0.7)
    before = machine.logins()
    first = via(desk, machine, "srun -u -n1 -c1", "compute", "--share")
    assert first.wait(20) == (0, "")
    ends = [first] + [via(desk, machine, "srun -u -n1 -c1", "compute", "--share") for _ in range(63)]
    for end in ends[1:]:
        assert end.wait(60) == (0, "")
    for end in ends:
        end.accept()
    assert len(cluster.kernels()) == len(cluster.jobs()) == 64
    kill_client(desk, machine)
    came_back(desk)
    for end in ends:
        end.echo(2000)
    assert machine.logins() == before + 2
    for end in ends:
        end.quit()
    desk.no_process(30)
    rig.wait_until(lambda: not cluster.jobs(), 20, "the end of all jobs")
