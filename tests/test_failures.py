"""Launches that fail: each ends by itself, in time, with one line that says what to do."""

import errno
import os
import re
import signal
import socket
import sys
import time

import pytest
import rig
from rig import frontend, product
from rig.desk import make_machine
from rig.launches import clients, ends_with, fails, failure, key_lines, launched, log_of, nothing_else, patched
from rig.servers import silent_server


@clients
@pytest.mark.parametrize("role", ["classic", "compute"])
def test_no_such_host(desk, machine, client, role):
    end = desk.launch(machine, role, client=client, host="no-such-host.invalid")
    fails(desk, end, failure(client), "no machine named no-such-host.invalid", 10)


@clients
def test_refused_connection(desk, machine, client):
    end = desk.launch(machine, "compute", client=client, host="{}:{}".format(machine.destination, 1))
    fails(desk, end, failure(client), "refused the connection: no SSH server listens", 5)


@clients
def test_wrong_password(desk, machine, client):
    host = "john:wrong-{}@{}".format(rig.PASSWORD, machine.address)
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    end = desk.launch(machine, "compute", host=host, env={"TUNNEL_SSH": wrapper})
    line = fails(desk, end, failure(client), "refused the login", 10)
    assert rig.PASSWORD not in line + "".join(desk.logs())


@clients
@pytest.mark.parametrize("display", ["", "127.0.0.1:99"], ids=["without a display", "with a display"])
def test_no_password_and_no_key_waits_for_no_terminal_and_guesses_nothing(desk, machine, client, display):
    """An ssh that can ask nobody sends an empty password, three times: fail2ban counts them."""
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    failed, attempts = machine.server_log().count("Failed password"), machine.attempts()
    environ = {"TUNNEL_SSH": wrapper, "DISPLAY": display, "SSH_ASKPASS_REQUIRE": "", "SSH_ASKPASS": ""}
    end = desk.launch(machine, "classic", env=environ)
    line = fails(desk, end, failure(client), "refused the login", 10)
    assert "check user, password and keys" in line
    assert (
        "{} -l john {} ".format(os.path.basename("plink" if client == "plink" else "ssh"), machine.address) in line
    )
    assert machine.attempts() == attempts + 1
    assert machine.server_log().count("Failed password") <= failed + bool(display)


@clients
def test_password_login(desk, machine, client):
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    end = desk.launch(machine, "callback", host=host, env={"TUNNEL_SSH": wrapper})
    end.accept()
    end.echo()
    for pid in desk.processes():
        assert pid == end.launcher.pid or rig.PASSWORD not in str(rig.command_line(pid))
        if pid != end.launcher.pid:
            with open("/proc/{}/environ".format(pid), "rb") as stream:
                assert rig.PASSWORD.encode() not in stream.read()
    end.tell(b"!quit 0\n")
    assert end.wait()[0] == 0
    assert rig.PASSWORD not in "".join(desk.logs())


def test_password_is_not_given_to_a_jump_host(request, desk):
    jump = make_machine(request, password=True)
    target = make_machine(request, behind=jump, password=True)
    lines = ["Host gate", "HostName {}".format(jump.address), "User john", "PubkeyAuthentication no"]
    lines += ["UserKnownHostsFile {}".format(jump.known_hosts), "StrictHostKeyChecking accept-new"]
    lines += ["Host cluster", "HostName {}".format(target.address), "ProxyJump gate"] + target.client_lines
    _, wrapper = jump.make_ssh("asking", lines)
    host = "john:{}@cluster".format(rig.PASSWORD)
    end = desk.launch(target, "compute", host=host, env={"TUNNEL_SSH": wrapper})
    fails(desk, end, 255, "asks for what nobody can answer here", 5)
    asked = "asked for something else than the password, not answered: john@{}"
    assert asked.format(jump.address) in desk.logs()[0]
    assert "password for john" not in jump.server_log()  # accepted or refused


def test_unknown_host_key_is_accepted_and_remembered_by_ssh(desk, machine):
    if os.path.exists(machine.known_hosts):
        os.remove(machine.known_hosts)
    end = desk.launch(machine, "compute")
    end.accept()
    assert machine.address in open(machine.known_hosts).read()


def test_unknown_host_key_is_refused_by_plink_with_its_fingerprint(desk, machine):
    end = desk.launch(machine, "classic", env={"TUNNEL_SSH": machine.make_plink(trusted=False)})
    line = fails(desk, end, 1, r"host key of \S+ is unknown \(ssh-ed25519 255 SHA256:\S+\)", 5)
    assert "plink" in line
    assert not machine.kernels()


def test_changed_host_key_is_refused_by_ssh(desk, machine):
    machine.shell("true")
    with open(machine.path("id.pub")) as stream:
        other = stream.read().split()[1]
    config = [line for line in machine.client_lines if not line.startswith("UserKnownHosts")]
    known = machine.write("known_wrong", "{} ssh-ed25519 {}\n".format(machine.address, other), 0o600)
    _, wrapper = machine.make_ssh("wrong", ["Host *"] + config + ["UserKnownHostsFile {}".format(known)])
    end = desk.launch(machine, "classic", env={"TUNNEL_SSH": wrapper})
    line = fails(desk, end, 255, r"host key of \S+ has changed", 5)
    assert "ssh-keygen -R" in line
    assert not machine.kernels()


def test_changed_host_key_is_refused_by_plink(desk, own_machine):
    wrapper = own_machine.make_plink()
    os.remove(own_machine.path("host_key"))
    rig.must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own_machine.path("host_key"))
    own_machine.restart_server()
    end = desk.launch(own_machine, "compute", env={"TUNNEL_SSH": wrapper})
    fails(desk, end, 1, r"host key of \S+ has changed", 5)
    assert not own_machine.kernels()


@clients
@pytest.mark.parametrize("role", ["classic", "compute"])
def test_no_such_kernel(desk, machine, client, role):
    end = desk.launch(machine, role, client=client, kernel="/opt/Mathematica/10.1/no such/MathKernel")
    fails(desk, end, 127, "there is no kernel /opt/Mathematica/10.1/no such/MathKernel", 5)


@clients
def test_kernel_that_is_not_executable(desk, machine, client):
    path = machine.write("plain", "text")
    end = desk.launch(machine, "compute", client=client, kernel=path)
    fails(desk, end, 126, "cannot be executed", 5)


@clients
@pytest.mark.parametrize(
    "behaviour, code, words",
    [("unlicensed", 1, "found no licence"), ("early", 3, "ended before it called back, with exit code 3")],
)
def test_kernel_that_ends_before_it_calls_back(desk, machine, client, behaviour, code, words):
    kernel = machine.install_kernel(behaviour + "/10.1/MathKernel")
    machine.behave(kernel, behaviour)
    desk.alter(VERIFY_SECONDS=3)  # on a busy machine
    for role in ("classic", "compute"):
        fails(desk, desk.launch(machine, role, client=client, kernel=kernel), code, words, 5)


def test_connection_lost_later(desk, machine):
    end = desk.launch(machine, "classic")
    end.accept()
    for pid in machine.sessions():
        if "sshd:" in str(rig.command_line(pid)):
            rig.end_process(pid)
    fails(desk, end, 255, "the connection was lost", 5)
    rig.wait_until(lambda: not machine.kernels(), 5)


def test_no_client(desk, machine):
    end = desk.launch(machine, "classic", "--client", "/no/such/ssh")
    code, errors = end.wait()
    assert code == 69
    assert "looked for /no/such/ssh" in errors


def test_a_server_that_says_nothing_is_given_up_in_the_time_that_was_asked_for(desk, machine):
    port, end_server = silent_server()
    named, end_named_server = silent_server(b"SSH-2.0-OpenSSH_9.2\r\n")
    host, named_host = ("john@127.0.0.1:{}".format(each) for each in (port, named))
    try:
        ends = [
            desk.launch(machine, "compute", "-o", "ConnectTimeout=" + text, host=host)
            for text in ("2", "2s", "0m2S", "1s1s")
        ]
        ends.append(desk.launch(machine, "classic", "-o", "connecttimeout=2", host=named_host))
        ends.append(patched(desk, machine, "classic", {"CONNECT_SECONDS": 2}, host=host))
        environ = {"TUNNEL_SSH": machine.make_plink()}
        ends.append(patched(desk, machine, "classic", {"CONNECT_SECONDS": 2}, host=host, env=environ))
        wrong = desk.launch(machine, "classic", "-o", "ConnectTimeout=soon", host=host)
        for end in ends:
            code, errors = end.wait(10)
            assert (code, len(errors.splitlines())) == (failure("plink" if end is ends[-1] else "ssh"), 1)
            assert "127.0.0.1 did not answer within 2 s; check the name, the port" in errors
        code, errors = wrong.wait()
        assert code == 255
        assert "the client rejected its options" in errors
    finally:
        end_server()
        end_named_server()


@pytest.mark.parametrize("text", ["0", "1m", "90"])
def test_a_server_that_may_take_its_time_gets_it(desk, machine, text):
    """With 1 s as the launcher's own limit, and a server that goes away without a word after more than that."""
    port, end_server = silent_server()
    begin = time.monotonic()
    host = "john@127.0.0.1:{}".format(port)
    end = patched(
        desk, machine, "classic", {"CONNECT_SECONDS": 1, "TRIES": 1}, "-o", "ConnectTimeout=" + text, host=host
    )
    try:
        with pytest.raises(Exception, match="timed out"):
            end.launcher.wait(2.5 - (time.monotonic() - begin))
    finally:
        end_server()
    fails(desk, end, 255, "closed the connection before the login", 10)


PAM = "auth required pam_permit.so\nsession required pam_permit.so\naccount required "
NOBODY = dict.fromkeys(("DISPLAY", "WAYLAND_DISPLAY", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE"), "")
WAYS = {  # client, role and arguments of a launch
    "ssh": ("ssh", "classic"),
    "shared": ("ssh", "shared"),
    "relay": ("ssh", "callback", "--relay"),
    "plink": ("plink", "classic"),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@ways
def test_an_account_that_is_not_let_in_is_told_so_in_the_servers_words(desk, serve, machine, way):
    machine.write("nologin", "The cluster is down for maintenance until Monday.\n")
    machine.client(way[0])  # which introduces plink to the machine
    serve(pam=PAM + "pam_nologin.so file={}\n".format(machine.path("nologin")))
    before = machine.attempts()
    end = launched(desk, machine, *way[1:], client=way[0])
    line = fails(desk, end, failure(way[0]), "closed the connection during the login; it may not let this", 10)
    assert line.endswith("; it said: The cluster is down for maintenance until Monday.") == (way[0] == "ssh")
    assert "MaxStartups" not in line
    assert machine.attempts() == before + 1


@pytest.fixture
def expired(serve, machine):
    """The machine, on which john's password has expired."""
    machine.make_plink()
    with open(machine.path("shadow")) as stream:
        text = stream.read()
    machine.write("shadow", text.replace(":19000:0:99999:", ":19000:0:90:"), 0o600)
    yield serve(pam=PAM + "pam_unix.so\n")
    machine.write("shadow", text, 0o600)


@ways
def test_an_expired_password_is_told_as_such(desk, expired, way):
    """The server lets john in, but forwards nothing, and runs nothing but a change of the password."""
    before = expired.logins()
    end = launched(desk, expired, *way[1:], client=way[0])
    words = (
        "the password on .* has expired; log in by hand and change it: {} -l john .*You are required to change "
    )
    code = 255 if "--relay" in way else failure(way[0])
    line = ends_with(desk, end, code, words.format(way[0]))
    assert "AllowTcpForwarding" not in line
    assert "the next block of ports" not in log_of(desk, end)
    assert expired.logins() == before + 1


@ways
def test_a_login_that_needs_a_second_step_is_told_as_such(desk, serve, machine, way):
    machine.client(way[0])
    serve("AuthenticationMethods publickey,password")
    before = machine.attempts()
    end = launched(desk, machine, *way[1:], client=way[0], env=NOBODY)
    line = fails(
        desk, end, failure(way[0]), "needs a second step, which nobody has taken here .*ControlMaster", 10
    )
    assert "check user, password and keys" not in line
    assert machine.attempts() == before + 1


WRAPPER = "could not start the kernel: .*WolframKernel: line 3: exec: MathKernel: not found"
INTERPRETER = "could not start the kernel: .*WolframKernel: .*(bad interpreter|required file not found)"


@pytest.mark.parametrize(
    "text, words, arguments",
    [
        ('#!/bin/bash\nmodule load mathematica\nexec MathKernel "$@"\n', WRAPPER, ()),
        ('#!/bin/bash\nmodule load mathematica\nexec MathKernel "$@"\n', WRAPPER, ("--relay",)),
        ("#!/bin/sh\r\nexit 0\r\n", INTERPRETER, ()),
        ("#!/no/such/sh\nexit 0\n", INTERPRETER, ()),
        ("#!/no/such/sh\nexit 0\n", INTERPRETER, ("--relay",)),
    ],
)
def test_a_script_in_place_of_the_kernel_is_told_from_one_that_is_not_there(desk, machine, text, words, arguments):
    path = machine.write("home/WolframKernel", text, 0o755)
    for kernel in (path, "~/WolframKernel"):
        end = launched(desk, machine, "callback", *arguments, kernel=kernel)
        code, errors = end.wait(10)
        assert code in (126, 127)
        assert re.search(words, errors), errors
        assert "there is no kernel" not in errors


def test_what_a_login_says_that_runs_no_kernel_is_told(desk, serve):
    machine = serve("ForceCommand echo This service allows sftp connections only.; exit 1")
    end = desk.launch(machine, "classic")
    fails(
        desk,
        end,
        1,
        r"ended before it called back, with exit code 1 \(This service allows sftp connections only",
        10,
    )


@clients
def test_a_start_up_file_that_replaces_the_shell_on_a_terminal_shows_in_the_advice(desk, machine, client):
    """`ssh host command` works then, and with a terminal, as a launch has one, the command never runs."""
    machine.client(client)
    start_up = machine.write("home/.bashrc", "[ -t 1 ] && exec cat\n")
    try:
        environ = {"TUNNEL_SSH": machine.client(client)}
        end = patched(desk, machine, "classic", {"CALLBACK_SECONDS": 1}, env=environ)
        rig.wait_until(lambda: "has not called back" in log_of(desk, end), 10, "the note")
        flag = "-tt" if client == "ssh" else "-t"
        words = r"has not called back within 1 s; run it by hand: \S+ -l john {} .*start-up file .* try --relay\n"
        assert re.search(words.format(flag), log_of(desk, end))
        end.signal()
        end.wait(10)
    finally:
        os.remove(start_up)


@clients
def test_a_kernel_that_a_signal_has_ended_is_told_so(desk, machine, client):
    """As the system does when memory runs out: no exit code is told then."""
    end = desk.launch(machine, "classic", client=client)
    end.accept()
    for pid in machine.kernels():
        os.kill(pid, signal.SIGKILL)
    code, errors = end.wait(10)
    assert (code, errors) == (255 if client == "ssh" else 128, "")
    last = log_of(desk, end).splitlines()[-1]
    assert re.search(r" the kernel was ended by a signal \(out of memory\?\) after \d+ s$", last), last


def test_dropped_connections_are_tried_again(desk, serve):
    machine = serve("MaxStartups 1:50:100")
    ends = [desk.launch(machine, "compute") for _ in range(8)]
    for end in ends:
        assert end.wait(60)[0] == 0
        end.accept()
        end.echo()


@clients
def test_a_server_that_drops_all_connections_is_given_up_after_five(desk, serve, client):
    machine = serve("MaxStartups 1:100:1")
    guest = socket.create_connection((machine.address, machine.port))  # as many as it lets in at once
    try:
        assert guest.recv(4) == b"SSH-"
        before = machine.attempts()
        end = desk.launch(machine, "compute", client=client)
        line = fails(
            desk, end, failure(client), "closed the connection before the login; it may be overloaded", 20
        )
        assert "trying again" not in desk.logs()[0].splitlines()[-2]
        assert machine.attempts() == before + 5
        assert "blocks" not in line
    finally:
        guest.close()


def test_forwards_and_commands_in_the_configuration_do_not_break_a_launch(desk, machine):
    taken = rig.free_port()
    holder = socket.socket()
    holder.bind(("127.0.0.1", taken))
    holder.listen(1)
    lines = ["Host *"] + machine.client_lines
    lines += ["LocalForward 127.0.0.1:{} 127.0.0.1:9".format(taken), "RemoteCommand false", "RequestTTY no"]
    _, wrapper = machine.make_ssh("busy", lines)
    try:
        end = desk.launch(machine, "classic", env={"TUNNEL_SSH": wrapper})
        end.accept()
        end.echo()
        assert "without regard to it" in desk.logs()[0]
    finally:
        holder.close()


def test_a_full_disk_ends_the_log_and_not_the_launch(desk, machine):
    size = (
        "import resource as r,os,sys; r.setrlimit(r.RLIMIT_FSIZE, (400, 400)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    end = frontend.FrontEnd("classic")
    desk.front_ends.append(end)
    script = str(desk.folder / "tunnel.py")
    command = [sys.executable, "-c", size, sys.executable, script, machine.destination, machine.classic]
    end.launch(command=command, environment=desk.environment(machine))
    end.accept()
    end.echo()
    end.tell(b"!quit 0\n")
    code, errors = end.wait()
    assert code == 0
    assert "ends here" in errors
    assert len(desk.logs()[0]) <= 400


def test_plink_older_than_0_77_is_refused_where_it_would_need_the_password_in_its_arguments(desk, machine):
    real = machine.make_plink(key=False)
    os.makedirs(machine.path("old"), exist_ok=True)
    old = machine.write(
        "old/plink",
        '#!/bin/sh\ncase "$*" in\n*-pwfile*) echo \'plink: unknown option "-pwfile"\' >&2; exit 1 ;;\nesac\n'
        'exec {} "$@"\n'.format(real),
        0o755,
    )
    before = machine.attempts()
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    end = desk.launch(machine, "compute", host=host, env={"TUNNEL_SSH": old})
    line = fails(desk, end, 1, "older than 0.77, .* install a newer PuTTY, or log in with a key", 5)
    assert machine.attempts() == before
    assert rig.PASSWORD not in line + "".join(desk.logs())


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


@clients
def test_a_kernel_that_cannot_reach_its_link_is_explained(desk, machine, client):
    """The front end has gone, all its listeners with it, in the moment in which the kernel connects."""
    desk.alter(FRONT_END_SECONDS=60)
    end = launched(desk, machine, "classic", client=client, slow=True)
    desk.wait_until(end, lambda: machine.kernels(), what="the kernel")
    end.close_listeners()
    assert end.wait(10)[0] not in (0, None)
    assert "the front end does not answer at" in log_of(desk, end)
    rig.wait_until(lambda: not machine.kernels(), 5)


def test_a_peer_that_has_gone_by_the_time_its_socket_is_set_up_ends_one_channel():
    """macOS refuses TCP_NODELAY then."""
    near, far = socket.socketpair()

    class Gone:
        """A connection of which the system says that it is none any more."""

        def __getattr__(self, name):
            return getattr(near, name)

        def setsockopt(self, *_):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    loop, told = product.Loop(), []
    end = product.SocketEnd(loop, Gone())
    end.on_finish = lambda: told.append("finished")
    end.resume()
    far.close()
    loop.step()
    assert told == ["finished"]
    end.close()


def test_a_slow_look_up_in_the_configuration_keeps_no_password_back(desk, machine):
    """ssh goes through it for each login, and for the question who logs in."""
    lines = ['Match exec "sleep 5.5; true"', "Compression yes", "Host *"] + key_lines(machine, key=False)
    environ = {"TUNNEL_SSH": machine.make_ssh("slow", lines)[1], "PYTHONHOME": "/nowhere"}
    end = desk.launch(machine, "classic", host="john:{}@{}".format(rig.PASSWORD, machine.address), env=environ)
    end.accept()
    end.quit()
    assert end.wait(10)[0] == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_the_system_does_not_give_is_no_defect(number):
    def fail():
        raise OSError(number, os.strerror(number), "/run/x")

    assert product.guarded(fail) == (69, "no room is left below /run/x: " + os.strerror(number))

    def fail_without_a_name():  # as mkfifo and write do
        raise OSError(number, os.strerror(number))

    line = "no room is left below {}: ".format(product.private_folder(os.environ)) + os.strerror(number)
    assert product.guarded(fail_without_a_name) == (69, line)


def test_no_further_process_is_no_defect(monkeypatch):
    def fail():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fail)
    code, text = product.guarded(lambda: product.spawn(["/bin/true"], {}, (None, None, None)))
    assert (code, text[:37]) == (69, "no further process can be started (Re")


def test_too_little_memory_is_no_defect():
    def fail():
        raise MemoryError

    assert product.guarded(fail) == (69, "there is not enough memory: raise the limit (ulimit -v)")


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
