"""A relay's keeper: it keeps a session over connections that are cut, for its minutes and its launcher alone."""

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
from rig.logins import Launcher, is_keeper

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked at in /proc")
machine = far.machine


# -- sessions


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
        launcher.near.connections.host = "login-7"
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


def test_a_session_that_has_nothing_to_tell_outlives_its_last_kernel_no_longer_when_it_is_cut_off(machine):
    with Launcher(machine, cable=True, reconnect=False) as launcher:
        launcher.call(lambda: launcher.near.linger(2))
        kernel = launcher.start(machine.script("exit 0\n", python=False))
        launcher.wait(lambda: kernel.code == 0, "the kernel's end")
        launcher.call(launcher.near.connections.probe)  # which acknowledges what has come
        launcher.wait(lambda: launcher.near.wire.heard > launcher.near.wire.pinged, "its answer")
        launcher.cut()
        rig.wait_until(lambda: not any(is_keeper(pid) for pid in machine.processes()), 6, "the end of the keeper")


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


# -- connections

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


# -- versions


def test_a_source_of_another_version_is_refused(machine):
    with Launcher(machine, reconnect=False, cable=True) as launcher:
        waiting_kernel(launcher, machine)
        launcher.cut()
        launcher.wait(lambda: launcher.lost, "the loss")
        before, after = b"\nPROTOCOL = 2\n", b"\nPROTOCOL = 3\n"
        launcher.near.connections.source = product.altered_door(launcher.near.connections.source, before, after)
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
        launcher.near.connections.source = product.altered_door(launcher.near.connections.source, before, after)
        monkeypatch.setattr(product, "PROTOCOL", 3)  # this launcher is newer than the keeper that it started
        launcher.call(launcher.connect)
        launcher.wait(lambda: launcher.over, "the verdict")
        text, error = launcher.over
        assert error == product.VERSIONS and "speaks version 2 of its protocol, this one 3" in text
        (keeper,) = machine.keepers()
        os.kill(keeper, signal.SIGTERM)
        machine.no_process()


# -- what the machine gives


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
