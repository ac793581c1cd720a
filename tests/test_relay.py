"""--relay, end to end: a real sshd that forwards nothing, the real ssh and plink, connections that come and go.

The layers below are tested in test_relay_wire.py and test_relay_far.py.
"""

import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import frontend
import pytest
import relay_rig
import rig
from conftest import make_machine

clients = pytest.mark.parametrize("client", ["ssh", "plink"])
QUICK = {"DEAD_SECONDS": 1.5, "PING_SECONDS": 0.4}  # so that a silent connection is noticed soon
SERVER = ["AllowTcpForwarding no"]
OTHERS = [sys.executable, sys.executable.replace("py3.13", "py3.6"), sys.executable.replace("py3.6", "py3.13")]


@pytest.fixture(scope="module")
def machine(request):
    return make_machine(request, password=True, sshd_options=SERVER)


@pytest.fixture
def desk(desk, machine):
    yield desk
    try:
        desk.close()
    finally:
        mend(machine)
    nothing_left(desk, machine)


def cut(machine):
    machine.is_cut = True
    machine.cut()


def mend(machine):
    if getattr(machine, "is_cut", False):
        machine.is_cut = False
        machine.mend()


def nothing_left(desk, machine):
    desk.no_process()
    try:
        rig.wait_until(lambda: not machine.sessions(), 10, "the end of all on the kernel machine")
    except AssertionError as error:
        left = [relay_rig.describe(pid) for pid in machine.sessions()]
        for pid in machine.sessions():
            rig.end_process(pid)
        shutil.rmtree(relay_folder(machine), ignore_errors=True)
        raise AssertionError("{}; left: {}".format(error, left)) from None
    assert sockets(machine) == []
    assert desk.left_files() == []
    folder = desk.runtime / "tunnel"
    for path in folder.iterdir() if folder.exists() else ():
        assert path.is_file(), "a socket or a pipe is left: {}".format(path)
        assert "relay " not in path.read_text(encoding="utf-8", errors="replace")


def relay_folder(machine):
    return machine.path("tmp", "tunnel-relay-{}".format(machine.uid))


def sockets(machine):
    """What keepers have in their folder."""
    try:
        return os.listdir(relay_folder(machine))
    except OSError:
        return []


def alter(desk, **constants):
    """Give constants of this desk's launchers, and so of the relay that they send, other values."""
    for name in ("tunnel.py", "tunnel_relay.py"):
        path = desk.folder / name
        text = path.read_text(encoding="utf-8")
        for constant in list(constants):
            line = "{} = {}".format(constant, constants[constant])
            text, count = re.subn("(?m)^{} = [^#\n]*[^#\n ]".format(constant), line, text)
            if count:
                del constants[constant]
        path.write_text(text, encoding="utf-8")
    assert not constants


def ssh_clients(desk):
    names = ("ssh", "plink")
    return [pid for pid in desk.processes() if os.path.basename((rig.command_line(pid) or [""])[0]) in names]


def launchers(desk):
    return [pid for pid in desk.processes() if any("import tunnel_sub" in word for word in rig.command_line(pid))]


def kill_client(desk, machine):
    for pid in ssh_clients(desk):
        rig.end_process(pid)


def kill_server_session(desk, machine):
    for pid in machine.pids():
        if rig.process_name(pid).startswith("sshd") and pid != machine.server.pid:
            rig.end_process(pid)


def keepers(machine):
    return [pid for pid in machine.pids() if relay_rig.is_keeper(pid)]


def count(desk, text):
    return "\n".join(desk.logs()).count(text)


def logged(desk, text, times=1, seconds=15):
    rig.wait_until(lambda: count(desk, text) >= times, seconds, "{!r} in the log".format(text))


def came_back(desk, times=1):
    logged(desk, "the connection is back after ", times)


class Bulk:
    """Random bytes down every channel of a front end at once; the same have to come back."""

    def __init__(self, end, size=2000000):
        self.sent = [os.urandom(size) for _ in end.channels]
        self.total, self.received, self.right, self.failures = size * len(self.sent), 0, 0, []
        self.lock = threading.Lock()
        self.threads = []
        for act in (self._send, self._receive):
            for channel, data in zip(end.channels, self.sent):
                self.threads.append(threading.Thread(target=self._guard, args=(act, channel, data), daemon=True))
        for thread in self.threads:
            thread.start()

    def _guard(self, act, channel, data):
        try:
            act(channel, data)
        except (OSError, AssertionError) as error:
            self.failures.append(error)

    @staticmethod
    def _send(channel, data):
        channel.sendall(data)

    def _receive(self, channel, data):
        got, size = hashlib.sha256(), 0
        while size < len(data):
            more = channel.recv(1 << 16)
            assert more, "the channel ended after {} bytes".format(size)
            size += len(more)
            got.update(more)
            with self.lock:
                self.received += len(more)
        assert got.digest() == hashlib.sha256(data).digest(), "other bytes came back"
        self.right += 1

    def reached(self, part):
        """Wait until this part of all has come back."""
        rig.wait_until(lambda: self.failures or self.received >= part * self.total, 20, "data")
        assert not self.failures

    def finish(self):
        for thread in self.threads:
            thread.join(40)
        assert not self.failures
        assert self.right == len(self.sent)


def quits(end, code=0):
    end.tell("!quit {}\n".format(code).encode("ascii"))
    assert end.wait(15)[0] == code


# -- launches that succeed


@clients
@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
def test_all_channels_carry_bytes_both_ways_without_a_forward(desk, machine, client, role):
    end = desk.launch(machine, role, "--relay", client=client)
    assert len(end.accept()) == (2 if role == "compute" else 6)
    end.echo()
    end.echo(300000)
    end.tell(b"!quit 0\n")
    assert end.wait() == (0, "")
    desk.no_process()
    log = desk.logs()[0]
    assert "the kernel has called back" in log
    assert "with exit code 0" in log.splitlines()[-1]
    assert not re.search(" -[RL] ", log)
    assert "connection is lost" not in log


def test_slow_kernels_too(desk, machine):
    ends = [desk.slow(machine, role, "--relay") for role in ("classic", "callback", "compute")]
    for end in ends:
        end.accept()
        end.echo()
    for end in ends:
        quits(end)


def test_the_exit_code_is_the_kernels(desk, machine):
    end = desk.launch(machine, "classic", "--relay", client="plink")
    end.accept()
    quits(end, 7)


def test_a_jump_host(request, desk):
    jump = make_machine(request)
    target = make_machine(request, behind=jump, sshd_options=SERVER)
    lines = ["Host gate", "HostName {}".format(jump.address)] + jump.client_lines
    lines += ["StrictHostKeyChecking accept-new", "Host cluster", "HostName {}".format(target.address)]
    lines += ["ProxyJump gate"] + target.client_lines
    _, wrapper = jump.make_ssh("both", lines)
    end = desk.launch(target, "callback", "--relay", host="cluster", env={"TUNNEL_SSH": wrapper})
    end.accept()
    bulk = Bulk(end)
    bulk.reached(0.2)
    kill_server_session(desk, jump)
    came_back(desk)
    bulk.finish()
    quits(end)
    nothing_left(desk, target)


@pytest.mark.parametrize("python", [python for python in OTHERS if python != sys.executable][:1])
def test_another_python_on_this_side(desk, machine, python):
    if not os.access(python, os.X_OK):
        pytest.skip("there is no other Python of the tests beside this one")
    end = frontend.FrontEnd("callback")
    desk.front_ends.append(end)
    command = [python, str(desk.folder / "tunnel.py")]
    words = ["--relay", machine.destination, machine.modern]
    end.launch(*words, environment=desk.environment(machine), command=command)
    end.accept()
    kill_client(desk, machine)
    came_back(desk)
    end.echo(300000)
    quits(end)


@pytest.mark.parametrize("shell", ["/bin/csh", "/usr/bin/fish"])
def test_other_login_shells(request, desk, shell):
    own = make_machine(request, sshd_options=SERVER, shell=shell)
    end = desk.launch(own, "callback", "--relay")
    end.accept()
    kill_client(desk, own)
    came_back(desk)
    end.echo()
    quits(end)
    nothing_left(desk, own)


def test_a_login_that_prints_is_logged_and_skipped(desk, machine):
    path = machine.path("home", ".bashrc")
    machine.write("home/.bashrc", "echo 'Welcome to the cluster!'; echo 'quota: 97 %' >&2; printf 'no end'\n")
    try:
        end = desk.launch(machine, "classic", "--relay")
        end.accept()
        kill_client(desk, machine)
        came_back(desk)
        end.echo()
        quits(end)
    finally:
        os.unlink(path)
    log = desk.logs()[0]
    assert "login: Welcome to the cluster!" in log
    assert "login: no end" in log


def test_letters_blanks_and_quotes_in_a_kernels_path(desk, machine):
    name = 'My $HOME `id` "Kernel" \\ Ü {0}/MathKernel'
    path = machine.install_kernel(name, "boot=0", "classic")
    end = desk.launch(machine, "classic", "--relay", kernel=path)
    end.accept()
    end.echo()
    quits(end)


# -- connections that are lost


@pytest.mark.parametrize("role, client", [("classic", "ssh"), ("callback", "plink"), ("compute", "ssh")])
def test_a_lost_connection_comes_back_in_the_middle_of_a_transfer(desk, machine, role, client):
    end = desk.launch(machine, role, "--relay", client=client)
    end.accept()
    kernels, starts = machine.kernels(), machine.kernel_starts()
    bulk = Bulk(end, 9000000 if role == "compute" else 3000000)
    for number, strike in enumerate((kill_client, kill_server_session, kill_client), 1):
        bulk.reached(0.25 * number)
        strike(desk, machine)
        came_back(desk, number)
    bulk.finish()
    end.echo()
    assert machine.kernels() == kernels and machine.kernel_starts() == starts
    quits(end)
    log = desk.logs()[0]
    assert log.count("the connection is lost: ") == 3
    assert len(re.findall(r"the connection is back after \d+\.\d s", log)) == 3


def test_a_network_that_is_cut_and_mended(desk, machine):
    alter(desk, **QUICK)
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    bulk = Bulk(end)
    bulk.reached(0.2)
    cut(machine)
    logged(desk, "the connection is lost: nothing has come for ")
    mend(machine)
    came_back(desk)
    bulk.finish()
    quits(end)


def test_a_server_that_freezes(desk, machine):
    alter(desk, **QUICK)
    end = desk.launch(machine, "classic", "--relay")
    end.accept()
    bulk = Bulk(end)
    bulk.reached(0.2)
    machine.freeze()
    try:
        came_back(desk)  # the server takes new logins, and still believes in the old one
        bulk.finish()
    finally:
        machine.thaw()
    end.echo()
    quits(end)


def test_a_server_that_is_restarted(desk, machine):
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    machine.stop_server()
    kill_server_session_without_server(machine)
    logged(desk, "the connection is lost: ")
    logged(desk, "Connection refused", 2)
    machine.start_server()
    came_back(desk)
    end.echo()
    quits(end)


def kill_server_session_without_server(machine):
    for pid in machine.pids():
        if rig.process_name(pid).startswith("sshd"):
            rig.end_process(pid)


@clients
def test_a_password_is_answered_again_each_time(desk, machine, client):
    wrapper = machine.make_keyless_ssh() if client == "ssh" else machine.make_plink(key=False)
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    before = machine.logins()
    end = desk.launch(machine, "callback", "--relay", host=host, env={"TUNNEL_SSH": wrapper})
    end.accept()
    for number in (1, 2):
        kill_client(desk, machine)
        came_back(desk, number)
    end.echo()
    assert machine.logins() == before + 3
    quits(end)
    assert rig.PASSWORD not in desk.logs()[0]


def test_a_kernel_that_ends_meanwhile_is_told_on_the_return(desk, machine):
    alter(desk, **QUICK)
    end = desk.launch(machine, "classic", "--relay")
    end.accept()
    cut(machine)
    end.tell(b"never mind")
    for pid in machine.kernels():
        rig.end_process(pid)
    logged(desk, "the connection is lost: ")
    mend(machine)
    assert end.wait(20)[0] == 137
    assert count(desk, "the connection is back after ") == 1


def test_a_login_that_is_refused_meanwhile_is_retried_with_a_long_pause(desk, machine):
    alter(desk, ASKING_SECONDS=1)
    end = desk.launch(machine, "compute", "--relay")
    end.accept()
    keys = machine.path("home", ".ssh", "authorized_keys")
    os.rename(keys, keys + ".away")
    try:
        kill_client(desk, machine)
        logged(desk, "the login was refused: if it needs a person, log in by hand")
    finally:
        os.rename(keys + ".away", keys)
    came_back(desk)
    end.echo()
    quits(end)


@clients
def test_a_login_that_needs_a_person_is_retried_until_it_does_not(desk, machine, client):
    alter(desk, ASKING_SECONDS=0.5)
    end = desk.launch(machine, "callback", "--relay", client=client)
    end.accept()
    try:
        machine.restart_server("AuthenticationMethods publickey,password", *SERVER)
        before = machine.attempts()
        kill_client(desk, machine)
        logged(desk, "the login was refused: if it needs a person, log in by hand; next attempt in 0.5 s", 3)
        assert machine.attempts() - before in (3, 4)
        assert "Partial publickey for " in machine.server_log(), "the first factor was taken"
    finally:
        machine.restart_server(*SERVER)
    came_back(desk)
    end.echo()
    quits(end)
    assert count(desk, "the connection is lost: ") == 1


def take_a_nap(desk):
    """Freeze the launcher and its client for 2 s, as the lid of a laptop does. The client falls asleep first, and
    wakes up last, so that the launcher finds nothing when it looks."""
    clients = ssh_clients(desk)
    others = [pid for pid in desk.processes() if pid not in clients]
    for pids, number, seconds in (
        (clients, signal.SIGSTOP, 0.1),
        (others, signal.SIGSTOP, 2),
        (others, signal.SIGCONT, 0.2),
        (clients, signal.SIGCONT, 0),
    ):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)


def test_a_connection_that_has_survived_a_nap_is_not_taken_for_dead(desk, machine):
    # The far end, which does not sleep, is more patient here than a launcher that is awake.
    near = "{} if __name__ == 'tunnel_relay' else 30.0"
    alter(desk, DEAD_SECONDS=near.format(1.0), PING_SECONDS=0.4, ASLEEP_SECONDS=0.5)
    end = desk.launch(machine, "callback", "--relay", client="plink")
    end.accept()
    clients = ssh_clients(desk)
    take_a_nap(desk)
    end.echo(100000)
    assert ssh_clients(desk) == clients
    quits(end)
    assert count(desk, "the connection is lost: ") == 0


def test_a_connection_that_has_died_meanwhile_is_found_dead_on_waking_up(desk, machine):
    alter(desk, PROBE_SECONDS=0.5, PING_SECONDS=0.4, ASLEEP_SECONDS=0.5)
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    end.echo(100000)
    machine.freeze()  # its server lets new logins in, but nothing comes from the old one
    try:
        take_a_nap(desk)
        begin = time.monotonic()
        logged(desk, "the connection is lost: nothing has come for ")
        came_back(desk)
        assert time.monotonic() - begin < 8, "awake it would take 20 s"
        end.echo(100000)
    finally:
        machine.thaw()
    quits(end)


def test_another_login_node_is_named_and_the_right_one_comes_back(request, desk):
    names = ("login-1", "login-2")
    nodes = [make_machine(request, sshd_options=SERVER, hostname=name) for name in names]
    folder = nodes[0].folder
    for node, name in zip(nodes, names):
        node.make_ssh(name, ["Host cluster", "HostName " + node.address] + node.client_lines)

    def leads_to(position):
        """What the name stands for from now on."""
        link = os.path.join(folder, "draft")
        os.symlink(nodes[position].path(names[position] + "_config"), link)
        os.rename(link, os.path.join(folder, "cluster_config"))

    leads_to(0)
    text = '#!/bin/sh\nexec {} -F {}/cluster_config "$@"\n'.format(shutil.which("ssh"), folder)
    wrapper = nodes[0].write("ssh-cluster", text, 0o755)
    end = desk.launch(nodes[0], "callback", "--relay", host="cluster", env={"TUNNEL_SSH": wrapper})
    end.accept()
    (kernel,) = nodes[0].kernels()
    leads_to(1)
    kill_client(desk, nodes[0])
    rig.wait_until(lambda: nodes[1].logins() >= 3, 15, "attempts")
    assert count(desk, "the connection is back") == 0
    leads_to(0)
    came_back(desk)
    end.echo(100000)
    assert nodes[0].kernels() == [kernel]
    words = "relay: the session is on login-1, but this login has come to login-2: name login-1 as the host"
    assert count(desk, words) == 1
    quits(end)
    for node in nodes:
        nothing_left(desk, node)


def test_cut_after_cut(desk, machine):
    """A hundred of them below the launcher: test_relay_far.py."""
    alter(desk, SETTLED_SECONDS=0)
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    kernels, chance, number, bulk = machine.kernels(), random.Random(7), 0, None
    while number < 15:
        if bulk is None or bulk.right == len(bulk.sent):
            bulk = Bulk(end, 5000000)  # there is always one under way
        end.busy(chance.uniform(0.02, 0.2))
        returns = count(desk, "the connection is back after ")
        kill_client(desk, machine)
        number += 1
        if chance.random() < 0.8:  # otherwise the next cut may come during a login
            came_back(desk, returns + 1)
        assert not bulk.failures
    bulk.finish()
    end.echo()
    assert machine.kernels() == kernels
    quits(end)


# -- the end


@pytest.mark.parametrize("strike", [False, True])
def test_a_flood_reaches_a_busy_front_end_before_the_launcher_ends(desk, machine, strike):
    end = desk.launch(machine, "callback", "--relay", receive_buffer=8192)
    end.accept()
    end.tell(b"!flood-all 1500000\n")
    if strike:
        rig.wait_until(lambda: not end.busy(0.2) and kill_client(desk, machine) is None)
    end.busy(1.5)
    end.expect_flood(1500000, range(6))
    assert end.wait(15) == (0, "")


def test_a_front_end_that_takes_nothing_is_given_up(desk, machine):
    alter(desk, STALL_SECONDS=1)
    end = desk.launch(machine, "callback", "--relay", receive_buffer=8192)
    end.accept()
    end.tell(b"!flood 3000000\n")
    assert end.wait(20)[0] == 0


def test_an_orphan_that_holds_the_links_does_not_hold_up_the_end(desk, machine):
    alter(desk, DRAIN_SECONDS=0.5)
    end = desk.launch(machine, "classic", "--relay")
    end.accept()
    end.tell(b"!orphan\n")
    assert end.wait(20)[0] == 0
    for pid in machine.orphans():
        rig.end_process(pid)


def computing(desk, machine, role="callback", *arguments, **options):
    end = desk.launch(machine, role, "--relay", *arguments, **options)
    end.accept()
    end.tell(b"!compute\n")
    assert end.channels[0].recv(4) == b"busy"
    return end


@pytest.mark.parametrize("how", ["quit", "die"])
def test_a_front_end_that_goes_ends_a_computing_kernel(desk, machine, how):
    alter(desk, LOST_SECONDS=0.5)
    end = computing(desk, machine, client="plink" if how == "quit" else "ssh")
    end.quit() if how == "quit" else end.die()
    assert end.wait(8)[0] == 129
    assert not machine.kernels()
    assert count(desk, "the front end has closed the main link: the kernel is hung up on") == 1


def test_a_front_end_that_goes_ends_an_idle_kernel_and_the_launcher(desk, machine):
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    end.quit()
    assert end.wait(8)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_launcher_client_and_kernel(desk, machine, number):
    end = computing(desk, machine, client="plink" if number == signal.SIGINT else "ssh")
    end.signal(number)
    assert end.wait(4)[0] == 128 + number
    rig.wait_until(lambda: not machine.kernels(), 5)
    desk.no_process()


def test_a_signal_at_any_moment_of_a_launch_ends_it(desk, machine):
    ends = [desk.launch(machine, "classic", "--relay") for _ in range(6)]
    for end in ends:
        end.busy(0.06)
        end.signal()
    for end in ends:
        assert end.wait(6)[0] in (143, -15), "those that had not caught it yet die of it"
    rig.wait_until(lambda: not machine.kernels(), 10)
    forget(desk)


def test_a_signal_in_the_middle_of_a_transfer_ends_the_kernel_at_once(desk, machine):
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    bulk = Bulk(end, 20000000)
    bulk.reached(0.05)
    end.signal()
    assert end.wait(5)[0] == 143
    rig.wait_until(lambda: not machine.kernels(), 5, "the end of the kernel")


@clients
def test_a_launcher_that_is_killed_takes_its_kernel_along(desk, machine, client):
    end = computing(desk, machine, client=client)
    end.signal(signal.SIGKILL)
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernel")
    desk.no_process(10)
    rig.wait_until(lambda: not machine.sessions(), 5)
    forget(desk)


def forget(desk):
    """What a launcher that was killed has noted of its session stays until the next one."""
    for path in desk.runtime.glob("tunnel/*"):
        path.unlink()


def test_a_launcher_that_is_killed_in_the_middle_of_a_transfer(desk, machine):
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    bulk = Bulk(end, 20000000)
    bulk.reached(0.05)
    end.signal(signal.SIGKILL)
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernel")
    desk.no_process(10)
    forget(desk)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_launch_ends_a_session_whose_launcher_went_while_the_network_was_cut(desk, machine, how):
    alter(desk, **QUICK)
    first = computing(desk, machine)
    (kernel,) = machine.kernels()
    cut(machine)
    logged(desk, "the connection is lost: ")
    first.signal(how)
    assert first.wait(5)[0] == (143 if how == signal.SIGTERM else -9)
    # The watchdog, and the client that it watches, which may just be starting.
    rig.wait_until(lambda: not [rig.end_process(pid) for pid in desk.processes()], 5, "the end of what is left")
    mend(machine)
    assert machine.kernels() == [kernel]
    second = desk.launch(machine, "classic", "--relay")
    second.accept()
    rig.wait_until(lambda: kernel not in machine.kernels(), 8, "the end of the dead launcher's kernel")
    second.echo()
    quits(second)
    for path in (desk.runtime / "tunnel").glob("log-*"):
        path.unlink()  # of a launcher that was killed before its client had opened it


def test_a_relay_that_is_killed_is_told_with_what_to_do(desk, machine):
    end = computing(desk, machine)
    for pid in keepers(machine):
        rig.end_process(pid)
    code, errors = end.wait(10)
    assert code == 255
    assert re.search("^tunnel: launching controller kernel on .*: the relay on .* is gone", errors)
    assert "KillExcludeUsers" in errors and errors.count("\n") == 1
    rig.wait_until(lambda: not machine.kernels(), 5)
    assert len(sockets(machine)) == 1  # it could not remove that
    again = desk.launch(machine, "classic", "--relay")
    again.accept()
    assert len(sockets(machine)) == 1
    quits(again)


def test_a_machine_that_was_restarted_is_told(desk, machine):
    alter(desk, **QUICK)
    end = computing(desk, machine)
    for pid in machine.sessions():
        rig.end_process(pid)
    shutil.rmtree(relay_folder(machine))
    code, errors = end.wait(10)
    assert code == 255 and "the machine was restarted" in errors


def test_with_0_minutes_a_lost_connection_is_the_end(desk, machine):
    end = desk.launch(machine, "callback", "--relay=0")
    end.accept()
    end.tell(b"!compute\n")
    kill_client(desk, machine)
    code, errors = end.wait(5)
    assert code == 255
    assert "the connection has not come back within 0 min" in errors and errors.count("\n") == 1
    rig.wait_until(lambda: not machine.kernels(), 8)
    forget(desk)


def test_when_its_minutes_are_over_the_launcher_says_so(desk, machine):
    alter(desk, RELAY_MINUTES=0.04, **QUICK)
    end = computing(desk, machine)
    cut(machine)
    code, errors = end.wait(15)
    assert code == 255
    assert "the connection has not come back within 0.04 min" in errors
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernel")
    forget(desk)


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


@pytest.mark.parametrize("how", ["gives up", "loses its client"])
@pytest.mark.parametrize("argument", ["--relay", "--via=nice"])
def test_a_launch_that_fails_during_a_slow_login_starts_no_kernel_afterwards(
    desk, machine, start_up, argument, how
):
    alter(desk, RELAY_SECONDS=0.5 if how == "gives up" else 60)
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


@pytest.mark.parametrize("client", ["ssh", "plink"])
@pytest.mark.parametrize(
    "text, words",
    [
        ("exec zsh", "runs another shell"),
        ("exec csh", "runs another shell"),
        ("read -r word", "reads standard input"),
        ("exec 1>&-", "closes standard output, or redirects it"),
        ("exec >/dev/null 2>&1", "closes standard output, or redirects it"),
        ("exec >~/all 2>&1", "closes standard output, or redirects it"),
        ("head -c 1100000 /dev/zero | tr '\\0' x", "the login prints without end"),
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


@pytest.mark.parametrize("client", ["ssh", "plink"])
@pytest.mark.parametrize(
    "constant, words",
    [
        ("DEAD_SECONDS", "closes standard output, or redirects it"),
        ("RELAY_SECONDS", "the login ran, but no relay"),
    ],
    ids=["the relay hears nothing", "the launcher gives up"],
)
def test_what_the_relay_says_that_leads_nowhere_ends_the_kernel(desk, machine, start_up, client, constant, words):
    alter(desk, **{constant: 1.5})
    start_up("exec > >(cat >/dev/null)")
    before = machine.kernel_starts()
    end = desk.launch(machine, "callback", "--relay", client=client)
    code, errors = end.wait(20)
    assert machine.kernel_starts() == before + 1
    assert code == 255 and words in errors and errors.count("\n") == 1
    assert "Killed by" not in errors
    rig.wait_until(lambda: not machine.sessions(), 15, "the end of kernel and relay")
    forget(desk)


def test_a_server_that_sends_back_what_it_is_sent_is_told_as_such(request, desk):
    own = make_machine(request, sshd_options=["ForceCommand cat"] + SERVER)
    alter(desk, RELAY_SECONDS=0.5)
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
    alter(desk, CALLBACK_SECONDS=1)
    kernel = machine.install_kernel("silent/10.1/MathKernel", "silent")
    done = run(desk, machine, "--check", "--relay", machine.destination, kernel)
    assert done.returncode == 255
    assert "has not called back within 1 s" in done.stderr


@pytest.mark.parametrize("option", ["--relay", "--via=srun", "--dry-run"])
def test_without_its_file_beside_the_launcher(desk, machine, option):
    (desk.folder / "tunnel_relay.py").unlink()
    end = desk.launch(machine, "callback", option, "--relay")
    code, errors = end.wait()
    assert code == 69
    assert errors == "tunnel: --relay: tunnel_relay.py is not beside tunnel.py; run install.py again\n"


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
    alter(desk, SHARE_SECONDS=0.7)
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
    alter(desk, SHARE_SECONDS=0.05)
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


def test_kernels_started_while_the_connection_is_lost_come_up_with_it(sharing, machine):
    desk = sharing
    alter(desk, **QUICK)
    first = stands(shared(desk, machine))
    cut(machine)
    logged(desk, "the connection is lost: ")
    late = shared(desk, machine)
    with pytest.raises(subprocess.TimeoutExpired):
        late.launcher.wait(0.5)
    mend(machine)
    stands(late).echo()
    first.echo()
