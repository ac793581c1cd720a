"""--share: one login for any number of compute kernels."""

import os
import signal
import time

import pytest
import rig
from rig.launches import ends_with, launched, log_of, masters, nothing_else, share_by_hand, sharing_ssh
from rig.processes import supervisor

FULL = "the shared connection takes no further kernel"
CALLED_BACK = "the kernel has called back"


def shared(desk, machine, *arguments, **options):
    return desk.launch(machine, "compute", "--share", *arguments, **options)


def works(end):
    assert end.wait(30) == (0, "")
    end.accept()
    end.echo(1000)


@pytest.fixture
def cheap(machine):
    """A program that takes a kernel's place on a connection, and never calls back."""
    return machine.write("cheap", "#!/bin/sh\nexec sleep 600\n", 0o755)


def test_one_login_serves_many_kernels(desk, machine):
    before = machine.logins()
    ends = []
    for _ in range(6):
        end = shared(desk, machine)
        ends.append(end)
        assert end.wait() == (0, "")
        end.accept()
    for end in ends:
        end.echo()
    assert machine.logins() == before + 1
    assert len(masters(desk)) == 1
    assert all(CALLED_BACK in log for log in desk.logs())
    for end in ends:
        end.quit()
    rig.wait_until(lambda: not machine.kernels(), 5)
    rig.wait_until(lambda: not machine.listeners(), 5, "the return of the forwards")
    nothing_else(desk)
    assert all(pid in masters(desk) for pid in desk.processes())


def test_launches_at_the_same_moment_log_in_once(desk, machine):
    before = machine.logins()
    ends = [shared(desk, machine) for _ in range(6)]
    for end in ends:
        works(end)
    assert machine.logins() == before + 1


def test_a_password_is_asked_for_once(desk, machine):
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    before = machine.logins()
    for _ in range(3):
        works(shared(desk, machine, host=host, env={"TUNNEL_SSH": machine.make_keyless_ssh()}))
    assert machine.logins() == before + 1


# -- how many kernels one connection takes


def launch_cheaply(desk, machine, cheap, count):
    ends = []
    for _ in range(count):
        ends.append(shared(desk, machine, kernel=cheap))
        assert ends[-1].wait(20)[0] == 0
    return ends


def test_sixty_four_kernels_take_seven_logins_on_a_default_server(desk, machine, cheap):
    logins, attempts = machine.logins(), machine.attempts()
    launch_cheaply(desk, machine, cheap, 64)
    assert machine.logins() == logins + 7
    assert machine.attempts() == attempts + 7  # nobody has knocked in vain
    assert "".join(desk.logs()).count(FULL) == 1  # from then on it was known
    rig.wait_until(lambda: len(kernels(machine)) == 64, 5, "sixty-four kernels")


def test_a_place_that_is_free_again_is_taken_again(desk, machine, cheap):
    before = machine.logins()
    launch_cheaply(desk, machine, cheap, 12)
    launchers = [
        pid for pid in desk.processes() if any("import tunnel_sub" in word for word in rig.command_line(pid))
    ]
    assert len(launchers) == 12
    for pid in launchers[:3]:
        os.kill(pid, signal.SIGTERM)
    for pid in launchers[3:6]:
        os.kill(pid, signal.SIGKILL)
    rig.wait_until(lambda: len(kernels(machine)) == 6, 5, "the end of six kernels")
    launch_cheaply(desk, machine, cheap, 14)
    assert machine.logins() <= before + 3  # 20 fill two, and the next may be made in advance
    rig.wait_until(lambda: len(kernels(machine)) == 20, 5, "twenty kernels")


def kernels(machine):
    """Those of the cheap kind: a launcher that knows the path returns before the last one is there."""
    return [pid for pid in machine.pids() if rig.command_line(pid)[:2] == ["sleep", "600"]]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_each_connection_is_filled_and_a_full_one_is_never_tried_again(desk, serve, most):
    machine = serve("MaxSessions {}".format(most))
    logins, attempts = machine.logins(), machine.attempts()
    for _ in range(6):
        works(shared(desk, machine))
    needed = 6 // most
    assert needed <= machine.logins() - logins <= needed + 1  # the next may be made in advance
    rig.wait_until(
        lambda: machine.attempts() - attempts == machine.logins() - logins, 5, "all who knock to log in"
    )
    assert "".join(desk.logs()).count(FULL) == 1
    assert len(machine.kernels()) == 6


def test_a_server_that_takes_fewer_sessions_than_before_is_believed(desk, serve, cheap):
    machine = serve("MaxSessions 4")
    launch_cheaply(desk, machine, cheap, 6)
    machine.restart_server("MaxSessions 1")
    for pid in machine.sessions():
        rig.end_process(pid)
    rig.wait_until(lambda: not masters(desk), 5)
    nothing_else(desk)
    before = "".join(desk.logs()).count(FULL)
    launch_cheaply(desk, machine, cheap, 4)
    assert "".join(desk.logs()).count(FULL) - before <= 1


def test_many_launches_at_the_same_moment_fill_connections_too(desk, machine, cheap):
    before = machine.logins()
    ends = [shared(desk, machine, kernel=cheap) for _ in range(16)]
    for end in ends:
        assert end.wait(60) == (0, "")
    assert machine.logins() <= before + 3
    # Nothing wrong has been learned: each connection still takes ten.
    launch_cheaply(desk, machine, cheap, 14)
    assert machine.logins() <= before + 4
    rig.wait_until(lambda: len(kernels(machine)) == 30, 5, "thirty kernels")


# -- connections that die


def test_a_stale_socket_is_no_obstacle(desk, machine):
    first = shared(desk, machine)
    works(first)
    first.quit()
    for pid in masters(desk):
        rig.end_process(pid)
    rig.wait_until(lambda: not masters(desk), 5)
    sockets = [name for name in os.listdir(str(desk.runtime / "tunnel")) if name.endswith("-0")]
    assert sockets  # it is still there, and nobody answers
    before = machine.logins()
    ends = [shared(desk, machine) for _ in range(6)]
    for end in ends:
        works(end)
    assert machine.logins() == before + 1


def test_a_connection_that_dies_takes_only_its_own_kernels_with_it(desk, machine):
    first = shared(desk, machine)
    works(first)
    for pid in masters(desk):
        rig.end_process(pid)
    works(shared(desk, machine))
    rig.wait_until(lambda: len(machine.kernels()) == 1, 5)
    rig.wait_until(lambda: "the connection was lost" in log_of(desk, first), 5)


def test_after_the_server_was_restarted_the_next_launch_makes_a_new_connection_at_once(desk, serve, machine):
    works(shared(desk, machine))
    for pid in machine.sessions():
        rig.end_process(pid)
    serve()
    before, begin = machine.logins(), time.monotonic()
    works(shared(desk, machine))
    assert machine.logins() == before + 1
    assert time.monotonic() - begin < 3


def test_a_connection_that_no_longer_answers_is_given_up_without_waiting_for_a_time_out(desk, own_machine):
    """The server's end of it hangs, as after a change of networks; whoever connects anew is served."""
    machine = own_machine
    works(shared(desk, machine))
    (path,) = (desk.runtime / "tunnel").glob("*-0")
    os.utime(str(path), (0, 0))  # the server has long done what it does for a login
    machine.freeze()
    before, begin = machine.logins(), time.monotonic()
    end = shared(desk, machine)
    code, errors = end.wait(30)
    took = time.monotonic() - begin
    machine.thaw()
    assert code == 0, errors
    assert machine.logins() == before + 1
    assert took < 6  # ServerAlive would take 60, ConnectTimeout 15
    end.accept()


def test_a_server_that_takes_its_time_after_a_login_is_logged_in_to_once(desk, own_machine, tmp_path):
    """As one that mounts a home directory for it."""
    machine = own_machine
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    os.mkfifo(there)
    os.mkfifo(back)
    text = '#!/bin/sh\n{} "$@"; code=$?\ncase " $* " in *" -N "*) echo >{}; read -r _ <{};; esac\nexit $code\n'
    wrapper = machine.write("ssh-slow", text.format(machine.ssh, there, back), 0o755)
    desk.alter(HUNG_SECONDS=0.5)
    before = machine.attempts()
    end = shared(desk, machine, env={"TUNNEL_SSH": wrapper})
    with open(there) as stream:
        stream.read()
    machine.freeze()
    with open(back, "w") as stream:
        stream.write("\n")
    rig.wait_until(lambda: "Requesting forwarding" in log_of(desk, end), 5)
    time.sleep(1)  # in which nothing must happen
    machine.thaw()
    end.accept()
    assert machine.attempts() == before + 1
    assert "trying again" not in log_of(desk, end)


def test_a_server_that_ends_a_new_connection_is_not_asked_for_shared_ones_again_and_again(desk, serve):
    machine = serve("ChrootDirectory /tmp")  # which others can write to: sshd gives up at the first session
    before = machine.attempts()
    end = shared(desk, machine)
    assert end.wait(20)[0] == 255
    assert machine.attempts() == before + 2
    assert "the shared connection that has just been made is gone" in log_of(desk, end)


def test_a_slow_launch_does_not_take_a_new_connections_socket_away(desk, machine):
    """It has found the connection dead; until it looks again, another has made a new one."""
    works(shared(desk, machine))
    for pid in masters(desk):
        rig.end_process(pid)
    rig.wait_until(lambda: not masters(desk), 5)
    # Its ssh stops for a while whenever somebody has told it that nobody answers.
    real = machine.ssh + ".real"
    text = (
        '#!/bin/sh\n[ -n "$SLOW" ] || exec {0} "$@"\n{0} "$@"\ncode=$?\n[ $code = 255 ] && sleep 1.5\nexit $code\n'
    )
    os.rename(machine.ssh, real)  # both launches know it by one name, or they would not share
    try:
        machine.write(os.path.basename(machine.ssh), text.format(real), 0o755)
        before = machine.logins()
        late = shared(desk, machine, env={"SLOW": "1"})
        rig.wait_until(lambda: "Connection refused" in log_of(desk, late), 5)
        quick = shared(desk, machine)
        works(quick)
        works(late)
        works(shared(desk, machine))
        assert machine.logins() == before + 1
    finally:
        os.rename(real, machine.ssh)


# -- where sockets can be

FOLDERS = ["with blanks", "50%C %h %%", 'it\'s "quoted"', "$HOME `pwd` \\ #", "ä ö", "long" * 30, "~", "a\tb"]


@pytest.mark.parametrize(
    "variable, name",
    [("XDG_RUNTIME_DIR", name) for name in FOLDERS] + [("TMPDIR", name) for name in FOLDERS[:2] + FOLDERS[5:6]],
)
def test_a_folder_of_any_name_is_no_obstacle(desk, machine, variable, name):
    folder = desk.runtime / name
    folder.mkdir(mode=0o700)
    environ = {"XDG_RUNTIME_DIR": str(desk.runtime) + "/none", variable: str(folder)}
    fallback = "/tmp/tunnel-{}".format(os.getuid())
    there = set(os.listdir(fallback)) if os.path.isdir(fallback) else set()
    if variable == "XDG_RUNTIME_DIR":
        desk.runtime = folder  # by this its processes are known
    before = machine.logins()
    try:
        for _ in range(2):
            works(shared(desk, machine, env=environ))
        assert machine.logins() == before + 1
    finally:
        desk.close()
        for left in set(os.listdir(fallback)) - there if os.path.isdir(fallback) else ():
            os.remove(os.path.join(fallback, left))


def test_the_socket_is_private(desk, machine):
    end = shared(desk, machine)
    assert end.wait()[0] == 0
    folder = desk.runtime / "tunnel"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert any(path.is_socket() for path in folder.iterdir())
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_written_is_no_obstacle(desk, machine):
    machine_folder = desk.runtime / "tunnel"
    machine_folder.write_text("somebody has a file there")
    end = shared(desk, machine)
    code, _ = end.wait()
    assert code == 0
    end.accept()
    end.echo(1000)
    assert "gets its own connection" in log_of(desk, end)


def test_plink_goes_without(desk, machine):
    end = shared(desk, machine, client="plink")
    works(end)
    assert "--share needs OpenSSH" in log_of(desk, end)


def test_taken_ports_are_replaced_on_a_shared_connection_too(desk, machine):
    works(shared(desk, machine))
    port = rig.free_port()
    release = machine.occupy(port)
    try:
        logins, attempts = machine.logins(), machine.attempts()
        end = shared(desk, machine, ports=(port, 0))
        works(end)
        assert "the next block of ports is" in log_of(desk, end)
        assert (machine.logins(), machine.attempts()) == (logins, attempts)
    finally:
        release()


# -- connections that the user shares already


def test_a_kernel_outlives_the_wait_for_an_answer_on_any_connection(desk, machine, users):
    """Kernels launched with ``ConnectTimeout=1`` are there long after that has passed."""
    limit = ("-o", "ConnectTimeout=1")
    ends = [
        shared(desk, machine, *limit),
        desk.launch(machine, "callback", *limit, env={"TUNNEL_SSH": users}),
        desk.launch(machine, "classic", *limit),
    ]
    assert ends[0].wait() == (0, "")
    ends.append(shared(desk, machine, *limit))
    for end in ends:
        end.accept()
    begin = time.monotonic()
    while time.monotonic() - begin < 2.5:
        for end in ends:
            end.echo(1000)
            end.busy(0.1)


@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
def test_a_connection_that_the_user_shares_is_used_and_its_forwards_are_taken_back(desk, machine, users, role):
    before = machine.logins()
    end = launched(desk, machine, role, env={"TUNNEL_SSH": users})
    end.accept()
    end.echo()
    assert machine.logins() == before
    end.tell(b"!quit 0\n")
    assert end.wait(10)[0] == 0
    end.close_listeners()
    desk.no_process()
    nothing_listens(desk, machine)


@pytest.mark.parametrize(
    "role, name", [("callback", "SIGTERM"), ("callback", "SIGKILL"), ("shared", "SIGHUP"), ("shared", "SIGKILL")]
)
def test_a_launcher_that_is_ended_leaves_no_forward_on_a_shared_connection(desk, machine, users, role, name):
    other = shared(desk, machine)  # which keeps the connection of --share
    other.accept()
    kept = machine.listeners()
    end = launched(desk, machine, role, env={"TUNNEL_SSH": users} if role == "callback" else {})
    end.accept()
    os.kill(supervisor(desk, end), getattr(signal, name))
    nothing_listens(desk, machine, kept)
    other.echo(1000)


@pytest.mark.parametrize("hangs", ["process", "network"])
def test_a_users_connection_that_hangs_is_passed_over(desk, own_machine, tmp_path, hangs):
    desk.alter(CONNECT_SECONDS=2, SHARED_SECONDS=1)
    wrapper = share_by_hand(own_machine, tmp_path)
    (master,) = [pid for pid in rig.processes_with(own_machine.folder) if "-M" in rig.command_line(pid)]
    try:
        if hangs == "process":
            os.kill(master, signal.SIGSTOP)
        else:
            for pid in own_machine.sessions():
                os.kill(pid, signal.SIGSTOP)
        end = launched(desk, own_machine, "callback", env={"TUNNEL_SSH": wrapper})
        end.accept()
        assert "or does not answer: trying again" in log_of(desk, end)
        end.quit()
        assert end.wait(10)[0] == 0
    finally:
        rig.end_process(master)
        for pid in own_machine.sessions():
            os.kill(pid, signal.SIGCONT)


def test_where_a_login_needs_a_person_their_connection_is_shared(desk, machine, tmp_path):
    unable = sharing_ssh(machine, tmp_path, key=False)
    before = machine.attempts()
    able = share_by_hand(machine, tmp_path)
    try:
        for _ in range(3):
            works(shared(desk, machine, env={"TUNNEL_SSH": unable}))
        assert machine.attempts() == before + 2  # one has been refused, and that is known
    finally:
        rig.run(able, "-O", "exit", machine.address)
    end = shared(desk, machine, env={"TUNNEL_SSH": unable})
    ends_with(desk, end, 255, "refused the login")


def test_a_kernel_that_ends_with_255_has_not_lost_its_connection(desk, machine):
    kernel = machine.install_kernel("all/10.1/MathKernel", "exit=255")
    desk.alter(VERIFY_SECONDS=5)  # else it may come after the launcher's return
    end = shared(desk, machine, kernel=kernel)
    ends_with(desk, end, 255, "ended before it called back, with exit code 255")


def nothing_listens(desk, machine, kept=()):
    rig.wait_until(lambda: machine.listeners() == list(kept), 5, "the return of the remote forwards")
    here = set(desk.local_ports())
    rig.wait_until(lambda: not here & set(rig.listening_ports()), 5, "the return of the local forwards")


def test_a_users_connection_that_is_full_is_left_as_it_was(desk, serve, tmp_path):
    machine = serve("MaxSessions 1")
    wrapper = share_by_hand(machine, tmp_path)
    try:
        first = launched(desk, machine, "compute", env={"TUNNEL_SSH": wrapper})
        works(first)
        kept = machine.listeners()
        before = machine.logins()
        for role in ("compute", "classic"):
            end = launched(desk, machine, role, env={"TUNNEL_SSH": wrapper})
            end.accept()
            end.echo(1000)
            end.quit()
            end.wait(10)
        assert machine.logins() == before + 2
        rig.wait_until(lambda: machine.listeners() == kept, 5, "the return of the forwards")
        first.echo(1000)
    finally:
        rig.run(wrapper, "-O", "exit", machine.address)


@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
def test_a_users_connection_without_terminals_runs_one_kernel(desk, serve, tmp_path, role):
    machine = serve("PermitTTY no")
    wrapper = share_by_hand(machine, tmp_path)
    try:
        before = machine.kernel_starts()
        end = launched(desk, machine, role, slow=True, env={"TUNNEL_SSH": wrapper})
        end.accept()
        end.echo(1000)
        assert machine.kernel_starts() == before + 1
    finally:
        rig.run(wrapper, "-O", "exit", machine.address)


def test_a_lost_shared_connection_is_said(desk, machine, users):
    end = desk.launch(machine, "classic", env={"TUNNEL_SSH": users})
    end.accept()
    rig.run(users, "-O", "exit", machine.address)
    code, errors = end.wait(10)
    assert code == 255
    assert "the connection was lost" in errors


def test_whoever_types_a_second_factor_may_take_longer_than_a_host_that_does_not_answer(desk, machine):
    """The user's own password helper, slow as a person is, while the shared connection is being made."""
    helper = machine.write("slow-askpass", "#!/bin/sh\nsleep 2.5\necho '{}'\n".format(rig.PASSWORD), 0o755)
    wrapper = machine.make_keyless_ssh()
    asking = {"TUNNEL_SSH": wrapper, "SSH_ASKPASS": helper, "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": "x"}
    works(shared(desk, machine, "-o", "ConnectTimeout=1", env=asking))
