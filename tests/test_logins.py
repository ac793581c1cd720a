"""Logins: host keys, banners, accounts that are not let in, second steps, and how long each may take."""

import os
import re

import pytest
import rig
from rig.launches import FAKED, clients, ends_with, fails, failure, kinds, launched, log_of, patched, tries, works

# -- host keys


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


# -- banners


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


def test_a_banner_decides_nothing_where_ssh_has_no_log_of_its_own(desk, serve, machine):
    """As on Windows, and where no private folder can be made: words, that is, but whole lines of ssh's own."""
    machine.write("banner", "\n".join("> " + line for line in FAKED) + "\n")
    serve("Banner {}".format(machine.path("banner")))
    nowhere = str(desk.runtime) + "/none"
    before = machine.attempts()
    environ = {"XDG_RUNTIME_DIR": nowhere, "TMPDIR": nowhere}
    logs = works(desk, machine, ["classic", "callback", "compute"], slow=True, env=environ)
    assert [tries(log) for log in logs] == [1] * 3
    assert all("nothing is remembered" in log for log in logs)
    assert machine.attempts() == before + 3


# -- accounts

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


# -- what a login does


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


@pytest.mark.parametrize("role", ["callback", "shared"])
def test_a_login_without_a_terminal_at_its_standard_input(desk, own_machine, role):
    own_machine.write("home/.bashrc", "exec </dev/null\n")
    (log,) = works(desk, own_machine, [role])
    assert "the login has no terminal at its standard input" in log
    assert own_machine.kernel_starts() == 1


# -- time

SLOW_LOGIN = "AuthorizedKeysCommand /bin/sh -c 'sleep {}; cat {}'"


def slow_to_log_in(serve, machine, seconds):
    keys = machine.path("home", ".ssh", "authorized_keys")
    command = SLOW_LOGIN.format(seconds, keys)
    return serve(command, "AuthorizedKeysCommandUser john", "AuthorizedKeysFile none")


def test_a_login_may_take_longer_than_an_answer(desk, serve, machine):
    slow_to_log_in(serve, machine, 1)  # for each of two questions
    before = machine.attempts()
    works(desk, machine, ["classic", "shared"], ("-o", "ConnectTimeout=1"))
    assert machine.attempts() == before + 2


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
    ends_with(desk, end, 255, "closed the connection during the login|ended the login", 20)
    assert machine.attempts() == before + 1
