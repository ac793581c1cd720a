"""What login shells and kernels print decides nothing, and what they are given arrives."""

import os

import pytest
import rig
from rig.launches import FAKED, clients, ends_with, log_of, parent, works

# -- login shells

NOISE = (
    "echo 'debug1: Exit status 4'; echo 'bash: module: command not found'; echo 'Permission denied' >&2 || true"
)
RC_FILES = {
    "/bin/bash": ".bashrc",
    "/bin/dash": ".none",
    "/bin/csh": ".cshrc",
    "/bin/tcsh": ".tcshrc",
    "/usr/bin/fish": ".config/fish/config.fish",
    "/usr/bin/zsh": ".zshenv",
}
ODD = 'it\'s 50% "off" $HOME `pwd` $(pwd) !! !x \\ \\n ~ {a,b} [x] *? ; & | < > ^ # ( ) = , ä'


@pytest.fixture
def shells(machine):
    """Has john log in with another shell that prints things when it starts; call with its path."""
    passwd = machine.path("passwd")
    with open(passwd) as stream:
        text = stream.read()
    made = []

    def set_shell(path):
        if not os.access(path, os.X_OK):
            pytest.skip("needs {}; `python3 tests/run.py` installs it".format(path))
        with open(passwd, "w") as stream:
            stream.write(text.replace("{}:/bin/bash".format(machine.home), "{}:{}".format(machine.home, path)))
        name = os.path.join("home", RC_FILES[path])
        os.makedirs(os.path.dirname(machine.path(name)), exist_ok=True)
        noise = NOISE.replace(">&2", "") if "csh" in path else NOISE
        made.append(machine.write(name, noise + "\n"))

    yield set_shell
    with open(passwd, "w") as stream:
        stream.write(text)
    for path in made:
        os.remove(path)


@pytest.mark.parametrize("shell", list(RC_FILES))
def test_a_login_shell_gets_the_path_as_it_was_given(desk, machine, shells, shell):
    kernel = machine.install_kernel("opt/{}/10.1/MathKernel".format(ODD), "classic", "boot=0")
    shells(shell)
    works(desk, machine, ["classic", "compute", "shared"], kernel=kernel)


@pytest.mark.parametrize("shell", list(RC_FILES))
def test_a_missing_kernel_is_told_as_such_whatever_the_shell_and_the_folder(desk, machine, shells, shell):
    shells(shell)
    desk.alter(VERIFY_SECONDS=5)
    for share in ((), ("--share",)):
        for path in ("/opt/licensed/10.1/MathKernel", "/opt/license server/activate/10.1/MathKernel"):
            end = desk.launch(machine, "compute", *share, kernel=path)
            code, errors = end.wait()
            assert code != 0
            assert "there is no kernel {}".format(path) in errors, errors


@pytest.mark.parametrize("shell", list(RC_FILES))
def test_what_a_login_shell_prints_does_not_explain_why_a_kernel_ended(desk, machine, shells, shell):
    kernel = machine.install_kernel("ends/10.1/MathKernel", "exit=3")
    shells(shell)
    end = desk.launch(machine, "classic", kernel=kernel)
    ends_with(desk, end, 3, "ended before it called back, with exit code 3")


# -- what a kernel prints


# Without a terminal nothing tells plink's words from a kernel's.
@pytest.mark.parametrize("client, terminal", [("ssh", True), ("ssh", False), ("plink", True)])
def test_what_a_kernel_prints_decides_nothing(desk, serve, machine, client, terminal):
    serve(*([] if terminal else ["PermitTTY no"]))
    words = [stream + "=" + line for stream in ("stdout", "stderr") for line in FAKED]
    before = machine.kernel_starts()
    kernel = machine.install_kernel("prints/10.1/MathKernel", "classic", "boot=0.5", *words)
    works(desk, machine, ["classic", "compute"], kernel=kernel, client=client)
    assert machine.kernel_starts() == before + 2


# -- smaller things


def test_a_watchdog_that_somebody_has_killed_does_not_change_the_exit_code(desk, machine):
    end = desk.launch(machine, "classic")
    desk.accept(end)
    dogs = [pid for pid in rig.processes_with("tunnel-watchdog") if parent(pid) == end.launcher.pid]
    assert dogs
    for pid in dogs:
        rig.end_process(pid)
    end.echo(1000)
    end.tell(b"!quit 5\n")
    assert end.wait() == (5, "")


@clients
def test_link_names_too_short_to_be_replaced_are_explained(desk, machine, client):
    end = desk.launch(machine, "callback", host_of_links="::1", client=client)
    desk.wait_until(end, lambda: "the kernel has called back" in log_of(desk, end))
    assert "link name {} is too short to be replaced".format(end.link) in log_of(desk, end)


def test_a_digit_that_is_no_ascii_digit_is_no_number(desk, machine):
    kernel = machine.install_kernel("Wolfram/1\u0664.\u0661/1\u00b2/MathKernel", "classic", "boot=0")
    works(desk, machine, ["classic", "compute"], kernel=kernel)
