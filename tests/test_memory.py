"""What launches to one destination tell later ones: kept as long as it holds, and never in a launch's way."""

import os
import subprocess
import sys
import time

import pytest
from rig import product

pytestmark = pytest.mark.usefixtures("in_time")


def test_what_is_remembered_and_forgotten(memory, tmp_path):
    assert memory.read() == {}
    memory.remember("terminal", "yes")
    memory.remember("kernel /a b/14.1/math\tx", "2024-01-01 12:00:00")
    assert memory.read() == {"terminal": "yes", "kernel /a b/14.1/math\tx": "2024-01-01 12:00:00"}
    memory.remember("terminal", "no")
    memory.remember("died", "several\nlines and a\ttab")
    assert product.Memory(memory.path).read()["died"] == "several lines and a tab"
    memory.remember("died", None)
    memory.remember("never known", None)
    assert memory.read() == {"terminal": "no", "kernel /a b/14.1/math\tx": "2024-01-01 12:00:00"}
    assert (tmp_path / "memory").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", ["/ä/math", "/\udcff/math", "/a\u2028b/math", "/a\x85b/math", "/a\u00a0b/math"])
def test_a_path_is_remembered_whatever_letters_it_has(memory, path):
    memory.remember("kernel " + path, "now")
    memory.remember("terminal", "yes")
    assert memory.read() == {"kernel " + path: "now", "terminal": "yes"}


@pytest.mark.parametrize(
    "data", [b"", b"\n\n", b"no tab\n", b"\xff\xfe\x00", b"cut off", b"a\tb\nterminal", b"\0" * 5000]
)
def test_a_damaged_file_is_no_reason_to_fail(memory, data):
    with open(memory.path, "wb") as stream:
        stream.write(data)
    memory.remember("terminal", "yes")
    known = memory.read()
    assert known.pop("terminal") == "yes"
    assert known == ({"a": "b"} if b"a\t" in data else {})


@pytest.mark.parametrize("where", [None, "no/such/folder/memory", "."])
def test_where_nothing_can_be_remembered_a_launch_knows_nothing_and_goes_on(tmp_path, where):
    memory = product.Memory(where and str(tmp_path / where))
    calls = []
    assert memory.change(lambda values: calls.append(dict(values))) == {}
    assert calls == [{}]
    memory.remember("terminal", "yes")
    assert memory.read() == {}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink(os.path.dirname(path) + "/other", path)])
def test_what_is_no_file_of_ours_is_neither_waited_for_nor_written_to(memory, tmp_path, make):
    (tmp_path / "other").write_text("somebody's")
    make(memory.path)
    memory.remember("terminal", "yes")
    assert memory.read() == {}
    assert (tmp_path / "other").read_text() == "somebody's"


def test_a_full_disk_is_no_reason_to_fail(memory, monkeypatch):
    memory.remember("terminal", "yes")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    values = memory.change(lambda values: values.update(more="x"))
    assert values["more"] == "x"
    memory.remember("other", "x")
    monkeypatch.undo()
    memory.remember("terminal", "no")
    assert memory.read()["terminal"] == "no"


def test_somebody_who_holds_the_file_for_long_stops_nobody(memory):
    memory.remember("terminal", "yes")
    calls = []
    code = "import os, sys; os.lockf(os.open(sys.argv[1], os.O_RDWR), os.F_LOCK, 0)\n"
    code += "print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-SEsc", code, memory.path], **pipes) as somebody:
        somebody.stdout.readline()
        memory.change(lambda values: (calls.append(dict(values)), values.update(terminal="no")))
        somebody.stdin.close()
    assert len(calls) == 1
    assert memory.read() == {"terminal": "yes"}  # what somebody else is about to change was left alone


def test_launches_at_the_same_time_lose_nothing_of_each_other(memory):
    def count(values):
        time.sleep(0.002)  # so that they meet
        values["count"] = str(int(values.get("count", 0)) + 1)

    children = []
    for number in range(6):
        child = os.fork()
        if not child:
            try:
                for turn in range(10):
                    memory.change(count)
                    memory.remember("{} {}".format(number, turn), "x")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    known = memory.read()
    assert known.pop("count") == "60"
    assert sorted(known) == sorted("{} {}".format(number, turn) for number in range(6) for turn in range(10))
