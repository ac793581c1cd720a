"""A password in a launcher's arguments, where a front end puts it, can soon be read nowhere."""

import os
import subprocess
import sys

import pytest
import rig
from rig import installing

SECRET = "Sesam:0@pen"
KERNEL = "/opt/Mathematica/10.1/MathKernel"
CLIENT = """#!/bin/sh
exec sleep 60
"""


@pytest.fixture
def silent_client(tmp_path):
    """An SSH client that says nothing."""
    path = tmp_path / "ssh-silent"
    path.write_text(CLIENT)
    path.chmod(0o755)
    return str(path)


def arguments(mark):
    return " ".join(word for pid in rig.processes_with(mark) for word in rig.command_line(pid))


@pytest.mark.parametrize("script", ["tunnel", "tunnel_sub"])
@pytest.mark.parametrize("way", ["drop-in", "script"])
def test_a_password_is_gone_from_the_arguments_of_all_processes_once_the_client_runs(
    tmp_path, silent_client, script, way
):
    command = [sys.executable, os.path.join(rig.LAUNCHERS, script + ".py")]
    if way == "drop-in":
        home = installing.Home(tmp_path / "home")
        (home.path / ".Mathematica").mkdir(parents=True)
        assert home.install("--front-end") == 0
        command = [str(home.path / ".Mathematica" / "FrontEnd" / (script + ".sh"))]
    mark = "TUNNEL_TEST={}".format(tmp_path)
    names = {"TUNNEL_SSH": silent_client, "TUNNEL_TEST": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    words = ["john:{}@host".format(SECRET), KERNEL, "53994@127.0.0.1,39359@127.0.0.1"]
    null = subprocess.DEVNULL
    launcher = subprocess.Popen(command + words, env=dict(os.environ, **names), stdout=null, stderr=null)
    try:
        rig.wait_until(lambda: "sleep 60" in arguments(mark), 5, "the client")
        assert SECRET not in arguments(mark)
        assert "john:***********@host" in arguments(mark)  # the launcher is looked at, and shows what is harmless
        for pid in rig.processes_with(mark):
            with open("/proc/{}/environ".format(pid)) as stream:
                assert SECRET not in stream.read()
    finally:
        for pid in rig.processes_with(mark):
            rig.end_process(pid)
        launcher.wait(5)
