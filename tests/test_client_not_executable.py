"""A client that the system cannot execute, or that a wrapper does not find, is no SSH client: exit code 69."""

import os
import sys

import pytest
import rig
from rig import product

LINK = "53994@127.0.0.1,39359@127.0.0.1"


@pytest.mark.parametrize("relay", [[], ["--relay"]])
@pytest.mark.parametrize(
    "text, said",
    [
        ("not a program", "it cannot be executed (Exec format error)"),
        ("#!/nonexistent\n", "it cannot be executed (No such file or directory)"),
        ("#!/bin/sh\nexit 127\n", "it ended with exit code 127"),
    ],
)
def test_a_client_that_does_not_run_is_named(tmp_path, relay, text, said):
    client = tmp_path / "ssh"
    client.write_text(text)
    client.chmod(0o755)
    argv = (
        [sys.executable, os.path.join(rig.LAUNCHERS, "tunnel.py")] + relay + ["host", "/k/10.1/MathKernel", LINK]
    )
    done = rig.run(*argv, env=dict(os.environ, TUNNEL_SSH=str(client), XDG_RUNTIME_DIR=str(tmp_path)))
    assert (done.returncode, done.stderr) == (69, "tunnel: no SSH client: {}: {}\n".format(client, said))


def test_windows_says_so_of_a_file_that_is_no_program(monkeypatch):
    from tunnel_lib import windows

    def popen(argv, **options):
        raise OSError(193, "%1 is not a valid Win32 application")

    monkeypatch.setattr("subprocess.Popen", popen)
    with pytest.raises(product.Fatal) as caught:
        windows.WindowsClient(product.Loop(), ["ssh.exe"], {}, {})
    assert caught.value.code == 69 and "it cannot be executed (%1 is not" in caught.value.text
