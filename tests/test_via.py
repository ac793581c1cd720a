"""--via, end to end: kernels that another command runs, and commands that do not."""

import os
import shutil
import signal

import pytest
import rig
from rig import logins, product
from rig.desk import make_machine
from rig.relays import SERVER, count, logged, nothing_left, quits
from rig.via import check, ends_with, running, via


@pytest.fixture(scope="module")
def machine(request):
    return make_machine(request, sshd_options=SERVER)


@pytest.fixture
def desk(desk, machine):
    yield desk
    desk.close()
    nothing_left(desk, machine)


def in_a_box(machine):
    """A container with a network of its own, in which john may make one."""
    words = ["--dev-bind", "/", "/", "--unshare-net", "--die-with-parent"]
    return " ".join([shutil.which("bwrap") or "bwrap"] + words)


@pytest.mark.parametrize("command", ["nice -n 10", "env X=y", "export X=y;", "bwrap"])
@pytest.mark.parametrize("client", ["ssh", "plink"])
def test_any_command_that_runs_another(desk, machine, command, client):
    end = via(desk, machine, in_a_box(machine) if command == "bwrap" else command, client=client)
    end.accept()
    end.echo(300000)
    kernel = (machine.kernels() + [None])[0]
    if command == "nice -n 10":
        assert os.getpriority(os.PRIO_PROCESS, kernel) == 10
    if "X=y" in command:
        with open("/proc/{}/environ".format(kernel), "rb") as stream:
            assert b"X=y" in stream.read().split(b"\0")
    quits(end, 3)


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/dash", "/bin/tcsh", "/usr/bin/fish", "/bin/zsh"])
def test_what_a_login_shell_reads_is_there(request, desk, shell):
    own = make_machine(request, sshd_options=SERVER, shell=shell)
    if shell == "/bin/tcsh":
        own.write("home/.login", "alias module 'echo loaded \\!*; setenv MODULE \\!:2'\n")
    elif shell == "/usr/bin/fish":
        os.makedirs(own.path("home", ".config", "fish"))
        text = "status is-login; and function module; echo loaded $argv; set -gx MODULE $argv[2]; end\n"
        own.write("home/.config/fish/config.fish", text)
    else:
        text = "module() { echo loaded $*; MODULE=$2; export MODULE; }\n"
        own.write("home/.zprofile" if shell == "/bin/zsh" else "home/.profile", text)
    kernel = own.modern
    end = via(desk, own, "module load mathematica; env", kernel=kernel)
    end.accept()
    with open("/proc/{}/environ".format(own.kernels()[0]), "rb") as stream:
        assert b"MODULE=mathematica" in stream.read().split(b"\0")
    quits(end)
    assert "via: loaded load mathematica" in desk.logs()[0]
    nothing_left(desk, own)


def beyond(machine):
    """The far ends beyond commands."""
    return [pid for pid in machine.pids() if "alarm" in "".join(rig.command_line(pid)) and is_python(pid)]


def is_python(pid):
    return rig.process_name(pid).startswith("python")


def test_a_far_end_that_is_suspended_is_spoken_of_and_goes_on(desk, machine):
    desk.alter(SUSPENDED_SECONDS=0.7, PING_SECONDS=0.2, DEAD_SECONDS=1.5)
    end = via(desk, machine, "nice")
    end.accept()
    (pid,) = beyond(machine)
    os.kill(pid, signal.SIGSTOP)
    logged(desk, "via: nothing has come for ")
    end.busy(2)
    os.kill(pid, signal.SIGCONT)
    end.echo(300000)
    quits(end)
    assert count(desk, "the connection is lost") == 0


def test_a_far_end_that_is_killed_takes_its_kernel_along(desk, machine):
    end = running(desk, machine, "nice")
    (pid,) = beyond(machine)
    rig.end_process(pid)
    ends_with(end, "--via nice: it ended with exit code 137, and the kernel with it (")


@pytest.mark.parametrize("share", [(), ("--share",)])
def test_a_compute_kernel_whose_command_ends_says_so_in_its_log_only(desk, machine, share):
    desk.alter(SHARE_SECONDS=0.5)
    end = via(desk, machine, "nice", "compute", *share)
    assert end.wait(10) == (0, "")
    end.accept()
    rig.end_process(beyond(machine)[0])
    desk.no_process(10)
    assert "--via nice: it ended with exit code 137, and the kernel with it (" in desk.logs()[0]
    end = via(desk, machine, "nice", "compute", *share)
    assert end.wait(10) == (0, ""), "that one had connected: the next launch has nothing to say"
    end.accept()
    quits(end)


def test_a_compute_kernel_that_dies_before_it_connects_is_told_by_the_next_launch(desk, machine):
    kernel = machine.install_kernel("silent/10.1/MathKernel", "silent")
    assert via(desk, machine, "nice", "compute", kernel=kernel).wait(10) == (0, "")
    rig.end_process(beyond(machine)[0])
    desk.no_process(10)
    end = via(desk, machine, "nice", "compute")
    code, errors = end.wait(10)
    assert code == 0 and "an earlier launch" in errors and "--via nice: it ended with exit code 137" in errors
    end.accept()
    quits(end)


def stop_keeper(machine):
    """The relay on the login node does nothing any more, until it gets a SIGCONT; returns its process id."""
    (pid,) = [pid for pid in machine.pids() if logins.is_keeper(pid)]
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_a_far_end_that_nobody_talks_to_ends(desk, machine):
    desk.alter(ORPHAN_SECONDS=1, PING_SECONDS=0.3)
    end = running(desk, machine, "nice")
    pid = stop_keeper(machine)
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernel")
    os.kill(pid, signal.SIGCONT)
    ends_with(end, "--via nice: it ended with exit code 0, and the kernel with it (")


def test_a_far_end_that_gets_no_source_ends(desk, machine):
    desk.alter(BEGIN_SECONDS=1)
    end = via(desk, machine, "echo here >&2; sleep 1; nice")
    logged(desk, " via: here")
    pid = stop_keeper(machine)
    rig.wait_until(lambda: beyond(machine), 10, "the far end")
    rig.wait_until(lambda: not beyond(machine), 10, "its end")
    os.kill(pid, signal.SIGCONT)
    ends_with(end, "its standard output does not come back; it has to pass that on (")


def test_a_signal_at_any_moment_of_a_launch_ends_it(desk, machine):
    ends = [via(desk, machine, "sleep 0.2; nice") for _ in range(6)]
    for end in ends:
        end.busy(0.1)
        end.signal()
    for end in ends:
        assert end.wait(8)[0] in (143, -15), "those that had not caught it yet die of it"
    rig.wait_until(lambda: not machine.kernels(), 10)
    for path in (desk.runtime / "tunnel").glob("*"):
        path.unlink()


# What people put into start-up files where they cannot change their login shell, and what asks or waits.
@pytest.mark.parametrize(
    "line", ["exec /bin/zsh -l", "/bin/dash", "exec /bin/tcsh -l", "read x", "exec > /dev/null"]
)
def test_a_start_up_file_that_keeps_the_shell_from_the_command(request, desk, line):
    own = make_machine(request, sshd_options=SERVER)
    own.write("home/.bash_profile", line + "\n")
    desk.alter(SHELL_SECONDS=2)
    before = own.kernel_starts()
    end = via(desk, own, "nice -n 10")
    ends_with(end, "--via nice -n 10: ", "the login shell there does not come to it: a start-up file")
    assert own.kernel_starts() == before
    nothing_left(desk, own)


def test_what_bash_env_names_is_there(request, desk):
    own = make_machine(request, sshd_options=SERVER)
    path = own.write("modules", "module() { export MODULE=$2; }\n")
    own.restart_server("SetEnv BASH_ENV=" + path, *SERVER)
    end = via(desk, own, "module load mathematica; env")
    end.accept()
    with open("/proc/{}/environ".format(own.kernels()[0]), "rb") as stream:
        assert b"MODULE=mathematica" in stream.read().split(b"\0")
    quits(end)
    nothing_left(desk, own)


# -- commands that do not do


BROKEN = {
    "no-such-command -n1": "there is no such command (",
    "exec /etc/passwd": "it cannot be run (",
    "exit 3;": "it ended with exit code 3 before the relay ran through it (it said nothing)",
    "kill -9 $$;": "it ended by signal 9 before the relay ran through it (it said nothing)",
    "test -t 0 || { echo no terminal >&2; exit 1; };": "code 1 before the relay ran through it (no terminal)",
    "script -qec sh /dev/null #": "it gives the relay a terminal",
    "</dev/null": "it ended with exit code 0 before the relay ran through it",
    "dd bs=1 count=3000 2>/dev/null |": "its standard input ended while the relay was being sent",
    "yes | head -c 1200000;": "it prints without end on standard output",
    """LC_ALL=C sh -c '"$@" | sed -u "s/\\x11/\\x12/g"' sh""": "byte 0x11 comes out as 0x12",
    """sh -c '"$@" | sed -u "s/$/\\r/"' sh""": "a byte 0x0d is put before 0x0a",
    "(sleep 1.5; echo hello)&": "it changes what passes, or prints on standard output while the kernel runs",
}


@pytest.mark.parametrize("command", sorted(BROKEN))
def test_a_command_that_does_not_do_is_one_line(desk, machine, command):
    end = via(desk, machine, command)
    ends_with(end, "--via {}: ".format(command), BROKEN[command])


def test_a_place_without_python(desk, machine):
    words = [shutil.which("bwrap"), "--dev-bind", "/", "/"]
    found = {
        os.path.realpath(path)
        for path in map(shutil.which, product.PYTHONS.split())
        if path and "/root/" not in path
    }
    for path in sorted(found):
        words += ["--ro-bind", "/dev/null", path]
    ends_with(via(desk, machine, " ".join(words)), "no Python 3 was found where it leads")


def test_a_command_that_takes_the_relay_and_runs_nothing(desk, machine):
    desk.alter(BEGIN_SECONDS=1)
    text = "sh -c 'echo --tunnel-relay-ready--; cat >/dev/null'"
    ends_with(via(desk, machine, text), "the relay was sent through it, and has not answered")


def test_what_a_command_leaves_behind_is_ended(desk, machine):
    end = via(desk, machine, "sleep 600 & nice")
    end.accept()
    quits(end)


@pytest.mark.parametrize("value", ["", " ", "srun\n-n1", "srun\x7f", "x" * 4097])
@pytest.mark.parametrize("role", ["callback", "compute"])
def test_a_bad_value(desk, machine, value, role):
    code, errors = via(desk, machine, value, role).wait()
    assert code == 2 and "--via: " in errors and errors.count("\n") == 1
    assert not desk.logs()


def test_a_windows_kernel_machine_is_refused(desk, machine):
    path = "C:\\Program Files\\Wolfram Research\\Wolfram\\14.1\\WolframKernel.exe"
    code, errors = via(desk, machine, "srun", kernel=path).wait()
    assert code == 2 and "--via" in errors and "Windows" in errors and errors.count("\n") == 1


# -- --check and --dry-run


def test_a_check_waits_for_the_queue_and_then_not_for_ever(desk, machine):
    desk.alter(CALLBACK_SECONDS=1)
    kernel = machine.install_kernel("silent/10.1/MathKernel", "silent")
    done = check(desk, machine, "--check", "--via", "sleep 2; nice", machine.destination, kernel)
    assert done.returncode == 255
    assert "has not called back within 1 s" in done.stderr
    assert "  ok  node: " in done.stdout


@pytest.mark.parametrize("words, minutes", [((), 60), (("--relay=7",), 7), (("--relay",), 60)])
def test_it_implies_a_relay(words, minutes):
    for order in (words + ("--via", "srun -u"), ("--via=srun -u",) + words):
        request = product.parse_arguments(product.CONTROLLER, list(order) + ["host", "/k/math", "1@a,2@a"])
        assert (request.via, request.relay) == ("srun -u", minutes)


def test_kernels_of_one_process_may_have_different_commands(desk, machine):
    desk.alter(SHARE_SECONDS=0.5)
    ends = [via(desk, machine, "nice -n {}".format(number), "compute", "--share") for number in (5, 10)]
    ends.append(desk.launch(machine, "compute", "--share", "--relay"))
    for end in ends:
        assert end.wait(10) == (0, "")
        end.accept()
        end.echo()
    assert sorted(os.getpriority(os.PRIO_PROCESS, pid) for pid in machine.kernels()) == [0, 5, 10]
    for end in ends:
        end.quit()
    desk.no_process(10)


def test_dry_run(desk, machine):
    words = ("--dry-run", "--via", "module load x; srun -u", "john:secret@there", machine.modern)
    done = check(desk, machine, *(words + ("1234@127.0.0.1,1235@127.0.0.1",)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "; module load x; srun -u /bin/sh\n" in done.stdout
    assert "secret" not in done.stdout
