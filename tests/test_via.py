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
