"""What somebody else does in the middle of a launch: another user who connects, a front end that leaves, a program
that writes into the relay's stream, a host whose output would act upon a terminal."""

import os
import socket
import subprocess
import sys

import pytest
import rig
from rig import product, relays
from rig.launches import log_of
from rig.relays import came_back

machine, desk = relays.machine, relays.desk

CONNECT = """import os, socket, sys
os.setgid({0})
os.setuid({0})
end = socket.socket()
end.settimeout(10)
end.connect(("127.0.0.1", {1}))
try:
    sys.exit(len(end.recv(1)))
except ConnectionResetError:
    pass
"""


class Lines(list):
    """A log that keeps its lines."""

    write = list.append


def step_until(loop, condition):
    """Run a loop until there is something true in ``condition``, or for 10 s."""
    loop.after(10, lambda: condition.append("nothing came"))
    while not condition:
        loop.step()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_user_of_the_front_ends_machine_is_turned_away_and_the_kernel_let_in():
    loop, log, came = product.Loop(), Lines(), []
    way = product.Forwards(loop, log, 1)

    class Board:
        @staticmethod
        def arrived(position, end):
            came.append((position, end))

        called = arrived

    way.serve(Board)
    port = way.ports[0]
    stranger = subprocess.Popen([sys.executable, "-SEsc", CONNECT.format(65534, port)])
    step_until(loop, log)
    assert stranger.wait(10) == 0, "nothing was said to the stranger"
    assert log == ["a connection from another user (number 65534) was turned away"] and not came
    with socket.create_connection(("127.0.0.1", port), 5):
        step_until(loop, came)
        assert len(log) == 1 and came[0][0] == 0
        came[0][1].close()
    way.close()


@pytest.mark.parametrize("way", ["ask_linux", "search_tables"])
def test_who_connects_is_known_for_both_families_and_only_on_this_machine(way):
    look = getattr(product, way)
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::ffff:127.0.0.1")):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(2)
            with socket.socket(family) as far:
                far.connect((address, listener.getsockname()[1]))
                near, _ = listener.accept()
                ends = near.getpeername(), near.getsockname()
                with near:
                    state, user, inode = look(*ends)
                    assert (state, user) == (product.ESTABLISHED, os.getuid()) and inode
                    assert product.peer_user(near) == os.getuid()
                    far.close()
                    assert look(*ends)[2] == 0 and product.peer_user(near) == -1
                far.close()
            assert (look(*ends) or product.CLOSED_SOCKET)[2] == 0


@pytest.mark.parametrize("role, more", [("callback", ()), ("compute", ()), ("compute", ("--share",))])
def test_a_front_end_that_goes_while_a_relays_kernel_boots_takes_it_along(desk, machine, role, more):
    kernel = machine.install_kernel("never/14.1/WolframKernel", "silent")
    product.alter(desk.folder, SHARE_SECONDS=0.1)
    end = desk.launch(machine, role, "--relay", *more, kernel=kernel)
    desk.wait_until(end, lambda: machine.kernels(), what="the kernel")
    end.close_listeners()
    rig.wait_until(lambda: not machine.kernels(), 4, "the end of the kernel")
    assert "the front end has closed the main link: nothing is run for it any more" in log_of(desk, end)
    assert end.wait(5)[0] == (129 if role == "callback" else 0)


@pytest.mark.parametrize("word", ["good morning", "hello", "--tunnel-relay-far--", "a"])
def test_a_line_of_a_start_up_job_in_the_relays_stream_costs_a_connection_and_nothing_else(desk, machine, word):
    go, once = machine.path("tmp", "go"), machine.path("tmp", "once")
    job = "[ -e {1} ] || {{ : >{1}; (until [ -e {0} ]; do sleep 0.02; done; echo {2}) & }}\n"
    start_up = machine.write("home/.bashrc", job.format(go, once, word))
    try:
        end = desk.launch(machine, "callback", "--relay")
        end.accept()
        end.echo()
        machine.write("tmp/go", "")
        came_back(desk)
        end.echo(300000)
        end.tell(b"!quit 0\n")
        assert end.wait() == (0, "")
    finally:
        for path in (start_up, go, once):
            if os.path.exists(path):
                os.remove(path)


def test_nothing_that_a_host_prints_acts_upon_the_terminal_of_a_check(desk, machine):
    via = "printf '\\033]0;title\\007 \\342\\200\\256evil \\302\\233 \\n' >&2;"
    argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check", "--via", via]
    argv += [machine.destination, machine.modern]
    done = rig.run(*argv, env=dict(os.environ, **desk.environment(machine)))
    assert done.returncode == 0
    assert r"\x1b]0;title\x07 \u202eevil \x9b" in done.stdout
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))
    assert all(line.isprintable() for text in desk.logs() for line in text.split("\n"))
