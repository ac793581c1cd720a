"""--check: plays the front end, says step by step what works, and stops the kernel."""

import os
import pty
import re
import subprocess
import sys

import pytest
import rig
from rig import product
from rig.launches import clients, masters

EXPOSED = "this server opens the forwarded ports to its whole network (GatewayPorts yes in its sshd_config)"
STEP = r" *\d+\.\d\d s  ok  ([a-z ]+): (\S.*)"


def check(desk, machine, *arguments, client="ssh", script="tunnel.py", **environ):
    environment = dict(os.environ, **desk.environment(machine, client, **environ))
    argv = [sys.executable, str(desk.folder / script), "--check"] + list(arguments)
    return rig.run(*argv, env=environment)


def steps(done):
    """The names of the steps that were reported."""
    said = re.compile(r" *\d+\.\d\d s      (?:kernel|via): ")  # what others say is no step
    return [re.match(STEP + "$", line).group(1) for line in done.stdout.splitlines() if not said.match(line)]


ORDER = ["client", "name", "host key", "login", "forwards", "data channel", "message channel"]


@clients
@pytest.mark.parametrize("script", ["tunnel.py", "tunnel_sub.py"])
def test_each_step_is_reported_with_its_time(desk, machine, client, script):
    done = check(desk, machine, machine.destination, machine.modern, client=client, script=script)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(done) == ORDER
    times = [float(line.split(" s ")[0]) for line in done.stdout.splitlines()]
    assert times == sorted(times)
    assert re.search("OpenSSH_|plink: Release", done.stdout)
    assert re.search("publickey|Access granted", done.stdout)
    desk.no_process()
    rig.wait_until(lambda: not machine.kernels(), 5)


@pytest.mark.parametrize(
    "client, script", [("ssh", "tunnel.py"), ("ssh", "tunnel_sub.py"), ("plink", "tunnel.py")]
)
def test_a_kernel_that_boots_slowly_is_waited_for(desk, machine, client, script):
    done = check(desk, machine, machine.destination, machine.slow_modern, client=client, script=script)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(done) == ORDER


def test_a_failure_is_explained_with_the_command_to_try_by_hand(desk, machine):
    done = check(desk, machine, machine.destination, "/opt/10.1/no/MathKernel")
    assert done.returncode == 127
    assert "there is no kernel /opt/10.1/no/MathKernel" in done.stderr
    assert re.search(r"ssh -l john \S+ '\"/opt/10.1/no/MathKernel\"'", done.stderr)
    assert "data channel" not in done.stdout


def test_a_kernel_that_never_calls_back_is_given_up(desk, machine):
    kernel = machine.install_kernel("silent/10.1/MathKernel", "silent")
    script = product.launching(CALLBACK_SECONDS=1)
    argv = [sys.executable, "-c", script, str(desk.folder), "--check", machine.destination, kernel]
    done = rig.run(*argv, env=dict(os.environ, **desk.environment(machine)))
    assert done.returncode == 255
    assert re.search(
        r"has not called back within 1 s; run it by hand: ssh -l john -tt .* try --relay$", done.stderr
    )
    desk.no_process()
    rig.wait_until(lambda: not machine.kernels(), 5)


def test_an_existing_configuration_can_be_checked_with_its_link_name(desk, machine):
    done = check(desk, machine, machine.destination, machine.classic, "53994@127.0.0.1,39359@127.0.0.1")
    assert done.returncode == 0
    assert "too short" not in done.stdout


def test_link_names_too_short_to_be_replaced_are_told(desk, machine):
    name = "53994@::1,39359@::1"
    done = check(desk, machine, machine.destination, machine.modern, name)
    assert done.returncode == 0
    assert "link name {} is too short to be replaced".format(name) in done.stdout
    older = check(desk, machine, machine.destination, machine.classic, name)  # its names are not replaced
    assert older.returncode == 0
    assert "too short" not in older.stdout


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


# -- what servers do


@clients
def test_ports_that_the_server_opens_to_its_network_are_told(desk, serve, client):
    machine = serve("GatewayPorts yes")
    done = check(desk, machine, machine.destination, machine.modern, client=client)
    assert done.returncode == 0
    assert EXPOSED in done.stdout
    assert steps(done).count("server") == 1


@clients
@pytest.mark.parametrize("script", ["tunnel.py", "tunnel_sub.py"])
def test_a_server_without_terminals_passes_the_check(desk, serve, client, script):
    machine = serve("PermitTTY no")
    before = machine.kernel_starts()
    done = check(desk, machine, machine.destination, machine.slow_modern, client=client, script=script)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(done)[-2:] == ORDER[-2:]
    assert machine.kernel_starts() == before + 1
    rig.wait_until(lambda: not machine.kernels(), 5)


@clients
def test_a_server_that_forwards_no_ports_fails_the_check(desk, serve, client):
    machine = serve("AllowTcpForwarding no")
    done = check(desk, machine, machine.destination, machine.slow_modern, client=client)
    assert done.returncode == (255 if client == "ssh" else 1)
    assert "the server forwards no ports" in done.stderr
    assert "data channel" not in done.stdout


@clients
def test_a_server_whose_loopback_nobody_reaches_fails_the_check_for_kernels_that_listen_there(desk, serve, client):
    machine = serve("PermitOpen none")
    done = check(desk, machine, machine.destination, machine.modern, client=client)
    assert (done.returncode, done.stderr) == (0, "")
    done = check(desk, machine, machine.destination, machine.slow_classic, client=client)
    assert done.returncode == (255 if client == "ssh" else 1)
    assert "PermitOpen" in done.stderr


def test_a_shared_connection_can_be_checked_too(desk, machine):
    before = machine.logins()
    for _ in range(2):
        done = check(desk, machine, "--share", machine.destination, machine.classic, script="tunnel_sub.py")
        assert (done.returncode, done.stderr) == (0, "")
        assert steps(done)[-2:] == ORDER[-2:]
    assert machine.logins() == before + 1
    assert len(masters(desk)) == 1
    rig.wait_until(lambda: not machine.kernels(), 5)
    rig.wait_until(lambda: not machine.listeners(), 5, "the return of the forwards")


# -- output that has nowhere to go


def shell(command, *argv, **environ):
    """Run a shell command; ``"$@"`` in it stands for ``argv``."""
    return rig.run("bash", "-c", command, "bash", *argv, env=dict(os.environ, **environ))


def test_a_reader_that_leaves_early_is_no_defect(desk, machine):
    argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check", machine.destination, machine.modern]
    done = shell('"$@" | head -1; echo "${PIPESTATUS[0]}"', *argv, **desk.environment(machine))
    lines = done.stdout.splitlines()
    assert re.match(STEP, lines[0])
    assert lines[1:] == ["0"]
    assert done.stderr == ""
    desk.no_process()
    rig.wait_until(lambda: not machine.kernels(), 5)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["--dry-run", "host", "/10.1/MathKernel", "1@a,2@a"]]
)
@pytest.mark.parametrize("where", [">/dev/full", ">&-", ">/dev/full 2>&1", ">&- 2>&-", "| true"])
def test_output_that_has_nowhere_to_go_is_no_defect(desk, words, where):
    done = shell('"$@" ' + where, sys.executable, str(desk.folder / "tunnel.py"), *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_a_message_that_has_nowhere_to_go_changes_no_exit_code(desk, where):
    done = shell('"$@" ' + where, sys.executable, str(desk.folder / "tunnel.py"), "--check", "-bad", "words")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_check_whose_output_has_nowhere_to_go_still_tells_by_its_exit_code(desk, machine):
    argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check", machine.destination]
    for kernel, code in ((machine.modern, 0), ("/no/such/kernel", 127)):
        done = shell('"$@" >/dev/full 2>&1', *(argv + [kernel]), **desk.environment(machine))
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
