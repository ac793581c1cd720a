"""Kernels that a relay starts, alone or through a command: what they get, what they print, how they end."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import rig
from rig import far, product
from rig.far import over
from rig.logins import PYENV, Launcher, Machine

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked at in /proc")
machine = far.machine


@pytest.mark.parametrize("role", ["callback", "classic", "compute"])
def test_a_kernel_gets_all_its_channels_and_its_exit_code_comes_back(machine, role):
    path = machine.kernel(*(["classic"] if role == "classic" else []))
    with Launcher(machine) as launcher:
        front_end, kernel = launcher.launch(path, role)
        with front_end:
            front_end.echo(300000)
            front_end.tell(b"!quit 7\n")
            launcher.wait(lambda: kernel.code is not None, "the kernel's end")
        assert kernel.code == kernel.exit == 7 and kernel.started and launcher.lost == []
        launcher.wait(lambda: launcher.over, "the session's end")
        machine.no_process()
        assert launcher.over == ("the session is over", None)


PYTHONS = [os.path.join(PYENV, version, "bin", "python3") for version in ("3.6.15", "3.13.0")]


@pytest.mark.parametrize("python", [path for path in PYTHONS if os.path.exists(path)])
def test_oldest_and_newest_python_over_there(python):
    with Machine(python=python) as machine, Launcher(machine, cable=True) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "callback")
        with front_end:
            launcher.cut()
            front_end.echo(100000)
            assert launcher.facts["python"] in python and launcher.attached == 2
            over(launcher, machine)


@pytest.mark.parametrize("code", ["0", "3", "255"])
def test_exit_codes_come_back(machine, code):
    with Launcher(machine) as launcher:
        kernel = launcher.start(machine.script("exit {}\n".format(code), python=False))
        launcher.wait(lambda: launcher.over, "the end")
        assert str(kernel.code) == code


def test_a_kernel_ended_by_a_signal_is_told_as_a_shell_does(machine):
    with Launcher(machine) as launcher:
        kernel = launcher.start(machine.script("kill -9 $$\n", python=False))
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 128 + 9


def test_a_path_that_cannot_be_run_is_told_as_a_shell_does(machine):
    plain = machine.write("plain", "text", 0o644)
    with Launcher(machine) as launcher:
        launcher.call(lambda: launcher.near.linger(60))
        for path, code, text in (
            ("/no/such/kernel", 127, "/no/such/kernel: No such file or directory"),
            ("no-such-kernel", 127, "no-such-kernel: No such file"),
            (plain, 126, "{}: Permission denied".format(plain)),
            (machine.folder, 126, "Permission denied"),
        ):
            kernel = launcher.start(path, listen=2)
            launcher.wait(lambda kernel=kernel: kernel.code is not None, "the verdict")
            assert (kernel.code, kernel.started) == (code, False) and text in kernel.text
        over(launcher, machine)


@pytest.mark.parametrize(
    "start", [b"\x7fELF\x02\x01\x01\0", b"\xcf\xfa\xed\xfe\x0c\0\0\1", b"\xca\xfe\xba\xbe\0\0\0\2"]
)
def test_a_program_of_another_machine_is_not_taken_for_a_script(machine, start):
    path = machine.write("bin/other", "", 0o755)
    with open(path, "wb") as stream:
        stream.write(start + bytes(100))
    with Launcher(machine) as launcher:
        launcher.call(lambda: launcher.near.linger(60))
        for name in (path, "other"):
            kernel = launcher.start(name)
            launcher.wait(lambda kernel=kernel: kernel.code is not None, "the verdict")
            assert kernel.code == 126 and "other: Exec format error" in kernel.text
        over(launcher, machine)


def test_a_leading_home_is_resolved_and_nothing_else_is_expanded(machine):
    machine.script("exit 5\n", python=False)
    odd = machine.write("odd $HOME `x` {0} \"'", "#!/bin/sh\nexit 6\n", 0o755)
    with Launcher(machine) as launcher:
        launcher.call(lambda: launcher.near.linger(60))
        kernels = [launcher.start(path, listen=2) for path in ("~/script-1", "$HOME/script-1", odd)]
        launcher.wait(lambda: all(kernel.code is not None for kernel in kernels), "the ends")
        assert [kernel.code for kernel in kernels] == [5, 5, 6]
        over(launcher, machine)


def test_a_script_without_an_interpreter_line_runs_as_in_a_shell(machine):
    path = machine.write("bare", "exit 9\n", 0o755)
    with Launcher(machine) as launcher:
        kernel = launcher.start(path)
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 9


LOOK = """
import os, resource, signal, sys
names = ("SIGPIPE", "SIGHUP", "SIGTERM", "SIGCHLD")
changed = [name for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_DFL]
print(os.isatty(0), os.isatty(1), os.isatty(2), os.getsid(0) == os.getpid(), os.getpgrp() == os.tcgetpgrp(0))
print(set(changed) <= {"SIGPIPE"})  # which Python changes itself
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], sorted(int(fd) for fd in os.listdir("/proc/self/fd")))
print(os.getcwd(), os.environ["HOME"])
"""


def test_a_kernel_has_a_terminal_and_nothing_of_its_keeper(machine):
    with Launcher(machine) as launcher:
        kernel = launcher.start(machine.script(LOOK))
        plain = launcher.start(machine.script("grep SigIgn /proc/self/status\n", python=False))
        launcher.wait(lambda: launcher.over, "the end")
        assert plain.text.split() == ["SigIgn:", "0" * 16]
        words = kernel.text.split()
        assert words[:6] == ["True"] * 6, kernel.text
        assert words[7:11] == ["[0,", "1,", "2,", "3]"], "descriptor 3 is listdir's own"
        assert words[11:] == [machine.folder, machine.folder]


def test_its_limit_on_open_files_is_that_of_the_login(machine):
    command = "ulimit -S -n 40; " + product.bootstrap_command()
    with Launcher(machine, command=command) as launcher:
        kernel = launcher.start(machine.script(LOOK))
        others = [launcher.start(machine.script("sleep 60\n", python=False), listen=6) for _ in range(8)]
        launcher.wait(lambda: all(other.started for other in others), "many more than 40 files")
        launcher.wait(lambda: kernel.code is not None, "what it has printed")
        assert "\n40 [" in kernel.text
        over(launcher, machine)


PRINTING = """
import sys
for number in range(40000):
    print("line %d of a kernel that prints and prints" % number)
print("last words")
sys.exit(4)
"""


def test_what_a_kernel_prints_is_bounded_but_its_last_words_come(machine):
    with Launcher(machine) as launcher:
        kernel = launcher.start(machine.script(PRINTING))
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 4
        assert kernel.text.startswith("line 0 of") and kernel.text.endswith("last words\n")
        assert "bytes are left out" in kernel.text and len(kernel.text) < 300000


@pytest.mark.skipif(os.getuid() != 0, reason="another user is needed")
def test_other_users_are_turned_away_from_the_listeners(machine):
    with Launcher(machine) as launcher:
        kernel = launcher.start(machine.script("import time\ntime.sleep(60)\n"), listen=6)
        launcher.wait(lambda: len(kernel.ports) == 6 and kernel.started, "the ports")
        code = (
            "import encodings.idna, os, socket, sys; os.setuid(65534)\n"
            "s = socket.create_connection(('127.0.0.1', {})); s.settimeout(10); sys.exit(len(s.recv(1)))"
        )
        done = subprocess.run([sys.executable, "-c", code.format(kernel.ports[0])], timeout=20)
        assert done.returncode == 0
        launcher.wait(lambda: "of another user (number 65534) was turned away" in kernel.text, "the word of it")
        over(launcher, machine)


def test_it_listens_on_the_loopback_only_and_leaves_four_ports_to_the_kernel(machine):
    before = rig.exposed_ports()
    with Launcher(machine) as launcher:
        kernel = launcher.start(machine.script("import time\ntime.sleep(60)\n"), listen=6)
        launcher.wait(lambda: kernel.started, "the kernel")
        base = kernel.ports[0]
        assert kernel.ports == [base, base + 1, base + 6, base + 7, base + 8, base + 9] and base >= 10000
        assert set(kernel.ports) <= set(rig.listening_ports()) and not rig.exposed_ports() - before
        over(launcher, machine)


def test_a_block_is_passed_over_when_a_port_of_the_kernels_is_taken(monkeypatch):
    with socket.socket() as taken:
        while True:
            base = product.draw_block()
            try:
                taken.bind(("127.0.0.1", base + 4))
                break
            except OSError:
                pass
        taken.listen(1)
        blocks = [base, base + 20]
        monkeypatch.setattr(product, "draw_block", lambda: blocks.pop(0))
        listeners = product.listen_in_block(2)
        assert [each.getsockname()[1] for each in listeners] == [base + 20, base + 21]
        for each in listeners:
            each.close()
        monkeypatch.setattr(product, "draw_block", lambda: base)
        with pytest.raises(OSError, match="no block of ports is free"):
            product.listen_in_block(2)


# -- many

FLOOD = """
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while True:
    s.sendall(bytes(1 << 20))
    print("x" * 10000)
"""


def test_one_kernels_flood_or_end_disturbs_no_other(machine):
    with socket.socket() as listener, Launcher(machine, cable=True) as launcher:
        launcher.call(lambda: launcher.near.linger(60))
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        link = "{0}@127.0.0.1,{0}@127.0.0.1".format(listener.getsockname()[1])
        path = machine.kernel()
        flood = launcher.start(machine.script(FLOOD), link, listen=2, words=["{0}"])
        launcher.wait(lambda: len(flood.text) > 200000 or (flood.ends and flood.ends[0].pending), "the flood")
        launched = [launcher.launch(path, "compute") for _ in range(8)]
        try:
            for front_end, _ in launched:
                front_end.echo(100000)
            for number, (front_end, _) in enumerate(launched[:4]):
                front_end.tell("!quit {}\n".format(number).encode())
            launcher.wait(lambda: all(kernel.code is not None for _, kernel in launched[:4]), "four ends")
            assert [kernel.code for _, kernel in launched[:4]] == [0, 1, 2, 3]
            launcher.cut()
            for front_end, _ in launched[4:]:
                front_end.echo(100000)
            assert launcher.attached == 2 and len(machine.keepers()) == 1
            launcher.call(lambda: launcher.near.hang_up(flood.number))
            launcher.wait(lambda: flood.exit is not None, "the flood's end")
            launched[4][0].echo(1000)
        finally:
            for front_end, _ in launched:
                front_end.quit()
                front_end.close_listeners()
        over(launcher, machine)


# -- through a command


@pytest.mark.parametrize("python", [path for path in PYTHONS if os.path.exists(path)])
def test_oldest_and_newest_python_beyond_a_command(python):
    with Machine(python=python) as machine, Launcher(machine, cable=True) as launcher:
        command = "PATH={}:$PATH nice".format(machine.path("bin"))
        front_end, kernel = launcher.launch(machine.kernel(), "callback", via=command)
        with front_end:
            launcher.cut()
            front_end.echo(100000)
            assert kernel.told["node"][0]["python"] in python
            front_end.tell(b"!quit 7\n")
            launcher.wait(lambda: kernel.code == 7, "the kernel's end")
            assert "failed" not in kernel.told
            launcher.wait(lambda: launcher.over, "the session's end")
            machine.no_process()


def test_a_kernel_that_cannot_be_started_beyond_a_command(machine):
    with Launcher(machine) as launcher:
        kernel = launcher.start("/no/such/kernel", via="nice")
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 127 and "No such file" in kernel.text and "failed" not in kernel.told


def test_a_command_that_prints_very_much_on_standard_error(machine):
    with Launcher(machine) as launcher:
        command = "seq 200000 >&2; echo the last words >&2; exit 3;"
        kernel = launcher.start("/no/such/kernel", via=command)
        launcher.wait(lambda: launcher.over, "the end")
        said = [message["text"] for message in kernel.told["said"]]
        assert said[0] == "1" and said[-1] == "the last words" and len(said) < 100000
        assert kernel.told["failed"][0]["code"] == 3 and kernel.code == 255


def test_a_command_that_sigterm_does_not_end_is_killed(monkeypatch, machine):
    product.alter_sent(monkeypatch, COMMAND_SECONDS=0.5)
    with Launcher(machine) as launcher:
        kernel = launcher.start("/no/such/kernel", via="trap '' TERM; sleep 600; sleep 600;")
        launcher.wait(lambda: "via" in kernel.told, "the command")
        time.sleep(0.3)
        launcher.call(launcher.near.hang_up, kernel.number)
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 129 and "failed" not in kernel.told
        machine.no_process()


# -- ends

LAST = """
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
s.sendall(b"y" * (6 << 20))
print("done", flush=True)
sys.exit(11)
"""


@pytest.mark.parametrize("cut", [False, True])
def test_6_mb_of_a_kernel_that_exits_at_once_arrive_before_its_exit_code(machine, cut):
    with socket.socket() as listener, Launcher(machine, cable=True, small_buffers=True) as launcher:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(15)
        link = "{0}@127.0.0.1,{0}@127.0.0.1".format(listener.getsockname()[1])
        kernel = launcher.start(machine.script(LAST), link, listen=2, words=["{0}"])
        connection, _ = listener.accept()
        connection.settimeout(15)

        def read(most):
            count = 0
            while count < most:
                data = connection.recv(65536)
                if not data:
                    break
                count += len(data)
            return count

        count = read(3 << 20)
        if cut:
            launcher.cut()
        count += read((6 << 20) - 400000 - count)
        launcher.wait(lambda: launcher.near.finished, "the word that the session is over")
        assert kernel.exit == 11 and kernel.code is None and launcher.over is None, "nobody has read its data yet"
        assert count + read(6 << 20) == 6 << 20
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 11
        connection.close()


def test_a_child_that_holds_the_kernels_links_open_does_not_hold_up_its_end(machine):
    text = (
        "import os, signal, socket, sys, time\n"
        's = socket.create_connection(("127.0.0.1", int(sys.argv[1])))\n'
        "s.sendall(b'x')\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n"
        "    time.sleep(30)\n"
        "os._exit(3)\n"
    )
    with socket.socket() as listener, Launcher(machine) as launcher:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        link = "{0}@127.0.0.1,{0}@127.0.0.1".format(listener.getsockname()[1])
        kernel = launcher.start(machine.script(text), link, listen=2, words=["{0}"])
        launcher.wait(lambda: kernel.code is not None, "the kernel's end", 8)
        assert kernel.code == 3
        launcher.wait(lambda: launcher.over, "the session's end")


def test_a_computing_kernel_is_hung_up_on(machine):
    with Launcher(machine) as launcher:
        front_end, kernel = launcher.launch(machine.kernel("computing"), "compute")
        with front_end:
            start = time.monotonic()
            launcher.call(lambda: launcher.near.hang_up(1))
            launcher.wait(lambda: launcher.over, "the end")
            assert kernel.code == 128 + signal.SIGHUP and time.monotonic() - start < 4
            machine.no_process()


STUBBORN = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    time.sleep(60)
print("up", flush=True)
time.sleep(60)
"""


def test_a_kernel_that_ignores_it_is_killed_after_5_s_with_its_group(machine):
    with Launcher(machine) as launcher:
        kernel = launcher.start(machine.script(STUBBORN))
        launcher.wait(lambda: "up" in kernel.text, "the kernel")
        start = time.monotonic()
        launcher.call(lambda: launcher.near.hang_up(1))
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 128 + signal.SIGKILL and 4.5 < time.monotonic() - start < 8
        machine.no_process()
