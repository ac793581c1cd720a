"""The relay's far end with real processes: logins, keepers and kernels, over connections that are cut."""

import hashlib
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
import rig
from rig import far, product
from rig.far import over, waiting_kernel
from rig.logins import PYENV, Launcher, Machine, is_keeper

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked at in /proc")
machine = far.machine


# -- kernels


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


BULK = """
import hashlib, socket, sys, threading
count = int(sys.argv[2])
def block(number):
    return hashlib.sha256(b"%d" % number).digest() * 2048
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def send():
    for number in range(count):
        s.sendall(block(number))
    s.shutdown(1)
thread = threading.Thread(target=send)
thread.start()
got, expected = hashlib.sha256(), hashlib.sha256()
while True:
    data = s.recv(1 << 18)
    if not data:
        break
    got.update(data)
for number in range(count, 2 * count):
    expected.update(block(number))
thread.join()
sys.exit(0 if got.digest() == expected.digest() else 9)
"""


class Bulk:
    """A transfer both ways at once between a kernel and this front end, with sums compared."""

    def __init__(self, launcher, machine, blocks):
        self.count, self.received, self.right, self.failure = blocks, 0, None, None
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(15)
        port = listener.getsockname()[1]
        link = "{0}@127.0.0.1,{0}@127.0.0.1".format(port)
        self.kernel = launcher.start(machine.script(BULK), link, listen=2, words=["{0}", str(blocks)])
        self.socket = listener.accept()[0]
        self.socket.settimeout(30)
        listener.close()
        self.threads = [threading.Thread(target=self._guard, args=(act,)) for act in (self._send, self._receive)]
        for thread in self.threads:
            thread.start()

    @staticmethod
    def block(number):
        return hashlib.sha256(b"%d" % number).digest() * 2048

    def _guard(self, act):
        try:
            act()
        except OSError as error:
            self.failure = error

    def _send(self):
        for number in range(self.count, 2 * self.count):
            self.socket.sendall(self.block(number))
        self.socket.shutdown(socket.SHUT_WR)

    def _receive(self):
        got, expected = hashlib.sha256(), hashlib.sha256()
        while True:
            data = self.socket.recv(1 << 18)
            if not data:
                break
            self.received += len(data)
            got.update(data)
        for number in range(self.count):
            expected.update(self.block(number))
        self.right = got.digest() == expected.digest()

    @property
    def running(self):
        return any(thread.is_alive() for thread in self.threads)

    def finish(self, launcher):
        for thread in self.threads:
            thread.join(60)
        assert self.right and not self.failure, (self.failure, self.received, launcher.lost)
        launcher.wait(lambda: self.kernel.code is not None, "the kernel's end")
        assert self.kernel.code == 0, "the kernel has received the same sum"
        self.socket.close()


def test_bulk_data_both_ways_survives_cuts_and_kills(machine):
    with Launcher(machine, cable=True) as launcher:
        bulk = Bulk(launcher, machine, 1200)  # so much that it is not over while this machine is busy
        total = 1200 * 65536
        for part in (1, 2, 3, 4):
            launcher.wait(lambda part=part: bulk.received > total * part // 6, "data")
            if part % 2:
                launcher.cut()
            else:
                os.killpg(launcher.connection.login.process.pid, signal.SIGKILL)
            launcher.wait(lambda part=part: launcher.attached > part, "the return")
        assert bulk.received < total
        bulk.finish(launcher)
        launcher.wait(lambda: launcher.over, "the end")
        machine.no_process()
        assert launcher.attached == 5 and len(launcher.lost) == 4


def test_a_hundred_cuts_at_random(machine):
    draw = random.Random(7)
    with Launcher(machine, cable=True) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "callback")
        with front_end:
            stop, failures = [], []

            def talk():
                try:
                    while not stop:
                        front_end.echo(draw.choice((10, 50000, 2000000)))
                except BaseException as error:
                    failures.append(error)

            thread = threading.Thread(target=talk)
            thread.start()
            for number in range(100):
                size = int(10 ** draw.uniform(0, 6.5))
                launcher.wait(lambda size=size: launcher.moved >= size, "traffic")
                launcher.cut()
                launcher.wait(lambda number=number: len(launcher.lost) > number, "the loss")
            stop.append(True)
            thread.join(60)
            assert not failures and not thread.is_alive(), (failures, launcher.lost[-5:])
            assert len(launcher.lost) == 100 and len(machine.keepers()) == 1
            over(launcher, machine)


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


# -- ends


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


def test_with_0_minutes_a_lost_connection_ends_the_kernel_at_once(machine):
    with Launcher(machine, cable=True, reconnect=False, minutes=0) as launcher:
        waiting_kernel(launcher, machine)
        launcher.cut()
        machine.no_process(5)


def test_after_its_minutes_a_lost_session_ends(machine):
    with Launcher(machine, cable=True, reconnect=False, minutes=0.03) as launcher:
        waiting_kernel(launcher, machine)
        start = time.monotonic()
        launcher.cut()
        machine.no_process(8)
        assert time.monotonic() - start > 1.5


def test_a_session_that_was_never_used_ends_after_a_minute(machine, monkeypatch):
    monkeypatch.setattr(product, "FIRST_SECONDS", 0.4)
    here, there = socket.socketpair()
    keeper = product.Keeper(product.PollLoop(), there, os.urandom(16).hex())
    try:
        end = time.monotonic() + 5
        while not keeper.done:
            assert time.monotonic() < end
            keeper.loop.step()
        assert keeper.path and os.path.exists(keeper.path)
    finally:
        keeper.close()
        here.close()
    assert not os.path.exists(keeper.path)


def test_a_keeper_serves_only_who_knows_the_secret():
    here, there = socket.socketpair()
    loop = product.PollLoop()
    secret = os.urandom(16).hex()
    keeper = product.Keeper(loop, there, secret)
    try:
        here.setblocking(False)
        for said in (b'{"session": "cd", "end": true}\n', b'{"end": true}\n'):
            with product.connect_to(product.session_name(secret)) as guest:
                guest.sendall(said)
                loop.after(5, lambda: pytest.fail("no answer"))
                guest.setblocking(False)
                while True:
                    loop.step()
                    try:
                        answer = guest.recv(10)
                        break
                    except BlockingIOError:
                        pass
                assert answer == bytes([product.NO_SESSION]) and not keeper.far.over
    finally:
        keeper.close()
        here.close()


def test_a_keeper_that_was_killed_is_told_with_what_to_do(machine):
    with Launcher(machine, cable=True) as launcher:
        waiting_kernel(launcher, machine)
        (keeper,) = machine.keepers()
        os.kill(keeper, signal.SIGKILL)
        launcher.wait(lambda: launcher.over, "the verdict")
        text, error = launcher.over
        assert error == product.GONE and "KillUserProcesses=no" in text and "KillExcludeUsers" in text
        assert "is gone" in text and socket.gethostname() in text and "\n" not in text
        machine.no_process(3)  # the kernel was hung up on with its terminal
        remains = [name for name in machine.names if os.path.exists(name)]
        for name in remains:  # what a killed keeper leaves is removed by the next
            os.rename(name, name)
        with Launcher(machine) as other:
            kernel = other.start(machine.script("exit 0\n", python=False))
            other.wait(lambda: kernel.code == 0, "another launch")
        assert not [name for name in machine.names if os.path.exists(name)]


def test_coming_back_to_another_machine_names_both(machine):
    with Launcher(machine, cable=True, reconnect=False) as launcher:
        waiting_kernel(launcher, machine)
        (keeper,) = machine.keepers()
        os.kill(keeper, signal.SIGKILL)
        launcher.wait(lambda: launcher.lost, "the loss")
        launcher.near.host = "login-7"
        launcher.call(launcher.connect)
        launcher.wait(lambda: launcher.elsewhere, "the verdict")
        assert "login-7" in launcher.elsewhere and socket.gethostname() in launcher.elsewhere
        assert not launcher.over, "it may come to the right one yet"
    machine.names = [name for name in machine.names if not os.path.exists(name) or os.unlink(name)]


def test_sigterm_ends_a_keeper_and_its_kernels(machine):
    with Launcher(machine) as launcher:
        waiting_kernel(launcher, machine)
        (keeper,) = machine.keepers()
        os.kill(keeper, signal.SIGTERM)
        launcher.wait(lambda: launcher.over, "the end")
        assert "ended by SIGTERM" in launcher.notes
        machine.no_process()


def test_the_next_launch_ends_the_session_of_a_dead_launcher(machine):
    with Launcher(machine, cable=True, reconnect=False) as dead:
        waiting_kernel(dead, machine)
        dead.cut()
        dead.wait(lambda: dead.lost, "the loss")
        assert len(machine.keepers()) == 1
        with Launcher(machine, end=[dead.near.secret, "ff" * 16, 7]) as launcher:
            kernel = launcher.start(machine.script("exit 0\n", python=False))
            launcher.wait(lambda: kernel.code == 0, "the new kernel")
            machine.no_process()


LAUNCHER = """
import os, sys
sys.path.insert(0, {tests!r})
from rig import logins, product
machine = logins.Machine(folder={folder!r})
launcher = logins.Launcher(machine)
launcher.__enter__()
login = launcher.connection
leash, end = os.pipe()
watchdog = product.watchdog_command(login.process.pid)
if os.fork() == 0:
    os.setsid()
    os.dup2(leash, 0); os.dup2(login.stdin, 1)
    os.closerange(3, 256)
    os.execve(watchdog[0], watchdog, {{"PATH": "/usr/bin:/bin", "RELAY_RIG": machine.folder}})
os.close(leash)
os.write(end, launcher.near.farewell)
kernel = launcher.start(machine.script({script!r}))
launcher.wait(lambda: "up" in kernel.text, "the kernel")
print(launcher.near.secret, flush=True)
if {busy}:
    stream = launcher.call(lambda: launcher.near.open(1, "127.0.0.1", {port}))
    while True:
        launcher.call(lambda: stream.write(bytes(1 << 18)) if not stream.pending else None)
sys.stdin.read()
"""


@pytest.mark.parametrize("busy", [False, True])
def test_a_launcher_that_is_killed_takes_its_kernel_along_within_10_s(machine, busy):
    script = "import time\nprint('up', flush=True)\ntime.sleep(100)\n"
    with socket.socket() as target:
        target.bind(("127.0.0.1", 0))
        target.listen(1)
        text = LAUNCHER.format(
            tests=rig.TESTS,
            folder=machine.folder,
            script=script,
            busy=busy,
            port=target.getsockname()[1],
        )
        process = subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            secret = process.stdout.readline().strip()
            assert len(secret) == 32, process.stderr.read() if process.poll() is not None else secret
            if busy:
                connection, _ = target.accept()
                connection.recv(1000)
            assert machine.keepers()
            process.kill()
            process.wait()
            machine.no_process(10)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()


# -- connections


def test_a_new_connection_takes_over_from_one_that_the_server_still_believes_in(machine):
    with Launcher(machine, cable=True, reconnect=False) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "callback")
        with front_end:
            old = launcher.connection
            old.freeze()
            launcher.call(launcher.near.detach)
            launcher.connection = None
            launcher.call(launcher.connect)
            front_end.echo(100000)
            assert launcher.attached == 2
            old.login.process.wait(5)  # the keeper has let it go
            old.cut()
            old.close_near()
            over(launcher, machine)


def test_a_frozen_connection_is_noticed_and_replaced(machine, monkeypatch):
    monkeypatch.setattr(product, "DEAD_SECONDS", 1.5)
    monkeypatch.setattr(product, "PING_SECONDS", 0.4)
    with Launcher(machine, cable=True) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "compute")
        with front_end:
            launcher.connection.freeze()
            launcher.wait(lambda: launcher.attached == 2, "the return", 8)
            assert "nothing has come for" in launcher.lost[0]
            front_end.echo(100000)
            over(launcher, machine)


def test_an_idle_connection_stays(machine, monkeypatch):
    monkeypatch.setattr(product, "DEAD_SECONDS", 3)
    monkeypatch.setattr(product, "PING_SECONDS", 0.1)
    with Launcher(machine, cable=True) as launcher:
        launcher.start(machine.script("import time\ntime.sleep(60)\n"))
        launcher.wait(lambda: launcher.attached, "the hello")
        moved = launcher.moved
        launcher.wait(lambda: launcher.moved > moved + 600, "pings")
        assert not launcher.lost
        over(launcher, machine)


def test_a_kernel_that_ends_while_nobody_is_connected_is_told_on_the_return(machine):
    with Launcher(machine, cable=True, reconnect=False) as launcher:
        front_end, kernel = launcher.launch(machine.kernel(), "compute")
        with front_end:
            launcher.cut()
            launcher.wait(lambda: launcher.lost, "the loss")
            (pid,) = [pid for pid in machine.processes() if "-subkernel" in rig.command_line(pid)]
            os.kill(pid, signal.SIGKILL)
            launcher.call(launcher.connect)
            launcher.wait(lambda: launcher.over, "the end")
            assert kernel.code == 128 + 9
            machine.no_process()


# -- logins

SHELLS = ["/bin/sh", "/bin/bash", "/bin/dash", "/usr/bin/zsh", "/bin/csh", "/bin/tcsh", "/usr/bin/fish"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_starts_it(machine, shell):
    if not os.path.exists(shell):
        pytest.skip("no {} here".format(shell))
    with Launcher(machine, shell=shell) as launcher:
        kernel = launcher.start(machine.script("exit 5\n", python=False))
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 5 and launcher.noise == ""


@pytest.mark.parametrize("noise", ["Welcome to the cluster!\\n", "no newline at all", "\\n--tunnel-relay\\n\\n"])
def test_a_login_that_prints_is_no_obstacle(machine, noise):
    command = "printf '{}'; echo to stderr >&2; {}".format(noise, product.bootstrap_command())
    with Launcher(machine, command=command, cable=True) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "compute")
        with front_end:
            launcher.cut()
            front_end.echo()
            assert launcher.noise.strip().startswith(noise.replace("\\n", "\n").strip()[:20])
            over(launcher, machine)


def ends_with(machine, command, data, shell="/bin/sh"):
    """The exit code of a login that gets ``data``, and what it printed."""
    login = machine.login(command, shell)
    out, errors = login.process.communicate(data, timeout=20)
    return login.process.returncode, out, errors.decode("utf-8", "replace")


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/csh", "/usr/bin/fish"])
def test_without_python_it_ends_with_101(machine, shell):
    if not os.path.exists(shell):
        pytest.skip("no {} here".format(shell))
    command = product.bootstrap_command().replace(product.PYTHONS, "no-python /nor/this")
    code, out, _ = ends_with(machine, command, product.first_sent(), shell)
    assert (code, out) == (101, b"") and "no Python 3" in product.explain_start(code, "")


@pytest.mark.skipif(not os.path.exists(os.path.join(PYENV, "2.7.18")), reason="no Python that is too old")
def test_an_old_python_is_passed_over_and_told(machine):
    old = os.path.join(PYENV, "2.7.18", "bin", "python2.7")
    alone = product.bootstrap_command().replace(product.PYTHONS, old)
    code, _, _ = ends_with(machine, alone, product.first_sent())
    assert code == 102 and "older than 3.6" in product.explain_start(code, "")
    both = product.bootstrap_command().replace(product.PYTHONS, old + " /bin/false python3")
    with Launcher(machine, command=both) as launcher:
        kernel = launcher.start(machine.script("exit 5\n", python=False))
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 5


def test_a_source_that_is_cut_short_or_altered_is_told(machine):
    source = product.first_sent()
    for data, code in ((b"", 103), (source[:5], 103), (source[:-1], 103), (source, 104)):
        assert ends_with(machine, product.bootstrap_command(), data)[0] == code, len(data)
        assert product.explain_start(code, "")
    mangled = bytearray(source)
    mangled[len(source) // 2] ^= 1
    code, _, errors = ends_with(machine, product.bootstrap_command(), bytes(mangled))
    assert code == 106 and "zlib" in errors


@pytest.mark.parametrize(
    "start", ["read -r a", "read -r a; read -r b", "head -c 1 >/dev/null", "head -c 26 >/dev/null"]
)
def test_a_login_that_has_read_the_beginning_is_told(machine, start):
    command = "{}; {}".format(start, product.bootstrap_command())
    code, out, errors = ends_with(machine, command, product.first_sent() + b"more", "/bin/bash")
    assert (code, out, errors) == (product.TAKEN, b"", "")
    assert "reads standard input" in product.explain_start(code, "")


@pytest.mark.parametrize("shell", SHELLS + ["/usr/bin/ksh", "/bin/bash -i", "/usr/bin/zsh -i", "/bin/tcsh -i"])
def test_another_shell_in_place_of_the_login_shell_executes_nothing(machine, shell):
    """Its standard input stays open, as in a login. A fish reads all of it first, and then executes nothing of
    what it cannot read to its end."""
    if not os.path.exists(shell.split()[0]):
        pytest.skip("no {} here".format(shell))
    login = machine.login("exec " + shell)
    os.write(login.stdin, product.first_sent())
    if "fish" in shell:
        login.process.stdin.close()
        assert login.process.wait(20) in (127, product.OTHER_SHELL)
    else:
        assert login.process.wait(20) == product.OTHER_SHELL
    errors = login.errors()
    assert "not found" not in errors and "Unknown" not in errors
    assert "runs another shell" in product.explain_start(product.OTHER_SHELL, "")


@pytest.mark.parametrize("where", [">&-", ">/dev/null", ">all"])
def test_a_login_whose_output_leads_nowhere_starts_nothing(machine, where):
    for shell in ("/bin/sh", "/bin/bash"):
        code, _, errors = ends_with(
            machine, "exec {}; {}".format(where, product.bootstrap_command()), first_words(machine), shell
        )
        assert (code, errors) == (product.UNHEARD, "")
        assert "standard output" in product.explain_start(code, "")
    machine.no_process()


def first_words(machine, goodbye=False):
    """What a near end sends that has a kernel started at once, a shell script that leaves a mark."""
    near = product.Near(product.PollLoop())
    name = "relay-" + product.session_name(near.secret)
    machine.names += [os.path.join(folder, name) for folder in product.folders()]
    near.start([machine.script("touch ~/started; sleep 60\n", python=False)], 0)
    facts = {"session": near.secret, "new": True, "minutes": 60, "rest": len(near.rest)}
    near.wire.attach(facts, before=near.source, fresh=True, after=near.rest)
    data = b""
    while near.wire.pull():
        chunk = b"".join(near.wire.pull())
        near.wire.wrote(len(chunk))
        data += chunk
    return data + (near.farewell if goodbye else b"")


@pytest.mark.parametrize("goodbye", [False, True])
def test_who_has_gone_before_the_relay_came_up_gets_no_kernel(machine, goodbye):
    login = machine.login("while [ ! -e ~/go ]; do sleep 0.05; done; " + product.bootstrap_command())
    os.write(login.stdin, first_words(machine, goodbye))
    if not goodbye:
        login.process.stdin.close()
    machine.write("go", "")
    assert login.process.wait(20) == 0
    machine.no_process()
    assert not os.path.exists(machine.path("started"))


def test_a_kernel_whose_launcher_hears_nothing_of_it_is_ended(machine, monkeypatch):
    product.alter_sent(monkeypatch, DEAD_SECONDS=1.0)
    command = "set -o pipefail; ({}) | cat >/dev/null".format(product.bootstrap_command())
    login = machine.login(command, "/bin/bash")
    os.write(login.stdin, first_words(machine))
    rig.wait_until(lambda: os.path.exists(machine.path("started")), 20, "the kernel")
    assert login.process.wait(20) == product.UNHEARD
    machine.no_process()


def test_a_session_that_was_never_acknowledged_waits_a_minute_at_most(machine, monkeypatch):
    product.alter_sent(monkeypatch, FIRST_SECONDS=1.0)
    login = machine.login()
    os.write(login.stdin, first_words(machine))
    rig.wait_until(lambda: os.path.exists(machine.path("started")), 20, "the kernel")
    login.process.stdin.close()
    machine.no_process()


def test_a_file_with_line_ends_of_windows_is_sent_all_the_same(tmp_path):
    product.copy_to(str(tmp_path))
    for name in product.files():
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    assert product.sent_from(tmp_path) == b"".join(product.parcel())


def test_a_windows_kernel_machine_is_recognized():
    text = "'exec' is not recognized as an internal or external command,\noperable program or batch file."
    assert "no sh" in product.explain_start(1, text)
    assert product.explain_start(255, "Connection refused") is None


def test_reads_that_come_up_short_are_completed(machine):
    login = machine.login()
    data = product.first_sent() + product.hello(
        "near", {"session": os.urandom(16).hex(), "new": False, "host": "h-1"}
    )
    for start in range(0, len(data), 97):
        os.write(login.stdin, data[start : start + 97])
        time.sleep(0.0005)
    out = b""
    while product.END not in out:
        more = os.read(login.stdout, 4096)
        assert more, login.errors()
        out += more
    _, facts, _ = product.HelloReader("far").feed(out)
    assert facts["error"] == product.ELSEWHERE and "h-1" in facts["text"]
    assert login.process.wait(5) == product.NO_SESSION


def test_bytes_that_are_changed_on_the_way_are_told_as_such(machine):
    command = "({}) | LC_ALL=C sed -u 's/\\x11/\\x12/g'".format(product.bootstrap_command())
    with Launcher(machine, command=command) as launcher:
        launcher.wait(lambda: launcher.over, "the verdict")
        text, error = launcher.over
        assert error == product.ALTERED and "byte 0x11 comes out as 0x12" in text
        machine.no_process()


def test_a_source_of_another_version_is_refused(machine):
    with Launcher(machine, reconnect=False, cable=True) as launcher:
        waiting_kernel(launcher, machine)
        launcher.cut()
        launcher.wait(lambda: launcher.lost, "the loss")
        before, after = b"\nPROTOCOL = 2\n", b"\nPROTOCOL = 3\n"
        launcher.near.source = product.altered_door(launcher.near.source, before, after)
        launcher.call(launcher.connect)
        launcher.wait(lambda: launcher.over, "the verdict")
        assert launcher.over[1] == product.VERSIONS and "\n" not in launcher.over[0]
        (keeper,) = machine.keepers()
        os.kill(keeper, signal.SIGTERM)
        machine.no_process()


def test_a_keeper_of_another_version_refuses_and_says_so(machine, monkeypatch):
    with Launcher(machine, reconnect=False, cable=True) as launcher:
        waiting_kernel(launcher, machine)
        launcher.cut()
        launcher.wait(lambda: launcher.lost, "the loss")
        before, after = b"\nPROTOCOL = 2\n", b"\nPROTOCOL = 3\n"
        launcher.near.source = product.altered_door(launcher.near.source, before, after)
        monkeypatch.setattr(product, "PROTOCOL", 3)  # this launcher is newer than the keeper that it started
        launcher.call(launcher.connect)
        launcher.wait(lambda: launcher.over, "the verdict")
        text, error = launcher.over
        assert error == product.VERSIONS and "speaks version 2 of its protocol, this one 3" in text
        (keeper,) = machine.keepers()
        os.kill(keeper, signal.SIGTERM)
        machine.no_process()


def test_32_open_files_are_enough(machine):
    with Launcher(machine, command="ulimit -n 32; " + product.bootstrap_command(), cable=True) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "callback")
        with front_end:
            launcher.cut()
            front_end.echo(100000)
            over(launcher, machine)


def test_too_few_open_files_are_told_and_hurt_no_other_kernel(machine):
    with Launcher(machine, command="ulimit -n 40; " + product.bootstrap_command()) as launcher:
        launcher.call(lambda: launcher.near.linger(60))
        front_end, _ = launcher.launch(machine.kernel(), "callback")
        with front_end:
            more = [launcher.start(machine.script("import time\ntime.sleep(60)\n"), listen=6) for _ in range(6)]
            launcher.wait(lambda: any(kernel.code == 126 for kernel in more), "the verdict")
            assert any("cannot be started: Too many open files" in kernel.text for kernel in more)
            front_end.echo(100000)
            over(launcher, machine)


def can_mount():
    done = (
        subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL) if shutil.which("unshare") else None
    )
    return os.getuid() == 0 and done is not None and done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace")
def test_full_disks_are_no_obstacle_to_coming_back(machine):
    # This test's own folder lies in /tmp and has to stay; it takes the last inode there.
    lines = [
        "mount --bind {0} /mnt",
        "mount -t tmpfs -o nr_inodes=2 none /tmp",
        "mkdir {0}",
        "mount --bind /mnt {0}",
    ]
    lines += ["mount -t tmpfs -o nr_inodes=1 none /var/tmp", "mount -t tmpfs -o nr_inodes=1 none /dev/shm"]
    lines = [line.format(machine.folder) for line in lines] + ["cd " + machine.folder, product.bootstrap_command()]
    command = "exec unshare -m --propagation private sh -c {}".format(quoted(" && ".join(lines)))
    with Launcher(machine, command=command, cable=True) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "compute")
        with front_end:
            assert not [name for name in machine.names if os.path.exists(name)]
            launcher.cut()
            front_end.echo(100000)
            assert launcher.attached == 2
            over(launcher, machine)


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


# -- others


def test_nothing_tells_the_secret_and_the_folder_is_private(machine):
    with Launcher(machine, cable=True) as launcher:
        waiting_kernel(launcher, machine)
        launcher.cut()
        launcher.wait(lambda: launcher.attached == 2, "the return")
        secret = launcher.near.secret
        assert not rig.processes_with(secret)
        (path,) = [name for name in machine.names if os.path.exists(name)]
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700 and secret not in path
        over(launcher, machine)


def test_a_folder_that_is_not_private_is_not_used(tmp_path, monkeypatch):
    places = []
    for name in ("open", "link", "good"):
        (tmp_path / name).mkdir()
        places.append(str(tmp_path / name))
    monkeypatch.setattr(product, "PLACES", places)
    folders = product.folders()
    os.mkdir(folders[0], 0o755)
    os.symlink(str(tmp_path), folders[1])
    (listener, outside), path = product.listen_as("0123456789abcdef")
    outside.close()
    with listener:
        assert path.startswith(folders[2]) and private_mode(folders[2]) == 0o700
        connection = product.connect_to("0123456789abcdef")
        assert connection is not None
        connection.close()
        os.chmod(folders[2], 0o755)
        assert product.connect_to("0123456789abcdef") is None, "others could have put that there"
    assert product.connect_to("0123456789abcdef") is None


def private_mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


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


def test_a_session_that_has_nothing_to_tell_outlives_its_last_kernel_no_longer_when_it_is_cut_off(machine):
    with Launcher(machine, cable=True, reconnect=False) as launcher:
        launcher.call(lambda: launcher.near.linger(2))
        kernel = launcher.start(machine.script("exit 0\n", python=False))
        launcher.wait(lambda: kernel.code == 0, "the kernel's end")
        launcher.call(launcher.near.probe)  # which acknowledges what has come
        launcher.wait(lambda: launcher.near.wire.heard > launcher.near.wire.pinged, "its answer")
        launcher.cut()
        rig.wait_until(lambda: not any(is_keeper(pid) for pid in machine.processes()), 6, "the end of the keeper")


# -- many kernels

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


def test_a_session_lingers_after_its_last_kernel_as_long_as_it_is_told(machine):
    with Launcher(machine) as launcher:
        launcher.call(lambda: launcher.near.linger(0.5))
        path = machine.script("sleep 0.4; exit 0\n", python=False)
        for _ in range(3):
            kernel = launcher.start(path)
            launcher.wait(lambda kernel=kernel: kernel.code == 0, "the kernel's end")
            assert not launcher.over
        launcher.wait(lambda: launcher.over, "the end", 3)
        rig.wait_until(lambda: not any(is_keeper(pid) for pid in machine.processes()), 3, "the end of the keeper")
        machine.no_process()
