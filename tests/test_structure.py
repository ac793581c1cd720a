"""The check of the structure reports each breach of a rule with its file, its line and the rule; nothing else."""

import os
import runpy
import sys

import pytest
import rig

CHECK = os.path.join(rig.LAUNCHERS, ".ci", "structure.py")
structure = runpy.run_path(CHECK)

# A program that keeps all rules. Each file comes close to what a rule forbids.
CLEAN = {
    "tunnel.py": """\
import sys

KIND = "ssh"
ORDER = 1
ORDER = ORDER + 1


def the_room(name):
    sys.modules.setdefault("tunnel", sys.modules[__name__])
    try:
        return __import__("tunnel_lib." + name, fromlist=["_"])
    except ValueError:
        from tunnel_lib import share

        return share


def main():
    return the_room("share").take()
""",
    "tunnel_sub.py": "import tunnel\n\n\ndef main():\n    return tunnel.main()\n",
    "install.py": "import argparse\n\nimport tunnel\n\nKIND = tunnel.KIND\n\n\nclass Loop:\n    pass\n",
    "tunnel_lib/__init__.py": "import os\n\n__all__ = []\n_ = 1\n",
    "tunnel_lib/names.py": "import tunnel\n\nLENGTH, _ = [1 for _ in tunnel.KIND]\n__all__ = []\n",
    "tunnel_lib/why.py": """\
class Loop:
    is_loop = True

    def __init__(self, kind, limit):
        self.kind, self.limit = kind, limit
        self.is_open = False

    def start(self):
        self.is_open = not self.is_open
        print(type(self.limit), self.kind, isinstance(self.limit, int))
""",
    "tunnel_lib/share.py": """\
import tunnel
from tunnel_lib.why import Loop

from . import names
from .sent import wire
from .sent.door import opened


class Shared(Loop):
    def take(self):
        if self.is_open:
            names.replace(wire.SIZE, getattr(tunnel, "KIND"), opened)

    def one(self):
        return self.limit and 1

    def two(self):
        return self.limit and 2


def take(*others):
    _ = [Shared(wire, 1) for wire in others]
""",
    "tunnel_lib/sent/door.py": "import os\n\n\ndef opened():\n    return os.getpid()\n",
    "tunnel_lib/sent/wire.py": "from . import door\nfrom .door import opened\n\nSIZE = door.opened() + opened()\n",
}


def write(folder, files):
    for path, text in files.items():
        place = folder.joinpath(*path.split("/"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return str(folder)


def methods(count):
    return "".join("    def method_{}(self):\n        pass\n".format(number) for number in range(count))


def statements(count, indent):
    return (" " * indent + "pass\n") * count


def attribute_tested(count, words):
    """A class that keeps an argument, and so many methods that test it."""
    begin = "class Try:\n    def __init__(self, session):\n        self.session = session\n"
    method = "    def method_{}(self):\n        return 1 if {} else 2\n"
    return begin + "".join(method.format(number, words) for number in range(count))


# Allowed: as much as there may be.
AT_THE_LIMIT = {
    "class lines": "class Long:\n" + statements(249, 4),
    "class methods": "class Wide:\n"
    + methods(19)
    + "    @property\n"
    + "    def last(self):\n"
    + methods(3).replace("  ", "    "),
    "function lines": "def long():\n" + statements(59, 4),
    "attribute tested": attribute_tested(5, "self.session"),
    "option tested": attribute_tested(9, "self.dry_run").replace("session", "dry_run"),
}

NO_STANDARD = "imports {}, which is not in the standard library of each Python from 3.6 on"
ORDER = "imports {}, against the order in .ci/structure.py"
TYPE = "{} of self asks what kind its object is; no method does"
ATTRIBUTE = "self.{} tells what kind its object is; no method asks, and {} of {} do"
HANDED = "{} is handed in; a module is imported where it is used"
TWICE = "{} is defined in {} too; a top-level name stands for one thing"
WIRE, SHARE, NAMES, TUNNEL = "tunnel_lib/sent/wire.py", "tunnel_lib/share.py", "tunnel_lib/names.py", "tunnel.py"

# For each breach: the file, what it holds, the line that is reported, and the rule.
BREACHES = [
    # sizes
    (SHARE, "class Long:\n" + statements(250, 4), 1, "class Long has 251 lines; a class has at most 250"),
    (SHARE, "\n@wide\nclass Wide:\n" + methods(21), 2, "class Wide has 21 methods; a class has at most 20"),
    (
        SHARE,
        "class Wide:\n" + methods(20) + "    @property\n    def last(self):\n        pass\n",
        1,
        "class Wide has 21 methods; a class has at most 20",
    ),
    (
        "install.py",
        "def long():\n" + statements(60, 4),
        1,
        "function long has 61 lines; a function has at most 60",
    ),
    (
        SHARE,
        'class Few:\n    def long(self):\n        """Say.\n' + "\n" * 58 + '        """\n',
        2,
        "function long has 61 lines; a function has at most 60",
    ),
    (
        SHARE,
        "def long():\n    return [\n" + "        1,\n" * 58 + "    ]\n",
        1,
        "function long has 61 lines; a function has at most 60",
    ),
    (TUNNEL, "\n" * 3201, 3201, "tunnel.py has 3201 lines; it has at most 3200"),
    # kinds
    (SHARE, "class A:\n    def f(self):\n        return isinstance(self, B)\n", 3, TYPE.format("isinstance")),
    (SHARE, "class A:\n    def f(self):\n        return type(self) is A\n", 3, TYPE.format("type")),
    (SHARE, "class A:\n    def f(self):\n        return self.__class__\n", 3, TYPE.format("__class__")),
    (SHARE, attribute_tested(1, "not self.is_login"), 5, ATTRIBUTE.format("is_login", 1, "Try")),
    (SHARE, attribute_tested(1, "self.kind == 1"), 5, ATTRIBUTE.format("kind", 1, "Try")),
    (SHARE, attribute_tested(1, "1 and self.kind"), 5, ATTRIBUTE.format("kind", 1, "Try")),
    (SHARE, attribute_tested(1, "[1 for _ in () if self.kind]"), 5, ATTRIBUTE.format("kind", 1, "Try")),
    (SHARE, attribute_tested(6, "self.session"), 5, ATTRIBUTE.format("session", 6, "Try")),
    (
        SHARE,
        "from . import why\n\n\nclass Try(why.Loop):\n    def f(self):\n        assert self.kind\n",
        6,
        ATTRIBUTE.format("kind", 1, "Try"),
    ),
    # arrows
    (
        TUNNEL,
        "import os\n\nfrom tunnel_lib import share\n",
        3,
        "imports tunnel_lib.share at module level; tunnel.py does so inside a function",
    ),
    (
        TUNNEL,
        "try:\n    import tunnel_lib.share\nexcept ValueError:\n    pass\n",
        2,
        "imports tunnel_lib.share at module level; tunnel.py does so inside a function",
    ),
    (
        TUNNEL,
        'share = __import__("tunnel_lib." + "share")\n',
        1,
        "imports tunnel_lib.(a computed name) at module level; tunnel.py does so inside a function",
    ),
    (
        TUNNEL,
        "def one():\n    import tunnel_lib.share\n\n\ndef two():\n    import tunnel_lib.names\n",
        6,
        "two imports from tunnel_lib; one does so for all",
    ),
    (NAMES, "import os\n\nfrom . import share\n", 3, ORDER.format("tunnel_lib.share")),
    (NAMES, "def f():\n    from tunnel_lib.share import Shared\n", 2, ORDER.format("tunnel_lib.share")),
    (NAMES, "import tunnel_lib.names\n", 1, ORDER.format("tunnel_lib.names")),
    (NAMES, "import tunnel_sub\n", 1, NO_STANDARD.format("tunnel_sub")),
    (SHARE, "from . import elsewhere\n", 1, ORDER.format("tunnel_lib.elsewhere")),
    (SHARE, 'import importlib\nimportlib.import_module("x")\n', 2, ORDER.format("tunnel_lib.(a computed name)")),
    ("tunnel_sub.py", "from tunnel_lib import share\n", 1, ORDER.format("tunnel_lib.share")),
    ("install.py", "import tunnel_lib.sent.wire\n", 1, ORDER.format("tunnel_lib.sent.wire")),
    ("tunnel_lib/elsewhere.py", "import os\n", 1, "tunnel_lib.elsewhere stands in no list of .ci/structure.py"),
    ("tunnel_relay.py", "import os\n", 1, "tunnel_relay stands in no list of .ci/structure.py"),
    # what is sent
    (WIRE, "import os\nimport tunnel\n", 2, ORDER.format("tunnel")),
    (WIRE, "from .. import names\n", 1, ORDER.format("tunnel_lib.names")),
    (WIRE, "from . import keeper\n", 1, ORDER.format("tunnel_lib.sent.keeper")),
    (
        WIRE,
        "from tunnel_lib.sent import door\n",
        1,
        "imports tunnel_lib.sent.door by its full name, not relatively",
    ),
    (WIRE, "import door\n", 1, NO_STANDARD.format("door")),
    (WIRE, "def f():\n    import distutils.util\n", 2, NO_STANDARD.format("distutils.util")),
    ("install.py", "from dataclasses import dataclass\n", 1, NO_STANDARD.format("dataclasses")),
    (TUNNEL, "def f():\n    from .os import path\n", 2, NO_STANDARD.format("os")),
    (TUNNEL, "def f():\n    from . import share\n", 2, NO_STANDARD.format(".")),
    # modules that are handed in
    (SHARE, "def f(\n    one,\n    tunnel,\n):\n    pass\n", 3, HANDED.format("module tunnel")),
    (SHARE, "f = lambda relay_module: 1\n", 1, HANDED.format("module relay_module")),
    (SHARE, "class A:\n    def f(self):\n        return self.tunnel\n", 3, HANDED.format("module tunnel")),
    (SHARE, "import tunnel\n\nprint(1, tunnel)\n", 3, HANDED.format("module tunnel")),
    (SHARE, "from . import names as other\n\nprint(file=other)\n", 3, HANDED.format("module other")),
    (SHARE, "import sys\n\nprint(sys.modules[__name__])\n", 3, HANDED.format("sys.modules[__name__]")),
    (WIRE, 'globals()["x"] = 1\n', 1, "globals() is called; no code asks where it runs"),
    # names
    (SHARE, "KIND, OTHER = 1, 2\n", 1, TWICE.format("KIND", "tunnel.py:3")),
    (SHARE, "if 1:\n\n    def the_room():\n        pass\n", 3, TWICE.format("the_room", "tunnel.py:8")),
    (
        "tunnel_lib/sent/wire.py",
        "class opened:\n    pass\n",
        1,
        TWICE.format("opened", "tunnel_lib/sent/door.py:4"),
    ),
    (SHARE, "FEW: int = 1\nFEW = 2\n", 2, TWICE.format("FEW", "tunnel_lib/share.py:1")),
    ("install.py", "def f():\n    pass\n\n\nclass f:\n    pass\n", 5, TWICE.format("f", "install.py:1")),
]


def test_a_program_that_keeps_all_rules_passes(tmp_path):
    done = rig.run(sys.executable, CHECK, write(tmp_path, CLEAN))
    assert (done.returncode, done.stdout, done.stderr) == (0, "the structure is true\n", "")


@pytest.mark.parametrize("what", sorted(AT_THE_LIMIT))
def test_as_much_as_is_allowed_passes(tmp_path, what):
    assert structure["breaches"](write(tmp_path, dict(CLEAN, **{SHARE: AT_THE_LIMIT[what]}))) == []


@pytest.mark.parametrize("path, text, line, rule", BREACHES, ids=[each[-1] for each in BREACHES])
def test_a_breach_is_reported_with_its_file_its_line_and_its_rule(tmp_path, path, text, line, rule):
    found = structure["breaches"](write(tmp_path, dict(CLEAN, **{path: text})))
    assert found == [(path, line, rule)]


def test_a_breach_is_printed_and_is_the_exit_code(tmp_path):
    path, text, line, rule = BREACHES[0]
    done = rig.run(sys.executable, CHECK, write(tmp_path, dict(CLEAN, **{path: text})))
    assert (done.returncode, done.stdout) == (1, "{}:{}: {}\n".format(path, line, rule))


@pytest.mark.parametrize("files", [{}, {"tunnel.py": "def\n"}])
def test_what_is_no_program_is_refused_in_one_line(tmp_path, files):
    done = rig.run(sys.executable, CHECK, write(tmp_path, files))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_program_needs_nothing_but_the_standard_library():
    found = structure["breaches"](rig.LAUNCHERS)
    assert [
        each for each in found if "standard library" in each[2] and "imports tunnel_relay," not in each[2]
    ] == []
