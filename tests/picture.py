#!/usr/bin/env python3
"""Make the README's picture: a terminal with ``--check --relay``, from a real run, as SVG.

usage: python3 tests/picture.py [FILE]

The kernel machine is the tests' (root, and see tests/rig/machine.py). It is called cluster.example.org, its
kernel lies in /opt, and the client reads a configuration of its own, each in mount namespaces that end with the
run: so what is printed is what a user sees, and tells nothing of the machine that this runs on.
"""

import os
import pty
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import xml.sax.saxutils

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import rig
import run
from rig import product

FILE = os.path.join(rig.TESTS, "data", "check.svg")
HOST, NODE, KERNEL = "cluster.example.org", "login1", "/opt/wolfram/14.1/Executables/WolframKernel"
COMMAND = ["python3", "tunnel.py", "--check", "--relay", "john@" + HOST, KERNEL]

SIZE, WIDTH, HEIGHT, MARGIN = 14, 8.43, 20, 16  # of letters, lines and the space around, in pixels
COLOURS = {"32": "#7ee787", "31": "#ff7b72", "": "#e6edf3"}  # those of a terminal: green, red, and none
PAPER, PROMPT = "#0d1117", "#8b949e"


def render(command, output):
    """An SVG of a terminal.

    :param command: what has been typed
    :param output: what a program has printed since, colours included
    """
    lines = [[(PROMPT, "$ "), (COLOURS[""], command)]]
    for line in output.rstrip("\n").split("\n"):
        words = re.split(r"\033\[([\d;]*)m", line)
        colours = [COLOURS.get(code, COLOURS[""]) for code in [""] + words[1::2]]
        lines.append([(colour, text) for colour, text in zip(colours, words[::2]) if text])
    columns = max(sum(len(text) for _, text in line) for line in lines)
    size = 'width="{0}" height="{1}" viewBox="0 0 {0} {1}"'.format(
        round(columns * WIDTH + 2 * MARGIN), len(lines) * HEIGHT + 2 * MARGIN
    )
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" {} role="img">'.format(size),
        "<title>{}</title>".format(xml.sax.saxutils.escape(command)),
        '<rect width="100%" height="100%" rx="8" fill="{}"/>'.format(PAPER),
        '<g font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="{}"'
        ' xml:space="preserve">'.format(SIZE),
    ]
    for number, line in enumerate(lines):
        spans = "".join(
            '<tspan fill="{}">{}</tspan>'.format(colour, xml.sax.saxutils.escape(text)) for colour, text in line
        )
        # Its length is given, so that each column is where it belongs, whatever letters there are.
        length = sum(len(text) for _, text in line) * WIDTH
        parts.append(
            '<text x="{}" y="{}" textLength="{:.1f}">{}</text>'.format(
                MARGIN, MARGIN + number * HEIGHT + SIZE, length, spans
            )
        )
    return "\n".join(parts + ["</g>", "</svg>"]) + "\n"


def place_kernel(machine):
    """Put a kernel into /opt as the kernel machine, and it alone, sees that."""
    kernel = machine.install_kernel("new/WolframKernel")
    script = 'mount -t tmpfs tmpfs /opt && mkdir -p "$2" && cp -p "$1"/* "$2"'
    folders = os.path.dirname(kernel), os.path.dirname(KERNEL)
    rig.must("nsenter", "-t", str(machine.server.pid), "-m", "sh", "-c", script, "sh", *folders)


def seen(machine, folder):
    """Run the command in a terminal; returns what that shows."""
    home = os.path.join(folder, "home")
    os.makedirs(os.path.join(home, ".ssh"), 0o700)
    write(os.path.join(home, ".ssh", "config"), "\n".join(["Host " + HOST] + machine.client_lines) + "\n")
    with open("/etc/passwd") as stream:
        users = [line.split(":") for line in stream]
    name = pwd.getpwuid(os.getuid()).pw_name
    users = [fields[:5] + [home] + fields[6:] if fields[0] == name else fields for fields in users]
    write(os.path.join(folder, "passwd"), "".join(":".join(fields) for fields in users))
    write(os.path.join(folder, "hosts"), "127.0.0.1 localhost\n{} {}\n".format(machine.address, HOST))
    script = 'for name in passwd hosts; do mount --bind "$1/$name" "/etc/$name" || exit; done; shift; exec "$@"'
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", folder]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNNEL_")}
    environment.update(HOME=home, XDG_RUNTIME_DIR=home, TERM="xterm")
    environment.pop("NO_COLOR", None)
    near, far = pty.openpty()
    process = subprocess.Popen(
        inside + [sys.executable] + COMMAND[1:],
        stdin=subprocess.DEVNULL,
        stdout=far,
        stderr=far,
        env=environment,
        cwd=folder,
    )
    os.close(far)
    output = b""
    while True:
        try:
            data = os.read(near, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        output += data
    os.close(near)
    text = output.decode("utf-8").replace("\r\n", "\n")
    if process.wait(60):
        raise SystemExit("picture.py: the launch failed: {}".format(text))
    return text


def write(path, text):
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    wrong = [word for word in argv if word.startswith("-")] + argv[1:]
    if wrong:
        print("picture.py: {}: not known; expected: [FILE]".format(wrong[0]), file=sys.stderr)
        return 2
    if os.getuid():
        return "picture.py: needs root"
    if os.uname().nodename != NODE:
        # Under another name, which the relay tells.
        script = 'hostname "$1" && shift && exec "$@"'
        again = [sys.executable, os.path.abspath(__file__)] + argv
        os.execvp("unshare", ["unshare", "--uts", "sh", "-c", script, "sh", NODE] + again)
    run.install_packages({name: run.PACKAGES[name] for name in ("sshd", "ssh", "ip", "unshare")})
    folder = tempfile.mkdtemp(prefix="tunnel-run-")
    try:
        product.copy_to(folder)
        with rig.KernelMachine() as machine:
            place_kernel(machine)
            text = seen(machine, folder)
    except rig.Unavailable as reason:
        return "picture.py: {}".format(reason)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write(argv[0] if argv else FILE, render(" ".join(COMMAND), text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
