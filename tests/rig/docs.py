"""README and MANUAL taken apart: their sections, tables and commands, for the tests that hold them to the code.

What the documents keep to: an indented line is a command, or a line of a configuration file; a fence names what it
holds (``mathematica``, ``sh``), and holds no command where it says ``text``; a command within a sentence stands in
backticks.
"""

import os
import re

import rig

NAMES = ("README.md", "MANUAL.md")
# What begins a command within a sentence.
PROGRAMS = [
    "python3",
    "install.py",
    "ssh",
    "ssh-add",
    "ssh-copy-id",
    "ssh-keygen",
    "plink",
    "env",
    "chmod",
    "sudo",
]
PROGRAMS += ["module", "which", "loginctl", "salloc", "qsub"]


def text_of(name):
    with open(os.path.join(rig.LAUNCHERS, name), encoding="utf-8") as stream:
        return stream.read()


README, MANUAL = (text_of(name) for name in NAMES)
BOTH = README + MANUAL


def section(text, title):
    """What stands below a heading, up to the next one of its level."""
    match = re.search(r"^(#+) {}\n(.*?)(?=^\1 |\Z)".format(re.escape(title)), text, re.MULTILINE | re.DOTALL)
    assert match, title
    return match.group(2)


def tables(text):
    """The tables in a text: lists of rows, those lists of cells, the line below the head left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        rows = [[cell.strip("| ") for cell in row] for row in rows]
        found.append(rows[:1] + rows[2:])
    return found


def code_in(cell):
    """What stands in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def fences(text, language):
    """The contents of all fences that name a language."""
    return re.findall(r"^```{}\n(.*?)^```$".format(language), text, re.MULTILINE | re.DOTALL)


def without_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def indented(text):
    """The indented blocks: lists of lines."""
    blocks = re.findall(r"(?:^    .*\n)+", without_fences(text), re.MULTILINE)
    return [[line[4:] for line in block.splitlines()] for block in blocks]


def configurations(text):
    """The indented blocks that are for ``~/.ssh/config``."""
    return [block for block in indented(text) if block[0].startswith("Host ")]


def commands(text):
    """All other indented lines, and what begins like a command within a sentence."""
    lines = [line for block in indented(text) if not block[0].startswith("Host ") for line in block]
    prose = re.sub(r"^(?:    .*|<!--.*?-->)$", "", without_fences(text), flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    # A word alone names a program; with one argument at least it is a command.
    starts = tuple(program + " " for program in PROGRAMS)
    lines += [span for span in spans if span.startswith(starts)]
    lines += [span for span in spans if span.startswith("tests/") and span.endswith(".py")]
    return sorted(set(lines))
