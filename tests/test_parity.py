"""What the shell scripts passed on to ssh in 70 calls, against what is passed on now.

The command line is not compared as text: the real ssh reads it (``ssh -G``) and says what it understood.
"""

import json
import os
import subprocess

import pytest
from rig import product

CASES = json.load(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "cases.json")))


def plan(case, *options, relays=()):
    """Request, plan and settings of a case; without ``relays`` the forwards lead to the front end itself, as the
    shell scripts had it."""
    role = product.CONTROLLER if case["script"] == "tunnel" else product.COMPUTE
    asked = product.parse_arguments(role, list(options) + case["args"])
    settings = product.Settings(product.first_ports(asked))
    return asked, product.Plan(asked, settings, relays), settings


def options_of(case):
    """The links that the shell scripts knew, where the kernel's path does not say so by itself."""
    unversioned = product.version_in(case["args"][1]) is None
    return ("--links", "classic") if unversioned and case["script"] == "tunnel" else ()


def bracketed(words):
    """``[listen]:port`` and ``[host]:port``, as ssh -G writes a forward, without its brackets."""
    return words.replace("[127.0.0.1]", "127.0.0.1").replace("[192.168.1.17]", "192.168.1.17")


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([case["script"]] + case["args"]))
def test_parity(case):
    asked, made, settings = plan(case, *options_of(case))
    arguments = product.OpenSSH.arguments(asked, made, settings)
    given = {flag: [str(each) for each in made.forwards if each.flag == flag] for flag in ("-R", "-L")}
    assert given["-R"] == case["remote_forwards"]
    assert given["-L"] == case["local_forwards"]
    assert arguments[-1] == case["remote_command"]
    output = subprocess.check_output(["ssh", "-F", "/dev/null", "-G"] + arguments).decode()
    lines = [line.partition(" ")[::2] for line in output.splitlines()]
    understood = dict(lines)
    assert understood["hostname"] == case["host"]
    assert understood["port"] == str(case["port"] or 22)
    if case["login"]:
        assert understood["user"] == case["login"]
    assert (understood["forwardagent"] == "yes") is case["agent_forwarding"]
    assert understood["compression"] == ("yes" if case["script"] == "tunnel" else "no")
    for name, wanted in (("remoteforward", case["remote_forwards"]), ("localforward", case["local_forwards"])):
        seen = sorted(bracketed(value) for key, value in lines if key == name)
        listening = sorted(
            "{} {}".format(*(":".join(part) for part in (each.split(":")[:2], each.split(":", 2)[2:])))
            for each in wanted
        )
        assert [each.replace("[", "").replace("]", "") for each in seen] == [
            each.replace("[", "").replace("]", "") for each in listening
        ]


def test_there_are_seventy_cases():
    assert len(CASES) == 70


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([case["script"]] + case["args"]))
def test_only_the_main_link_leads_elsewhere_than_with_the_shell_scripts(case):
    """Each of its channels leads to the launcher; ports over there, command line and all else stay."""
    asked, before, settings = plan(case, *options_of(case))
    _, made, _ = plan(case, *options_of(case), relays=(1001, 1002))
    given = {flag: [str(each) for each in made.forwards if each.flag == flag] for flag in ("-R", "-L")}
    listening = [each.split(":")[:2] for each in case["remote_forwards"]]
    assert [each.split(":")[:2] for each in given["-R"]] == listening
    assert [each.split(":")[2:] for each in given["-R"]] == [["127.0.0.1", "1001"], ["127.0.0.1", "1002"]]
    assert given["-L"] == case["local_forwards"]
    assert made.command == case["remote_command"]
    others = [product.OpenSSH.arguments(asked, each, settings) for each in (before, made)]
    changed = [pair for pair in zip(*others) if pair[0] != pair[1]]
    assert len(others[0]) == len(others[1])
    assert [old for old, _ in changed] == case["remote_forwards"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([case["script"]] + case["args"]))
def test_a_try_adds_nothing_to_the_command_line_but_where_ssh_speaks_and_whether_there_is_a_terminal(case):
    asked, made, settings = plan(case, *options_of(case))
    plain = product.OpenSSH.arguments(asked, made, settings)
    assert (
        product.OpenSSH.arguments(asked, made, settings, "/run/log") == plain[:1] + ["-E", "/run/log"] + plain[1:]
    )
    guarded = product.Plan(asked, settings.but(guarded=True), ())
    assert product.OpenSSH.arguments(asked, guarded, settings)[:-1] == plain[:-1]
    assert guarded.command == "test -t 0 && " + case["remote_command"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["script"] == "tunnel"], ids=lambda case: case["args"][1]
)
def test_the_switchboard_only_adds_forwards(case):
    _, made, _ = plan(case, "--links", "callback", relays=(1, 2, 3, 4, 5, 6))
    remote = [str(each) for each in made.forwards if each.flag == "-R"]
    base = max(made.link.data_port, made.link.message_port)
    assert [each.split(":")[:2] for each in remote[:2]] == [
        each.split(":")[:2] for each in case["remote_forwards"]
    ]
    assert [each.split(":")[1] for each in remote[2:]] == [str(base + n) for n in (5, 6, 7, 8)]
    assert [each.split(":", 2)[2] for each in remote] == ["127.0.0.1:{}".format(n) for n in (1, 2, 3, 4, 5, 6)]
    assert [str(each) for each in made.forwards if each.flag == "-L"] == case["local_forwards"]
    assert made.command == case["remote_command"]
