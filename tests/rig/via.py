"""What the tests of --via have in common: launches through a command, and how they end."""

import os
import shutil
import sys

import pytest

import rig
from rig import logins, slurm
from rig.desk import make_machine
from rig.relays import SERVER, relay_folder

SRUN = "srun -n1 -u"


def make_cluster(request):
    """A kernel machine, and the Slurm whose login node it is, for as long as ``request`` lasts."""
    machine = make_machine(request, sshd_options=list(SERVER))
    try:
        cluster = slurm.Cluster(machine).__enter__()
    except rig.Unavailable as reason:
        assert not os.environ.get("CI"), reason
        pytest.skip(str(reason))
    request.addfinalizer(cluster.__exit__)
    return cluster


def nothing_remains(desk, cluster):
    """Wait until nothing is left of what was launched, in no place."""
    desk.no_process()
    try:
        rig.wait_until(lambda: not cluster.jobs(), 10, "the end of all jobs")
        rig.wait_until(lambda: not cluster.left(), 10, "the end of all on both nodes")
    except AssertionError as error:
        left = [logins.describe(pid) for pid in cluster.left()]
        cluster.ask("scancel", "--user=root")
        for pid in cluster.left():
            rig.end_process(pid)
        shutil.rmtree(relay_folder(cluster.machine), ignore_errors=True)
        raise AssertionError("{}; left: {}, {}".format(error, left, cluster.jobs())) from None
    assert desk.left_files() == []


def via(desk, machine, command=SRUN, role="callback", *arguments, **options):
    return desk.launch(machine, role, "--via", command, *arguments, **options)


def running(desk, machine, *arguments):
    """A kernel that computes."""
    end = via(desk, machine, *arguments)
    end.accept()
    end.tell(b"!compute\n")
    assert end.channels[0].recv(4) == b"busy"
    return end


def ends_with(end, *texts, seconds=12):
    """Assert that a launch ends with 255, and one line that holds these texts."""
    code, errors = end.wait(seconds)
    assert code == 255
    assert errors.count("\n") == 1 and errors.startswith("tunnel: launching ")
    for text in texts:
        assert text in errors, errors


def check(desk, machine, *arguments, script="tunnel.py"):
    """What ``--check`` says; or another of the options that print something and end."""
    argv = [sys.executable, str(desk.folder / script)] + list(arguments)
    return rig.run(*argv, env=dict(os.environ, **desk.environment(machine)))
