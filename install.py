#!/usr/bin/env python3
"""Put Tunnel where Mathematica looks for it, on this machine and, by SSH, on the kernel machine.

The front end machine gets the launchers, and drop-ins with the names that kernel configurations use
(``tunnel.sh``, ``tunnel_sub.sh``, on Windows ``.bat``), into ``FrontEnd`` of the user base directory. The
kernel machine gets ``tunnel.m`` into ``Kernel`` of the base directory, or of the user base directory where
the first cannot be written.

Each folder holds a record of what was put there, so that it can be taken away again. What is not ours is
moved aside, never overwritten.
"""

import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # an embeddable Python does not

import tunnel

RECORD = "tunnel-install.json"
PRODUCTS = ("Mathematica", "Wolfram")  # from 14.1 on the second

USAGE = """\
usage: install.py [options]

Installs Tunnel for this user: what a front end machine and what a kernel machine needs.

  --front-end     only what the front end machine needs
  --kernel        only what the kernel machine needs
  --remote HOST   instead: what the kernel machine [user@]HOST needs, by SSH (Linux and macOS)
  -o NAME=VALUE   an OpenSSH option for --remote
  --dry-run       list what would be done, and do nothing
  --uninstall     remove what was installed, and put back what was moved aside
  --version, --help
"""

SHELL_DROP_IN = """\
#!/bin/sh
# Starts {script}.py for kernel configurations that name {script}.sh. Written by install.py, with the Python
# that ran it: a front end has a minimal PATH, and a shim in front of python costs time.
python={python}
case $0 in
/*) here=${{0%/*}} ;;
*/*) here=$PWD/${{0%/*}} ;;
*) here=$PWD ;;
esac
# A Linux front end puts its own libraries before the system's, and those break Python and ssh.
case ${{LD_LIBRARY_PATH-}} in
*SystemFiles/Libraries*)
    kept=
    set -f
    IFS=:
    for entry in $LD_LIBRARY_PATH; do
        case $entry in
        *SystemFiles/Libraries*) ;;
        *) kept=${{kept:+$kept:}}$entry ;;
        esac
    done
    unset IFS
    set +f
    if [ -n "$kept" ]; then LD_LIBRARY_PATH=$kept; else unset LD_LIBRARY_PATH; fi
    ;;
esac
if [ ! -x "$python" ]; then
    text="{script}: the Python that installed Tunnel is gone ($python); run install.py again"
    echo "$text" >&2
    umask 077
    {{ mkdir -p "$here/Logs" && echo "$text" >>"$here/Logs/{script}_no_python.log"; }} 2>/dev/null
    exit 69
fi
TUNNEL_DROPIN=$here/{script}.sh
export TUNNEL_DROPIN
exec "$python" -SEs -c 'import sys
sys.path = [sys.argv.pop(1)] + [path for path in sys.path if path]
import {script}
sys.exit({script}.main())' "$here" "$@"
"""

BATCH_DROP_IN = """\
@echo off
rem Starts {script}.py for kernel configurations that name {script}.bat. Written by install.py, with the
rem Python that ran it. Launches run without a console; what a person asks for is printed to one.
setlocal
set "python={windowless}"
for %%f in (--check --dry-run --help --version) do if "%~1"=="%%f" set "python={python}"
if not exist "%python%" goto gone
set "code=import sys; sys.path = [sys.argv.pop(1)] + [path for path in sys.path if path]"
set "code=%code%; import {script}; sys.exit({script}.main())"
"%python%" -SEs -c "%code%" "%~dp0." %*
exit /b %ERRORLEVEL%
:gone
set "text={script}: the Python that installed Tunnel is gone (%python%); run install.py again"
echo %text% 1>&2
if not exist "%~dp0Logs" mkdir "%~dp0Logs"
echo %text% >> "%~dp0Logs\\{script}_no_python.log"
exit /b 69
"""

# Runs on the kernel machine, in sh. It does there what Folder does here, for one file.
REMOTE_SCRIPT = """\
set -u
case $(uname -s) in
Darwin) mathematica=$HOME/Library/Mathematica wolfram=$HOME/Library/Wolfram ;;
*) mathematica=$HOME/.Mathematica wolfram=$HOME/.Wolfram ;;
esac
[ -n "${{MATHEMATICA_USERBASE-}}" ] && mathematica=$MATHEMATICA_USERBASE
[ -n "${{WOLFRAM_USERBASE-}}" ] && wolfram=$WOLFRAM_USERBASE
task={task}
new=$(mktemp) || exit 1
trap 'rm -f "$new"' EXIT
cat >"$new" <<'TUNNEL_END_OF_FILE'
{content}TUNNEL_END_OF_FILE
code=0
one() {{
    file=$1/Kernel/tunnel.m aside=$1/Kernel/tunnel.m.before-tunnel record=$1/Kernel/.tunnel-installed
    case $task in
    list) if cmp -s "$new" "$file"; then echo "unchanged $file"; else echo "would install $file"; fi ;;
    install)
        if cmp -s "$new" "$file"; then echo "unchanged $file"; return; fi
        mkdir -p "$1/Kernel" || {{ echo "failed $file"; code=1; return; }}
        if [ -e "$file" ] && ! {{ [ -e "$record" ] && cmp -s "$record" "$file"; }}; then
            while [ -e "$aside" ]; do aside=$aside.2; done
            mv "$file" "$aside" || {{ echo "failed $file"; code=1; return; }}
            echo "moved aside to $aside"
        fi
        if cp "$new" "$file" && cp "$new" "$record"; then echo "installed $file"
        else echo "failed $file"; code=1; fi ;;
    uninstall)
        [ -e "$record" ] || return
        if cmp -s "$record" "$file"; then
            rm -f "$file" && echo "removed $file"
            if [ -e "$aside" ]; then mv "$aside" "$file" && echo "restored $file"; fi
        else echo "kept $file: it has changed since"; fi
        rm -f "$record"
        rmdir "$1/Kernel" 2>/dev/null && rmdir "$1" 2>/dev/null ;;
    esac
}}
found=
for base in "$mathematica" "$wolfram"; do
    if [ -d "$base" ]; then found=yes; one "$base"; fi
done
if [ -z "$found" ] && [ "$task" != uninstall ]; then one "$wolfram"; fi
exit $code
"""


def base_directories(platform, environ, home):
    """Where Mathematica looks, for each product.

    :param platform: as ``sys.platform``
    :returns: ``{product: (user base directory, base directory)}``; see the documentation of
        ``$UserBaseDirectory`` and ``$BaseDirectory``
    """
    bases = {}
    for product in PRODUCTS:
        if platform == "win32":
            user = environ.get("APPDATA") or home + "\\AppData\\Roaming"
            system = environ.get("ProgramData") or "C:\\ProgramData"
            user, system = user + "\\" + product, system + "\\" + product
        elif platform == "darwin":
            user, system = home + "/Library/" + product, "/Library/" + product
        else:
            user, system = home + "/." + product, "/usr/share/" + product
        name = product.upper()
        bases[product] = (environ.get(name + "_USERBASE") or user, environ.get(name + "_BASE") or system)
    return bases


def layouts(platform, environ, home):
    """The directories to install to: of each product that is here, else of the newest.

    :returns: a list of pairs as in :func:`base_directories`
    """
    bases = base_directories(platform, environ, home)
    here = [pair for pair in bases.values() if any(os.path.isdir(path) for path in pair)]
    return here or [bases[PRODUCTS[-1]]]


def interpreter(platform):
    """The Python to pin: that which runs this, but not one of a virtual environment, which may go."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    inside = ("python.exe",) if platform == "win32" else ("bin", "python3")
    path = os.path.join(sys.base_prefix, *inside)
    return path if os.path.exists(path) else sys.executable


def drop_in(script, platform, python):
    """The text of a drop-in."""
    if platform != "win32":
        return SHELL_DROP_IN.format(script=script, python=tunnel.printable([python]))
    windowless = python.replace("python.exe", "pythonw.exe")
    windowless = windowless if os.path.exists(windowless) else python
    text = BATCH_DROP_IN.format(
        script=script, python=python.replace("%", "%%"), windowless=windowless.replace("%", "%%")
    )
    return text.replace("\n", "\r\n")


def front_end_files(source, platform, python):
    """What goes into ``FrontEnd``: a list of name, bytes and mode."""
    files = []
    for script in ("tunnel", "tunnel_sub"):
        files.append((script + ".py", read(os.path.join(source, script + ".py")), 0o755))
    for script in ("tunnel", "tunnel_sub"):
        name = script + (".bat" if platform == "win32" else ".sh")
        files.append((name, drop_in(script, platform, python).encode("utf-8", "surrogateescape"), 0o755))
    return files


def read(path):
    with open(path, "rb") as stream:
        return stream.read()


def digest(data):
    import hashlib

    return hashlib.sha256(data).hexdigest()


class Folder:
    """One folder that is installed to, and the record of what was put there.

    :param say: called with one line for each thing done
    """

    def __init__(self, path, say, dry_run=False):
        self.path, self.say, self.dry_run = path, say, dry_run
        self.failed = False
        self.made = []  # folders that may go, once all is uninstalled
        self.record = {"files": {}, "folders": []}
        try:
            self.record = json.loads(read(self.file(RECORD)).decode("utf-8"))
        except (OSError, ValueError):
            pass  # nothing of ours yet

    def file(self, name):
        return os.path.join(self.path, name)

    @property
    def writable(self):
        """Whether files can be put here, once missing folders have been made."""
        path = self.path
        while not os.path.exists(path) and os.path.dirname(path) != path:
            path = os.path.dirname(path)
        return os.path.isdir(path) and os.access(path, os.W_OK)

    def attempt(self, name, action):
        """Do one thing; what failed is said, and the rest goes on."""
        try:
            action()
        except OSError as error:
            self.failed = True
            self.say("failed: {}: {}".format(self.file(name), error.strerror or error))

    def install(self, files):
        """:param files: a list of name, bytes and mode"""
        self.attempt("", self._make)
        if self.failed:
            return
        for name, data, mode in files:
            self.attempt(name, lambda name=name, data=data, mode=mode: self._install(name, data, mode))
        self._save()

    def _make(self):
        missing, path = [], self.path
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            if not self.dry_run:
                os.mkdir(path)
            self.record["folders"].append(path)

    def _install(self, name, data, mode):
        path, known = self.file(name), self.record["files"].get(name)
        present = read(path) if os.path.isfile(path) else None
        if present == data:
            self.say("unchanged: " + path)
            return
        if self.dry_run:
            self.say("would install: " + path)
            return
        entry = {"sha256": digest(data), "aside": known["aside"] if known else None}
        ours = known and present is not None and digest(present) == known["sha256"]
        if os.path.lexists(path) and not ours:
            aside = free_name(path + ".before-tunnel")
            os.rename(path, aside)
            self.say("moved aside: {} to {}".format(path, os.path.basename(aside)))
            entry["aside"] = entry["aside"] or os.path.basename(aside)
        replace(path, data, mode)
        self.record["files"][name] = entry
        self.say("installed: " + path)

    def _save(self):
        if not self.dry_run and self.record["files"]:
            data = json.dumps(self.record, indent=1, sort_keys=True).encode("utf-8")
            if not os.path.exists(self.file(RECORD)) or read(self.file(RECORD)) != data:
                self.attempt(RECORD, lambda: replace(self.file(RECORD), data, 0o644))

    def compile(self, names):
        """Compile scripts, so that no launch has to."""
        import py_compile

        for name in names:
            if not self.dry_run and os.path.isfile(self.file(name)):
                self.attempt(name, lambda name=name: py_compile.compile(self.file(name)))

    def uninstall(self):
        for name in sorted(self.record["files"]):
            self.attempt(name, lambda name=name: self._uninstall(name, self.record["files"][name]))
        if self.dry_run or self.failed or not self.record["files"]:
            return
        self.attempt(RECORD, lambda: os.remove(self.file(RECORD)))
        self.made = [self.file("__pycache__")] + self.record["folders"]

    def _uninstall(self, name, entry):
        path = self.file(name)
        present = read(path) if os.path.isfile(path) else None
        if present is not None and digest(present) != entry["sha256"]:
            self.say("kept: {}: it has changed since it was installed".format(path))
            return
        if self.dry_run:
            self.say("would remove: " + path)
            return
        if present is not None:
            os.remove(path)
            self.say("removed: " + path)
        for cached in cached_files(path):
            os.remove(cached)
        if entry["aside"] and os.path.lexists(self.file(entry["aside"])) and not os.path.lexists(path):
            os.rename(self.file(entry["aside"]), path)
            self.say("restored: " + path)


def remove_folders(paths):
    """Remove the folders that are empty now; what others have put into one, such as logs, keeps it."""
    for path in sorted(paths, key=len, reverse=True):
        try:
            os.rmdir(path)
        except OSError:
            pass  # not empty, or gone already


def cached_files(path):
    """The byte code that any version of Python has written for a script."""
    folder, name = os.path.split(path)
    stem, extension = os.path.splitext(name)
    cache = os.path.join(folder, "__pycache__")
    if extension != ".py" or not os.path.isdir(cache):
        return []
    return [os.path.join(cache, each) for each in os.listdir(cache) if each.startswith(stem + ".")]


def free_name(path):
    """``path``, or with a number after it, such that nothing of that name is there."""
    name, number = path, 1
    while os.path.lexists(name):
        number += 1
        name = "{}-{}".format(path, number)
    return name


def replace(path, data, mode):
    """Write a file such that it is there whole or not at all."""
    new = "{}.{}.new".format(path, os.getpid())
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.chmod(new, mode)
        os.replace(new, path)
    except OSError:
        os.remove(new)
        raise


class Installer:
    """One run: options as attributes, ``platform``, ``environ`` and ``home`` of the machine."""

    def __init__(self, argv, platform=sys.platform, environ=os.environ, home=None, say=print):
        self.platform, self.environ, self.say = platform, environ, say
        self.home = home or os.path.expanduser("~")
        self.source = os.path.dirname(os.path.abspath(__file__))
        self.front_end = self.kernel = self.dry_run = self.uninstall = False
        self.remote, self.options = None, []
        self._parse(list(argv))

    def _parse(self, rest):
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if word in ("--front-end", "--kernel", "--dry-run", "--uninstall"):
                setattr(self, word[2:].replace("-", "_"), True)
            elif name in ("--remote", "-o"):
                if not equals and not rest:
                    raise tunnel.Fatal("{}: a value has to follow".format(name))
                value = value if equals else rest.pop(0)
                if name == "-o":
                    self.options.append(tunnel.parse_option(value))
                else:
                    self.remote = tunnel.Destination.parse(value)
            else:
                raise tunnel.Fatal("{}: not known; --help lists the options".format(name))
        if self.remote and self.remote.password:
            raise tunnel.Fatal("--remote: no password here; ssh asks for it")
        if self.remote and (self.front_end or self.kernel):
            raise tunnel.Fatal("--remote: installs for the kernel there; leave --front-end and --kernel out")
        if not self.front_end and not self.kernel:
            self.front_end = self.kernel = True

    def run(self):
        """:returns: the exit code, 1 when something failed"""
        if self.remote:
            return self.run_remote()
        folders = []
        for user, system in layouts(self.platform, self.environ, self.home):
            if self.front_end:
                folders.append(self.do_front_end(self.folder(user, "FrontEnd")))
            if self.kernel:
                folders += self.do_kernel(self.folder(user, "Kernel"), self.folder(system, "Kernel"))
        remove_folders(path for folder in folders for path in folder.made)
        return 1 if any(folder.failed for folder in folders) else 0

    def folder(self, base, name):
        separator = "\\" if self.platform == "win32" and os.sep == "\\" else "/"
        return Folder(base + separator + name, self.say, self.dry_run)

    def do_front_end(self, folder):
        if self.uninstall:
            folder.uninstall()
            return folder
        files = front_end_files(self.source, self.platform, interpreter(self.platform))
        folder.install(files)
        folder.compile(name for name, _, _ in files if name.endswith(".py"))
        return folder

    def do_kernel(self, user, system):
        """Install to one of two folders, or uninstall from both; returns those that it has worked on."""
        if self.uninstall:
            user.uninstall()
            system.uninstall()
            return [user, system]
        if not system.writable:
            self.say("{} cannot be written: tunnel.m goes to this user's {}".format(system.path, user.path))
            system = user
        system.install([("tunnel.m", read(os.path.join(self.source, "tunnel.m")), 0o644)])
        return [system]

    def run_remote(self):
        """Have a shell on the kernel machine do the same. It reads its script from standard input, so
        neither its kind nor any quoting matters; ssh asks for passwords on the terminal."""
        program, client = tunnel.find_client(None, self.environ)
        if client is not tunnel.OpenSSH:
            raise tunnel.Fatal("--remote: needs OpenSSH's ssh; name it with TUNNEL_SSH", tunnel.EX_UNAVAILABLE)
        task = "list" if self.dry_run else "uninstall" if self.uninstall else "install"
        content = read(os.path.join(self.source, "tunnel.m")).decode("utf-8")
        script = REMOTE_SCRIPT.format(task=task, content=content)
        options = [("ConnectTimeout", str(tunnel.CONNECT_SECONDS)), ("RemoteCommand", "none")]
        argv = [program, "-T"] + tunnel.OpenSSH.words(self.options + options, self.remote)
        environment = tunnel.client_environment(self.environ)
        done = subprocess.run(
            argv + [self.remote.host, "sh"],
            input=script.encode("utf-8"),
            stdout=subprocess.PIPE,
            env=environment,
        )
        for line in done.stdout.decode("utf-8", "replace").splitlines():
            self.say("{}: {}".format(self.remote.host, line))
        if done.returncode:
            self.say("failed: {}: ssh ended with exit code {}".format(self.remote, done.returncode))
        return 1 if done.returncode else 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    if argv[:1] == ["--version"]:
        print("tunnel " + tunnel.VERSION)
        return 0
    code, text = tunnel.guarded(lambda: Installer(argv).run())
    if text:
        sys.stderr.write("install.py: {}\n".format(text))
    return code


if __name__ == "__main__":
    sys.exit(main())
