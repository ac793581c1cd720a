"""What users have in their ssh configuration, and which ssh they have: each harmless, or explained in one line."""

import contextlib
import os
import socket

import pytest
import rig
from rig import frontend
from rig.desk import make_machine
from rig.launches import DIAL, ROLES, configured, ends_with, key_lines, log_of, tries, works


@pytest.fixture
def taken():
    """A port of this machine's loopback that somebody has."""
    (listener,) = frontend.listening_pair(ports=(rig.free_port(),))
    yield listener.getsockname()[1]
    listener.close()


# Together where they say nothing about the same: each alone has to be harmless, so all are.
HARMLESS = {
    "what the command line overrules": [
        "ForwardX11 yes",
        "ClearAllForwardings yes",
        "SessionType none",
        "ForkAfterAuthentication yes",
        "BatchMode yes",
        "RemoteCommand false",
        "RequestTTY no",
        "Tunnel yes",
        "ExitOnForwardFailure no",
        "ConnectTimeout 1",
        "ConnectionAttempts 3",
        "ServerAliveInterval 0",
        "StrictHostKeyChecking ask",
    ],
    "what is quiet": ["LogLevel QUIET", "StdinNull yes", "EscapeChar none", "Tunnel ethernet", "RequestTTY force"],
    "what speaks": [
        "LogLevel DEBUG3",
        "VisualHostKey yes",
        "FingerprintHash md5",
        "PermitLocalCommand yes",
        "LocalCommand echo debug1: Exit status 4; echo debug1: Exit status 4 >&2",
        "KnownHostsCommand /bin/echo debug1: Exit status 4",
        'Match exec "echo debug1: Exit status 4 >&2; true"',
        "SessionType subsystem",
    ],
    "what speaks in another form": ["LogVerbose *:*:*"],
    "what shares connections": ["ControlMaster auto", "ControlPath {folder}/users-%C", "ControlPersist 60"],
    "what asks before it shares": ["ControlMaster autoask", "ControlPath {folder}/users-%C"],
    "the rest": [
        "Include {folder}/included",
        "IgnoreUnknown Unheard*",
        "UnheardOf yes",
        "SendEnv *",
        "SetEnv TERM=dumb",
        "EnableEscapeCommandline yes",
        "Compression yes",
        "RekeyLimit 1M",
        "IPQoS lowdelay throughput",
        "ServerAliveCountMax 1",
        "GSSAPIAuthentication yes",
        "GSSAPIDelegateCredentials yes",
        "HashKnownHosts yes",
        "CheckHostIP yes",
        "UpdateHostKeys ask",
        "CanonicalizeHostname always",
        "CanonicalDomains example.invalid",
        "GatewayPorts yes",
        "PermitRemoteOpen none",
        "AddKeysToAgent ask",
        "PreferredAuthentications keyboard-interactive,publickey",
        "RemoteForward 0 127.0.0.1:9",
        "StreamLocalBindUnlink yes",
        "LocalForward {folder}/agent.sock 127.0.0.1:9",
    ],
}


@pytest.mark.parametrize("name", list(HARMLESS))
def test_a_configuration_is_harmless(desk, machine, name):
    machine.write("included", "LogLevel QUIET\nStdinNull yes\n")
    open(machine.path("agent.sock"), "w").close()
    before = machine.logins()
    logs = works(desk, machine, env={"TUNNEL_SSH": configured(machine, *HARMLESS[name])})
    assert [tries(log) for log in logs] == [1] * len(ROLES)
    assert machine.logins() == before + len(ROLES)
    # No connection of the user's is left for others.
    assert not [name for name in os.listdir(machine.folder) if name.startswith("users-")]


FOREIGN_FORWARDS = {
    "local port": "LocalForward 127.0.0.1:{taken} 127.0.0.1:9",
    "local socket": "LocalForward {folder}/taken.sock 127.0.0.1:9",
    "socks": "DynamicForward 127.0.0.1:{taken}",
    "remote port": "RemoteForward 127.0.0.1:65500 127.0.0.1:9",
    "agent of gpg": "RemoteForward /run/rig/home/S.gpg-agent {folder}/taken.sock",
}


@pytest.mark.parametrize("name", list(FOREIGN_FORWARDS))
def test_a_forward_of_the_configuration_that_fails_is_no_obstacle(desk, machine, taken, name):
    for path in (machine.path("taken.sock"), machine.path("home", "S.gpg-agent")):
        open(path, "w").close()
    release = machine.occupy(65500)  # which no front end here draws
    before = machine.kernel_starts()
    line = FOREIGN_FORWARDS[name].replace("{taken}", str(taken))
    try:
        logs = works(desk, machine, slow=True, env={"TUNNEL_SSH": configured(machine, line)})
    finally:
        release()
    assert machine.kernel_starts() == before + len(ROLES)
    for log in logs:
        before, found, _ = log.partition("without regard to it")
        # The server may not have taken the first try's ports back when the second asks for them.
        assert found and "next block" not in before


def test_an_x11_forward_that_was_asked_for_and_fails_is_harmless(desk, machine):
    asking = ("-o", "ForwardX11=yes", "-o", "ForwardX11Trusted=yes")
    (log,) = works(desk, machine, ["classic"], asking, env={"DISPLAY": "127.0.0.1:99"})
    assert "X11 forwarding request failed" in log
    assert tries(log) == 1


def through_a_proxy(machine):
    """The line of a configuration with which ssh leaves the connection to a program."""
    dial = machine.write(DIAL, DIALLER)
    return "ProxyCommand {} {} {} {}".format(rig.kernel_python(), dial, machine.address, machine.port)


DIALLER = """
import os, socket, sys, threading
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def copy():
    data = os.read(0, 65536)
    while data:
        there.sendall(data)
        data = os.read(0, 65536)
    os._exit(0)
threading.Thread(target=copy, daemon=True).start()
data = there.recv(65536)
while data:
    os.write(1, data)
    data = there.recv(65536)
os._exit(0)
"""


@pytest.mark.parametrize("role", ["classic", "compute", "shared"])
def test_a_configuration_for_ipv6_only_is_no_obstacle(desk, machine, role):
    """Links are on 127.0.0.1. ssh connects through a proxy, since the machine has no IPv6 address."""
    before = machine.kernel_starts()
    wrapper = configured(machine, "AddressFamily inet6", through_a_proxy(machine))
    works(desk, machine, [role], slow=True, env={"TUNNEL_SSH": wrapper})
    assert machine.kernel_starts() <= before + 2


def test_an_address_family_that_was_asked_for_is_explained(desk, machine):
    environ = {"TUNNEL_SSH": configured(machine, through_a_proxy(machine))}
    end = desk.launch(machine, "classic", "-o", "AddressFamily=inet6", env=environ)
    ends_with(desk, end, 255, "AddressFamily leaves out the loopback address")


REJECTED = "the client rejected its options"
WRONG = {
    "BindAddress 192.0.2.1": "this machine lacks the address from which ssh is to connect .bind 192.0.2.1: ",
    "ProxyCommand echo oops >&2; exit 3": "the ProxyCommand to .* has ended by itself: echo oops",
    "ProxyCommand no-such-program": "no-such-program",
    "NoSuchOption yes": REJECTED + ".*: Bad configuration option: nosuchoption",
    "Port lots": REJECTED + ".*: Bad port 'lots'",
    'Host "unbalanced': REJECTED,
    "Ciphers 3des-cbc": "client and server share no algorithm",
    "PubkeyAuthentication no": "refused the login",
}


@pytest.mark.parametrize("line", list(WRONG))
def test_a_configuration_that_cannot_work_is_explained(desk, machine, line):
    before = machine.attempts()
    end = desk.launch(machine, "classic", env={"TUNNEL_SSH": configured(machine, line)})
    said = ends_with(desk, end, 255, WRONG[line], 20)
    assert (REJECTED in said) is WRONG[line].startswith(REJECTED)
    assert machine.attempts() <= before + 1


@pytest.mark.parametrize("name", ["gone", "never was"])
def test_an_agent_that_has_gone_is_no_obstacle(desk, machine, tmp_path, name):
    lines = [line for line in machine.client_lines if not line.startswith("IdentityAgent")]
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as gone:
        gone.bind(str(tmp_path / "gone"))
    environ = {
        "TUNNEL_SSH": machine.make_ssh("agent", ["Host *"] + lines)[1],
        "SSH_AUTH_SOCK": str(tmp_path / name),
    }
    before = machine.logins()
    works(desk, machine, env=environ)
    assert machine.logins() == before + 4


# -- passwords: answered once for each login, whatever has come between


def second_try_after(reason, machine, desk, wrapper, client):
    """Launch with a password where the first try fails for ``reason``; returns the front end, what to call in the
    end, and how many logins there have to be."""
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    block = rig.Ports()
    ports = (block.first, block.first + 1)
    releases, logins = [block.close], 2
    if reason == "remote port":
        releases.append(machine.occupy(block.first))
    elif reason == "local port":
        releases += [each.close for each in frontend.listening_pair(ports=(block.first + 3, 0))]
    elif reason == "held port":
        releases.append(machine.occupy(block.first + 4))
    elif reason == "dropped":
        # One connection that does not log in is all that the server allows, and there is one already.
        guests = []  # the first one may find that of an earlier test, on its way out

        def let_in():
            guests.append(socket.create_connection((machine.address, machine.port)))
            return guests[-1].recv(4) == b"SSH-"

        rig.wait_until(let_in, 5, "room for a guest")
        guest = guests[-1]
        before, logins = machine.attempts(), 1
        releases.append(guest.close)
    end = desk.slow(machine, "classic", client=client, host=host, ports=ports, env={"TUNNEL_SSH": wrapper})
    if reason == "dropped":
        desk.wait_until(end, lambda: machine.attempts() >= before + 2, what="a second try")
        guest.close()
    return end, releases, logins


REASONS = ["remote port", "local port", "held port", "foreign forward", "no terminal", "dropped"]


@pytest.mark.parametrize(
    "client, reason",
    [("ssh", reason) for reason in REASONS] + [("plink", reason) for reason in REASONS[:3] + ["dropped"]],
)
def test_a_password_is_answered_once_per_login(desk, serve, taken, client, reason):
    options = {"no terminal": ["PermitTTY no"], "dropped": ["MaxStartups 1:100:1"]}.get(reason, [])
    machine = serve(*options)
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    if reason == "foreign forward":
        lines = key_lines(machine, key=False) + ["LocalForward 127.0.0.1:{} 127.0.0.1:9".format(taken)]
        wrapper = machine.make_ssh("foreign", ["Host *"] + lines)[1]
    before, failed = machine.logins(), machine.server_log().count("Failed password")
    end, releases, logins = second_try_after(reason, machine, desk, wrapper, client)
    try:
        desk.accept(end)
        end.echo(1000)
    finally:
        for release in releases:
            release()
    log = log_of(desk, end)
    assert tries(log) >= 2
    assert machine.logins() == before + logins
    assert machine.server_log().count("Failed password") == failed
    if client == "ssh":
        assert log.count("the password prompt has been answered") == logins
    assert rig.PASSWORD not in log


@pytest.mark.parametrize("client", ["ssh", "plink"])
@pytest.mark.parametrize("share", [(), ("--share",)], ids=["own connection", "shared"])
def test_a_refused_login_is_never_repeated(desk, machine, client, share):
    wrapper = machine.make_plink(key=False) if client == "plink" else machine.make_keyless_ssh()
    before, failed = machine.attempts(), machine.server_log().count("Failed password")
    host = "john:wrong-{}@{}".format(rig.PASSWORD, machine.address)
    end = desk.launch(machine, "compute", *share, host=host, env={"TUNNEL_SSH": wrapper})
    ends_with(desk, end, 255 if client == "ssh" else 1, "refused the login")
    assert machine.attempts() == before + 1
    assert machine.server_log().count("Failed password") == failed + 1


# -- ssh before 8.4: no SSH_ASKPASS_REQUIRE, no word of who asks; before 8.7: fewer options

OLD_SSH = """#!{python}
import os, subprocess, sys
NEWER = ("sessiontype", "forkafterauthentication", "stdinnull", "logverbose", "knownhostscommand")
words = sys.argv[1:]
for flag, value in zip(words, words[1:]):
    name = value.partition("=")[0].lower()
    if flag == "-o" and name in NEWER:
        sys.stderr.write("command-line: line 0: Bad configuration option: %s\\r\\n" % name)
        sys.exit(255)
os.environ.pop("SSH_ASKPASS_REQUIRE", None)
if "SSH_ASKPASS" in os.environ:
    os.environ["REAL_ASKPASS"] = os.environ["SSH_ASKPASS"]
    os.environ["SSH_ASKPASS"] = {askpass!r}
log = words[words.index("-E") + 1] if "-E" in words else None
if log:
    mine = {folder!r} + "/log-%d" % os.getpid()
    os.mkfifo(mine)
    words[words.index("-E") + 1] = mine
    reader = os.open(mine, os.O_RDONLY | os.O_NONBLOCK)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
if "-V" in words:
    sys.stderr.write("OpenSSH_8.2p1 Ubuntu-4, OpenSSL 1.1.1f  31 Mar 2020\\n")
    sys.exit(0)
child = subprocess.Popen([{ssh!r}] + words)
while log:
    over = child.poll() is not None
    try:
        data = os.read(reader, 65536)
    except BlockingIOError:
        data = b""
    os.write(out, data.replace(b"OpenSSH_9.", b"OpenSSH_8.").replace(b"OpenSSH_10.", b"OpenSSH_8."))
    if over and not data:
        os.unlink(mine)
        break
    if not data:
        import time
        time.sleep(0.01)
sys.exit(child.wait() if child.wait() >= 0 else 255)
"""
ASKPASS = '#!/bin/sh\nprompt=$(printf %s "$1" | sed -e "s/^([^)]*) //" {})\nexec "$REAL_ASKPASS" "$prompt"\n'


def old_ssh(machine, ssh, edit=""):
    """``ssh`` as it was in 8.2.

    :param edit: what else sed does to the prompts
    """
    askpass = machine.write("old-askpass", ASKPASS.format(edit), 0o755)
    text = OLD_SSH.format(python=rig.kernel_python(), askpass=askpass, folder=machine.folder, ssh=ssh)
    return machine.write("old-ssh", text, 0o755)


@pytest.mark.parametrize("role", ROLES)
def test_an_ssh_before_8_4_works(desk, machine, role):
    wrapper = old_ssh(machine, machine.make_keyless_ssh())
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    before = machine.logins()
    (log,) = works(desk, machine, [role], host=host, env={"TUNNEL_SSH": wrapper})
    assert machine.logins() == before + 1
    assert log.count("the password prompt has been answered") == 1
    assert "older than OpenSSH 8.7" in log


def test_an_ssh_that_does_not_say_who_asks_hands_no_password_to_a_jump_host(request, desk):
    gate = make_machine(request, password=True)
    cluster = make_machine(request, behind=gate, password=True)
    lines = ["Host gate", "HostName {}".format(gate.address)] + key_lines(gate, key=False)
    lines += ["StrictHostKeyChecking accept-new", "Host cluster", "HostName {}".format(cluster.address)]
    _, ssh = gate.make_ssh("through", lines + ["ProxyJump gate"] + cluster.client_lines)
    edit = "-e s/{}/{}/".format(gate.address, cluster.address)  # it asks in the words of the other
    host = "john:{}@cluster".format(rig.PASSWORD)
    end = desk.launch(cluster, "compute", host=host, env={"TUNNEL_SSH": old_ssh(gate, ssh, edit)})
    ends_with(desk, end, 255, "asks for what nobody can answer here", 20)
    assert "not answered: john@{}'s password:".format(cluster.address) in log_of(desk, end)
    assert "Accepted password" not in gate.server_log()


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
