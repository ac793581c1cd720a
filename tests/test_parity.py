"""What the shell scripts passed on to ssh in 70 calls, against what is passed on now.

The command line is not compared as text: the real ssh reads it (``ssh -G``) and says what it understood.
"""

import json
import os
import subprocess

import pytest

import tunnel

CASES = json.load(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "cases.json")))


def plan(case, *options):
    role = tunnel.CONTROLLER if case["script"] == "tunnel" else tunnel.COMPUTE
    asked = tunnel.parse_arguments(role, list(options) + case["args"])
    return asked, tunnel.Plan(asked, tunnel.first_ports(asked), (1, 2, 3, 4, 5) if asked.callback else ())


def bracketed(words):
    """``[listen]:port`` and ``[host]:port``, as ssh -G writes a forward, without its brackets."""
    return words.replace("[127.0.0.1]", "127.0.0.1").replace("[192.168.1.17]", "192.168.1.17")


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([case["script"]] + case["args"]))
def test_parity(case):
    unversioned = tunnel.version_in(case["args"][1]) is None
    options = ("--links", "classic") if unversioned and case["script"] == "tunnel" else ()
    asked, made = plan(case, *options)
    arguments = tunnel.OpenSSH.arguments(asked, made)
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


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["script"] == "tunnel"], ids=lambda case: case["args"][1]
)
def test_the_switchboard_only_adds_forwards(case):
    _, made = plan(case, "--links", "callback")
    remote = [str(each) for each in made.forwards if each.flag == "-R"]
    base = max(made.link.data_port, made.link.message_port)
    assert remote[1] == case["remote_forwards"][1]
    assert [each.split(":")[1] for each in remote[2:]] == [str(base + n) for n in (5, 6, 7, 8)]
    assert made.command == case["remote_command"]
