"""Many kernels at once, adjacent ports, and what else goes wrong under load."""

import sys

import pytest
import rig
from rig import frontend, product
from rig.desk import make_machine


def test_eight_controller_kernels_with_adjacent_main_link_ports(desk, machine):
    """Their blocks overlap: each has the next one's main link in it."""
    block = rig.Ports(30)
    first = block.first
    ends = [desk.launch(machine, "callback", ports=(first + 2 * n, first + 2 * n + 1)) for n in range(8)]
    for end in ends:
        end.accept()
    for end in ends:
        end.echo()
    for end in ends:
        end.tell(b"!quit 0\n")
    assert [end.wait(20)[0] for end in ends] == [0] * 8
    block.close()


def test_many_compute_kernels_at_once(desk, machine):
    ends = [desk.launch(machine, "compute", "--share") for _ in range(16)]
    ends += [desk.launch(machine, "compute") for _ in range(16)]
    for end in ends:
        assert end.wait(120)[0] == 0
        end.accept()
    assert len(machine.kernels()) == 32
    for end in ends:
        end.echo(1000)
    for end in ends:
        end.quit()
    rig.wait_until(lambda: not machine.kernels(), 20, "the end of the kernels")


def test_sixteen_compute_kernels_one_after_another(desk, request):
    machine = make_machine(request, sshd_options=["MaxSessions 100"])
    ends = []
    for _ in range(16):
        end = desk.launch(machine, "compute", "--share")
        ends.append(end)
        assert end.wait(20) == (0, "")
    for end in ends:
        end.accept()
    for end in ends:
        end.echo(1000)
    assert len(machine.kernels()) == 16


def test_a_clock_that_jumps_does_not_matter(desk, machine):
    """time.time() goes back a year at every call; waiting goes by a clock that cannot."""
    script = (
        "import time; jumps = iter(range(10**6));"
        "real = time.time; time.time = lambda: real() - 31536000 * (next(jumps) % 40);"
    ) + product.launching("compute")
    end = frontend.FrontEnd("compute")
    desk.front_ends.append(end)
    command = [sys.executable, "-c", script, str(desk.folder), machine.destination, machine.classic]
    end.launch(command=command, environment=desk.environment(machine))
    assert end.wait() == (0, "")
    end.accept()
    end.echo()


@pytest.mark.parametrize("count", [200])
def test_fuzzed_command_lines_end_with_2_or_plan_a_launch(desk, count):
    """The whole program, not only its parser: no traceback, one line, no secret."""
    import random

    draw = random.Random(7)
    words = [
        "",
        "-",
        "--",
        "-o",
        "--links",
        "host",
        "a:pw-secret@h",
        "a:pw-secret@",
        "[::1",
        "\n",
        "\x7f",
        "ä",
        "%",
        "x" * 5000,
    ]
    words += [
        "/k/10.1/math",
        "C:\\a\\math.exe",
        '"',
        "1@h,2@h",
        "1@h",
        "--dry-run",
        "--share",
        "--client",
        "=",
        "--check",
    ]
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import tunnel\n"
        "for argv in json.load(sys.stdin):\n"
        "    code = tunnel.main('tunnel', tunnel.CONTROLLER, ['--dry-run'] + argv)\n"
        "    print('@', code); sys.stdout.flush()\n"
    )
    import json
    import subprocess

    vectors = [[draw.choice(words) for _ in range(draw.randint(0, 5))] for _ in range(count)]
    vectors += [["host", "/k/10.1/math", "1@h,2@h"]]
    done = subprocess.run(
        [sys.executable, "-c", script, str(desk.folder)],
        input=json.dumps(vectors).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    codes = [line.split()[1] for line in done.stdout.decode().splitlines() if line.startswith("@ ")]
    assert len(codes) == count + 1
    assert set(codes) <= {"0", "2", "69"}
    assert codes[-1] == "0"
    errors = done.stderr.decode()
    assert "Traceback" not in errors
    assert len(errors.splitlines()) == len([code for code in codes if code != "0"])
    assert "secret" not in errors + done.stdout.decode()


def test_shared_connections_to_two_machines_lead_each_to_its_own(desk, machine, own_machine):
    machines = (machine, own_machine, machine, own_machine)
    ends = [desk.launch(each, "compute", "--share", kernel=each.classic) for each in machines]
    for end in ends:
        end.accept()
        end.echo(1000)
    assert [len(machine.kernels()), len(own_machine.kernels())] == [2, 2]
