"""The relay's far end with real processes, on this machine: a fixture, and what its tests wait for."""

import pytest

from rig.logins import Machine


@pytest.fixture
def machine():
    with Machine() as machine:
        yield machine


def over(launcher, machine):
    """End a session; nothing may be left."""
    launcher.call(launcher.near.end)
    launcher.wait(lambda: launcher.over, "the session's end")
    assert launcher.over == ("the session is over", None)
    machine.no_process()


def waiting_kernel(launcher, machine):
    front_end, kernel = launcher.launch(machine.kernel("computing"), "compute")
    front_end.close_listeners()
    for channel in front_end.channels:
        channel.close()
    return kernel
