"""The log of a launch as a file: where it is, who may read it, how long it gets, and what a full disk does."""

import os
import re
import stat
import sys

import pytest
import rig
from rig import frontend, product


def test_log_is_private_and_tells_everything_but_secrets(desk, machine):
    end = desk.launch(machine, "compute", host="john:{}@{}".format(rig.PASSWORD, machine.address))
    end.accept()
    end.quit()
    assert end.wait()[0] == 0
    desk.no_process()
    (path,) = desk.folder.glob("Logs/*/*.log")
    assert re.match(r"tunnel_sub_\d{4}-\d\d-\d\d-\d{6}_\d+\.log$", path.name)
    assert path.parent.name == re.search(r"\d{4}-\d\d-\d\d", path.name).group()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    text = path.read_text()
    assert rig.PASSWORD not in text
    for word in ("tunnel 1.", "john:***@", "-LinkName", "-R 127.0.0.1:", "debug1:", "with exit code"):
        assert word in text
    assert "XDG_RUNTIME_DIR" not in text


def test_log_falls_back_to_the_temporary_folder(desk, machine, tmp_path):
    (desk.folder / "Logs").write_text("in the way")
    end = desk.launch(machine, "compute")
    end.accept()
    end.quit()
    code, errors = end.wait()
    assert code == 0
    path = re.search(r"it is (\S+\.log)", errors).group(1)
    assert path.startswith(str(desk.runtime))
    assert "the kernel has called back" in open(path).read()


def test_launches_in_the_same_second_have_logs_of_their_own(desk, tmp_path):
    logs = [product.Log(str(tmp_path), "tunnel", os.environ) for _ in range(20)]
    assert len({log.path for log in logs}) == 20


def test_a_full_disk_ends_the_log_and_not_the_launch(desk, machine):
    size = (
        "import resource as r,os,sys; r.setrlimit(r.RLIMIT_FSIZE, (400, 400)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    end = frontend.FrontEnd("classic")
    desk.front_ends.append(end)
    script = str(desk.folder / "tunnel.py")
    command = [sys.executable, "-c", size, sys.executable, script, machine.destination, machine.classic]
    end.launch(command=command, environment=desk.environment(machine))
    end.accept()
    end.echo()
    end.tell(b"!quit 0\n")
    code, errors = end.wait()
    assert code == 0
    assert "ends here" in errors
    assert len(desk.logs()[0]) <= 400


@pytest.mark.parametrize("terminal, size", [("yes", 6000000), ("no", 30000000)])
def test_a_kernel_that_prints_much_leaves_a_log_of_bounded_size(desk, machine, terminal, size):
    end = desk.launch(machine, "callback", "-o", "RequestTTY={}".format("force" if terminal == "yes" else "no"))
    end.accept()
    end.tell("!print {}\n".format(size).encode("ascii"))  # on stdout, and as much on stderr
    end.channels[0].settimeout(60)
    assert end.channels[0].recv(7) == b"printed"
    end.echo()
    end.tell(b"!quit 5\n")
    assert end.wait()[0] == 5
    (log,) = desk.logs()
    assert len(log) < 4 << 20
    assert "what comes from here on is not logged" in log
    assert log.splitlines()[-1].endswith("with exit code 5")  # what the launcher itself says is there all the same


def test_many_short_connections_leave_a_log_of_bounded_size(desk, machine):
    desk.alter(LOG_BYTES=1 << 16)
    end = desk.launch(machine, "classic")
    end.accept()
    port = end.block.first
    code = (
        "import socket\n"
        "for _ in range(400):\n"
        "    try: socket.create_connection(('127.0.0.1', {}), 5).close()\n"
        "    except OSError: pass\n"
    ).format(port)
    machine.shell("{} -c '{}'".format(rig.kernel_python(), code.replace("'", '"')))
    end.echo()
    end.tell(b"!quit 5\n")
    assert end.wait()[0] == 5
    (log,) = desk.logs()
    assert "what comes from here on is not logged" in log
    assert len(log) < 4 << 16
    assert log.splitlines()[-1].endswith("with exit code 5")
