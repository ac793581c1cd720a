"""--via with a real Slurm at its limits: of a job's time, to which it sees every 30 s, and 64 jobs at once."""

import pytest
import rig
from rig.relays import came_back, kill_client
from rig.via import ends_with, make_cluster, nothing_remains, running, via


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


def test_64_compute_kernels_through_one_login(desk, machine, cluster):
    desk.alter(SHARE_SECONDS=0.7)
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
