"""What --check shows: a step that worked is marked ok, and nothing else is."""

import os
import sys

import pytest
import rig
from rig import product

BOTH = pytest.mark.parametrize("arguments", [(), ("--relay",)], ids=["forwards", "relay"])


def check(desk, machine, *words, **values):
    code = product.launching(**values)
    argv = [sys.executable, "-c", code, str(desk.folder), "--check"] + list(words)
    return rig.run(*argv, env=dict(os.environ, **desk.environment(machine)))


@BOTH
def test_a_kernel_that_does_not_exist_is_not_told_as_started(desk, machine, arguments):
    done = check(desk, machine, *(list(arguments) + [machine.destination, "/opt/14.1/no/WolframKernel"]))
    assert done.returncode == 127
    assert "ok  kernel" not in done.stdout
    assert "there is no kernel /opt/14.1/no/WolframKernel" in done.stderr


@BOTH
def test_a_question_of_the_kernel_is_shown_and_quoted_in_the_last_line(desk, machine, arguments):
    kernel = machine.install_kernel("asks/14.1/WolframKernel", "silent")
    with open(kernel, "w") as stream:
        stream.write("#!/bin/sh\necho 'Mathematica is not activated.'\necho 'Enter your key:'\nexec sleep 60\n")
    done = check(desk, machine, *(list(arguments) + [machine.destination, kernel]), CALLBACK_SECONDS=2)
    assert "s      kernel: Mathematica is not activated.\n" in done.stdout
    assert "has not called back within 2 s (it said: Enter your key:); " in done.stderr
    desk.no_process()


def test_what_a_command_says_is_not_marked_ok(desk, machine):
    via = "sh -c 'echo srun: error: invalid partition >&2; exit 1'"
    done = check(desk, machine, "--via", via, machine.destination, machine.classic)
    assert "s      via: srun: error: invalid partition\n" in done.stdout
    assert "ok  via: srun" not in done.stdout and "invalid partition" in done.stderr


def test_marks_of_our_own_are_not_shown(desk, machine):
    via = "sh -c 'echo --tunnel-relay-ready--; exit 1'"
    done = check(desk, machine, "--via", via, machine.destination, machine.classic)
    assert done.returncode and "via: --tunnel-relay" not in done.stdout
