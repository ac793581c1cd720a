"""Fixtures: the launchers in a folder as users have it, and kernel machines with a real sshd."""

import os
import pathlib
import shutil
import signal
import sys
import tempfile

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import rig
from rig import product
from rig.desk import Desk, make_machine
from rig.launches import server_of, share_by_hand

os.environ.pop("PYTHONUNBUFFERED", None)  # hides what becomes of a buffer that nobody takes
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    # The tests run under nohup. A launcher that they start would ignore SIGHUP too; what is handled here is not
    # ignored there.
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="module")
def machine(request):
    """A kernel machine that lets ``john`` in with a key or a password."""
    return make_machine(request, password=True)


@pytest.fixture
def own_machine(request):
    """The same for a single test, which may break it."""
    return make_machine(request, password=True)


@pytest.fixture
def users(machine, tmp_path):
    """An ssh whose configuration shares a connection that its user has made."""
    wrapper = share_by_hand(machine, tmp_path)
    yield wrapper
    rig.run(wrapper, "-O", "exit", machine.address)


@pytest.fixture
def serve(request, machine):
    """What has the machine's server started again with lines of its own, for a test."""
    yield from server_of(request, machine)


@pytest.fixture
def front_end_folder(tmp_path):
    """The launchers in a folder as on a user's machine: with blanks, and letters beyond ASCII."""
    folder = tmp_path / "Bücher und Möbel" / "FrontEnd"
    folder.mkdir(parents=True)
    product.copy_to(str(folder), compiled=True)
    return folder


@pytest.fixture
def in_time():
    """For tests of which none takes long: one that does never ends."""

    def late(*_):
        raise AssertionError("this does not come to an end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def memory(tmp_path):
    """What launches to one destination tell later ones, in a file of the test's own."""
    return product.Memory(str(tmp_path / "memory"))


def pytest_collection_modifyitems(config, items):
    """With ``TUNNEL_SAMPLE=N`` only every Nth of the tests that launch something or need a kernel machine: run.py
    runs all of them on the newest Python, and a sample on the oldest."""
    step = int(os.environ.get("TUNNEL_SAMPLE") or 1)
    older = os.environ.get("TUNNEL_WINDOWS_PYTHONS", "").split(os.pathsep)[:-1]
    on_older = [item for item in items if "wine" in item.fixturenames and item.callspec.params["wine"] in older]
    launching = [item for item in items if {"desk", "machine", "login", "home"} & set(item.fixturenames)]
    left_out = [item for number, item in enumerate(launching) if number % step]
    left_out += [item for number, item in enumerate(on_older) if number % 3]  # the same on Windows
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(map(id, left_out))
        items[:] = [item for item in items if id(item) not in gone]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """The report of a test that fails holds the logs of all that it launched."""
    outcome = yield
    report = outcome.get_result()
    desk = getattr(item, "funcargs", {}).get("desk")
    if report.failed and desk:
        report.sections.append(("what was launched", desk.facts()))


@pytest.fixture
def desk(front_end_folder):
    # Short enough for the paths of sockets, as real ones are.
    runtime, temporary = (pathlib.Path(tempfile.mkdtemp(prefix="run-")) for _ in range(2))
    desk = Desk(front_end_folder, runtime, temporary)
    yield desk
    desk.close()
    for folder in (runtime, temporary):
        shutil.rmtree(str(folder), ignore_errors=True)
