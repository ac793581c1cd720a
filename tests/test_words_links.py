"""What is said of a front end that does not answer."""

import sys

import pytest
import rig
from rig import product
from rig.launches import tries


@pytest.mark.parametrize("arguments", [(), ("--relay",)], ids=["forwards", "relay"])
def test_a_front_end_that_does_not_listen_is_blamed_itself(desk, machine, arguments):
    """Nobody is behind the ports of the link, and no look at them has told so. The kernel is not at fault."""
    first = rig.free_port()
    code = product.launching(watch_front_end="lambda *_, **__: None")
    link = "{}@127.0.0.1,{}@127.0.0.1".format(first, rig.free_port())
    command = [sys.executable, "-c", code, str(desk.folder)] + list(arguments)
    done = rig.run(*command, machine.destination, machine.classic, link, env=desk.environment(machine))
    assert done.returncode not in (0, None)
    assert (
        "the kernel had connected, but the front end does not answer at {}@127.0.0.1".format(first) in done.stderr
    )
    assert "ended before it called back" not in done.stderr and tries(desk.logs()[0]) == 1
    desk.no_process()
