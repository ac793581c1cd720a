"""install.py: several at once, and a record of its own that is damaged."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from rig import installing, product
from rig.installing import INSTALL, LOADED, OLD, Home, Login, copy_of_tunnel, tree, version

import install

this_machine_is_left_alone = installing.this_machine_is_left_alone


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path)


# -- several at once


@pytest.fixture
def another_runs(tmp_path):
    """The home is held, as by another install.py; returns what ends that."""
    descriptor = os.open(str(tmp_path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    left = [descriptor]

    def end():
        while left:
            os.close(left.pop())

    yield end
    end()


@pytest.mark.parametrize("argv", [["--front-end"], ["--front-end", "--uninstall"]])
def test_one_run_waits_for_another(home, another_runs, tmp_path, argv):
    home.path = tmp_path / "other home"  # which nobody holds
    home.path.mkdir()
    assert home.install("--front-end") == 0
    (home.path / ".Wolfram").rename(tmp_path / ".Wolfram")
    before = tree(tmp_path / ".Wolfram")
    if "--uninstall" not in argv:
        (tmp_path / ".Wolfram/FrontEnd/tunnel.py").unlink()
        before = tree(tmp_path / ".Wolfram")
    process = subprocess.Popen(
        [sys.executable, INSTALL] + argv,
        env=dict(os.environ, HOME=str(tmp_path), PYTHONUNBUFFERED=""),
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    assert process.stdout.readline() == "waiting: another install.py is at work\n"
    assert tree(tmp_path / ".Wolfram") == before
    another_runs()
    assert "tunnel.py" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert (tmp_path / ".Wolfram/FrontEnd/tunnel.py").exists() is ("--uninstall" not in argv)


def test_a_run_waits_for_another_no_longer_than_a_minute(home, another_runs, monkeypatch):
    assert install.LOCK_SECONDS == 60
    monkeypatch.setattr(install, "LOCK_SECONDS", 0.1)
    before = tree(home.path)
    with pytest.raises(product.Fatal) as caught:
        home.install()
    assert caught.value.code == 1
    assert caught.value.text == "another install.py has been at work for 0.1 s; run this again when it has ended"
    assert home.said == ["waiting: another install.py is at work"]
    assert tree(home.path) == before
    another_runs()
    assert home.install() == 0
    assert "waiting" not in str(home.said)


def test_several_at_once_leave_what_one_would(tmp_path, tmp_path_factory):
    """Of two versions, so that each replaces what another has put there."""
    scripts = [version(copy_of_tunnel(tmp_path_factory.mktemp(name) / "tunnel"), name) for name in ("one", "two")]
    for source in scripts:
        shutil.copy(product.path("tunnel.py"), str(source))
    folder = tmp_path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    (tmp_path / "none").mkdir()
    for name in ("tunnel.sh", "tunnel_sub.py"):
        (folder / name).write_bytes(OLD)
    before = tree(tmp_path)
    environ = dict(os.environ, HOME=str(tmp_path), WOLFRAM_BASE=str(tmp_path / "none/W"))
    for argv in ([], ["--uninstall"]):
        processes = [
            subprocess.Popen(
                [sys.executable, str(source / "install.py")] + argv,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                universal_newlines=True,
            )
            for source in scripts * 2
        ]
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, outputs
        assert "failed" not in str(outputs)
        if not argv:
            assert len({(folder / name).read_text() for name in LOADED}) == 1
    assert tree(tmp_path) == before


def test_the_remote_side_waits_too(login, monkeypatch, tmp_path):
    if not shutil.which("flock"):
        pytest.skip("needs flock")
    tools, waits = tmp_path / "tools", tmp_path / "waits"
    tools.mkdir()
    (tools / "flock").write_text(
        '#!/bin/sh\n[ "$1" = -n ] || : >"{}"\nexec {} "$@"\n'.format(waits, shutil.which("flock"))
    )
    (tools / "flock").chmod(0o755)
    path = "{}:{}".format(tools, os.environ["PATH"])
    monkeypatch.setattr(install, "LOCK_SECONDS", 1)
    descriptor = os.open(str(login.path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert login.remote(KERNEL_PATH=path) == 1
    assert login.said == ["failed: another install.py has been at work for 1 s; run this again when it has ended"]
    assert tree(login.path) == {}
    monkeypatch.setattr(install, "LOCK_SECONDS", 60)
    waits.unlink()
    run = threading.Thread(target=login.remote, kwargs={"KERNEL_PATH": path})
    run.start()
    while not waits.exists():
        assert run.is_alive()
        time.sleep(0.01)
    os.close(descriptor)
    run.join(30)
    assert [line.partition(":")[0] for line in login.said] == ["installed", "installed"]


@pytest.mark.parametrize("folder", ["/no/such/folder", "/"])
def test_what_cannot_be_locked_is_not_waited_for(folder, monkeypatch):
    def no_locks(descriptor, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = []
    with install.Lock(folder, said.append), install.Lock(folder, said.append):
        assert said == []


# -- damaged records


def damaged(record):
    """What may have become of a record, by kind."""
    title, folders, *files, _ = record.split(b"\n")
    lines = {
        "no levels": [title] + files,
        "levels beyond all": [title, b"folders 99999999999"] + files,
        "many levels": [title, b"folders 99"] + files,
        "digits beyond all": [title, b"folders " + b"9" * 9999] + files,
        "odd digits": [title, "folders ²".encode()] + files,
        "no files": [title, folders],
        "no title": [folders] + files,
        "twice": [title, folders] + files * 2,
        "nothing": [],
        "zeros": [b"\0" * len(record)],
        "long line": [title, folders, b"file tunnel.m " + b"a" * (1 << 20)] + files,
        "many lines": [title, folders] + [b"file tunnel.m"] * (1 << 14) + files,
        "capitals": [record.upper()[:-1]],
        "\\r": [line + b"\r" for line in record.split(b"\n")],
        "bits": [bytes(byte ^ (number % 50 == 49) for number, byte in enumerate(record))],
    }
    for number, line in enumerate(files):
        _, name, sha256, aside, former = line.split()
        for kind, other in (
            ("gone", b""),
            ("cut", line[:40]),
            ("digest", b" ".join([b"file", name, sha256[:-1], aside, former])),
            ("other digest", b" ".join([b"file", name, sha256[::-1], aside, former])),
            ("place", b" ".join([b"file", b"../" + name, sha256, aside, former])),
            ("user's", b" ".join([b"file", b"init.m", sha256, aside, former])),
            ("aside", b" ".join([b"file", name, sha256, b"init.m", former])),
            ("former", b" ".join([b"file", name, sha256, aside, b"\xff\0*"])),
        ):
            replaced = [title, folders] + files[:number] + [other] * bool(other) + files[number + 1 :]
            lines["{} {}".format(kind, number)] = replaced
    return {kind: b"".join(line + b"\n" for line in each) for kind, each in lines.items()}


def check_damage(folder, kind, install_it, uninstall, said, mine):
    """Whatever has become of the record in ``folder``: what is the user's stays, and of what is not removed all is
    named."""
    assert install_it() == 0
    record = folder / install.RECORD
    record.write_bytes(damaged(record.read_bytes())[kind])
    begin = time.monotonic()
    assert uninstall() == 0
    assert time.monotonic() - begin < 10
    found = {name: content for name, content in tree(folder).items() if content and not name.endswith(".pyc")}
    assert OLD in [content[0] for content in found.values()]
    for name, content in found.items():
        if name in mine:
            assert content[0] == b"mine", name
        else:
            lines = [line + " " for line in said()]
            named = ("restored: {} ", "kept: {}: ", "what was there before is {} ")
            named = [text.format(path) for text, path in zip(named, (folder / name, folder / name, name))]
            assert any(text in line for text in named for line in lines), (name, lines)
    assert folder.is_dir() and set(mine) <= set(found)
    if not kind.startswith(("many levels", "gone", "other digest")):  # those cannot be told from a good one
        assert "damaged: {}: {}".format(record, install.DAMAGED) in said(), said()


RECORDED = """# title
folders 2
file tunnel.m 0 - -
"""


@pytest.mark.parametrize("kind", sorted(damaged(RECORDED.encode("ascii"))))
def test_a_damaged_record_of_launchers_costs_the_user_nothing(home, tmp_path_factory, kind):
    source = version(tmp_path_factory.mktemp("of"), "one", *LOADED[2:])
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    mine = ["init.m", "mine.sh", "x.py.before-tunnel"]
    for name in mine:
        (folder / name).write_bytes(b"mine")
    (folder / "tunnel.py").write_bytes(OLD)
    check_damage(
        folder,
        kind,
        lambda: home.install("--front-end", source=source),
        lambda: home.install("--front-end", "--uninstall"),
        lambda: home.said,
        mine,
    )


@pytest.mark.parametrize("back", ["local", "remote"])
@pytest.mark.parametrize("kind", sorted(damaged(RECORDED.encode("ascii"))))
def test_a_damaged_record_of_kernels_costs_the_user_nothing(login, capfd, back, kind):
    folder = login.path / ".Mathematica" / "Kernel"
    folder.mkdir(parents=True)
    (folder / "init.m").write_bytes(b"mine")
    (folder / "tunnel.m").write_bytes(OLD)
    run = getattr(login, back)
    check_damage(folder, kind, run, lambda: run("--uninstall"), lambda: login.said, ["init.m"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("back", ["local", "remote"])
def test_no_number_of_levels_leads_to_the_home(login, back):
    """It is empty but for what is removed."""
    run = getattr(login, back)
    assert run() == 0
    for record in login.path.rglob(install.RECORD):
        record.write_text(record.read_text().replace("folders 2", "folders 98"))
    assert run("--uninstall") == 0
    assert os.listdir(str(login.path)) == []


@pytest.mark.parametrize("argv", [["--kernel"], ["--kernel", "--uninstall"]])
def test_a_record_that_would_be_read_for_ever_is_one_line(home, argv):
    folder = home.path / ".Wolfram" / "Kernel"
    folder.mkdir(parents=True)
    home.environ["WOLFRAM_USERBASE"] = str(folder.parent)
    os.mkfifo(str(folder / install.RECORD))
    assert home.install(*argv) == 1
    assert home.said == ["failed: {}: is no file".format(folder / install.RECORD)]


def test_files_of_others_that_end_as_ours_do_stay(home):
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    for name in ("mine" + install.NEW, "tunnel.txt" + install.NEW):
        (folder / name).write_text("mine")
    before = tree(home.path)
    assert home.install("--front-end") == 0
    assert home.install("--uninstall") == 0
    assert tree(home.path) == before
