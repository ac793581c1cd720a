"""--via with a real Slurm: the end of a job's time, to which it sees every 30 s. That takes a file of its own."""

import pytest
from via_rig import ends_with, make_cluster, nothing_remains, running


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


def test_a_time_limit(desk, machine, cluster):
    end = running(desk, machine, "srun -n1 -u --time=1")
    job = cluster.jobs()[0][0]
    cluster.ask("scontrol", "update", "JobId=" + job, "EndTime=now")  # instead of in a minute
    ends_with(end, "the job's time limit is over (ended by SIGTERM; slurmstepd", "DUE TO TIME LIMIT", seconds=40)
