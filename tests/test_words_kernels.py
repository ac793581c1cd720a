"""What is said where something else than a kernel's path was given, and of a login that was refused."""

import os
import re
import subprocess
import sys

import pytest
import rig
from rig import product


def launch(desk, machine, *words, **environ):
    """A check of the words, with this machine's ssh."""
    argv = [sys.executable, str(desk.folder / "tunnel.py"), "--check"] + list(words)
    return rig.run(*argv, env=dict(os.environ, **desk.environment(machine, **environ)))


def through(relay):
    return ["--relay"] if relay else []


@pytest.mark.parametrize("relay", [False, True], ids=["forwards", "relay"])
@pytest.mark.parametrize(
    "path, words",
    [
        ("WolframKernel", "give the full path"),
        ("module load mathematica; WolframKernel", "a command goes into --via, or into a script"),
        ("ssh node3 math", "a command goes into --via, or into a script"),
    ],
)
def test_what_is_no_path_is_told_from_a_path_that_does_not_exist(desk, machine, relay, path, words):
    done = launch(desk, machine, *(through(relay) + [machine.destination, path]))
    assert done.returncode == 127
    assert "there is no kernel " + path in done.stderr and words in done.stderr, done.stderr
    desk.no_process()


@pytest.mark.parametrize("relay", [False, True], ids=["forwards", "relay"])
def test_a_folder_in_place_of_the_kernel_is_named_with_what_is_in_it(desk, machine, relay):
    folder = os.path.dirname(machine.classic)
    done = launch(desk, machine, *(through(relay) + [machine.destination, folder]))
    assert done.returncode == 126
    assert re.search("is a folder; the kernel is|in a folder the kernel is Executables/WolframKernel", done.stderr)


def test_a_command_that_only_prepares_is_told_to_end_with_a_semicolon(desk, machine):
    done = launch(desk, machine, "--via", "true", machine.destination, machine.classic)
    assert "did not run what was appended to it; one that only prepares ends with `;`" in done.stderr
    desk.no_process()


def test_a_refused_login_is_to_be_tried_by_a_login_that_starts_no_kernel(desk, machine):
    wrapper = machine.make_keyless_ssh()
    done = launch(desk, machine, machine.destination, machine.classic, TUNNEL_SSH=wrapper)
    assert "ssh -l john {0} true, then ssh-copy-id john@{0}".format(machine.address) in done.stderr
    assert machine.classic not in done.stderr


def test_the_line_of_an_agent_that_refuses_to_sign_is_quoted(desk, machine, tmp_path):
    """An agent that is to ask before it signs, and has nobody to ask."""
    key = next(line.split()[1] for line in machine.client_lines if line.startswith("IdentityFile"))
    public = tmp_path / "key.pub"
    with open(key + ".pub") as stream:
        public.write_text(stream.read())
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    try:
        rig.wait_until((tmp_path / "agent").exists, 5, "the agent")
        rig.must("ssh-add", "-c", key, env=dict(os.environ, SSH_AUTH_SOCK=str(tmp_path / "agent")))
        lines = [line for line in machine.client_lines if not line.startswith("Identity")]
        lines += ["IdentityAgent {}".format(tmp_path / "agent"), "IdentityFile {}".format(public)]
        wrapper = machine.make_ssh("agent", ["Host *"] + lines + ["IdentitiesOnly yes"])[1]
        done = launch(desk, machine, machine.destination, machine.classic, TUNNEL_SSH=wrapper)
    finally:
        agent.terminate()
        agent.wait()
    assert "the agent has not signed" in done.stderr and "agent refused operation" in done.stderr, done.stderr


def test_a_second_factor_is_explained_where_the_server_would_ask_for_one():
    table, words = product.DIAGNOSES, dict.fromkeys(("host", "try_login"), "x")
    line = "john@x: Permission denied (publickey,keyboard-interactive)."
    assert "for a second factor log in by hand" in product.diagnose(table, [line], dict(words, copy_key="y"))
    assert "second factor" not in product.diagnose(table, [line[:-23] + ")."], dict(words, copy_key="y"))
