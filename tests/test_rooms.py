"""The files of tunnel_lib, loaded late: what an update does to a launch that runs."""

import os
import sys

import pytest
import rig
from rig import product

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import tunnel
tunnel.room("notes", "x")
exec(sys.argv[2])
print(tunnel.room("notes", "x").__name__)
for _ in range(2):
    try:
        print(tunnel.room("why", "x").__name__)
    except tunnel.Fatal as error:
        print(error.code, error.text)
print(tunnel.room_if_there("why"))
"""
UPDATED = "70 Tunnel has been updated while this launch ran; launch again"


@pytest.mark.parametrize(
    "act, said",
    [
        ("pass", ["tunnel_lib.why"] * 2),
        ("import os; os.replace(sys.argv[1] + '/next', sys.argv[1] + '/tunnel.py')", [UPDATED] * 2),
        ("open(sys.argv[1] + '/tunnel.py.tunnel-new', 'w').close()", [UPDATED] * 2),
        ("import os; os.remove(sys.argv[1] + '/tunnel.py')", [UPDATED] * 2),
    ],
)
def test_a_file_that_is_loaded_late_is_of_the_launchers_version(tmp_path, act, said):
    product.copy_to(str(tmp_path))
    (tmp_path / "next").write_bytes((tmp_path / "tunnel.py").read_bytes())
    done = rig.run(sys.executable, "-SEsc", CODE, str(tmp_path), act)
    lines = done.stdout.splitlines()
    assert done.stderr == "" and lines[:3] == ["tunnel_lib.notes"] + said
    assert (lines[3] == "None") == (said[0] == UPDATED)


def test_a_file_of_another_version_is_named(tmp_path):
    product.copy_to(str(tmp_path))
    (tmp_path / "tunnel_lib" / "why.py").write_text("from tunnel import what_no_version_has\n")
    lines = rig.run(sys.executable, "-SEsc", CODE, str(tmp_path), "pass").stdout.splitlines()
    assert lines[1].startswith("70 x the folder tunnel_lib beside tunnel.py, all of it and of its version (")
    assert os.linesep not in lines[1] and lines[1].endswith("; run install.py again")
