"""--relay, end to end: a real sshd that forwards nothing, the real ssh and plink, connections that come and go.

The layers below are tested in test_relay_wire.py and test_relay_far.py.
"""

import os
import random
import re
import shutil
import signal
import sys
import time

import pytest
import rig
from rig import frontend, product, relays
from rig.desk import make_machine
from rig.launches import clients
from rig.relays import (
    OTHERS,
    QUICK,
    SERVER,
    Bulk,
    came_back,
    count,
    cut,
    forget,
    keepers,
    kill_client,
    kill_server_session,
    logged,
    mend,
    nothing_left,
    quits,
    relay_folder,
    sockets,
    ssh_clients,
)

machine, desk = relays.machine, relays.desk


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
    desk.alter(**QUICK)
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
    desk.alter(**QUICK)
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
    desk.alter(**QUICK)
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
    desk.alter(ASKING_SECONDS=1)
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
    desk.alter(ASKING_SECONDS=0.5)
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
    desk.alter(DEAD_SECONDS=product.near_and_far(1.0, 30.0), PING_SECONDS=0.4, ASLEEP_SECONDS=0.5)
    end = desk.launch(machine, "callback", "--relay", client="plink")
    end.accept()
    clients = ssh_clients(desk)
    take_a_nap(desk)
    end.echo(100000)
    assert ssh_clients(desk) == clients
    quits(end)
    assert count(desk, "the connection is lost: ") == 0


def test_a_connection_that_has_died_meanwhile_is_found_dead_on_waking_up(desk, machine):
    desk.alter(PROBE_SECONDS=0.5, PING_SECONDS=0.4, ASLEEP_SECONDS=0.5)
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
    desk.alter(SETTLED_SECONDS=0)
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
    desk.alter(STALL_SECONDS=1)
    end = desk.launch(machine, "callback", "--relay", receive_buffer=8192)
    end.accept()
    end.tell(b"!flood 3000000\n")
    assert end.wait(20)[0] == 0


def test_an_orphan_that_holds_the_links_does_not_hold_up_the_end(desk, machine):
    desk.alter(DRAIN_SECONDS=0.5)
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
    desk.alter(NOTICE_SECONDS=0.5)
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
    desk.alter(**QUICK)
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
    desk.alter(**QUICK)
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
    desk.alter(RELAY_MINUTES=0.04, **QUICK)
    end = computing(desk, machine)
    cut(machine)
    code, errors = end.wait(15)
    assert code == 255
    assert "the connection has not come back within 0.04 min" in errors
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernel")
    forget(desk)


@pytest.mark.parametrize("logins", ["the first", "all"])
def test_a_return_whose_login_hangs_ends_nothing_when_it_wakes(desk, machine, logins):
    """As on a login node whose file system hangs for a while: what woke late brought a goodbye."""
    desk.alter(RELAY_SECONDS=2)
    end = desk.launch(machine, "callback", "--relay")
    end.accept()
    hold, first = machine.write("home/hold", ""), machine.path("home", "hanging")
    one = 'mkdir "{}" 2>/dev/null'.format(first) if logins == "the first" else "touch {}".format(first)
    start_up = machine.write("home/.bashrc", "{} && while [ -e {} ]; do sleep 0.1; done\n".format(one, hold))
    os.chown(machine.path("home"), machine.uid, machine.uid)
    try:
        kill_client(desk, machine)
        logged(desk, "the client ended", 3) if logins == "all" else came_back(desk)
        late = [pid for pid in machine.pids() if rig.process_name(pid) == "bash"]
        assert late
        os.unlink(hold)
        came_back(desk)
        most = 1 if logins == "all" else 0  # the latest carries the links now
        rig.wait_until(lambda: len(set(late) & set(machine.pids())) <= most, 15, "the end of the late logins")
        end.echo()
        assert logins == "all" or count(desk, "the connection is lost") == 1, "what woke late has been taken up"
        quits(end)
    finally:
        for path in (hold, start_up):
            if os.path.exists(path):
                os.unlink(path)
        shutil.rmtree(first, ignore_errors=True)
