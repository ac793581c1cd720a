"""--check: plays the front end, says step by step what works, and stops the kernel."""

import os
import pty
import re
import subprocess
import sys

import pytest
import rig

clients = pytest.mark.parametrize("client", ["ssh", "plink"])


def check(desk, machine, *arguments, client="ssh", script="tunnel.py", **environ):
    environment = dict(os.environ, **desk.environment(machine, client, **environ))
    argv = [sys.executable, str(desk.folder / script), "--check"] + list(arguments)
    return rig.run(*argv, env=environment)


@clients
@pytest.mark.parametrize("script", ["tunnel.py", "tunnel_sub.py"])
def test_each_step_is_reported_with_its_time(desk, machine, client, script):
    done = check(desk, machine, machine.destination, machine.modern, client=client, script=script)
    assert (done.returncode, done.stderr) == (0, "")
    steps = [re.match(r" +\d+\.\d\d s  ok  ([a-z ]+): \S", line) for line in done.stdout.splitlines()]
    names = [step.group(1) for step in steps]
    order = ["client", "name", "host key", "login", "forwards", "kernel", "data channel", "message channel"]
    assert names == order
    assert re.search("OpenSSH_|plink: Release", done.stdout)
    assert re.search("publickey|Access granted", done.stdout)
    desk.no_process()
    rig.wait_until(lambda: not machine.kernels(), 5)


def test_a_failure_is_explained_with_the_command_to_try_by_hand(desk, machine):
    done = check(desk, machine, machine.destination, "/opt/10.1/no/MathKernel")
    assert done.returncode == 127
    assert "there is no kernel /opt/10.1/no/MathKernel" in done.stderr
    assert re.search(r"ssh -l john \S+ '\"/opt/10.1/no/MathKernel\"'", done.stderr)
    assert "data channel" not in done.stdout


def test_a_kernel_that_never_calls_back_is_given_up(desk, machine):
    kernel = machine.install_kernel("silent/10.1/MathKernel")
    machine.behave(kernel, "silent")
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import tunnel; tunnel.CALLBACK_SECONDS = 1;"
        "sys.exit(tunnel.main())"
    )
    argv = [sys.executable, "-c", script, str(desk.folder), "--check", machine.destination, kernel]
    done = rig.run(*argv, env=dict(os.environ, **desk.environment(machine)))
    assert done.returncode == 255
    assert "has not called back within 1 s" in done.stderr
    desk.no_process()
    rig.wait_until(lambda: not machine.kernels(), 5)


def test_an_existing_configuration_can_be_checked_with_its_link_name(desk, machine):
    done = check(desk, machine, machine.destination, machine.classic, "53994@127.0.0.1,39359@127.0.0.1")
    assert done.returncode == 0


@pytest.mark.parametrize("no_color, coloured", [("", True), ("1", False)])
def test_colours_only_on_a_terminal_and_only_if_wanted(desk, machine, no_color, coloured):
    near, far = pty.openpty()
    environment = dict(os.environ, **desk.environment(machine, NO_COLOR=no_color))
    argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check", machine.destination, machine.modern]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=far, stderr=far, env=environment)
    os.close(far)
    output = b""
    while True:
        try:
            data = os.read(near, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        output += data
    assert process.wait(10) == 0
    os.close(near)
    assert (b"\033[" in output) is coloured
    assert b"message channel" in output
