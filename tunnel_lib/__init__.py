"""What the shell scripts did not do: one file for each such thing, loaded when a launch needs it.

An update replaces these files while launches run, and ``tunnel.py`` after all that it loads. Until all are
in place a file :data:`MARKER` lies beside it. So a launch can tell whether a file that it loads late is
of its version.
"""

import os

LAUNCHER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tunnel.py")
MARKER = LAUNCHER + ".tunnel-new"


def launcher_now():
    """What tells the ``tunnel.py`` beside this folder from any other that has lain there; None for none."""
    try:
        found = os.stat(LAUNCHER)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


LAUNCHER_AT_FIRST = launcher_now()


def is_of_one_version():
    """Whether the files here still belong to the launcher that has loaded the first of them."""
    return launcher_now() == LAUNCHER_AT_FIRST and not os.path.exists(MARKER)
