"""The rig's ``product``: a name of the launchers is found, set and set back in whatever rooms have it."""

import os
import shutil
import sys

import pytest
import rig
from rig import product

FILES = {
    "tunnel.py": "import os, sys\nPAUSE = 5.0  # seconds\n\n\nclass Probe:\n    PATIENCE = 2\n",
    "tunnel_sub.py": "import tunnel\n",
    "tunnel_lib/__init__.py": "",
    "tunnel_lib/share.py": "from tunnel_lib.sent.wire import DEPTH\nLIMIT = 7\ndef deep():\n    return DEPTH\n",
    "tunnel_lib/sent/wire.py": "KINDS, DEPTH = 2, 3\nDEPTH = 4\n",
    "tunnel_lib/sent/odd.py": "PAUSE = 6.0\n",
}


@pytest.fixture
def house(tmp_path):
    """Launchers of a few lines, with a copy of the rig beside them; what is called runs code with their names."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(rig.HERE, str(tmp_path / "tests" / "rig"), ignore=ignored)

    def run(*lines):
        begin = "import sys; sys.path.insert(0, {!r}); from rig import product".format(str(tmp_path / "tests"))
        done = rig.run(sys.executable, "-c", "\n".join((begin,) + lines))
        return done.stdout.split("\n")[:-1], done.stderr

    run.folder = tmp_path
    return run


def test_a_room_is_imported_when_a_name_is_in_none_that_is(house):
    loaded = "print(sorted(name for name in sys.modules if 'tunnel' in name))"
    said, errors = house("product.PAUSE", loaded, "product.deep", loaded)
    assert (said[0], errors) == ("['tunnel']", "")
    assert said[1] == "['tunnel', 'tunnel_lib', 'tunnel_lib.sent', 'tunnel_lib.sent.wire', 'tunnel_lib.share']"


def test_a_name_is_set_and_set_back_in_every_room_that_has_it(house):
    begin = "sys.path += {!r}; import pytest; patch = pytest.MonkeyPatch()".format(sys.path)
    show = "print(product.deep(), product.DEPTH)"
    patch = "patch.setattr(product, 'DEPTH', {})"
    said, errors = house(begin, show, patch.format(8), show, patch.format(9), show, "patch.undo()", show)
    assert (said, errors) == (["4 4", "8 8", "9 9", "4 4"], "")


def test_two_values_of_a_name_are_an_error_that_names_both_rooms(house):
    said, errors = house("print(product.PAUSE)", "import tunnel_lib.sent.odd", "product.PAUSE")
    assert said == ["5.0"]
    assert errors.endswith("AssertionError: PAUSE is 5.0 in tunnel and 6.0 in tunnel_lib.sent.odd\n")


def test_a_name_that_nobody_has_is_an_error(house):
    for line in ("product.NOWHERE", "product.NOWHERE = 1", "from rig.product import NOWHERE"):
        _, errors = house(line)
        assert "NOWHERE" in errors.splitlines()[-1]
        assert errors.splitlines()[-1].startswith(("AttributeError", "ImportError"))


def test_code_sets_a_name_in_the_room_that_makes_it(house):
    (house.folder / "tunnel_lib/sent/odd.py").unlink()
    said, errors = house("print(product.setting(**{'LIMIT': 1, 'deep': 3, 'Probe.PATIENCE': 0}))")
    shared = "import tunnel_lib.share; tunnel_lib.share."
    expected = [shared + "LIMIT = 1", shared + "deep = 3", "import tunnel; tunnel.Probe.PATIENCE = 0"]
    assert (said, errors) == (["; ".join(expected)], "")
    _, errors = house("product.setting(NOWHERE=1)")
    assert errors.endswith("AssertionError: NOWHERE is made in no room\n")


def test_launchers_are_copied_and_altered_as_a_whole(house, tmp_path):
    there = tmp_path / "there"
    said, errors = house(
        "product.copy_to({!r}, compiled=True)".format(str(there)),
        "product.alter({!r}, LIMIT=8, DEPTH=5)".format(str(there)),
    )
    assert (said, errors) == ([], "")
    for name, text in FILES.items():
        expected = text.replace("LIMIT = 7", "LIMIT = 8").replace("\nDEPTH = 4", "\nDEPTH = 5")
        assert (there / name).read_text() == expected
        assert list((there / name).parent.glob("__pycache__/{}.*.pyc".format((there / name).stem)))
    _, errors = house("product.alter({!r}, LIMIT=8, NOWHERE=5)".format(str(there)))
    assert "AssertionError" in errors and "NOWHERE" in errors


def test_what_the_rig_calls_its_own_is_no_name_of_the_launchers():
    own = {name for name in vars(product) if not name.startswith("__")}
    for name in own:
        rooms = [room for room in product.ROOMS if product.defines(room, name)]
        assert not rooms, "{} is a name of {} and of the rig".format(name, rooms)
    assert "tunnel" in product.ROOMS
    assert os.path.exists(product.path("tunnel.py"))
