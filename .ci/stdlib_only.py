"""Fails when a script imports what is not in the standard library of every Python from 3.6 on."""

import ast
import sys

# distutils and others that newer versions have dropped are not in here; nor is what came after 3.6.
ALLOWED = """
    _signal _socket argparse collections copy ctypes errno fcntl hashlib json os pwd py_compile re resource select
    signal socket struct subprocess sys tempfile termios threading time traceback tunnel tunnel_relay zlib
"""

bad = []
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as stream:
        tree = ast.parse(stream.read(), path)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        bad += [
            "{}:{}: imports {}".format(path, node.lineno, n)
            for n in names
            if n.split(".")[0] not in ALLOWED.split()
        ]
print("\n".join(bad) or "only the standard library is imported")
sys.exit(1 if bad else 0)
