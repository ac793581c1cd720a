"""--relay: launches that fail, that only look, and that share; see test_relay.py for what they are about."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import rig
from rig import relays
from rig.desk import make_machine
from rig.launches import patched
from rig.relays import (
    QUICK,
    SERVER,
    Bulk,
    came_back,
    cut,
    forget,
    keepers,
    kill_client,
    launchers,
    logged,
    mend,
    nothing_left,
    quits,
    ssh_clients,
)

machine, desk = relays.machine, relays.desk


# -- launches that fail


def hide_pythons(machine):
    """Put a file that nobody can execute over each Python of the machine."""
    empty = machine.write("none", "", 0o644)
    found = {os.path.realpath(os.path.join(folder, "python3")) for folder in ("/usr/bin", "/usr/local/bin")}
    for path in [path for path in found if os.path.exists(path)]:
        enter = ["nsenter", "-m", "-t", str(machine.server.pid)]
        rig.must(*(enter + ["mount", "--bind", empty, path]))


def test_without_python_there_one_line_says_so(request, desk):
    own = make_machine(request, sshd_options=SERVER)
    hide_pythons(own)
    for client in ("ssh", "plink") * 2:
        end = desk.launch(own, "callback", "--relay", client=client)
        code, errors = end.wait(10)
        assert code == 255
        assert "no Python 3 was found there" in errors and errors.count("\n") == 1
    nothing_left(desk, own)


def test_a_login_shell_that_runs_nothing(request, desk):
    own = make_machine(request, sshd_options=SERVER, shell="/bin/false")  # noqa: S604 - not subprocess's
    end = desk.launch(own, "callback", "--relay")
    code, errors = end.wait(10)
    assert code != 0 and errors.count("\n") == 1
    nothing_left(desk, own)


@pytest.mark.parametrize("role", ["callback", "compute"])
@pytest.mark.parametrize(
    "name, behaviour, code, text",
    [
        ("gone/10.1/MathKernel", None, 127, "there is no kernel"),
        ("locked/10.1/MathKernel", (), 126, "cannot be executed"),
        ("free/10.1/MathKernel", ("unlicensed", "boot=0.4"), 1, "found no licence"),
        ("early/10.1/MathKernel", ("early", "boot=0.4"), 3, "ended before it called back"),
    ],
)
def test_a_kernel_that_does_not_come_up(desk, machine, role, name, behaviour, code, text):
    path = machine.path(name)
    if behaviour is not None:
        path = machine.install_kernel(name, *behaviour)
    if behaviour == ():
        os.chmod(path, 0o644)
    end = desk.launch(machine, role, "--relay", kernel=path)
    found, errors = end.wait(10)
    if behaviour and role == "compute":
        assert (found, errors) == (0, ""), "it has been started: more is not waited for"
        logged(desk, text)
        desk.no_process()
        end = desk.launch(machine, role, "--relay")
        found, errors = end.wait(10)
        assert found == 0 and "an earlier launch" in errors and text in errors
        end.accept()
        quits(end, 0)
    else:
        assert found == code
        assert text in errors and errors.count("\n") == 1
        assert text in desk.logs()[0]


def test_what_keeps_the_relay_from_starting_a_kernel_is_not_told_as_its_path(request, desk):
    own = make_machine(request, sshd_options=SERVER)
    end = desk.launch(own, "callback", "--relay")
    end.accept()
    quits(end)
    enter = ["nsenter", "-m", "-t", str(own.server.pid)]
    rig.must(*(enter + ["mount", "-t", "tmpfs", "tmpfs", "/dev/pts"]))
    code, errors = desk.launch(own, "callback", "--relay").wait(10)
    assert code == 126
    assert ": the kernel cannot be started: No such device (" in errors and errors.count("\n") == 1
    assert "path" not in errors


def test_a_launcher_that_fails_of_something_unforeseen_leaves_no_kernel(desk, machine):
    values = {"Launch.step": "lambda self, *words: 1 / 0 if words[0] == 'kernel' else None"}
    end = patched(desk, machine, "callback", values, "--relay")
    code, errors = end.wait(10)
    assert code == 70 and "a defect of tunnel stopped the launch (ZeroDivisionError" in errors
    rig.wait_until(lambda: not machine.kernels() and not keepers(machine), 10, "the end of the kernel")
    forget(desk)


def test_a_server_that_closes_the_connection_right_after_the_login_is_told_as_that(request, desk):
    own = make_machine(request, sshd_options=["ChrootDirectory /no/such/folder"] + SERVER)
    for client, words in (("ssh", []), ("ssh", ["--relay"]), ("plink", []), ("plink", ["--relay"])):
        code, errors = desk.launch(own, "callback", *words, client=client).wait(20)
        assert code == (255 if client == "ssh" else 1), errors
        when = "right after" if client == "ssh" else "(right after|during)"  # plink may see the end first
        assert re.search(" closed the connection {} the login; ".format(when), errors), errors
        assert errors.count("\n") == 1
    code, errors = desk.launch(own, "compute", "--share").wait(20)
    assert code == 255 and " closed the connection right after the login; " in errors
    nothing_left(desk, own)


@pytest.mark.parametrize("line", ["ForceCommand echo no", "ForceCommand internal-sftp"])
def test_a_server_that_runs_something_else_is_told_as_such(request, desk, line):
    own = make_machine(request, sshd_options=[line] + SERVER)
    end = desk.launch(own, "callback", "--relay")
    code, errors = end.wait()
    assert code == 255
    assert "the login ran, but no relay: a start-up file or the server runs something else (" in errors
    assert "the kernel" not in errors


@pytest.fixture
def start_up(machine):
    """Gives john start-up files for the time of a test."""
    names = []

    def write(text, name=".bashrc"):
        names.append(machine.write("home/" + name, text + "\n"))

    yield write
    for name in names:
        os.unlink(name)


SLOW = "touch ~/slow; while [ -e ~/slow ]; do sleep 0.05; done"


@pytest.mark.parametrize(
    "argument, how", [("--relay", "gives up"), ("--via=nice", "gives up"), ("--relay", "loses its client")]
)
def test_a_launch_that_fails_during_a_slow_login_starts_no_kernel_afterwards(
    desk, machine, start_up, argument, how
):
    desk.alter(RELAY_SECONDS=0.5 if how == "gives up" else 60)
    start_up(SLOW)
    before, flag = machine.kernel_starts(), machine.path("home", "slow")
    end = desk.launch(machine, "callback", argument)
    rig.wait_until(lambda: os.path.exists(flag), 15, "the login")
    try:
        if how == "loses its client":
            logged(desk, "Sending command: ")
            time.sleep(0.2)  # for what has been sent to get there
            kill_client(desk, machine)
        code, errors = end.wait(20)
        assert code != 0 and errors.count("\n") == 1
        assert machine.sessions(), "the login still is at its start-up file"
    finally:
        os.unlink(flag)
    rig.wait_until(lambda: not machine.sessions(), 15, "the end of the login")
    assert machine.kernel_starts() == before
    forget(desk)  # whether the goodbye has got there is not known here


@pytest.mark.parametrize(
    "client, text, words",
    [
        ("ssh", "exec zsh", "runs another shell"),
        ("ssh", "read -r word", "reads standard input"),
        ("plink", "read -r word", "reads standard input"),
        ("ssh", "exec >/dev/null 2>&1", "closes standard output, or redirects it"),
        ("ssh", "exec >~/all 2>&1", "closes standard output, or redirects it"),
        ("ssh", "head -c 1100000 /dev/zero | tr '\\0' x", "the login prints without end"),
    ],
)
def test_a_start_up_file_that_is_in_the_way_is_named(desk, machine, start_up, client, text, words):
    start_up("", ".zshrc")
    start_up(text)
    before = machine.kernel_starts()
    end = desk.launch(machine, "callback", "--relay", client=client)
    code, errors = end.wait(20)
    assert code == 255 and words in errors and errors.count("\n") == 1
    log = desk.logs()[0]
    for wrong in ("Traceback", "not found", "Killed by"):
        assert wrong not in log
    rig.wait_until(lambda: not machine.sessions(), 15, "the end of the login")
    assert machine.kernel_starts() == before or "without end" in words, "that login may have begun to listen again"
    forget(desk)


@pytest.mark.parametrize(
    "constant, words",
    [
        ("DEAD_SECONDS", "closes standard output, or redirects it"),
        ("RELAY_SECONDS", "the login ran, but no relay"),
    ],
    ids=["the relay hears nothing", "the launcher gives up"],
)
def test_what_the_relay_says_that_leads_nowhere_ends_the_kernel(desk, machine, start_up, constant, words):
    desk.alter(**{constant: 1.5})
    start_up("exec > >(cat >/dev/null)")
    before = machine.kernel_starts()
    end = desk.launch(machine, "callback", "--relay")
    code, errors = end.wait(20)
    assert machine.kernel_starts() == before + 1
    assert code == 255 and words in errors and errors.count("\n") == 1
    assert "Killed by" not in errors
    rig.wait_until(lambda: not machine.sessions(), 15, "the end of kernel and relay")
    forget(desk)


def test_a_server_that_sends_back_what_it_is_sent_is_told_as_such(request, desk):
    own = make_machine(request, sshd_options=["ForceCommand cat"] + SERVER)
    desk.alter(RELAY_SECONDS=0.5)
    end = desk.launch(own, "callback", "--relay")
    code, errors = end.wait(20)
    assert code == 255 and "the server runs something else (which sends back what it is sent" in errors
    assert '"do"' not in desk.logs()[0] and "session" not in errors
    forget(desk)
    nothing_left(desk, own)


def test_what_a_login_prints_moves_no_cursor(request, desk):
    own = make_machine(request, sshd_options=["ForceCommand printf 'a\\033[2Jb\\tc\\n'"] + SERVER)
    code, errors = desk.launch(own, "callback", "--relay").wait(20)
    assert code == 255 and "(a\\x1b[2Jb c)" in errors
    nothing_left(desk, own)


def test_a_program_of_another_architecture_cannot_be_executed(desk, machine):
    path = machine.path("WolframKernel")
    with open(path, "wb") as stream:
        stream.write(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0\1\0\0\0" + bytes(40))
    os.chmod(path, 0o755)
    code, errors = desk.launch(machine, "callback", "--relay", kernel=path).wait(20)
    assert code == 126 and "cannot be executed" in errors


def test_a_refused_login_is_explained_as_without_a_relay(desk, machine):
    end = desk.launch(machine, "callback", "--relay", env={"TUNNEL_SSH": machine.make_keyless_ssh()})
    code, errors = end.wait(10)
    assert code == 255 and "refused the login" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "100000"])
def test_bad_minutes(desk, machine, value):
    end = desk.launch(machine, "callback", "--relay=" + value)
    code, errors = end.wait()
    assert code == 2 and "--relay" in errors and errors.count("\n") == 1
    assert not desk.logs()


@pytest.mark.parametrize("role", ["callback", "compute"])
def test_a_windows_kernel_machine_is_refused(desk, machine, role):
    path = "C:\\Program Files\\Wolfram Research\\Wolfram\\14.1\\WolframKernel.exe"
    code, errors = desk.launch(machine, role, "--relay", kernel=path).wait(10)
    assert code == 2 and "--relay" in errors and "Windows" in errors and errors.count("\n") == 1


# -- --check and --dry-run


def run(desk, machine, *arguments, client="ssh", script="tunnel.py"):
    argv = [sys.executable, str(desk.folder / script)] + list(arguments)
    return rig.run(*argv, env=dict(os.environ, **desk.environment(machine, client)))


@pytest.mark.parametrize("client, script", [("ssh", "tunnel.py"), ("plink", "tunnel_sub.py")])
def test_check_cuts_its_connection_once_and_shows_that_it_is_back(desk, machine, client, script):
    words = ("--check", "--relay", machine.destination, machine.modern)
    done = run(desk, machine, *words, client=client, script=script)
    assert (done.returncode, done.stderr) == (0, "")
    steps = [re.match(r" +\d+\.\d\d s  ok  ([a-z ]+): (\S.*)", line).groups() for line in done.stdout.splitlines()]
    names = [name for name, _ in steps]
    order = ["client", "name", "host key", "login", "relay", "kernel", "data channel", "message channel"]
    assert names[:8] == order
    assert re.match(r"Python 3\.\d+\.\d+, process \d+ on ", dict(reversed(steps))["relay"])
    assert steps[-1] == ("relay", "the connection was cut, and is back")


def test_check_with_a_kernel_that_never_calls_back(desk, machine):
    desk.alter(CALLBACK_SECONDS=1)
    kernel = machine.install_kernel("silent/10.1/MathKernel", "silent")
    done = run(desk, machine, "--check", "--relay", machine.destination, kernel)
    assert done.returncode == 255
    assert "has not called back within 1 s" in done.stderr


@pytest.mark.parametrize("option", ["--relay", "--via=srun", "--dry-run"])
def test_without_its_file_beside_the_launcher(desk, machine, option):
    shutil.rmtree(str(desk.folder / "tunnel_lib"))
    end = desk.launch(machine, "callback", option, "--relay")
    code, errors = end.wait()
    assert code == 70
    assert "need the folder tunnel_lib beside tunnel.py" in errors or option == "--dry-run"
    assert errors.endswith("; run install.py again\n") and errors.count("\n") == 1


def test_dry_run_prints_the_command_line_and_what_would_be_sent(desk, machine):
    words = ("--dry-run", "--relay", "john:secret@there", machine.modern, "1234@127.0.0.1,1235@127.0.0.1")
    for client in ("ssh", "plink"):
        done = run(desk, machine, *words, client=client)
        assert (done.returncode, done.stderr) == (0, "")
        assert "exec /bin/sh -c " in done.stdout and "secret" not in done.stdout
        assert not re.search("(?m)^-[RL] | -[RL] ", done.stdout)
        assert re.search(r"sent over standard input: \d{4,5} bytes", done.stdout)
        assert "WolframKernel" in done.stdout
    assert not machine.attempts() or not desk.logs()


# -- --share


@pytest.fixture
def sharing(desk):
    desk.alter(SHARE_SECONDS=0.7)
    return desk


def shared(desk, machine, **options):
    return desk.launch(machine, "compute", "--share", "--relay", **options)


def stands(end, seconds=20):
    assert end.wait(seconds) == (0, "")
    end.accept()
    return end


def test_sixteen_kernels_take_one_login_and_one_process(sharing, machine):
    desk = sharing
    before = machine.logins()
    ends = [stands(shared(desk, machine)) for _ in range(16)]
    for end in ends:
        end.echo()
    assert machine.logins() == before + 1
    assert len(launchers(desk)) == len(ssh_clients(desk)) == len(keepers(machine)) == 1
    assert len(machine.kernels()) == 16
    # One kernel's flood that nobody reads, and another's end, disturb no other; nor does a lost connection.
    ends[0].tell(b"!flood 3000000\n")
    ends[1].tell(b"!quit 0\n")
    for end in ends[2:]:
        end.echo(100000)
    bulks = [Bulk(end, 500000) for end in ends[2:6]]
    kill_client(desk, machine)
    came_back(desk)
    for bulk in bulks:
        bulk.finish()
    for end in ends[2:]:
        end.echo()
    ends[0].expect_flood(3000000)
    assert machine.logins() == before + 2
    rig.wait_until(lambda: len(machine.kernels()) == 14, 5)
    logs = desk.logs()
    assert sum("the connection is back after" in log for log in logs) >= 14
    for end in ends:
        end.quit()
    desk.no_process(10)


def test_a_wrong_path_is_that_launchs_error_and_stands_in_its_log(sharing, machine):
    desk = sharing
    first = stands(shared(desk, machine))
    early = machine.install_kernel("early/10.1/MathKernel", "early", "boot=0.5")
    code, errors = shared(desk, machine, kernel=machine.path("no/10.1/MathKernel")).wait(10)
    assert code == 127 and "there is no kernel" in errors
    assert shared(desk, machine, kernel=early).wait(10) == (0, "")
    logged(desk, "ended before it called back")
    first.echo()
    logs = {re.search(r"(\w+)/10\.1/", log).group(1): log for log in desk.logs()}
    assert "there is no kernel" in logs["no"] and "ended before it called back" in logs["early"]
    third = shared(desk, machine)
    code, errors = third.wait(10)
    assert code == 0 and "an earlier launch" in errors
    third.accept()
    first.echo()
    assert machine.kernels()


def test_launches_at_the_same_moment_make_one_hub(sharing, machine):
    desk = sharing
    before = machine.logins()
    ends = [shared(desk, machine) for _ in range(6)]
    for end in ends:
        stands(end, 30).echo()
    assert machine.logins() == before + 1
    assert len(launchers(desk)) == 1


def test_a_hub_without_a_descriptor_left_says_so_to_a_further_launch(sharing, machine):
    desk = sharing
    first = stands(shared(desk, machine))
    (hub,) = launchers(desk)
    limits = resource.prlimit(hub, resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/{}/fd".format(hub))))
    free = min(set(range(1000)) - taken)
    resource.prlimit(hub, resource.RLIMIT_NOFILE, (free, limits[1]))
    code, errors = shared(desk, machine).wait(10)
    assert code == 69 and "has as many files open as it may" in errors
    resource.prlimit(hub, resource.RLIMIT_NOFILE, limits)
    stands(shared(desk, machine))
    first.echo()


def test_a_hub_that_is_killed_is_followed_by_another(sharing, machine):
    desk = sharing
    first, second = (stands(shared(desk, machine)) for _ in range(2))
    (hub,) = launchers(desk)
    rig.end_process(hub)
    third = stands(shared(desk, machine))
    third.echo()
    rig.wait_until(lambda: len(machine.kernels()) == 1, 10, "the end of the first hub's kernels")
    assert hub not in launchers(desk) and len(launchers(desk)) == 1
    assert first.channels and second.channels
    third.tell(b"!quit 0\n")
    desk.no_process(10)
    forget(desk)


def test_a_hub_that_does_not_answer_is_passed_over(sharing, machine):
    desk = sharing
    desk.alter(CONNECT_SECONDS=2)
    first = stands(shared(desk, machine))
    (hub,) = launchers(desk)
    os.kill(hub, signal.SIGSTOP)
    second = stands(shared(desk, machine))
    os.kill(hub, signal.SIGCONT)
    for end in (first, second):
        end.echo()
    rig.wait_until(lambda: len(machine.kernels()) == 2, 10, "the end of what the hub has started late")


def test_a_hub_ends_after_its_last_kernel_and_another_can_follow(sharing, machine):
    desk = sharing
    for _ in range(2):
        end = stands(shared(desk, machine, client="plink"))
        end.echo()
        end.tell(b"!quit 3\n")
        desk.no_process(10)
        rig.wait_until(lambda: not machine.sessions(), 5)
    assert all("with exit code 3" in log for log in desk.logs())


def test_launches_while_a_hub_ends_are_served(sharing, machine):
    """One after the other, at all moments of the end of the hub before."""
    desk = sharing
    desk.alter(SHARE_SECONDS=0.05)
    for number in range(8):
        end = stands(shared(desk, machine))
        end.tell(b"!quit 0\n")
        end.busy(0.03 * number)
    desk.no_process(10)


def test_a_hub_whose_login_fails_tells_all_that_wait(sharing, machine):
    desk = sharing
    wrapper = machine.make_keyless_ssh()
    ends = [shared(desk, machine, env={"TUNNEL_SSH": wrapper}) for _ in range(3)]
    for end in ends:
        code, errors = end.wait(20)
        assert code == 255 and "refused the login" in errors
    for log in desk.logs():
        assert "refused the login" in log.splitlines()[-1]


def test_a_hub_that_loses_its_relay_ends_and_says_so_in_each_log(sharing, machine):
    desk = sharing
    ends = [stands(shared(desk, machine)) for _ in range(3)]
    for pid in keepers(machine):
        rig.end_process(pid)
    desk.no_process(10)
    assert ends
    assert all("the relay on " in log and "is gone" in log for log in desk.logs())
    stands(shared(desk, machine)).echo()


def test_a_controller_does_not_share(desk, machine):
    end = desk.launch(machine, "callback", "--share", "--relay")
    end.accept()
    assert end.launcher.poll() is None
    end.echo()
    quits(end)


def test_a_launch_waits_for_a_lost_connection_but_not_for_ever(sharing, machine):
    desk = sharing
    desk.alter(RELAY_SECONDS=4, **QUICK)
    first = stands(shared(desk, machine))
    cut(machine)
    logged(desk, "the connection is lost: ")
    second = shared(desk, machine)
    code, errors = second.wait(15)
    assert code == 255
    assert ": the connection of those before it is lost, and has not come back" in errors
    (log,) = [log for log in desk.logs() if second.link in log]
    assert log.splitlines()[-1].partition(" ")[2] == errors.strip().partition(": ")[2]
    mend(machine)
    came_back(desk)
    first.echo()
    rig.wait_until(lambda: len(machine.kernels()) == 1, 10, "the end of what has been started late")


def test_kernels_started_while_the_connection_is_lost_come_up_with_it(sharing, machine):
    desk = sharing
    desk.alter(**QUICK)
    first = stands(shared(desk, machine))
    cut(machine)
    logged(desk, "the connection is lost: ")
    late = shared(desk, machine)
    with pytest.raises(subprocess.TimeoutExpired):
        late.launcher.wait(0.5)
    mend(machine)
    stands(late).echo()
    first.echo()


def test_the_relay_is_found_beside_the_launcher(desk, machine):
    """Though the script's folder is none in which modules are looked for."""
    environ = dict(os.environ, PYTHONSAFEPATH="1", TUNNEL_SSH=machine.client("ssh"))
    argv = [
        sys.executable,
        "-I",
        str(desk.folder / "tunnel.py"),
        "--dry-run",
        "--relay",
        "host",
        "/k/math",
        "1@h,2@h",
    ]
    done = rig.run(*argv, env=environ)
    assert (done.returncode, done.stderr) == (0, "")
