"""--via with a real Slurm: kernels on a compute node that only the login node reaches."""

import os
import re
import shutil
import signal

import pytest
import rig
from rig import logins
from rig.relays import Bulk, came_back, count, kill_client, logged, quits, relay_folder
from rig.via import SRUN, check, ends_with, make_cluster, nothing_remains, running, via

QUEUED = "queued and waiting for resources"


@pytest.fixture(scope="module")
def cluster(request):
    return make_cluster(request)


@pytest.fixture(scope="module")
def machine(cluster):
    return cluster.machine


@pytest.fixture
def desk(desk, cluster):
    yield desk
    desk.close()
    nothing_remains(desk, cluster)


@pytest.mark.parametrize(
    "role, command",
    [
        ("classic", "srun -n1 -u"),
        ("callback", "srun -n1 -u"),
        ("compute", "srun -n1 -u"),
        ("classic", "srun -n1"),
        ("compute", "srun -n1"),
        ("callback", "srun -n1 --pty"),  # which does without a terminal then
    ],
)
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


# -- the queue


def waits(cluster):
    """Wait until one more job waits in the queue; returns its number."""
    jobs = rig.wait_until(lambda: [job for job in cluster.jobs() if job[1] == "PENDING"], 10, "a job in the queue")
    return jobs[-1][0]


def test_a_controller_waits_as_long_as_the_queue_does(desk, machine, cluster):
    desk.alter(CALLBACK_SECONDS=0.5)
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


@pytest.mark.parametrize("how", ["signal", "kill", "quit"])
def test_who_gives_up_while_others_wait_in_the_same_process(desk, machine, cluster, how):
    """The first launch is the process that carries all of them; the jobs of the others keep their places."""
    desk.alter(SHARE_SECONDS=0.7)
    with cluster.full():
        ends = []
        for number in range(3):
            ends.append(via(desk, machine, SRUN, "compute", "--share"))
            rig.wait_until(lambda number=number: len(cluster.jobs()) == number + 1, 15, "a job in the queue")
        jobs = sorted(cluster.jobs())
        for end in ends[:2]:
            if how == "quit":
                end.close_listeners()
                end.quit()
            elif how == "signal" or end is ends[1]:  # what has been killed leaves the process that it has started
                end.signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        left = jobs[-1:] if how != "kill" else [jobs[0], jobs[2]]
        rig.wait_until(lambda: sorted(cluster.jobs()) == left, 10, "the end of the jobs that nobody wants")
        for end in ends[:2] if how == "quit" else ends[1:2]:
            assert end.wait(5)[0] == {"quit": 129, "signal": 143, "kill": -9}[how]
        assert how != "signal" or ends[0].wait(5)[0] == 143
    for end in [ends[2]] if how != "kill" else [ends[0], ends[2]]:
        assert end.wait(15) == (0, "")
        end.accept()
        end.echo()
        end.quit()


def test_a_job_that_starts_when_nobody_is_left_ends(desk, machine, cluster):
    with cluster.full():
        end = via(desk, machine)
        waits(cluster)
        for pid in machine.pids():
            if logins.is_keeper(pid):
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


def test_all_that_a_kernel_has_sent_before_its_end_arrives(desk, machine, cluster):
    end = via(desk, machine, receive_buffer=8192)
    end.accept()
    end.tell(b"!flood-all 1500000\n")
    rig.wait_until(lambda: not end.busy(0.2) and kill_client(desk, machine) is None)
    end.busy(1)
    end.expect_flood(1500000, range(6))
    assert end.wait(15) == (0, "")


# -- the end


@pytest.mark.parametrize("how", ["signal", "kill", "quit"])
def test_the_launchers_end_is_that_of_the_job(desk, machine, cluster, how):
    desk.alter(NOTICE_SECONDS=0.5)
    end = running(desk, machine)
    end.quit() if how == "quit" else end.signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
    assert end.wait(10)[0] == {"signal": 143, "kill": -9, "quit": 129}[how]
    rig.wait_until(lambda: not cluster.jobs(), 10, "the end of the job")
    if how == "kill":
        desk.no_process(10)
        for path in desk.runtime.glob("tunnel/*"):
            path.unlink()


@pytest.mark.parametrize("state", ["queued", "running", "away"])
def test_a_job_that_is_cancelled(desk, machine, cluster, state):
    desk.alter(ASKING_SECONDS=1)
    if state == "queued":
        with cluster.full():
            end = via(desk, machine)
            cluster.ask("scancel", waits(cluster))
            ends_with(end, "--via srun -n1 -u: the job was cancelled (srun: ")
    else:
        end = running(desk, machine)
        if state == "away":
            keys = machine.path("home", ".ssh", "authorized_keys")
            os.rename(keys, keys + ".away")
            kill_client(desk, machine)
        cluster.ask("scancel", cluster.jobs()[0][0])
        if state == "away":
            rig.wait_until(lambda: not cluster.jobs(), 10, "the end of the job")
            os.rename(keys + ".away", keys)
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
        if logins.is_keeper(pid):
            rig.end_process(pid)
    ends_with(end, "is gone")
    rig.wait_until(lambda: not cluster.jobs(), 10, "the end of the job")
    shutil.rmtree(relay_folder(machine))


@pytest.mark.parametrize(
    "command, text",
    [
        ("srun --no-such-option", 'before the relay ran through it (Try "srun --help" for more information)'),
        ("srun -n1 -p nowhere", "(srun: error: Unable to allocate resources: Invalid partition name specified)"),
        ("srun -n3 -u", "it runs the relay more than once; have it run one task, as srun does with -n1"),
    ],
)
def test_a_job_that_cannot_be(desk, machine, command, text):
    ends_with(via(desk, machine, command), "--via {}: ".format(command), text)


# -- --check


@pytest.mark.parametrize("script", ["tunnel.py", "tunnel_sub.py"])
def test_check_names_node_and_job(desk, machine, script):
    done = check(
        desk,
        machine,
        "--check",
        "--via",
        "echo srun: wait >&2; " + SRUN,
        machine.destination,
        machine.modern,
        script=script,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert any(line.endswith(" s      via: srun: wait") for line in lines)  # it is no step that has worked
    steps = [
        re.match(r" +\d+\.\d\d s  ok  ([a-z ]+): (\S.*)", line) for line in lines if " s      via: " not in line
    ]
    steps = [step.groups() for step in steps]
    names = [name for name, _ in steps]
    order = ["client", "name", "host key", "login", "relay", "via", "node", "kernel", "data channel"]
    assert names[:9] == order
    assert re.match(r"Python 3\.\d+\.\d+, process \d+ on node1, job \d+$", dict(steps)["node"])
    assert steps[-1] == ("relay", "the connection was cut, and is back")
