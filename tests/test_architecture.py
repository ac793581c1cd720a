"""docs/ARCHITECTURE.md against the code: what it names is there, and its table of rooms has every file."""

import os
import re

import rig
from rig import product

PAGE = product.read(os.path.join(rig.LAUNCHERS, "docs", "ARCHITECTURE.md"))
NOT_NAMES = {"PORT@HOST,PORT@HOST", "desk", "test"}


def sources():
    """The text of all that is the product, its checks and its rigs."""
    names = product.files() + ["install.py", "tunnel.m", ".ci/structure.py"]
    names += [os.path.join("tests", "rig", name) for name in os.listdir(rig.HERE) if name.endswith(".py")]
    return "\n".join(product.read(os.path.join(rig.LAUNCHERS, name)) for name in names)


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`([\w/.-]+\.(?:py|m|md))`", PAGE):
        places = ("", "tests", "tunnel_lib")
        assert any(os.path.exists(os.path.join(rig.LAUNCHERS, place, name)) for place in places), name


def test_every_name_of_the_code_is_there():
    text = sources()
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", PAGE):
        last = name.rpartition(".")[2]
        if name.endswith((".py", ".m")) or name in NOT_NAMES:
            continue
        assert re.search(r"\b{}\b".format(last), text), name


def test_every_room_stands_in_the_table():
    for name in product.files():
        room = name.replace(os.sep, "/")
        if not room.endswith("__init__.py") and "/sent/" not in room:
            assert "`{}`".format(room) in PAGE, room


def test_four_pages_at_most():
    assert len(PAGE.split("\n")) <= 4 * 60
