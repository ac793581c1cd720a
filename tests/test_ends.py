"""How launches end: nothing that a kernel has sent is lost, its exit code is the launcher's, and a front end that
is gone is told from one that is only busy."""

import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest
import rig
from rig.launches import launched, log_of, nothing_else, parent
from rig.processes import (
    ALL_LAUNCHES,
    LAUNCHES,
    all_gone,
    client_of,
    compute,
    ended_with,
    launch,
    launch_all,
    supervisor,
    watchdog_of,
)

FLOOD = 6000000
SMALL = 4096  # bytes that a front end's system takes for it, so that all else stays on its way


# -- nothing is lost


@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
def test_every_byte_arrives_at_a_front_end_that_is_busy(desk, machine, users, role):
    """The kernel ends as soon as it has written, the front end reads seconds later."""
    ways = ["ssh", "plink", "users"] + (["share"] if role == "compute" else [])
    ends = launch_all(desk, machine, [(role, way) for way in ways], users, receive_buffer=SMALL)
    for end in ends:
        end.tell(b"!flood %d\n" % FLOOD)
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernels")
    ends[0].busy(3)
    for end in ends:
        end.expect_flood(FLOOD)
        end.quit()
    assert [ended_with(desk, end) for end in ends] == [0] * len(ends)


@pytest.mark.parametrize("role, way", [("classic", "ssh"), ("callback", "plink")])
def test_every_byte_arrives_on_all_channels_at_once(desk, machine, role, way):
    end = launch(desk, machine, role, way, receive_buffer=SMALL)
    end.accept()
    end.tell(b"!flood-all 1500000\n")
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernel")
    end.busy(1)
    end.expect_flood(1500000, positions=range(6))
    end.quit()
    assert end.wait()[0] == 0


def test_every_byte_arrives_over_a_slow_network(desk, machine, users):
    ends = launch_all(desk, machine, LAUNCHES, users)
    machine.shape(rate="2mbit")
    try:
        for end in ends:
            end.tell(b"!flood 400000\n")
        rig.wait_until(lambda: not machine.kernels(), 20, "the end of the kernels")
        for end in ends:
            end.expect_flood(400000)
            end.quit()
        assert [ended_with(desk, end) for end in ends] == [0] * len(ends)
    finally:
        machine.unshape()


def test_every_byte_arrives_at_a_front_end_that_goes_on_writing(desk, machine, users):
    """What it writes can no longer be delivered; that is no reason to give up what comes from the kernel. Only
    what is on its way to a kernel when that ends does harm: the kernel's own system then drops what it has not
    sent yet, as it does without a tunnel."""
    ends = launch_all(desk, machine, LAUNCHES, users, receive_buffer=SMALL)
    for end in ends:
        end.tell(b"!flood %d\n" % FLOOD)
    for end in ends:
        desk.wait_until(end, lambda end=end: knows_of_the_end(desk, end), 10, "word of the kernel's end")
    for _ in range(4):
        for channel in [channel for end in ends for channel in end.channels[:2]]:
            channel.sendall(b"are you there?")
        ends[0].busy(0.3)
    for end in ends:
        end.expect_flood(FLOOD)
        end.quit()
    assert [ended_with(desk, end) for end in ends] == [0] * len(ends)


def knows_of_the_end(desk, end):
    """Whether a launcher has heard that its kernel has ended: from the client, or by the client's own end."""
    log = log_of(desk, end)
    told = " rtype exit-status " in log or "Session sent command exit status" in log
    return told or not [pid for pid in desk.processes() if parent(pid) == supervisor(desk, end)]


def test_a_front_end_that_never_reads_keeps_nobody_for_ever(desk, machine, users):
    desk.alter(STALL_SECONDS=1)
    ends = launch_all(desk, machine, LAUNCHES, users, receive_buffer=SMALL)
    for end in ends:
        end.tell(b"!flood %d\n" % FLOOD)
    assert [ended_with(desk, end) for end in ends] == [0] * len(ends)  # as those of the kernels
    all_gone(desk)


def test_a_front_end_that_takes_little_by_little_gets_it_all(desk, machine):
    """As long as it takes some, it is given time."""
    desk.alter(STALL_SECONDS=1)
    end = launch(desk, machine, "callback", "ssh", receive_buffer=SMALL)
    end.accept()
    end.tell(b"!flood %d\n" % FLOOD)
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernel")
    begin, read = time.monotonic(), 0
    while time.monotonic() - begin < 3:
        end.busy(0.005)
        read += len(end.channels[0].recv(1 << 16))
    assert read < FLOOD / 2
    assert read + len(all_of(end.channels[0])) == FLOOD
    assert end.wait()[0] == 0


# -- the kernel's exit code


@pytest.mark.parametrize("closes", ["late", "never"])
def test_the_exit_code_is_the_kernels_whenever_the_front_end_closes(desk, machine, users, closes):
    ends = launch_all(desk, machine, ALL_LAUNCHES, users)
    begin = time.monotonic()
    for end in ends:
        end.tell(b"!quit 7\n")
        if closes == "late":
            end.quit(after=0.3)
    assert [ended_with(desk, end) for end in ends] == [7] * len(ends)
    all_gone(desk)
    assert time.monotonic() - begin < 4  # all has been read: nobody waits for anything


def test_the_exit_code_is_the_kernels_whatever_the_front_end_leaves_unread(desk, machine, users):
    desk.alter(STALL_SECONDS=1)
    ends = launch_all(desk, machine, LAUNCHES, users, receive_buffer=SMALL)
    for end in ends:
        end.channels[1].sendall(b"x" * 100000)  # it comes back, and nobody reads it
        end.tell(b"!quit 7\n")
    assert [ended_with(desk, end) for end in ends] == [7] * len(ends)


def test_nobody_waits_for_a_child_that_the_kernel_leaves_behind(desk, machine, users):
    """The child holds the links and the kernel's output open. ssh keeps the exit code to itself until those are
    closed, so of a connection of its own it is not known."""
    ends = launch_all(desk, machine, LAUNCHES, users)
    begin = time.monotonic()
    for end in ends:
        end.tell(b"!orphan\n")
    try:
        assert [ended_with(desk, end, 15) for end in ends] == [255, 0, 0, 0]
        assert "its exit code is not known" in log_of(desk, ends[0])
        all_gone(desk)
        assert time.monotonic() - begin < 14
        assert len(machine.orphans()) == len(ends)
    finally:
        for pid in machine.orphans():
            rig.end_process(pid)


def test_nobody_waits_for_what_else_the_connection_carries(desk, machine):
    """A forward of the user's own configuration has a connection that stays open; ssh waits for that."""
    port = rig.free_port()
    lines = ["Host *"] + machine.client_lines
    lines += ["LocalForward 127.0.0.1:{} {}:{}".format(port, machine.address, machine.port)]
    _, wrapper = machine.make_ssh("carrying", lines)
    end = desk.launch(machine, "callback", env={"TUNNEL_SSH": wrapper})
    end.accept()
    with socket.create_connection(("127.0.0.1", port), 5) as other:
        assert other.recv(4) == b"SSH-"
        begin = time.monotonic()
        end.tell(b"!quit 7\n")
        assert end.wait()[0] == 255  # ssh keeps the kernel's to itself
        assert time.monotonic() - begin < 8
        all_gone(desk)


def test_a_watchdog_that_somebody_has_ended_changes_no_exit_code(desk, machine, users):
    ends = launch_all(desk, machine, LAUNCHES, users)
    for number, end in enumerate(ends):
        rig.end_process(watchdog_of(desk, end))
        end.tell(b"!quit %d\n" % number)
    assert [ended_with(desk, end) for end in ends] == list(range(len(ends)))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_kernel_that_a_signal_ends_is_no_success(desk, machine, users, name):
    ends = launch_all(desk, machine, LAUNCHES, users)
    for pid in machine.kernels():
        os.kill(pid, getattr(signal, name))
    assert 0 not in [ended_with(desk, end) for end in ends]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_client_that_somebody_else_ends_is_no_success(desk, machine, users, name):
    ends = launch_all(desk, machine, LAUNCHES, users)
    for end in ends:
        os.kill(client_of(desk, end), getattr(signal, name))
    assert 0 not in [ended_with(desk, end) for end in ends]
    rig.wait_until(lambda: not machine.kernels(), 5, "the end of the kernels")


def test_a_connection_lost_in_the_moment_of_the_kernels_end_is_no_success(desk, machine, users):
    """The kernel has ended, and the server can no longer say how."""
    ends = launch_all(desk, machine, LAUNCHES, users)
    machine.freeze()
    for pid in machine.kernels():
        rig.end_process(pid)
    for pid in machine.sessions():
        rig.end_process(pid)
    codes = [ended_with(desk, end) for end in ends]
    assert 0 not in codes
    assert all("the connection was lost" in log_of(desk, end).splitlines()[-1] for end in ends)


def all_of(channel):
    """What comes to its end."""
    data = b""
    channel.settimeout(10)
    while True:
        try:
            more = channel.recv(1 << 18)
        except ConnectionError:
            break
        if not more:
            break
        data += more
    return data


# -- the front end is gone


def hold_in_another_process(end):
    """Hand the front end's sockets to a process of their own; returns that."""
    sockets = end.channels + end.main + [each for pair in end.others for each in pair]
    holder = subprocess.Popen(["sleep", "60"], pass_fds=[each.fileno() for each in sockets])
    for each in sockets:
        each.close()
    return holder


def leave(end, how):
    """Have the front end end in one of several ways."""
    if how == "closes its links":
        end.quit()
    elif how == "closes the main link":
        for channel in end.channels[:2]:
            channel.close()
    elif how == "dies":
        holder = hold_in_another_process(end)
        holder.kill()
        holder.wait()
    elif how == "dies with much unread":
        end.die()
    else:  # is cut off
        for channel in end.channels:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.die()


@pytest.mark.parametrize(
    "how", ["closes its links", "closes the main link", "dies", "dies with much unread", "is cut off"]
)
def test_all_ends_when_the_front_end_of_a_computing_kernel(desk, machine, users, how):
    """Within 10 s, and the forwards on a shared connection are taken back."""
    if how != "closes its links":
        desk.alter(NOTICE_SECONDS=1)
    before = set(machine.listeners())
    ends = launch_all(desk, machine, LAUNCHES, users)
    if how == "dies with much unread":
        for end in ends:
            end.channels[1].sendall(b"x" * 1000)
    compute(ends)
    begin = time.monotonic()
    for end in ends:
        leave(end, how)
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernels")
    all_gone(desk, max(0, begin + 10 - time.monotonic()))
    rig.wait_until(lambda: set(machine.listeners()) <= before, 5, "the return of the forwards")
    for end in ends:
        assert ended_with(desk, end) != 0
        assert "the front end has closed the main link" in log_of(desk, end)


def fill(channel, seconds=10):
    """Write to a channel until no more goes in."""
    channel.setblocking(False)
    end = time.monotonic() + seconds
    while select.select([], [channel], [], 0.5)[1]:
        channel.send(b"x" * (1 << 20))
        assert time.monotonic() < end


def test_all_ends_when_a_front_end_dies_to_which_its_kernel_does_not_listen(desk, machine):
    """It has sent more than a computing kernel takes, so nobody is about to read what it says next."""
    desk.alter(NOTICE_SECONDS=1)
    ends = launch_all(desk, machine, [("callback", "ssh"), ("compute", "ssh")], None)
    compute(ends)
    for end in ends:
        fill(end.channels[0])
        end.die()
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernels")
    all_gone(desk)


def test_all_ends_when_the_front_end_dies_while_the_kernel_boots(desk, machine):
    ends = [
        desk.slow(machine, role, client=client)
        for role, client in (("classic", "plink"), ("callback", "ssh"), ("compute", "ssh"))
    ]
    rig.wait_until(lambda: machine.kernels(), 10, "a kernel")
    for end in ends:
        end.die()
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernels")
    all_gone(desk)


def test_a_front_end_that_lives_is_not_taken_for_a_dead_one(desk, machine, users):
    """Neither one that is idle, nor one that has closed all but the main data channel, nor one that is too busy to
    read what its kernel sends."""
    desk.alter(NOTICE_SECONDS=0.3, STALL_SECONDS=0.3, LATE_SECONDS=0.3)
    idle, less, half, busy = launch_all(desk, machine, [("callback", "ssh")] * 2 + LAUNCHES[:2], users)
    for channel in less.channels[1:]:
        channel.close()
    for position in range(1, 6):
        half.half_close(position)
    compute([idle, less, half])
    sent = os.urandom(1 << 24)
    writer = threading.Thread(target=busy.channels[0].sendall, args=(sent,), daemon=True)
    writer.start()
    busy.busy(4)
    assert len(machine.kernels()) == 4
    received = bytearray()
    while len(received) < len(sent):
        received += busy.channels[0].recv(1 << 18)
    assert received == sent
    writer.join(10)
    busy.tell(b"!quit 7\n")
    assert busy.wait()[0] == 7
    assert len(machine.kernels()) == 3


@pytest.mark.parametrize("client, role", [("ssh", "classic"), ("plink", "compute")])
def test_a_front_end_that_has_gone_before_its_kernel_has_connected_ends_all(desk, machine, client, role):
    kernel = machine.install_kernel("never/10.1/MathKernel", "silent")
    end = launched(desk, machine, role, client=client, kernel=kernel)
    desk.wait_until(end, lambda: machine.kernels(), what="the kernel")
    end.close_listeners()
    rig.wait_until(lambda: "the front end has closed the main link" in log_of(desk, end), 3)
    assert end.wait(5)[0] == (0 if role == "compute" else 129)
    rig.wait_until(lambda: not machine.kernels(), 3)
    nothing_else(desk)


@pytest.mark.parametrize("arguments", [("callback",), ("shared",), ("callback", "--relay")])
def test_a_front_end_that_goes_during_the_login_ends_the_launch(desk, machine, arguments):
    """Here the login waits for an agent, as one does that asks its user each time."""
    with socket.socket(socket.AF_UNIX) as agent:
        path = machine.path("waiting-agent")
        agent.bind(path)
        agent.listen(9)
        agent.settimeout(20)
        lines = ["Host *", "IdentityAgent " + path]
        wrapper = machine.make_ssh(
            "waiting", lines + [each for each in machine.client_lines if "Agent" not in each]
        )
        end = launched(desk, machine, *arguments, env={"TUNNEL_SSH": wrapper[1]})
        asked, _ = agent.accept()
        end.close_listeners()
        assert end.wait(5)[0] == 129
        assert "the front end has closed the main link, and nothing is run for it" in log_of(desk, end)
        asked.close()
        os.remove(path)
    nothing_else(desk)
