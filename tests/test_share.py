"""--share: one login for all compute kernels on a host."""

import os
import re
import time

import pytest
import rig
from conftest import make_machine


def masters(desk):
    return [pid for pid in desk.processes() if "ControlPersist=60" in rig.command_line(pid)]


def logins(machine):
    return len(re.findall("Accepted (?:publickey|password) for", machine.server_log()))


def shared(desk, machine, **options):
    return desk.launch(machine, "compute", "--share", **options)


def test_one_login_serves_many_kernels(desk, machine):
    before = logins(machine)
    ends = []
    for _ in range(6):
        end = shared(desk, machine)
        ends.append(end)
        assert end.wait() == (0, "")
        end.accept()
    for end in ends:
        end.echo()
    assert logins(machine) == before + 1
    assert len(masters(desk)) == 1
    assert all("the kernel has called back" in log for log in desk.logs())
    for end in ends:
        end.quit()
    rig.wait_until(lambda: not machine.kernels(), 5)
    rig.wait_until(lambda: not machine.listeners(), 5, "the return of the forwards")
    rig.wait_until(lambda: desk.processes() == masters(desk), 5)


def test_launches_at_the_same_moment_log_in_once(desk, machine):
    before = logins(machine)
    ends = [shared(desk, machine) for _ in range(6)]
    for end in ends:
        assert end.wait(30) == (0, "")
        end.accept()
        end.echo()
    assert logins(machine) == before + 1


def test_a_password_is_asked_for_once(desk, machine):
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    before = logins(machine)
    for _ in range(3):
        end = shared(desk, machine, host=host, env={"TUNNEL_SSH": machine.make_keyless_ssh()})
        assert end.wait() == (0, "")
        end.accept()
        end.echo()
    assert logins(machine) == before + 1


def test_a_kernel_that_does_not_start_is_an_error_of_the_launcher(desk, machine):
    first = shared(desk, machine)
    assert first.wait()[0] == 0
    begin = time.monotonic()
    end = shared(desk, machine, kernel="/opt/Mathematica/10.1/no such/MathKernel")
    code, errors = end.wait()
    assert code == 127
    assert "there is no kernel" in errors
    assert time.monotonic() - begin < 5


def test_a_server_with_no_more_sessions_gets_a_connection_of_its_own(desk, request):
    machine = make_machine(request, sshd_options=["MaxSessions 2"])
    ends = []
    for _ in range(4):
        end = shared(desk, machine)
        ends.append(end)
        assert end.wait(30) == (0, "")
        end.accept()
    for end in ends:
        end.echo()
    assert logins(machine) == 3
    assert "one of its own then" in "".join(desk.logs())


def test_a_stale_socket_is_no_obstacle(desk, machine):
    first = shared(desk, machine)
    assert first.wait()[0] == 0
    first.accept()
    first.quit()
    for pid in masters(desk):
        rig.end_process(pid)
    rig.wait_until(lambda: not masters(desk), 5)
    sockets = [name for name in os.listdir(str(desk.runtime / "tunnel")) if not name.endswith(".log")]
    assert sockets  # it is still there, and nobody answers
    end = shared(desk, machine)
    assert end.wait() == (0, "")
    end.accept()
    end.echo()


def test_a_connection_that_dies_takes_only_its_own_kernels_with_it(desk, machine):
    first = shared(desk, machine)
    assert first.wait()[0] == 0
    first.accept()
    for pid in masters(desk):
        rig.end_process(pid)
    second = shared(desk, machine)
    assert second.wait() == (0, "")
    second.accept()
    second.echo()
    assert len(machine.kernels()) == 1


def test_taken_ports_are_replaced_on_a_shared_connection_too(desk, machine):
    first = shared(desk, machine)
    assert first.wait()[0] == 0
    port = rig.free_port()
    release = machine.occupy(port)
    try:
        before = logins(machine)
        end = shared(desk, machine, ports=(port, 0))
        assert end.wait() == (0, "")
        end.accept()
        end.echo()
        assert "the next block of ports is" in desk.logs()[-1]
        assert logins(machine) <= before + 1  # ssh may try one of its own before it is stopped
    finally:
        release()


def test_a_long_runtime_folder_is_no_obstacle(desk, machine):
    runtime = desk.runtime / ("long" * 30)
    runtime.mkdir(mode=0o700)
    desk.runtime = runtime
    end = shared(desk, machine)
    assert end.wait() == (0, "")
    end.accept()
    end.echo()


def test_plink_goes_without(desk, machine):
    end = shared(desk, machine, client="plink")
    assert end.wait() == (0, "")
    end.accept()
    assert "--share needs OpenSSH" in desk.logs()[0]


def test_the_socket_is_private(desk, machine):
    end = shared(desk, machine)
    assert end.wait()[0] == 0
    folder = desk.runtime / "tunnel"
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0


# -- connections that the user shares already


@pytest.fixture
def users_connection(machine, tmp_path):
    """A connection of the user's own, shared through ControlPath in the configuration."""
    path = str(tmp_path / "users")
    lines = ["Host *"] + machine.client_lines + ["ControlPath {}".format(path), "StrictHostKeyChecking no"]
    _, wrapper = machine.make_ssh("users", lines)
    rig.must(wrapper, "-M", "-f", "-N", machine.address)
    yield wrapper
    rig.run(wrapper, "-O", "exit", machine.address)


def outlives_the_wait_for_an_answer(end):
    """Assert that a kernel launched with ``ConnectTimeout=1`` is there long after that has passed."""
    end.accept()
    begin = time.monotonic()
    while time.monotonic() - begin < 3:
        end.echo(1000)


def test_a_kernel_on_a_shared_connection_outlives_the_wait_for_an_answer(desk, machine):
    for _ in range(2):  # the first makes the connection, the second finds it
        end = desk.launch(machine, "compute", "--share", "-o", "ConnectTimeout=1")
        assert end.wait() == (0, "")
        outlives_the_wait_for_an_answer(end)


def test_a_kernel_on_the_users_connection_outlives_the_wait_for_an_answer(desk, machine, users_connection):
    end = desk.launch(machine, "callback", "-o", "ConnectTimeout=1", env={"TUNNEL_SSH": users_connection})
    outlives_the_wait_for_an_answer(end)


def test_a_kernel_of_its_own_connection_outlives_the_wait_for_an_answer(desk, machine):
    end = desk.launch(machine, "classic", "-o", "ConnectTimeout=1")
    outlives_the_wait_for_an_answer(end)


@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
def test_a_connection_that_the_user_shares_is_used_and_its_forwards_are_taken_back(
    desk, machine, users_connection, role
):
    before = logins(machine)
    end = desk.launch(machine, role, env={"TUNNEL_SSH": users_connection})
    end.accept()
    end.echo()
    assert logins(machine) == before
    end.tell(b"!quit 0\n")
    assert end.wait(10)[0] == 0
    end.close_listeners()
    desk.no_process()
    rig.wait_until(lambda: not machine.listeners(), 5, "the return of the remote forwards")
    here = set(desk.local_ports())
    rig.wait_until(lambda: not here & set(rig.listening_ports()), 5, "the return of the local forwards")


def test_a_lost_shared_connection_is_said(desk, machine, users_connection):
    end = desk.launch(machine, "classic", env={"TUNNEL_SSH": users_connection})
    end.accept()
    rig.run(users_connection, "-O", "exit", machine.address)
    code, errors = end.wait(10)
    assert code == 255
    assert "the connection was lost" in errors


def test_whoever_types_a_second_factor_may_take_longer_than_a_host_that_does_not_answer(desk, machine):
    """The user's own password helper, slow as a person is, while the shared connection is being made."""
    helper = machine.write("slow-askpass", "#!/bin/sh\nsleep 4\necho '{}'\n".format(rig.PASSWORD), 0o755)
    wrapper = machine.make_keyless_ssh()
    asking = {"TUNNEL_SSH": wrapper, "SSH_ASKPASS": helper, "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": "x"}
    end = desk.launch(machine, "compute", "--share", "-o", "ConnectTimeout=1", env=asking)
    assert end.wait() == (0, "")
    end.accept()
    end.echo()
