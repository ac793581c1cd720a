"""What servers, jump hosts and login shells do and say: each harmless, or explained in one line."""

import os
import socket
import threading

import pytest
import rig
from conftest import make_machine
from launches import (
    ROLES,
    ends_with,
    key_lines,
    launched,
    log_of,
    nothing_else,
    parent,
    patched,
    server_of,
    tries,
    works,
)

clients = pytest.mark.parametrize("client", ["ssh", "plink"])
EXPOSED = "opens the forwarded ports to its whole network (GatewayPorts yes in its sshd_config)"

# Lines that mean something when a client says them, and nothing when anybody else does.
FAKED = [
    "debug1: Authentication succeeded (none).",
    'Authenticated to nowhere ([192.0.2.1]:22) using "none".',
    "debug1: Executing proxy command: exec nowhere",
    "debug1: Sending command: true",
    "debug1: Requesting forwarding of remote forward 127.0.0.1:2000 -> 127.0.0.1:2000",
    "debug1: mux_client_request_session: master session id: 2",
    "mux_client_request_session: session request failed: Session open refused by peer",
    "debug1: client_input_channel_req: channel 0 rtype exit-status reply 0",
    "debug1: Exit status 4",
    "Session sent command exit status 4",
    "Started a shell/command",
    "Main session channel closed",
    "Connecting to nowhere: Connection timed out",
    "ssh: connect to host nowhere port 22: Connection refused",
    "ssh: Could not resolve hostname nowhere: Name or service not known",
    "kex_exchange_identification: Connection closed by remote host",
    "Permission denied (publickey).",
    "john@nowhere: Permission denied (publickey,password).",
    "Error: remote port forwarding failed for listen port 2000",
    "Remote port forwarding from 127.0.0.1:2000 refused",
    "PTY allocation request failed on channel 0",
    "debug1: Remote: Server has disabled port forwarding.",
    "Couldn't open logfile /nowhere: Permission denied",
    "command-line: line 0: Bad configuration option: sessiontype",
    "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @",
    "Host key verification failed.",
    "the kernel has called back",
    "There is no valid password or licence; command not found: No such file or directory",
]


def kinds(client):
    """The kinds of launches that a client is there for: plink shares no connections."""
    return [role for role in ROLES if client == "ssh" or role != "shared"]


def failure(client):
    return 255 if client == "ssh" else 1


@pytest.fixture
def serve(request, machine):
    yield from server_of(request, machine)


class Relay:
    """A server on this machine's loopback that passes all connections on to ``machine``'s.

    :param first: what it says before that
    """

    def __init__(self, machine, first=b""):
        self.there, self.first, self.sockets = (machine.address, machine.port), first, []
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(20)
        self.port = self.listener.getsockname()[1]
        self._start(self._serve)

    @staticmethod
    def _start(work, *arguments):
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _serve(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            near.sendall(self.first)
            far = socket.create_connection(self.there)
            self.sockets += [near, far]
            self._start(self._copy, near, far)
            self._start(self._copy, far, near)

    @staticmethod
    def _copy(source, target):
        try:
            data = source.recv(1 << 16)
            while data:
                target.sendall(data)
                data = source.recv(1 << 16)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side has gone: the other will see that

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for each in self.sockets:
            each.close()


# -- jump hosts


@pytest.fixture(scope="module")
def gate(request):
    return make_machine(request, password=True)


@pytest.fixture(scope="module")
def cluster(request, gate):
    """A machine that only ``gate`` reaches."""
    return make_machine(request, behind=gate, password=True)


def through(gate, cluster, *lines, key=True):
    """ssh with a configuration that reaches ``cluster`` through ``gate``.

    :param lines: what it has for the gate, before all else
    :param key: whether it logs in on ``cluster`` with a key
    """
    config = ["Host gate"] + list(lines) + ["HostName {}".format(gate.address)]
    config += gate.client_lines + ["StrictHostKeyChecking accept-new"]
    config += ["Host cluster closed", "HostName {}".format(cluster.address), "ProxyJump gate"]
    config += ["Host closed", "Port 9", "Host cluster closed"] + key_lines(cluster, key)
    return {"TUNNEL_SSH": gate.make_ssh("through", config)[1]}


def test_banners_on_the_way_are_read_as_what_they_are(desk, gate, cluster):
    for each in (gate, cluster):
        each.write("banner", "\n".join(FAKED) + "\n")
        each.restart_server("Banner " + each.path("banner"))
    try:
        before = gate.logins(), cluster.logins()
        logs = works(desk, cluster, slow=True, host="john@cluster", env=through(gate, cluster))
        assert [tries(log) for log in logs] == [1] * 4
        assert (gate.logins(), cluster.logins()) == (before[0] + 4, before[1] + 4)
        end = desk.slow(cluster, "compute", host="john@cluster", env=through(gate, cluster))
        assert end.wait() == (0, "")
        assert "the kernel has called back after" not in log_of(desk, end)  # it has returned before
        desk.accept(end)
    finally:
        desk.close()
        gate.restart_server()
        cluster.restart_server()


REFUSALS = {
    "keys": (["PubkeyAuthentication no", "PasswordAuthentication no"], "refused the login"),
    "too many keys": (["IdentityFile {other}", "IdentitiesOnly yes"], "refused the login|too many keys"),
    "host key": (["UserKnownHostsFile {wrong}"], "the host key of .* has changed"),
    "port": (["Port 1"], "refused the connection"),
    "name": (["HostName no-such-host.invalid"], "no machine named"),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_a_jump_host_that_refuses_is_asked_once(desk, gate, cluster, name):
    lines, words = REFUSALS[name]
    other, wrong = gate.path("other"), gate.path("wrong")
    if not os.path.exists(other):
        rig.must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other)
        with open(other + ".pub") as stream:
            gate.write("wrong", "{} {}".format(gate.address, " ".join(stream.read().split()[:2])) + "\n", 0o600)
    gate.restart_server(*(["MaxAuthTries 1"] if name == "too many keys" else []))
    environ = through(gate, cluster, *[line.format(other=other, wrong=wrong) for line in lines])
    for role in ("classic", "shared"):
        before = gate.attempts()
        end = launched(desk, cluster, role, host="john@cluster", env=environ)
        ends_with(desk, end, 255, words, 20)
        assert gate.attempts() == before + (name not in ("port", "name"))
        log = log_of(desk, end)
        assert tries(log) + log.count(" shared connection: ") == 1


def test_a_machine_that_refuses_behind_a_jump_host_is_asked_once(desk, gate, cluster):
    before = cluster.attempts()
    environ = through(gate, cluster, key=False)
    end = desk.launch(cluster, "compute", host="john:wrong@cluster", env=environ)
    ends_with(desk, end, 255, "refused the login")
    assert cluster.attempts() == before + 1


def test_a_machine_that_a_jump_host_cannot_reach_is_not_told_as_overloaded(desk, gate, cluster):
    before = gate.logins()
    end = desk.launch(cluster, "compute", host="john@closed", env=through(gate, cluster))
    line = ends_with(desk, end, 255, "Connection refused|refused the connection", 20)
    assert "overloaded" not in line
    assert gate.logins() == before + 1


# -- what servers allow


@clients
def test_a_server_without_terminals_runs_one_kernel_and_that_is_the_one_watched(desk, serve, client):
    machine = serve("PermitTTY no")
    before = machine.kernel_starts()
    for _ in range(2):
        ends = [launched(desk, machine, role, client=client, slow=True) for role in kinds(client)]
        for end in ends:
            desk.accept(end)
        assert machine.kernel_starts() == before + len(ends)
        assert len(machine.kernels()) == len(ends)
        before = machine.kernel_starts()
        for end in ends:
            end.echo(1000)
            end.tell(b"!quit 7\n")
        for end in ends:
            assert end.wait()[0] == (0 if end.role == "compute" else 7)
        nothing_else(desk)
        logs = [log_of(desk, end) for end in ends]
        for log in logs:
            assert "allows no terminal" in log
            assert log.splitlines()[-1].endswith("with exit code 7")
    assert [tries(log) for log in logs] == [1] * len(ends)  # the first ones have left word


@clients
@pytest.mark.parametrize("line", ["AllowTcpForwarding no", "AllowTcpForwarding local", "DisableForwarding yes"])
def test_a_server_that_forwards_no_ports_is_explained(desk, serve, client, line):
    machine = serve(line)
    before, logins = machine.kernel_starts(), machine.logins()
    ends = [launched(desk, machine, role, client=client) for role in kinds(client)]
    for end in ends:
        ends_with(desk, end, failure(client), "set AllowTcpForwarding yes in its sshd_config", 20)
    if client == "ssh":
        assert machine.logins() == logins + len(ends)
        assert machine.kernel_starts() == before
    rig.wait_until(lambda: not machine.kernels(), 5)


@pytest.mark.parametrize("role", ["compute", "shared"])
def test_a_server_that_opens_none_of_the_ports_is_explained(desk, serve, role):
    machine = serve("PermitListen none")
    before = machine.logins()
    end = launched(desk, machine, role)
    ends_with(desk, end, 255, "5 blocks of ports were refused .* set AllowTcpForwarding yes", 20)
    assert machine.logins() == before + (5 if role == "compute" else 1)


@clients
@pytest.mark.parametrize("line", ["AllowTcpForwarding remote", "PermitOpen none"])
def test_a_server_that_lets_nobody_reach_its_loopback_is_explained_where_that_matters(desk, serve, client, line):
    machine = serve(line)
    works(desk, machine, kinds(client)[1:], client=client)
    end = desk.slow(machine, "classic", client=client)
    ends_with(desk, end, failure(client), "up to 11.0.*PermitOpen")


@clients
def test_a_server_that_opens_ports_to_its_network_is_told(desk, serve, client):
    machine = serve("GatewayPorts yes")
    for _ in range(2):
        own = [kind for kind in kinds(client) if kind != "shared"]  # there only the first login hears it
        for log in works(desk, machine, own, client=client):
            assert EXPOSED in log


@pytest.mark.parametrize("value", ["clientspecified", "no"])
def test_a_server_that_leaves_it_to_the_client_opens_nothing(desk, serve, value):
    machine = serve("GatewayPorts " + value)
    end = desk.launch(machine, "callback")
    desk.accept(end)
    assert set(machine.listeners(everywhere=True)) - set(machine.listeners()) == {machine.port}
    assert EXPOSED not in log_of(desk, end)


HARMLESS = {
    "little is allowed": [
        "MaxSessions 1",
        "MaxAuthTries 1",
        "LoginGraceTime 3",
        "AllowAgentForwarding no",
        "AllowStreamLocalForwarding no",
        "ClientAliveInterval 1",
        "ClientAliveCountMax 1",
        "RekeyLimit 1M",
        "SetEnv TERM=dumb",
    ],
    "a command of its own": ['ForceCommand echo wait; sleep 0.5; sh -c "$SSH_ORIGINAL_COMMAND"'],
    "a banner": ["Banner {folder}/banner"],
}


@clients
@pytest.mark.parametrize("name", list(HARMLESS))
def test_a_server_is_harmless(desk, serve, machine, client, name):
    machine.write("banner", "\n".join(FAKED) + "\n")
    serve(*[line.format(folder=machine.folder) for line in HARMLESS[name]])
    starts, logins = machine.kernel_starts(), machine.logins()
    roles = kinds(client)
    for log in works(desk, machine, roles, client=client):
        assert tries(log) == 1
    assert machine.kernel_starts() == starts + len(roles)
    assert machine.logins() == logins + len(roles)


@pytest.mark.parametrize("role", ["classic", "shared"])
def test_a_server_that_allows_no_session_is_explained(desk, serve, role):
    machine = serve("MaxSessions 0")
    before = machine.logins()
    end = launched(desk, machine, role)
    ends_with(desk, end, 255, "MaxSessions")
    assert machine.logins() <= before + 1 + 5  # shared connections are tried five times at most


def test_a_server_that_runs_something_else_is_explained(desk, serve):
    machine = serve("ForceCommand echo john may copy files only")
    end = desk.launch(machine, "compute")
    ends_with(desk, end, 1, "ended before it called back")
    assert "john may copy files only" in log_of(desk, end)


# -- logins


@clients
def test_a_banner_does_not_explain_a_refused_login(desk, serve, machine, client):
    machine.write("banner", "\n".join(FAKED) + "\n")
    serve("Banner {}".format(machine.path("banner")), "DenyUsers john")
    machine.client(client)  # which introduces plink to the machine
    for role in kinds(client)[::3]:
        before = machine.attempts()
        end = launched(desk, machine, role, client=client)
        ends_with(desk, end, failure(client), "refused the login")
        assert machine.attempts() == before + 1


@clients
@pytest.mark.parametrize("denied", [False, True], ids=["let in", "refused"])
def test_lines_before_the_servers_version_decide_nothing(desk, serve, client, denied):
    machine = serve(*(["DenyUsers john"] if denied else []))
    before = machine.attempts()
    # plink stops at a line that begins with "SSH-"; neither takes more than 1024 of them.
    with Relay(machine, "".join(line + "\r\n" for line in FAKED).encode()) as relay:
        host = "john@127.0.0.1:{}".format(relay.port)
        wrapper = machine.client(client)
        if client == "plink":
            rig.run(wrapper, "-ssh", "-P", str(relay.port), "nobody@127.0.0.1", "true", input="y\n\n")
            before = machine.attempts()
        if denied:
            end = desk.launch(machine, "classic", client=client, host=host)
            ends_with(desk, end, failure(client), "refused the login")
        else:
            (log,) = works(desk, machine, ["callback"], client=client, host=host)
            assert tries(log) == 1
        assert machine.attempts() == before + 1


def with_hosts(machine, lines):
    """ssh on a machine whose /etc/hosts has further lines."""
    with open("/etc/hosts") as stream:
        hosts = machine.write("hosts", stream.read() + "\n".join(lines) + "\n")
    script = 'mount --bind "$0" /etc/hosts && exec "$@"'
    words = "unshare -m --propagation private sh -c '{}' {} {}".format(script, hosts, machine.ssh)
    return machine.write("ssh-hosts", '#!/bin/sh\nexec {} "$@"\n'.format(words), 0o755)


@pytest.mark.parametrize("denied", [False, True], ids=["let in", "refused"])
def test_of_two_addresses_one_that_refuses_decides_nothing(desk, serve, denied):
    machine = serve(*(["DenyUsers john"] if denied else []))
    wrapper = with_hosts(machine, ["127.0.0.9 twofold", "{} twofold".format(machine.address)])
    before = machine.attempts()
    options = {"host": "john@twofold", "env": {"TUNNEL_SSH": wrapper}}
    if denied:
        end = desk.launch(machine, "classic", **options)
        ends_with(desk, end, 255, "refused the login")
    else:
        (log,) = works(desk, machine, ["classic"], **options)
        assert tries(log) == 1
    assert "127.0.0.9 port 22: Connection refused" in desk.logs()[0]
    assert machine.attempts() == before + 1


SLOW_LOGIN = "AuthorizedKeysCommand /bin/sh -c 'sleep {}; cat {}'"


def slow_to_log_in(serve, machine, seconds):
    keys = machine.path("home", ".ssh", "authorized_keys")
    command = SLOW_LOGIN.format(seconds, keys)
    return serve(command, "AuthorizedKeysCommandUser john", "AuthorizedKeysFile none")


@pytest.mark.parametrize("role", ["classic", "shared"])
def test_a_login_may_take_longer_than_an_answer(desk, serve, machine, role):
    slow_to_log_in(serve, machine, 1)  # for each of two questions
    before = machine.attempts()
    end = launched(desk, machine, role, "-o", "ConnectTimeout=1")
    desk.accept(end)
    end.echo(1000)
    assert machine.attempts() == before + 1


def test_a_login_that_stalls_is_not_told_as_a_host_that_does_not_answer(desk, serve, machine):
    slow_to_log_in(serve, machine, 30)
    end = patched(desk, machine, "classic", {"LOGIN_SECONDS": 2}, "-o", "ConnectTimeout=1")
    line = ends_with(desk, end, 255, "the login on .* did not come to an end within 2 s")
    assert "did not answer" not in line


def test_a_server_that_ends_a_login_which_takes_too_long_is_not_asked_again(desk, serve, machine):
    helper = machine.write("slow-askpass", "#!/bin/sh\nsleep 2\n", 0o755)
    serve("LoginGraceTime 1")
    before = machine.attempts()
    asking = {"TUNNEL_SSH": machine.make_keyless_ssh(), "SSH_ASKPASS": helper, "SSH_ASKPASS_REQUIRE": "force"}
    asking["DISPLAY"] = "x"
    end = desk.launch(machine, "compute", env=asking)
    ends_with(desk, end, 255, "closed the connection before the login|ended the login", 20)
    assert machine.attempts() == before + 1


# -- ports that somebody else holds


@clients
@pytest.mark.parametrize("position", [1, 4])
def test_a_port_that_the_kernel_would_listen_on_is_noticed_before_it_boots(desk, machine, client, position):
    block = rig.Ports()
    release = machine.occupy(block.first + 1 + position)
    try:
        end = desk.slow(machine, "classic", client=client, ports=(block.first, block.first + 1))
        desk.accept(end)
        end.echo(1000)
    finally:
        release()
        block.close()
    log = log_of(desk, end)
    assert "port {} is in use on the kernel machine".format(block.first + 1 + position) in log
    assert log.count("the kernel has called back") == 1
    assert tries(log) == 2


def test_blocks_that_are_all_held_are_explained(desk, machine):
    """Each block has a port that somebody answers at: then there is no sixth try."""
    block = rig.Ports()
    release = machine.occupy(block.first + 2)
    end = patched(
        desk,
        machine,
        "classic",
        {
            "draw_ports": "lambda: ({0}, {0} + 1)".format(block.first),
            "first_ports": "lambda _: tunnel.draw_ports()",
        },
    )
    try:
        ends_with(desk, end, 255, "5 blocks of ports were tried, and each had one in use", 30)
    finally:
        release()
        block.close()
    rig.wait_until(lambda: not machine.kernels(), 5)


# -- login shells

NOISE = (
    "echo 'debug1: Exit status 4'; echo 'bash: module: command not found'; echo 'Permission denied' >&2 || true"
)
RC_FILES = {
    "/bin/bash": ".bashrc",
    "/bin/dash": ".none",
    "/bin/csh": ".cshrc",
    "/bin/tcsh": ".tcshrc",
    "/usr/bin/fish": ".config/fish/config.fish",
    "/usr/bin/zsh": ".zshenv",
}
ODD = 'it\'s 50% "off" $HOME `pwd` $(pwd) !! !x \\ \\n ~ {a,b} [x] *? ; & | < > ^ # ( ) = , ä'


@pytest.fixture
def shells(machine):
    """Has john log in with another shell that prints things when it starts; call with its path."""
    passwd = machine.path("passwd")
    with open(passwd) as stream:
        text = stream.read()
    made = []

    def set_shell(path):
        if not os.access(path, os.X_OK):
            pytest.skip("needs {}; `python3 tests/run.py` installs it".format(path))
        with open(passwd, "w") as stream:
            stream.write(text.replace("{}:/bin/bash".format(machine.home), "{}:{}".format(machine.home, path)))
        name = os.path.join("home", RC_FILES[path])
        os.makedirs(os.path.dirname(machine.path(name)), exist_ok=True)
        noise = NOISE.replace(">&2", "") if "csh" in path else NOISE
        made.append(machine.write(name, noise + "\n"))

    yield set_shell
    with open(passwd, "w") as stream:
        stream.write(text)
    for path in made:
        os.remove(path)


@pytest.mark.parametrize("shell", list(RC_FILES))
def test_a_login_shell_gets_the_path_as_it_was_given(desk, machine, shells, shell):
    kernel = machine.install_kernel("opt/{}/10.1/MathKernel".format(ODD), "classic", "boot=0")
    shells(shell)
    works(desk, machine, ["classic", "compute", "shared"], kernel=kernel)


@pytest.mark.parametrize("shell", list(RC_FILES))
def test_a_missing_kernel_is_told_as_such_whatever_the_shell_and_the_folder(desk, machine, shells, shell):
    shells(shell)
    for share in ((), ("--share",)):
        for path in ("/opt/licensed/10.1/MathKernel", "/opt/license server/activate/10.1/MathKernel"):
            end = desk.launch(machine, "compute", *share, kernel=path)
            code, errors = end.wait()
            assert code != 0
            assert "there is no kernel {}".format(path) in errors, errors


@pytest.mark.parametrize("shell", list(RC_FILES))
def test_what_a_login_shell_prints_does_not_explain_why_a_kernel_ended(desk, machine, shells, shell):
    kernel = machine.install_kernel("ends/10.1/MathKernel", "exit=3")
    shells(shell)
    end = desk.launch(machine, "classic", kernel=kernel)
    ends_with(desk, end, 3, "ended before it called back, with exit code 3")


# -- what a kernel prints


# Without a terminal nothing tells plink's words from a kernel's.
@pytest.mark.parametrize("client, terminal", [("ssh", True), ("ssh", False), ("plink", True)])
def test_what_a_kernel_prints_decides_nothing(desk, serve, machine, client, terminal):
    serve(*([] if terminal else ["PermitTTY no"]))
    words = [stream + "=" + line for stream in ("stdout", "stderr") for line in FAKED]
    before = machine.kernel_starts()
    kernel = machine.install_kernel("prints/10.1/MathKernel", "classic", "boot=0.5", *words)
    works(desk, machine, ["classic", "compute"], kernel=kernel, client=client)
    assert machine.kernel_starts() == before + 2


# -- smaller things


def test_a_watchdog_that_somebody_has_killed_does_not_change_the_exit_code(desk, machine):
    end = desk.launch(machine, "classic")
    desk.accept(end)
    dogs = [pid for pid in rig.processes_with("tunnel-watchdog") if parent(pid) == end.launcher.pid]
    assert dogs
    for pid in dogs:
        rig.end_process(pid)
    end.echo(1000)
    end.tell(b"!quit 5\n")
    assert end.wait() == (5, "")


@clients
def test_link_names_too_short_to_be_replaced_are_explained(desk, machine, client):
    end = desk.launch(machine, "callback", host_of_links="::1", client=client)
    desk.wait_until(end, lambda: "the kernel has called back" in log_of(desk, end))
    assert "link name {} is too short to be replaced".format(end.link) in log_of(desk, end)


def test_a_digit_that_is_no_ascii_digit_is_no_number(desk, machine):
    kernel = machine.install_kernel("Wolfram/1\u0664.\u0661/1\u00b2/MathKernel", "classic", "boot=0")
    works(desk, machine, ["classic", "compute"], kernel=kernel)
