"""Start-up files on the kernel machine that keep a kernel from being run are named."""

import os

import pytest


@pytest.mark.parametrize("client", ["ssh", "plink"])
@pytest.mark.parametrize("role", ["classic", "compute"])
def test_one_that_ends_the_shell_is_named_with_a_way_to_see_it(desk, machine, role, client):
    path = machine.write("home/.bashrc", "exit 0\n")
    try:
        code, errors = desk.launch(machine, role, client=client).wait()
    finally:
        os.remove(path)
    assert code == 1
    assert errors.count("\n") == 1
    assert "a start-up file there (as .bashrc, with `exit 0`) may have ended the shell" in errors
    assert errors.endswith(" echo reached\n")
