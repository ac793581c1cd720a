"""The launchers' own names and files, wherever they lie: no test says in which file a name stands.

A *room* is a module of the launchers. ``product.Wire``, or ``from rig.product import Wire``, is the name in the
room that has it; a room is imported when a name is in none that is loaded. ``monkeypatch.setattr(product,
"DEAD_SECONDS", 1.5)`` sets a name in every loaded room that has it: one room may have imported it from another.

The functions below do so for launchers of other processes, in a folder of their own, and for what launchers send
to kernel machines.
"""

import compileall
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import zlib

from .machine import LAUNCHERS

WITH_ROOMS = ("tunnel.py", "tunnel_lib/*.py", "tunnel_lib/sent/*.py")  # in this order
WITHOUT = ("tunnel_sub.py",)  # has no name that is not in a room
# How a constant is set in a file, up to a comment behind it; and where any name of a module is made.
ASSIGNMENT = "(?m)^{} = .*?(?=  #|$)"
DEFINITION = r"(?m)^(?:(?:def|class) {0}\b|(?:\w+, )*{0}(?:, \w+)* = )"

if LAUNCHERS not in sys.path:
    sys.path.insert(0, LAUNCHERS)


def files(folder=LAUNCHERS, patterns=WITH_ROOMS + WITHOUT):
    """The launchers' files in ``folder``, as paths below it."""
    found = [sorted(glob.glob(os.path.join(folder, pattern))) for pattern in patterns]
    return [os.path.relpath(path, folder) for paths in found for path in paths]


# Each room's name as a module; the file that makes a folder a package is no room.
ROOMS = [name[: -len(".py")].replace(os.sep, ".") for name in files(patterns=WITH_ROOMS)]
ROOMS = [name for name in ROOMS if not name.endswith(".__init__")]


def path(name):
    """Where one of the launchers' files lies."""
    return os.path.join(LAUNCHERS, name)


def text():
    """The text of all files, one after the other."""
    return "".join(read(path(name)) for name in files(patterns=WITH_ROOMS))


def read(name):
    with open(name, encoding="utf-8") as stream:
        return stream.read()


def copy_to(folder, compiled=False):
    """Put the launchers into ``folder``.

    :param compiled: with their byte code, as they are from their second launch on, which is most of what one costs
    """
    for name in files():
        source, target = path(name), os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(source, target)  # with its time, by which byte code knows its source
        if compiled:
            compileall.compile_file(source, quiet=2)
            code, cache = map(importlib.util.cache_from_source, (source, target))
            os.makedirs(os.path.dirname(cache), exist_ok=True)
            shutil.copy2(code, cache)


# -- other values for a test


def setting(**values):
    """Python code that gives names other values, for a launcher whose folder is on sys.path.

    :param values: expressions; a name may have dots, as ``Probe.PATIENCE`` has
    """
    lines = []
    for name, value in values.items():
        room = room_of(name.partition(".")[0])
        lines.append("import {0}; {0}.{1} = {2}".format(room, name, value))
    return "; ".join(lines)


def room_of(name):
    """The room that makes a name; others may have imported it."""
    found = [room for room in ROOMS if defines(room, name)]
    assert len(found) == 1, "{} is made in {}".format(name, " and ".join(found) or "no room")
    return found[0]


def defines(room, name):
    """Whether a name is made in a room."""
    return bool(re.search(DEFINITION.format(name), read(path(room.replace(".", os.sep) + ".py"))))


def launching(role="classic", **values):
    """Python code that is a launcher of the folder which is its first argument, with other values for names.

    :param role: ``compute``, or anything else for a controller kernel
    """
    main = "'tunnel_sub', tunnel.COMPUTE" if role == "compute" else ""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import tunnel; {}; sys.exit(tunnel.main({}))"
    return code.format(setting(**values) or "pass", main)


def alter(folder, **constants):
    """Set constants in the files of launchers in ``folder``, and so in what they send to a kernel machine."""
    counts = dict.fromkeys(constants, 0)
    for name in files(str(folder), WITH_ROOMS):
        there = os.path.join(str(folder), name)
        before = read(there)
        after, found = rewritten_constants(before, constants)
        for constant in found:
            counts[constant] += 1
        if after != before:
            with open(there, "w", encoding="utf-8") as stream:
                stream.write(after)
    assert set(counts.values()) <= {1}, counts


def rewritten_constants(source, constants):
    """A module's text with other constants; returns it, and which it has."""
    found = []
    for name, value in constants.items():
        source, count = re.subn(ASSIGNMENT.format(name), "{} = {}".format(name, value), source)
        found += [name] * count
    return source, found


def near_and_far(near, far):
    """An expression that is ``near`` in a launcher, and ``far`` in what it has sent to a kernel machine."""
    return "{} if 'tunnel' in __import__('sys').modules else {}".format(near, far)


def alter_sent(monkeypatch, **constants):
    """Have launchers of this process send a relay whose constants are others."""
    plain = product.text_of_sent
    assert sorted(constants) == sorted(name for name in constants if room_of(name).startswith("tunnel_lib.sent."))
    monkeypatch.setattr(product, "text_of_sent", lambda name: rewritten_constants(plain(name), constants)[0])


def first_sent():
    """What launchers send to a kernel machine first on each connection."""
    return product.parcel()[0]


def altered_door(first, before, after):
    """What is sent first, with another text of the door."""
    text = zlib.decompress(first[product.HEAD :])
    assert text.count(before) == 1
    return product.opened(zlib.compress(text.replace(before, after)))


def sent_from(folder):
    """All that launchers in ``folder`` send to a kernel machine."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tunnel_lib.near import parcel;"
    code += "sys.stdout.buffer.write(b''.join(parcel()))"
    return subprocess.check_output([sys.executable, "-SEsc", code, str(folder)])


# -- names

replaced = {}  # for each name that was set the values before, the last one at the end


class Product(types.ModuleType):
    """This module: what it does not define itself is a name of the launchers."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        (first, value), *others = [(module.__name__, vars(module)[name]) for module in rooms_with(name)]
        for other, found in others:
            same = found is value or found == value
            assert same, "{} is {!r} in {} and {!r} in {}".format(name, value, first, found, other)
        return value

    def __setattr__(self, name, value):
        if name.startswith("__"):
            super().__setattr__(name, value)
            return
        replaced.setdefault(name, []).append(getattr(self, name))
        set_everywhere(name, value)

    def __delattr__(self, name):
        """Set a name back to what it was before: pytest undoes so what it has not found in a ``__dict__``."""
        set_everywhere(name, replaced[name].pop())


def set_everywhere(name, value):
    for module in rooms_with(name):
        setattr(module, name, value)


def rooms_with(name):
    """The rooms that have a name: all that are loaded, else the first of the others.

    :raises AttributeError: there is none
    """
    loaded = [sys.modules[room] for room in ROOMS if room in sys.modules]
    found = [module for module in loaded if name in vars(module)]
    for room in ROOMS if not found else ():
        if room not in sys.modules and name in vars(importlib.import_module(room)):
            return [sys.modules[room]]
    if not found:
        raise AttributeError("the launchers have no name {}".format(name))
    return found


product = sys.modules[__name__]
product.__class__ = Product
