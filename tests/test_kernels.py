"""Kernels that are not there, cannot be run, end before they connect or cannot connect: each is told as such."""

import os
import re
import signal

import pytest
import rig
from rig.launches import clients, fails, launched, log_of


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
