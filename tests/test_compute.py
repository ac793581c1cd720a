"""Compute kernels: launches that wait for no kernel to boot, and what later launches tell of earlier ones."""

import os
import re
import time

import pytest
import rig
from rig.launches import ends_with, launched, log_of, nothing_else

CALLED_BACK = "the kernel has called back"
KINDS = [("compute", "ssh"), ("compute", "plink"), ("shared", "ssh")]


def works(end):
    assert end.wait(30) == (0, "")
    end.accept()
    end.echo(1000)


def test_a_launch_returns_before_its_kernel_has_booted(desk, machine):
    kernel = machine.install_kernel("later/10.1/MathKernel", "boot=4")
    ends = []
    for role, client in KINDS * 2:
        ends.append(launched(desk, machine, role, kernel=kernel, client=client))
        assert ends[-1].wait() == (0, "")
        assert "kernel: started" in log_of(desk, ends[-1]) or client == "plink"
        assert CALLED_BACK not in log_of(desk, ends[-1])
    for end in ends:
        end.accept()
        end.echo(1000)


@pytest.mark.parametrize("role", ["compute", "shared"])
@pytest.mark.parametrize("known", [False, True], ids=["first launch", "later launch"])
def test_a_wrong_path_is_an_error_of_the_launch(desk, machine, role, known):
    if known:
        end = launched(desk, machine, role)
        works(end)
        end.quit()
    desk.alter(VERIFY_SECONDS=5)
    missing = launched(desk, machine, role, kernel="/opt/Mathematica/10.1/no such/MathKernel")
    ends_with(desk, missing, 127, "there is no kernel /opt/Mathematica/10.1/no such/MathKernel")
    plain = launched(desk, machine, role, kernel=machine.write("plain", "text"))
    ends_with(desk, plain, 126, "cannot be executed")
    folder = launched(desk, machine, role, kernel=machine.home)
    ends_with(desk, folder, 126, "is a folder; the kernel is Executables/WolframKernel in it")


@pytest.mark.parametrize("role", ["compute", "shared"])
def test_a_path_that_has_become_wrong_is_told_at_the_latest_by_the_next_launch(desk, machine, role):
    kernel = machine.install_kernel("gone/10.1/MathKernel", "boot=0")
    works(launched(desk, machine, role, kernel=kernel))
    os.rename(kernel, kernel + ".away")
    words = "there is no kernel " + kernel
    first = launched(desk, machine, role, kernel=kernel)
    code, errors = first.wait()
    if code == 0:
        rig.wait_until(lambda: words in log_of(desk, first), 5, "the reason in the log")
        assert words not in errors
    desk.alter(VERIFY_SECONDS=5)
    second = launched(desk, machine, role, kernel=kernel)
    code, errors = second.wait()
    assert code == 127
    assert words in errors


DEATHS = {"exit=3": "ended before it called back, with exit code 3", "unlicensed": "found no licence"}


@pytest.mark.parametrize(
    "role, client, death", [each + ("exit=3",) for each in KINDS] + [KINDS[2] + ("unlicensed",)]
)
def test_the_next_launch_says_that_when_and_why_the_last_kernel_died(desk, machine, role, client, death):
    kernel = machine.install_kernel("dying/10.1/MathKernel", "boot=1", death)
    first = launched(desk, machine, role, kernel=kernel, client=client)
    assert first.wait() == (0, "")
    rig.wait_until(lambda: DEATHS[death] in log_of(desk, first), 5, "the reason in the log")
    nothing_else(desk)
    second = launched(desk, machine, role, client=client)
    code, errors = second.wait()
    assert code == 0
    assert len(errors.splitlines()) == 1
    assert DEATHS[death] in errors
    when = re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", errors).group()
    assert abs(time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
    assert errors.partition(": ")[2].strip() in log_of(desk, second)
    works(launched(desk, machine, role, client=client))  # it has been said


def test_what_a_launch_that_fails_could_not_say_the_next_one_does(desk, machine):
    kernel = machine.install_kernel("dying/10.1/MathKernel", "boot=1", "exit=3")
    first = launched(desk, machine, "shared", kernel=kernel)
    assert first.wait() == (0, "")
    rig.wait_until(lambda: "with exit code 3" in log_of(desk, first), 5)
    nothing_else(desk)
    failing = launched(desk, machine, "shared", kernel="/no/such/kernel")
    assert failing.wait()[0] == 127
    code, errors = launched(desk, machine, "shared").wait()
    assert code == 0
    assert "with exit code 3" in errors


def test_a_launch_to_another_machine_is_told_nothing(desk, machine):
    kernel = machine.install_kernel("dying/10.1/MathKernel", "boot=1", "exit=3")
    first = desk.launch(machine, "compute", kernel=kernel)
    assert first.wait() == (0, "")
    rig.wait_until(lambda: "with exit code 3" in log_of(desk, first), 5)
    works(desk.launch(machine, "compute", host="{}:22".format(machine.destination)))


def test_a_new_kernel_on_the_ports_of_an_old_one_has_not_called_back_yet(desk, machine):
    block = rig.Ports()
    ports = (block.first, block.first + 1)
    old = launched(desk, machine, "shared", ports=ports)
    works(old)
    old.quit()
    old.close_listeners()
    nothing_else(desk)
    kernel = machine.install_kernel("dying/10.1/MathKernel", "boot=1", "exit=3")
    new = launched(desk, machine, "shared", ports=ports, kernel=kernel)
    assert new.wait() == (0, "")
    log = max(desk.logs(), key=lambda log: "dying" in log)
    assert CALLED_BACK not in log
    rig.wait_until(lambda: "with exit code 3" in "".join(desk.logs()), 5)
    block.close()
