"""install.py: the folder tunnel_lib beside the scripts, updates, and what a version no longer has."""

import os
import resource
import shutil
import sys

import pytest
from rig import installing
from rig.installing import LOADED, Home, Login, killed_after, tree, version

import install

this_machine_is_left_alone = installing.this_machine_is_left_alone


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path)


# -- updates


# What tunnel.py loads when it is needed; the folder is a package with or without an __init__.py.


def look_at(folder, names):
    """What the scripts in ``folder`` say, by name; and which file tunnel.py is."""
    there = os.stat(str(folder / "tunnel.py"))
    said = {name: (folder / name).read_text() for name in names}
    return said, (there.st_ino, there.st_mtime_ns)


@pytest.fixture
def updated(home, tmp_path_factory):
    """A folder into which version one is installed, and the sources of that and of version two."""
    one, two = (version(tmp_path_factory.mktemp(name), name) for name in ("one", "two"))
    assert home.install("--front-end", source=one) == 0
    return home.path / ".Wolfram" / "FrontEnd", one, two


def test_what_runs_during_an_update_keeps_the_files_that_it_has_open(home, updated):
    folder, _, two = updated
    names = ["tunnel.py", "tunnel_sub.py"] + LOADED
    streams = [(folder / name).open() for name in names]
    assert home.install("--front-end", source=two) == 0
    assert [stream.read() for stream in streams] == ["# one\n"] * len(names)
    assert set(look_at(folder, names)[0].values()) == {"# two\n"}
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("name", LOADED)
def test_tunnel_py_is_another_file_when_anything_that_it_loads_is(home, updated, name):
    folder, one, _ = updated
    (one / name).write_text("# changed\n")
    before = look_at(folder, LOADED)
    assert home.install("--front-end", source=one) == 0
    after = look_at(folder, LOADED)
    assert after[0] == dict(before[0], **{name: "# changed\n"})
    assert after[1] != before[1]
    assert home.install("--front-end", source=one) == 0
    assert look_at(folder, LOADED) == after
    assert home.install("--uninstall") == 0
    assert tree(home.path) == {}


def test_files_of_two_versions_are_told_by_the_new_name_of_tunnel_py(home, updated):
    """Wherever an update is, or was killed: a launcher that finds tunnel.py to be the file that it was at its
    start, and no new one beside it, has loaded files of its own version only."""
    folder, one, two = updated
    names, mixed, number, ended = ["tunnel.py"] + LOADED, 0, 0, False
    while not ended:
        number += 1
        assert home.install("--front-end", source=one) == 0
        before = look_at(folder, names)
        ended = killed_after(number, lambda: home.install("--front-end", source=two))
        after = look_at(folder, names)
        if not (folder / "tunnel.py.tunnel-new").exists():
            assert len(set(after[0].values())) == 1, number
            assert (after[0] == before[0]) is (after[1] == before[1]), number
        elif len(set(after[0].values())) > 1:
            mixed += 1
    assert mixed >= 1  # else nothing was tried
    assert not [name for name in tree(home.path) if name.endswith(install.NEW)]


def test_what_cannot_be_written_leaves_all_as_it_was(home, updated, monkeypatch):
    folder, _, two = updated
    before = tree(home.path)
    write_new = install.write_new
    for name in ["tunnel.py", "tunnel_sub.py", install.RECORD] + LOADED:

        def full(path, data, mode, name=name):
            if path.endswith(os.sep + os.path.basename(name)):
                raise OSError(28, "No space left on device")
            write_new(path, data, mode)

        monkeypatch.setattr(install, "write_new", full)
        assert home.install("--front-end", source=two) == 1
        assert "failed: {}: No space left on device".format(folder / name) in home.said
        assert tree(home.path) == before


def test_the_folder_is_put_beside_the_scripts_and_taken_away_with_its_byte_code(home, updated):
    folder, _, _ = updated
    for name in LOADED:
        path = folder / name
        assert path.stat().st_mode & 0o777 == 0o644
        cached = path.stem + "." + sys.implementation.cache_tag + ".pyc"
        assert (path.parent / "__pycache__" / cached).exists()
    (folder / "tunnel_lib/__pycache__/names.cpython-38.pyc").write_text("of another Python that ran here")
    assert home.install("--uninstall", "--dry-run") == 0
    for name in LOADED:
        assert "would remove: {}".format(folder / name) in home.said
    assert home.install("--uninstall") == 0
    assert tree(home.path) == {}


def test_what_else_is_in_the_folder_stays(home, updated):
    folder, _, _ = updated
    kept = ["tunnel_lib/__pycache__/mine.cpython-38.pyc", "tunnel_lib/mine.py", "tunnel_lib/sent/notes"]
    for name in kept:
        (folder / name).write_text("mine")
    assert home.install("--uninstall") == 0
    assert sorted(name for name, content in tree(folder).items() if content) == sorted(kept)


def test_modules_only_are_taken_from_the_folder(home, tmp_path_factory):
    source = version(tmp_path_factory.mktemp("of"), "one")
    for name in ("README", "x.py~", ".x.py", "a b.py", "x.pyc", "deeper/x.py", "sent/deeper/x.py"):
        (source / "tunnel_lib" / name).parent.mkdir(exist_ok=True)
        (source / "tunnel_lib" / name).write_text("")
    assert home.install("--front-end", source=source) == 0
    found = [name for name in tree(home.path / ".Wolfram/FrontEnd") if name.startswith("tunnel_lib/")]
    found = [name for name in found if "__pycache__" not in name and name != "tunnel_lib/sent"]
    assert sorted(found) == sorted(name for name in LOADED if "/" in name)


def test_what_a_version_no_longer_has_is_taken_away(home, updated, tmp_path_factory):
    """With its byte code, and what was in its place before comes back; what has changed since stays."""
    folder, one, _ = updated
    for number, name in enumerate(LOADED):
        (folder / name).write_text("mine {}".format(number))
    assert home.install("--front-end", source=one) == 0  # moves aside what is in the way
    (folder / "tunnel_lib/names.py").write_text("changed")
    (folder / "tunnel_relay.py.before-tunnel").unlink()
    last = version(tmp_path_factory.mktemp("last"), "last", "tunnel_lib/share.py")
    assert home.install("--front-end", "--dry-run", source=last) == 0
    assert [line for line in home.said if line.startswith("would remove: {}".format(folder))] == [
        "would remove: {}".format(folder / name)
        for name in ("tunnel_lib/__init__.py", "tunnel_lib/sent/wire.py", "tunnel_relay.py")
    ]
    assert home.install("--front-end", source=last) == 0
    assert (
        "kept: {}: it has changed since it was installed; what was there before is {}".format(
            folder / "tunnel_lib/names.py", "tunnel_lib/names.py.before-tunnel"
        )
        in home.said
    )
    assert not (folder / "tunnel_relay.py").exists()
    assert (folder / "tunnel_lib/__init__.py").read_text() == "mine 1"
    assert (folder / "tunnel_lib/names.py").read_text() == "changed"
    assert (folder / "tunnel_lib/sent/wire.py").read_text() == "mine 3"
    stems = {name.split(".")[0] for name in os.listdir(str(folder / "__pycache__"))}
    assert stems == {"tunnel", "tunnel_sub"}
    assert home.install("--uninstall") == 0
    left = [name for name, content in tree(folder).items() if content and "__pycache__" not in name]
    assert sorted(left) == sorted(
        [
            "tunnel_lib/__init__.py",
            "tunnel_lib/names.py",
            "tunnel_lib/names.py.before-tunnel",
            "tunnel_lib/sent/wire.py",
        ]
    )


def test_the_one_file_of_an_earlier_installation_goes_when_the_folder_comes(home, tmp_path_factory):
    folder = home.path / ".Wolfram" / "FrontEnd"
    earlier = version(tmp_path_factory.mktemp("earlier"), "one", "tunnel_relay.py")
    later = version(tmp_path_factory.mktemp("later"), "two", *LOADED[1:])
    assert home.install("--front-end", source=earlier) == 0
    assert home.install("--front-end", source=later) == 0
    assert "removed: {}".format(folder / "tunnel_relay.py") in home.said
    assert not [name for name in tree(home.path) if "tunnel_relay" in name]
    (folder / "tunnel_relay.py").write_text("# one\n")  # put there by hand, though a version had it
    assert home.install("--front-end", source=later) == 0
    assert home.install("--uninstall") == 0
    assert list(tree(folder)) == ["tunnel_relay.py"]


def test_an_update_to_other_modules_that_was_killed_can_be_undone(home, tmp_path_factory):
    one = version(tmp_path_factory.mktemp("one"), "one", *LOADED)
    two = version(tmp_path_factory.mktemp("two"), "two", "tunnel_lib/names.py", "tunnel_lib/share.py")
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    (folder / "tunnel_relay.py").write_text("mine")
    before, number, ended = tree(home.path), 0, False
    while not ended:
        number += 1
        if number % 2:
            assert home.install("--front-end", source=one) == 0
        ended = killed_after(number, lambda: home.install("--front-end", source=two))
        assert home.install("--uninstall") == 0
        assert tree(home.path) == before, number


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_is_none_of_ours_is_in_the_way(home, tmp_path_factory, kind):
    source = version(tmp_path_factory.mktemp("of"), "one")
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    if kind == "link":
        (folder / "tunnel_lib").symlink_to(version(tmp_path_factory.mktemp("mine"), "mine") / "tunnel_lib")
    else:
        (folder / "tunnel_lib").write_text("mine")
    before = tree(home.path), tree(tmp_path_factory.getbasetemp())
    assert home.install("--front-end", source=source) == 1
    (line,) = home.said
    assert line.startswith("failed: {}/tunnel_lib/".format(folder))
    assert "{}/tunnel_lib is in the way".format(folder) in line
    assert (tree(home.path), tree(tmp_path_factory.getbasetemp())) == before


def test_a_link_in_place_of_the_folder_is_not_looked_through(home, updated):
    """Somebody has linked it to the folder of the repository after he has installed it."""
    folder, one, _ = updated
    shutil.rmtree(str(folder / "tunnel_lib"))
    (folder / "tunnel_lib").symlink_to(one / "tunnel_lib")
    (one / "tunnel_lib" / ("x" + install.NEW)).write_text("")
    (one / "tunnel_lib" / "__pycache__").mkdir()
    before = tree(one)
    assert home.install("--uninstall") == 0
    assert tree(one) == before
    assert os.listdir(str(folder)) == ["tunnel_lib"]
    assert "kept: {}: it has changed".format(folder / "tunnel_lib/names.py") in str(home.said)


def test_folders_that_hold_nothing_of_a_version_go(home, updated, tmp_path_factory):
    folder, _, _ = updated
    assert home.install("--front-end", source=version(tmp_path_factory.mktemp("of"), "one", LOADED[2])) == 0
    assert sorted(os.listdir(str(folder / "tunnel_lib"))) == ["__pycache__", "names.py"]
    alone = version(tmp_path_factory.mktemp("alone"), "one", "tunnel_sub.py")
    assert home.install("--front-end", source=alone) == 0
    assert not (folder / "tunnel_lib").exists()
    before = tree(home.path)
    (alone / "tunnel_lib/sent").mkdir(parents=True)
    (alone / "tunnel_lib/sent/wire.py").write_bytes(b"-" * 9999)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        assert home.install("--front-end", source=alone) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(home.path) == before
