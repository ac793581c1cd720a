"""tunnel.py without the folder tunnel_lib: what the shell scripts did works, and all else says what is missing."""

import shutil
import signal

import pytest
import rig
from rig import frontend

clients = pytest.mark.parametrize("client", ["ssh", "plink"])


@pytest.fixture
def alone(desk):
    """A desk whose launchers have nothing beside them."""
    shutil.rmtree(str(desk.folder / "tunnel_lib"))
    return desk


def password_of(machine):
    user, _, host = machine.destination.rpartition("@")
    return "{}:{}@{}".format(user, rig.PASSWORD, host)


@clients
@pytest.mark.parametrize("role", ["classic", "compute"])
def test_kernels_are_launched_their_links_carry_bytes_and_their_exit_code_arrives(alone, machine, role, client):
    end = alone.launch(machine, role, client=client)
    assert len(alone.accept(end)) == (2 if role == "compute" else 6)
    end.echo()
    end.echo(200000)
    end.tell(b"!quit 7\n")
    for each in end.channels:  # while a front end holds the links that its kernel has made, ssh tells no exit code
        while each.recv(4096):
            pass
        each.close()
    assert end.wait()[0] == (0 if role == "compute" else 7)
    rig.wait_until(lambda: "the kernel has ended after" in alone.logs()[0], 10, "the kernel's end in the log")
    alone.no_process()


@clients
def test_a_password_is_answered_and_stands_nowhere(alone, machine, client):
    end = alone.launch(machine, "classic", client=client, host=password_of(machine))
    alone.accept(end)
    end.quit()
    end.wait()
    assert rig.PASSWORD not in "".join(alone.logs())


@clients
def test_another_block_of_ports_is_taken_where_one_is_held(alone, machine, client):
    end = frontend.FrontEnd("classic")
    data, message = (listener.getsockname()[1] for listener in end.main)
    end.close_listeners()
    release = machine.occupy(data)
    try:
        end = alone.launch(machine, "classic", client=client, ports=(data, message))
        alone.accept(end)
        assert "the next block of ports is" in alone.logs()[0]
        end.quit()
    finally:
        release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_client_and_kernel(alone, machine, number):
    end = alone.launch(machine, "classic")
    alone.accept(end)
    end.signal(number)
    assert end.wait(5)[0] == 128 + number
    rig.wait_until(lambda: not machine.kernels(), 5, "the end of the kernel")
    alone.no_process()


@clients
def test_a_launch_that_fails_says_what_the_client_said(alone, machine, client):
    end = alone.launch(machine, "classic", client=client, kernel="/opt/10.1/no/MathKernel")
    code, errors = end.wait()
    assert code == 127
    assert errors.count("\n") == 1 and "the folder tunnel_lib beside tunnel.py would tell more" in errors


@pytest.mark.parametrize(
    "role, option, who",
    [
        ("callback", "--client=ssh", "controller kernels of 11.1 and later need"),
        ("classic", "--relay", "--relay needs"),
        ("classic", "--via=srun", "--relay needs"),
        ("compute", "--share", "--share needs"),
        ("classic", "--dry-run", "--dry-run needs"),
    ],
)
def test_what_needs_the_folder_says_so_before_anything_starts(alone, machine, role, option, who):
    before = machine.attempts()
    end = alone.launch(machine, role, option)
    code, errors = end.wait()
    assert code == 70
    assert errors.startswith("tunnel: " + who) and errors.endswith("; run install.py again\n")
    assert errors.count("\n") == 1
    assert machine.attempts() == before
