"""Nothing is left behind, however a launch ends: no process, listener, socket, pipe or file, on either side, but
for what launches tell later ones."""

import os
import signal
import time

import pytest
import rig
from rig.processes import BOUND, Before, client_of, compute, left_in_runtime_folder, still_running, supervisor

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
    desk.alter(NOTICE_SECONDS=1)
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
