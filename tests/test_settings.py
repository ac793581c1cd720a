"""The settings of a try: what they are at first, what changes them, and the client's options that they become."""

import os

import pytest
from rig import product
from rig.product import OpenSSH
from rig.tries import KERNEL, LINK, changes, plan, request, settings

pytestmark = pytest.mark.usefixtures("in_time")


def test_settings_are_copied_and_never_changed():
    given = settings(share="/x")
    other = given.but(ports=None, lenient=True)
    assert changes(given, other) == {"ports": None, "lenient": True}
    assert (given.ports, given.lenient, given.share) == ((53994, 39359), False, "/x")
    assert (other.share, other.block, other.drops, other.terminal, other.modern) == ("/x", 1, 0, True, True)
    assert changes(given, given.but()) == {}
    assert "lenient=True" in repr(other)
    with pytest.raises(AttributeError):
        given.but(lenent=True)
    with pytest.raises(AttributeError):
        settings(port=1)


def test_what_a_first_try_assumes():
    first = settings()
    assert (first.terminal, first.modern, first.block, first.drops, first.share) == (True, True, 1, 0, None)
    assert not (first.guarded or first.separate or first.lenient or first.any_family or first.own)


@pytest.mark.parametrize(
    "changed, options",
    [
        ({}, {"ExitOnForwardFailure": "yes", "RequestTTY": "force"}),
        ({}, {"SessionType": "default", "ForkAfterAuthentication": "no", "StdinNull": "no", "LogVerbose": "none"}),
        ({"lenient": True}, {"ExitOnForwardFailure": "no"}),
        ({"terminal": False}, {"RequestTTY": "no"}),
        ({"modern": False}, {"SessionType": None, "ForkAfterAuthentication": None, "LogVerbose": None}),
        ({"any_family": True}, {"AddressFamily": "any"}),
        ({"any_family": False}, {"AddressFamily": None}),
        ({"share": "/run/x-0"}, {"ControlPath": "/run/x-0", "ControlMaster": "no"}),
        ({"share": None}, {"ControlPath": None}),
        ({"own": True}, {"ControlPath": "none"}),
        ({"own": True, "share": "/run/x-0"}, {"ControlPath": "/run/x-0"}),
    ],
)
def test_settings_become_options_of_ssh(changed, options):
    words = OpenSSH.login(request(), settings(**changed))
    given = dict(word.split("=", 1) for flag, word in zip(words, words[1:]) if flag == "-o")
    for name, value in options.items():
        assert given.get(name) == value
    for name, value in (
        ("ClearAllForwardings", "no"),
        ("Tunnel", "no"),
        ("RemoteCommand", "none"),
        ("ForwardX11", "no"),
        ("StrictHostKeyChecking", "accept-new"),
        ("ConnectTimeout", "15"),
        ("ServerAliveInterval", "15"),
        ("ServerAliveCountMax", "3"),
    ):
        assert given[name] == value


@pytest.mark.parametrize(
    "changed, words",
    [
        ({}, []),
        ({"lenient": True}, []),
        ({"share": "/run/x-0"}, ["-o", "ProxyCommand=false"]),
        ({"share": "/run/x-0", "lenient": True}, ["-o", "ProxyCommand=false", "-F", os.devnull]),
    ],
)
def test_a_client_of_our_shared_connection_makes_none_of_its_own(changed, words):
    given = settings(**changed)
    arguments = OpenSSH.arguments(request(), plan(), given)
    assert arguments[: 1 + len(words)] == ["-v"] + words
    for word in ("ProxyCommand=false", "-F"):
        assert (word in arguments) is (word in words)
    login = OpenSSH.login(request(), given)  # with which the connection itself is made
    assert "ProxyCommand=false" not in login
    assert "-F" not in login


def test_a_password_is_asked_for_once_and_is_in_no_argument():
    asked = request("john:secret@host", KERNEL, LINK)
    words = OpenSSH.arguments(asked, plan(), settings(), "/run/log")
    assert "NumberOfPasswordPrompts=1" in words
    assert "BatchMode=no" in words
    assert "secret" not in " ".join(words)


def test_where_nobody_can_be_asked_no_empty_password_is_sent():
    assert "BatchMode=yes" in OpenSSH.arguments(request(), plan(), settings(asks=False))
    words = OpenSSH.arguments(request(), plan(), settings())
    assert "BatchMode=yes" not in words
    assert "NumberOfPasswordPrompts=1" in words


@pytest.mark.parametrize(
    "name", ["RemoteCommand", "sessiontype", "ForkAfterAuthentication", "CLEARALLFORWARDINGS"]
)
def test_options_that_would_take_away_what_a_launch_needs_are_refused(name):
    with pytest.raises(product.Fatal) as caught:
        OpenSSH.check(request("-o", name + "=no", "host", KERNEL, LINK))
    assert caught.value.text.startswith("-o {}: ".format(name))
    OpenSSH.check(request("-o", "Compression=no", "host", KERNEL, LINK))


def test_a_silent_server_is_noticed_within_a_minute_by_default():
    request = product.parse_arguments(product.COMPUTE, ["h", "k", "1@h,2@h"])
    values = dict(product.OpenSSH.defaults(request, product.Settings((1, 2))))
    assert int(values["ServerAliveInterval"]) * (int(values["ServerAliveCountMax"]) + 1) <= 60
