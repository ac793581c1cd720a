#!/usr/bin/env python3
"""Put Tunnel where Mathematica looks for it, on this machine and, by SSH, on the kernel machine.

The front end machine gets the launchers, and drop-ins with the names that kernel configurations use
(``tunnel.sh``, ``tunnel_sub.sh``, on Windows ``.bat``), into ``FrontEnd`` of the user base directory. The
kernel machine gets ``tunnel.m`` into ``Kernel`` of the base directory, or of the user base directory where
the first cannot be written.

Each folder holds a record of what was put there, so that it can be taken away again. What is not ours is
moved aside, never overwritten. All files of a folder are written under other names first, then the record, and
then each file is renamed to its place. So a file is there whole or not at all, the record knows of every file,
whatever interrupts this, and what runs meanwhile keeps the file that it has open. One run waits for another.

A launcher loads some files late, and must not take one of another version than its own. It can tell: ``tunnel.py``
takes its place after all files that it loads, and is replaced whenever one of them is. While they take theirs, and
after an installation that was interrupted then, ``tunnel.py.tunnel-new`` lies beside it.
"""

import argparse
import collections
import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile

if sys.version_info < (3, 6):  # noqa: UP036 - for whoever types python and gets an old one
    sys.exit("install.py: needs Python 3.6 or later, and this is {}.{}".format(*sys.version_info[:2]))

SOURCE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, SOURCE)  # an embeddable Python does not

try:
    import tunnel
except ImportError:
    sys.exit("install.py: tunnel.py is missing; it has to lie beside install.py, with the rest of Tunnel")

# What goes into FrontEnd. The drop-ins are written for the scripts.
MAIN = "tunnel.py"
SCRIPTS = (MAIN, "tunnel_sub.py")
LOADED = re.compile(r"tunnel_relay\.py|tunnel_lib/(sent/)?\w+\.py", re.ASCII)  # names of what MAIN may load
PARTS = ("tunnel_lib", "tunnel_lib/sent")  # folders within FrontEnd, each after the one that holds it
DROP_INS = {"tunnel": "CONTROLLER", "tunnel_sub": "COMPUTE"}  # script: its role, as tunnel.py names it

DAMAGED = "not all of it is as install.py writes it; what is not counts for nothing"
UNKNOWN = "the record does not say that install.py has put it there"

# Names that files of any version may have, and the lines of a record: what else one says is not believed.
NAME = r"(tunnel\w*\.(?:py|sh|bat|m)|tunnel_lib/(?:sent/)?\w+\.py)"
MOVED = r"(?:\.before-tunnel(?:-\d{1,9})?)"
FILE_LINE = re.compile(r"file " + NAME + r" ([0-9a-f]{64}) (-|\1" + MOVED + r") (-|[0-9a-f]{64})", re.ASCII)
FOLDERS_LINE = re.compile(r"folders (\d{1,2})", re.ASCII)
UNFINISHED = re.compile(r"(?:{}|tunnel-install\.txt)\.tunnel-new".format(NAME), re.ASCII)
OURS_OR_MOVED = re.compile(NAME + MOVED + "?", re.ASCII)

PRODUCTS = ("Mathematica", "Wolfram")  # from 14.1 on the second
FOLDERS = ("FrontEnd", "Kernel")
SHARE = "/usr/share/"  # where base directories are on Linux

# The record of a folder: plain lines, since on the kernel machine a shell reads and writes them too.
#     folders COUNT              so many were made: this one, the one that holds it, and so on
#     file NAME SHA256 ASIDE FORMER
#                                what was put here, the name to which what was there has been moved, and the SHA256
#                                of what of ours it has replaced; - for none
RECORD = "tunnel-install.txt"
RECORD_TITLE = "# What install.py has put into this folder; by this it takes it away again."
RECORD_BYTES = 1 << 16  # nothing behind these is read
ASIDE = ".before-tunnel"
NEW = ".tunnel-new"  # ends the name of a file while it is written

SHELL_DROP_IN = """\
#!/bin/sh
# Starts {script}.py for kernel configurations that name {script}.sh. Written by install.py, with the Python
# that ran it: a front end has a minimal PATH, and a shim in front of python costs time.
python={python}
self=$0
case $self in
*/*) ;;
*) [ -e "./$self" ] || self=$(command -v -- "$self") ;; # `bash {script}.sh` looks along PATH as well
esac
case $self in
/*) ;;
*) self=$PWD/$self ;;
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
# What it starts lies beside this file, not beside a link to it. macOS before 12.3 has no `readlink -f`.
while [ -h "$self" ]; do
    target=$(readlink "$self")
    case $target in
    /*) self=$target ;;
    *) self=${{self%/*}}/$target ;;
    esac
done
here=${{self%/*}}
if [ ! -x "$python" ]; then
    text="{script}: the Python that installed Tunnel is gone ($python); run install.py again"
    printf '%s\\n' "$text" >&2
    umask 077
    {{ mkdir -p "$here/Logs" && printf '%s\\n' "$text" >>"$here/Logs/{script}_no_python.log"; }} 2>/dev/null
    exit 69
fi
TUNNEL_DROPIN=$self
export TUNNEL_DROPIN
exec "$python" -SEs -c 'import gc, sys
sys.path = [sys.argv.pop(1)] + [path for path in sys.path if path]
gc.disable() # it would look at each definition, several times
try:
    import tunnel
except (EOFError, TypeError, ValueError): # its byte code was cut short, as on a disk that is full
    sys.implementation.cache_tag = None
    import tunnel
gc.enable()
sys.exit(tunnel.main("{script}", tunnel.{role}))' "$here" "$@"
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
rem Byte code may have been cut short, as on a disk that is full.
set "code=%code%; exec('try: import {script}\\nexcept (EOFError, TypeError, ValueError):"
set "code=%code%\\n sys.implementation.cache_tag = None\\n import {script}')"
set "code=%code%; sys.exit({script}.main())"
"%python%" -SEs -c "%code%" "%~dp0." %*
exit /b %ERRORLEVEL%
:gone
set "text={script}: the Python that installed Tunnel is gone (%python%); run install.py again"
echo %text% 1>&2
if not exist "%~dp0Logs" mkdir "%~dp0Logs"
echo %text% >> "%~dp0Logs\\{script}_no_python.log"
exit /b 69
"""

# Runs on the kernel machine, in sh. It does there what Folder does here, for one file, with the same record.
# A login may print whatever it likes before this begins: what counts are lines with the mark.
REMOTE_SCRIPT = """\
set -u
LC_ALL=C
export LC_ALL # a damaged record has any bytes in it
trap '' PIPE # a connection that is cut leaves nothing half done
task={task} dry={dry} digest={digest} mark='{mark}' code=0 any=

content() {{
    cat <<'TUNNEL_END_OF_FILE'
{content}TUNNEL_END_OF_FILE
}}
say() {{ printf '%s%s\\n' "$mark" "$*"; }}
fail() {{ say "failed: $*"; code=1; }}
sha256() {{
    {{ sha256sum || shasum -a 256 || openssl dgst -sha256; }} 2>/dev/null |
        sed -n 's/.*\\([0-9a-f]\\{{64\\}}\\).*/\\1/p'
}}
present() {{ [ -e "$1" ] || [ -h "$1" ]; }}
ours() {{ [ -n "$1" ] && {{ [ "$1" = "$sha" ] || [ "$1" = "$former" ]; }}; }}
digest_of() {{ if [ -f "$1" ]; then sha256 <"$1"; fi; }}

# The record in $folder: sets source, sha, aside, former, levels. What is not as it should be is passed over.
look() {{
    source=$folder/{record}
    if [ ! -f "$source" ]; then source= sha= aside=- former= levels=0; return 1; fi
    levels=$(text | sed -n 's/^folders \\([0-9]\\{{1,2\\}}\\)$/\\1/p')
    sha='[0-9a-f]\\{{64\\}}' aside='tunnel[.]m{aside}[-0-9]*' former='[-0-9a-f]\\{{1,64\\}}'
    set -- $(
        text | sed -n -e "s/^file tunnel[.]m \\($sha - $former\\)$/\\1/p" \\
            -e "s/^file tunnel[.]m \\($sha $aside $former\\)$/\\1/p"
    )
    sha=${{1-}} aside=${{2-}} former=${{3-}}
    known=$(printf '%s\\n' '{title}' "folders $levels" "file tunnel.m $sha $aside $former")
    {{ [ "$(text)" = "$known" ] || say "damaged: $source: {damaged}"; }} 2>/dev/null # a shell may complain of NULs
    case $levels in [1-9] | [1-9][0-9]) ;; *) levels=0 ;; esac
    if [ -z "$aside" ] || ! present "$folder/$aside"; then aside=-; fi
}}
text() {{ head -c {most} "$source"; }}

# Remove folders that were made and are empty, $levels of them, from $folder upwards; none that holds the home.
remove_folders() {{
    path=$folder
    while [ "$levels" -gt 0 ]; do
        case $HOME/ in "$path"/*) return ;; esac
        rmdir "$path" 2>/dev/null || return
        levels=$((levels - 1)) path=${{path%/*}}
    done
}}

give_up() {{
    rm -f "$file{new}" "$folder/{record}{new}"
    if [ -z "$source" ]; then remove_folders; fi
    fail "$1: cannot be written"
}}

install() {{
    look
    there=$source
    old=$(digest_of "$file")
    if [ "$old" = "$digest" ]; then say "unchanged: $file"; return; fi
    if [ -n "$dry" ]; then say "would install: $file"; return; fi
    made=0 path=$folder
    while [ ! -d "$path" ]; do
        made=$((made + 1)) path=${{path%/*}}
        path=${{path:-/}}
    done
    mkdir -p "$folder" || {{ fail "$file: the folder cannot be made"; return; }}
    # The folder that holds this one was made for the front end's part: it may go with whichever goes last.
    source=$1/FrontEnd/{record}
    if [ "$made" = 1 ] && [ -f "$source" ] && text | grep -q '^folders [2-9]$'; then made=2; fi
    source=$there
    if [ "$made" -gt 0 ]; then levels=$made; fi
    content >"$file{new}" && chmod 644 "$file{new}"
    if [ "$(digest_of "$file{new}")" != "$digest" ]; then give_up "$file"; return; fi
    moved=
    if ours "$old"; then
        former=$old
    elif present "$file"; then
        moved=tunnel.m{aside} number=1
        while present "$folder/$moved"; do
            number=$((number + 1))
            moved=tunnel.m{aside}-$number
        done
        if [ "$aside" = - ]; then aside=$moved; fi
        former=
    fi
    record=$folder/{record} line="file tunnel.m $digest $aside ${{former:--}}"
    if ! printf '%s\\n' '{title}' "folders $levels" "$line" >"$record{new}" || ! mv -f "$record{new}" "$record"
    then
        give_up "$record"
        return
    fi
    if [ -n "$moved" ]; then
        mv "$file" "$folder/$moved" || {{ fail "$file: cannot be moved aside"; return; }}
    fi
    mv -f "$file{new}" "$file" || {{ fail "$file: cannot be written"; return; }}
    if [ -n "$moved" ]; then say "moved aside: $file to $moved"; fi
    say "installed: $file"
}}

uninstall() {{
    if [ -z "$dry" ]; then rm -f "$file{new}" "$folder/{record}{new}"; fi # of a run that was killed
    look || return 0
    any=yes
    if [ -z "$sha" ]; then
        for path in "$file" "$file{aside}"*; do
            if present "$path"; then say "kept: $path: {unknown}"; fi
        done
        if [ -n "$dry" ]; then return; fi
    elif present "$file" && ! ours "$(digest_of "$file")"; then
        if [ "$aside" != - ]; then aside="; what was there before is $aside"; else aside=; fi
        say "kept: $file: it has changed since it was installed$aside"
        if [ -n "$dry" ]; then return; fi
    else
        if [ -n "$dry" ]; then say "would remove: $file"; return; fi
        if present "$file"; then
            rm -f "$file" || {{ fail "$file: cannot be removed"; return; }}
            say "removed: $file"
        fi
        if [ "$aside" != - ]; then
            mv "$folder/$aside" "$file" || {{ fail "$folder/$aside: cannot be moved back"; return; }}
            say "restored: $file"
        fi
    fi
    rm -f "$source" || {{ fail "$source: cannot be removed"; return; }}
    remove_folders
}}

# One product, by the names of its user base directory and its base directory, and whether a variable names one.
product() {{
    if [ $task = uninstall ]; then
        for base in "$1" "$2"; do folder=$base/Kernel file=$base/Kernel/tunnel.m; uninstall; done
    elif [ -n "$3" ] || [ -d "$1" ] || [ -d "$2" ]; then
        any=yes folder=$1/Kernel file=$1/Kernel/tunnel.m
        install "$1"
    fi
}}

# One run at a time, as class Lock has it. Where there is no flock, as on macOS, nobody waits.
wait_for_others() {{
    if ! command -v flock >/dev/null 2>&1 || [ ! -d "$HOME" ] || [ ! -r "$HOME" ]; then return 0; fi
    exec 9<"$HOME"
    flock -n 9 2>/dev/null || flock -w {seconds} 9 2>/dev/null
    [ $? != 1 ] # what else flock ends with means that nothing can be locked here
}}

absolute() {{ case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }}

main() {{
    if [ "$(printf '' | sha256 | cut -c 1-8)" != e3b0c442 ]; then
        fail "one of sha256sum, shasum and openssl has to be there"
        return
    fi
    if [ -z "${{HOME-}}" ]; then fail "HOME is not set"; return; fi
    wait_for_others || {{ fail "{busy}"; return; }}
    case $(uname -s) in
    Darwin) user=$HOME/Library/ system=/Library/ ;;
    *) user=$HOME/. system='{share}' ;;
    esac
    m=${{MATHEMATICA_USERBASE-}} mb=${{MATHEMATICA_BASE-}} w=${{WOLFRAM_USERBASE-}} wb=${{WOLFRAM_BASE-}}
    mathematica=$(absolute "${{m:-${{user}}Mathematica}}") wolfram=$(absolute "${{w:-${{user}}Wolfram}}")
    product "$mathematica" "$(absolute "${{mb:-${{system}}Mathematica}}")" "$m$mb"
    product "$wolfram" "$(absolute "${{wb:-${{system}}Wolfram}}")" "$w$wb"
    if [ -n "$any" ]; then return; fi
    if [ $task = uninstall ]; then say "nothing of Tunnel is installed here"; return; fi
    # Neither has been started here yet, and nobody knows which will be.
    for base in "$mathematica" "$wolfram"; do product "$base" "$base" named; done
}}
main
say end
exit $code
"""
LOCK_SECONDS = 60  # for so long one run waits for another
BUSY = "another install.py has been at work for {} s; run this again when it has ended"
MARK = "tunnel-install> "  # before each line that REMOTE_SCRIPT prints; "end" after the last


# ------------------------------------------------------------------------------------------ directories


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
            user, system = home + "/." + product, SHARE + product
        bases[product] = (named(product, "_USERBASE", environ) or user, named(product, "_BASE", environ) or system)
    return bases


def named(product, suffix, environ):
    """The directory that a variable such as ``WOLFRAM_USERBASE`` names, if it does."""
    return environ.get(product.upper() + suffix)


def products_here(bases, environ):
    """The products to install for: each that is here or for which a variable names a directory. Where there is
    none, all: none has been started here yet, and nobody knows which will be.

    :param bases: as :func:`base_directories` returns them
    """
    found = []
    for product, pair in bases.items():
        wanted = named(product, "_USERBASE", environ) or named(product, "_BASE", environ)
        if wanted or any(map(os.path.isdir, pair)):
            found.append(product)
    return found or list(PRODUCTS)


def home_directory(platform, environ):
    """This user's home.

    :raises Fatal: there is none, and something would have to go into it
    """
    if all(named(product, "_USERBASE", environ) for product in PRODUCTS):
        return ""
    variable = "USERPROFILE" if platform == "win32" else "HOME"
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # as good as none; else it would be the root directory
    try:
        home = os.path.expanduser("~")
    except KeyError:  # up to Python 3.7, for a user who is in no list
        home = ""
    if not os.path.isabs(home) or not os.path.isdir(home):
        raise tunnel.Fatal(
            "{0}: names no directory; set {0} to that of the user who runs Mathematica".format(variable)
        )
    return home


def base_python(platform):
    """The Python to pin: that which runs this, but not one of a virtual environment, which may go.

    :raises Fatal: it does not know its own path
    """
    prefix = getattr(sys, "real_prefix", sys.base_prefix)  # the first is old virtualenv's
    places = [] if prefix != sys.prefix else [sys.executable]
    if prefix != sys.prefix and getattr(sys, "_base_executable", None) != sys.executable:
        places.append(getattr(sys, "_base_executable", None))
    if platform == "win32":
        places.append(os.path.join(prefix, "python.exe"))
    else:
        name = "python{}.{}".format(*sys.version_info[:2])
        places += [os.path.join(prefix, "bin", each) for each in (name, "python3")]
    for place in places + [sys.executable]:
        if place and os.path.isfile(place):
            return os.path.abspath(place)
    raise tunnel.Fatal("this Python does not know its own path; run install.py with the full path of one")


# ------------------------------------------------------------------------------------------------ files


def drop_in(script, platform, python):
    """The text of a drop-in."""
    if platform != "win32":
        pinned = "'{}'".format(python.replace("'", "'\\''"))
        return SHELL_DROP_IN.format(script=script, role=DROP_INS[script], python=pinned)
    windowless = python.replace("python.exe", "pythonw.exe")
    windowless = windowless if os.path.exists(windowless) else python
    text = BATCH_DROP_IN.format(
        script=script, python=python.replace("%", "%%"), windowless=windowless.replace("%", "%%")
    )
    return text.replace("\n", "\r\n")


class File(collections.namedtuple("File", "name data mode")):
    """What is to be installed: the name that it has in its folder, its bytes and its mode."""

    __slots__ = ()


def front_end_files(source, platform, python):
    """What goes into ``FrontEnd``: a list of :class:`File`, each after what it loads."""
    files = [File(name, read_source(source, name), 0o644) for name in loaded_files(source)]
    files += [File(name, read_source(source, name), 0o755) for name in SCRIPTS]
    for script in DROP_INS:
        name = script + (".bat" if platform == "win32" else ".sh")
        files.append(File(name, drop_in(script, platform, python).encode("utf-8", "surrogateescape"), 0o755))
    return files


def loaded_files(folder):
    """The names of the files in ``folder`` that MAIN may load, with ``/`` in them."""
    return [name for name in list_all(folder) if LOADED.fullmatch(name)]


def list_all(folder):
    """The names of what is in ``folder`` and in those within it that hold files of ours, with ``/`` in them."""
    names = list_folder(folder)
    for part in PARTS:
        names += [part + "/" + name for name in list_folder(os.path.join(folder, part))]
    return names


def list_folder(path):
    """The names of what is in a folder, in order; none where there is no folder."""
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def read_source(folder, name):
    """One of Tunnel's own files.

    :raises Fatal: it is not there, or cannot be read
    """
    path = os.path.join(folder, name)
    try:
        return read(path)
    except OSError as error:
        reason = error.strerror
    raise tunnel.Fatal("{}: {}; it has to lie beside install.py, with the rest of Tunnel".format(path, reason), 1)


def read(path):
    with open(path, "rb") as stream:
        return stream.read()


def read_record(path):
    """What :data:`RECORD` has to say; it may be anything by now."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "is no file")  # reading it may never end
    with open(path, "rb") as stream:
        return stream.read(RECORD_BYTES).decode("utf-8", "replace")


def digest(data):
    return hashlib.sha256(data).hexdigest()


def digest_of(path):
    """That of a file; None where there is none."""
    return digest(read(path)) if os.path.isfile(path) else None


def free_name(path):
    """``path``, or with a number after it, such that nothing of that name is there."""
    name, number = path, 1
    while os.path.lexists(name):
        number += 1
        name = "{}-{}".format(path, number)
    return name


def write_new(path, data, mode):
    """Write what is to become the file ``path``; until then its name ends in :data:`NEW`."""
    new = path + NEW
    try:
        with open(new, "wb") as stream:
            stream.write(data)
        os.chmod(new, mode)
    except BaseException:
        remove(new)
        raise


def remove(path):
    """Remove a file that may not be there."""
    if os.path.lexists(path):
        os.remove(path)


def cached_files(path):
    """The byte code that any version of Python has written for a script."""
    folder, name = os.path.split(path)
    stem, extension = os.path.splitext(name)
    cache = os.path.join(folder, "__pycache__")
    cached = list_folder(cache) if extension == ".py" else []
    return [os.path.join(cache, each) for each in cached if each.startswith(stem + ".")]


# ---------------------------------------------------------------------------------------------- records


class Entry(collections.namedtuple("Entry", "sha256 aside former")):
    """What a record says of one file; None for no ``aside`` and no ``former``."""

    __slots__ = ()

    def has(self, present):
        """Whether a file with this digest is what we have put there."""
        return present is not None and present in (self.sha256, self.former)


class Record:
    """What was put into a folder: ``files``, entries by name, and ``levels``, how many folders were made for
    it, from itself upwards. ``there`` is whether there is a file that says so, ``damaged`` whether not all of that
    file is as :meth:`save` writes it."""

    def __init__(self, folder):
        """:raises OSError: there is a record, and it cannot be read"""
        self.folder, self.files, self.levels, self.damaged = folder, {}, 0, False
        self.there = os.path.lexists(self.path(RECORD))
        if self.there:
            self._understand(read_record(self.path(RECORD)))

    def path(self, name):
        return os.path.join(self.folder, name)

    def _understand(self, text):
        lines = text.split("\n")
        folders = FOLDERS_LINE.fullmatch(lines[1]) if len(lines) > 1 else None
        self.levels = int(folders.group(1)) if folders else 0
        for line in lines:
            words = FILE_LINE.fullmatch(line)
            if words:
                name, sha256, aside, former = (None if word == "-" else word for word in words.groups())
                aside = aside if aside and os.path.lexists(self.path(aside)) else None
                self.files[name] = Entry(sha256, aside, former)
        whole = lines[0] == RECORD_TITLE and folders and self.files and lines[-1] == ""
        self.damaged = not whole or len(lines) != len(self.files) + 3

    def save(self, files, levels):
        """Write it with these; only then they count."""
        lines = [RECORD_TITLE, "folders {}".format(levels)]
        for name, entry in sorted(files.items()):
            lines.append(" ".join(["file", name] + [word or "-" for word in entry]))
        data = ("\n".join(lines) + "\n").encode("utf-8")
        write_new(self.path(RECORD), data, 0o644)
        os.replace(self.path(RECORD) + NEW, self.path(RECORD))
        self.files, self.levels, self.there = files, levels, True


class Folder:
    """One folder that is installed to.

    :param home: that of the user; it is never removed, nor what holds it
    :param say: called with one line for each thing done
    :param shared: whether it is for all users of the machine
    """

    def __init__(self, path, home, say, dry_run=False, shared=False):
        self.path, self.home, self.say, self.dry_run, self.shared = path, home, say, dry_run, shared
        self.failed = False
        self.found = False  # anything to uninstall
        self.left = []  # folders that may go, once all is uninstalled
        self.record, self.made = None, 0

    def file(self, name):
        """The path of a file here; its name may have ``/`` in it."""
        return os.path.join(self.path, *name.split("/"))

    def parts(self):
        """The paths of the folders within this one that hold files of ours. Nothing is ours where a link leads."""
        return [self.file(part) for part in PARTS if not self.leads_elsewhere(part + "/")]

    def leads_elsewhere(self, name):
        """Whether the folder within this one that the file ``name`` would be in is a link."""
        return any(name.startswith(part + "/") and os.path.islink(self.file(part)) for part in PARTS)

    def inner_folders(self):
        """The paths of the folders within this one that Tunnel makes, those for byte code among them."""
        return self.parts() + [os.path.join(part, "__pycache__") for part in [self.path] + self.parts()]

    @property
    def writable(self):
        """Whether files can be put here, once missing folders have been made."""
        path = self.path
        while not os.path.exists(path) and os.path.dirname(path) != path:
            path = os.path.dirname(path)
        return os.path.isdir(path) and os.access(path, os.W_OK)

    def attempt(self, name, action, *arguments):
        """Do one thing; what failed is said, and the rest goes on."""
        try:
            action(*arguments)
            return True
        except OSError as error:
            self.failed = True
            self.say("failed: {}: {}".format(self.file(name) if name else self.path, error.strerror or error))
            return False

    def read_record(self):
        self.record = Record(self.path)
        if self.record.damaged:
            self.say("damaged: {}: {}".format(self.file(RECORD), DAMAGED))

    def make(self):
        """Make the folder, and those that hold it."""
        missing, path = [], self.path
        while not os.path.isdir(path) and os.path.dirname(path) != path:
            missing.append(path)
            path = os.path.dirname(path)
        self.made = len(missing)
        for path in [] if self.dry_run else reversed(missing):
            os.mkdir(path)
            if self.shared:
                os.chmod(path, 0o755)  # noqa: S103 - for all users, whatever the umask of the administrator

    def make_parts(self, name):
        """Make the folders within this one that lead to the file ``name``."""
        for part in PARTS:
            path = self.file(part)
            if not name.startswith(part + "/"):
                continue
            if os.path.islink(path) or (os.path.lexists(path) and not os.path.isdir(path)):
                raise FileExistsError(errno.EEXIST, "{} is in the way, and no folder; move it away".format(path))
            if not os.path.isdir(path):
                os.mkdir(path)

    def begin(self):
        """Read the record, and let it say which folders have been made."""
        self.read_record()
        if self.made == 1:
            # The folder that holds this one may have been made for the other part; then it goes with
            # whichever of the two goes last.
            base, own = os.path.split(self.path)
            levels = [Record(os.path.join(base, name)).levels for name in FOLDERS if name != own]
            self.made = max([self.made] + levels)
        self.record.levels = self.made or self.record.levels

    def uninstall(self):
        """Take away what the record says; what has changed since stays."""
        if not self.dry_run:
            self.attempt("", self.remove_unfinished)
        if not self.attempt(RECORD, self.read_record) or not self.record.there:
            return
        self.found = True
        for name in sorted(self.record.files):
            self.attempt(name, self.take_away, name)
        for name in self._names():
            match = OURS_OR_MOVED.fullmatch(name)
            if match and match.group(1) not in self.record.files:
                self.say("kept: {}: {}".format(self.file(name), UNKNOWN))
        if not self.dry_run and not self.failed:
            self.attempt(RECORD, self._forget)

    def take_away(self, name):
        """Remove a file that the record has, and its byte code, and put back what was there before."""
        path, entry, present = self.file(name), self.record.files[name], digest_of(self.file(name))
        if os.path.lexists(path) and (self.leads_elsewhere(name) or not entry.has(present)):
            aside = "; what was there before is " + entry.aside if entry.aside else ""
            self.say("kept: {}: it has changed since it was installed{}".format(path, aside))
            return
        if self.dry_run:
            self.say("would remove: " + path)
            return
        if present:
            os.remove(path)
            self.say("removed: " + path)
        if entry.aside:
            os.rename(self.file(entry.aside), path)
            self.say("restored: " + path)
        for cached in cached_files(path):
            os.remove(cached)

    def remove_unfinished(self):
        """What a run that was killed has left."""
        for name in self._names():
            if UNFINISHED.fullmatch(name):
                os.remove(self.file(name))
                self.left = self.inner_folders()

    def _names(self):
        return [name for name in list_all(self.path) if not self.leads_elsewhere(name)]

    def _forget(self):
        os.remove(self.file(RECORD))
        self.left = self.inner_folders() + self.levels(self.record.levels)

    def levels(self, count):
        """This folder, the one that holds it, and so on: ``count`` paths, none of which holds the home."""
        paths, path = [], self.path
        while len(paths) < count and not self._holds_home(path):
            paths.append(path)
            path = os.path.dirname(path)
        return paths

    def _holds_home(self, path):
        home = os.path.join(os.path.abspath(self.home), "") if self.home else ""
        return home.startswith(os.path.join(path, ""))


class Change(collections.namedtuple("Change", "file entry aside")):
    """A file that is to take its place in a folder: ``entry`` is what the record will say of it, ``aside`` the
    path to which what is in its place is moved, None where that is replaced."""

    __slots__ = ()

    @property
    def name(self):
        return self.file.name


class Update:
    """The files of a folder, new or in place of those of another version.

    :param folder: a :class:`Folder`
    :param files: a list of :class:`File`, each after what it loads
    """

    def __init__(self, folder, files):
        self.folder, self.files = folder, files
        self.changes = []

    def run(self):
        """Install all files or, where one of them cannot be written, none: a drop-in is of no use without what it
        starts, and what it would replace may be. Then go the modules that the record has and ``files`` has not:
        they are of an earlier version."""
        folder = self.folder
        if not folder.attempt("", folder.make) or not folder.attempt(RECORD, folder.begin):
            return
        ready = all(folder.attempt(file.name, self._plan, file) for file in self.files)
        here = {file.name for file in self.files}
        obsolete = [name for name in sorted(folder.record.files) if name.endswith(".py") and name not in here]
        if folder.dry_run:
            for change in self.changes:
                folder.say("would install: " + folder.file(change.name))
            for name in obsolete:
                folder.attempt(name, folder.take_away, name)
            return
        placed = ready and self._write() and self._place()
        if placed:
            for name in obsolete:
                folder.attempt(name, self._remove, name)
            for name in sorted(folder.record.files):
                if name.endswith(".py"):
                    self._compile(name)
        if obsolete or not placed:
            remove_folders(folder.inner_folders())
        if not folder.record.there:  # nothing could be written
            remove_folders(folder.levels(folder.made))

    def _plan(self, file):
        """Note what is to be done for a file."""
        folder, path = self.folder, self.folder.file(file.name)
        known, present = folder.record.files.get(file.name), digest_of(path)
        entry = Entry(digest(file.data), known and known.aside, None)
        ours = known and known.has(present)
        if present == entry.sha256 and not (file.name == MAIN and self.changes and ours):
            self._mend_mode(path, file.mode)
            return
        aside = None
        if ours:
            entry = entry._replace(former=present)
        elif os.path.lexists(path):
            aside = free_name(path + ASIDE)
            entry = entry._replace(aside=entry.aside or file.name + aside[len(path) :])
        self.changes.append(Change(file, entry, aside))

    def _write(self):
        """Write all that changes under other names, and then the record; returns whether that could be done."""
        ready = False
        try:
            ready = all(self.folder.attempt(change.name, self._write_new, change) for change in self.changes)
            ready = ready and (not self.changes or self.folder.attempt(RECORD, self._note))
        finally:
            if not ready:
                for change in self.changes:
                    remove(self.folder.file(change.name) + NEW)
        return ready

    def _write_new(self, change):
        self.folder.make_parts(change.name)
        write_new(self.folder.file(change.name), change.file.data, change.file.mode)

    def _note(self):
        record = self.folder.record
        files = dict(record.files)
        files.update((change.name, change.entry) for change in self.changes)
        record.save(files, record.levels)

    def _place(self):
        """Have all that changes take its place. Where that ends early, what has been written for the others stays:
        that of MAIN tells launchers that files may be of two versions."""
        if not all(self.folder.attempt(change.name, self._replace, change) for change in self.changes):
            return False
        return self.folder.attempt("", self.folder.remove_unfinished)

    def _replace(self, change):
        path, say = self.folder.file(change.name), self.folder.say
        if change.aside:
            os.rename(path, change.aside)
        os.replace(path + NEW, path)
        if change.aside:
            say("moved aside: {} to {}".format(path, os.path.basename(change.aside)))
        say("installed: " + path)

    def _remove(self, name):
        self.folder.take_away(name)
        record = self.folder.record
        record.save({each: record.files[each] for each in record.files if each != name}, record.levels)

    def _mend_mode(self, path, mode):
        dry_run, say = self.folder.dry_run, self.folder.say
        if mode & 0o100 and not os.access(path, os.X_OK):
            if not dry_run:
                os.chmod(path, mode)
            say("{}made executable: {}".format("would be " if dry_run else "", path))
        else:
            say("unchanged: " + path)

    def _compile(self, name):
        """Compile a script, so that no launch has to; to where the drop-ins have Python look, whatever this
        run's own environment says."""
        import py_compile

        part, slash, script = name.rpartition("/")
        stem = os.path.splitext(script)[0]
        cached = "{}{}__pycache__/{}.{}.pyc".format(part, slash, stem, sys.implementation.cache_tag)
        file = self.folder.file
        self.folder.attempt(cached, lambda: py_compile.compile(file(name), cfile=file(cached), optimize=0))


def remove_folders(paths):
    """Remove the folders that are empty now; what others have put into one, such as logs, keeps it."""
    for path in sorted(paths, key=len, reverse=True):
        try:
            os.rmdir(path)
        except OSError:
            pass  # not empty, or gone already


# ------------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """What is bad becomes one line, as for the launchers. It never repeats what it does not know: a mistyped
    host has its password anywhere."""

    expected = {
        "--remote": "HOST, as in --remote john@host.example.com",
        "-o": "NAME=VALUE, as in -o Compression=no",
    }

    def error(self, message):
        name = message.replace("argument ", "", 1).partition(": ")[0]
        raise tunnel.Fatal("{}: expected {}".format(name, self.expected.get(name, "nothing after it")))

    @classmethod
    def make(cls):
        parser = cls(
            prog="install.py",
            usage="install.py [options]",
            description="Installs Tunnel for this user: what a front end machine and what a kernel machine needs.",
            allow_abbrev=False,
            add_help=False,
        )
        flags = {
            "--front-end": "only what the front end machine needs",
            "--kernel": "only what the kernel machine needs",
            "--dry-run": "list what would be done, and do nothing",
            "--uninstall": "remove what was installed, and put back what was moved aside",
            "--version": "print the version",
        }
        for name, text in flags.items():
            parser.add_argument(name, action="store_true", help=text)
        parser.add_argument("-h", "--help", action="store_true", help="print this")
        parser.add_argument(
            "--remote",
            metavar="HOST",
            type=remote_host,
            help="instead: what the kernel machine [user@]HOST needs, by SSH (Linux and macOS)",
        )
        parser.add_argument(
            "-o",
            metavar="NAME=VALUE",
            dest="ssh_options",
            type=tunnel.parse_option,
            action="append",
            default=[],
            help="an OpenSSH option for --remote",
        )
        return parser

    def parse(self, argv):
        """:raises Fatal: an argument is bad; the text names it"""
        words = []
        for word in argv:  # argparse up to Python 3.7 does not take -oNAME=VALUE apart
            words += [word[:2], word[2:]] if word.startswith("-o") and word[2:] else [word]
        options, rest = self.parse_known_args(words)
        for word in rest:
            name = word.partition("=")[0]
            if not name.startswith("-"):
                raise tunnel.Fatal("too many arguments; a host stands after --remote")
            name = name if name.replace("-", "").isalnum() else "this option"
            raise tunnel.Fatal("{}: not known; --help lists the options".format(name))
        if options.remote and (options.front_end or options.kernel):
            raise tunnel.Fatal("--remote: installs for the kernel there; leave --front-end and --kernel out")
        if options.ssh_options and not options.remote:
            raise tunnel.Fatal("-o: is for --remote only")
        return options


def remote_host(text):
    try:
        there, problem = tunnel.Destination.parse(text), None
    except tunnel.Fatal as error:
        there, problem = None, error.text.replace("host: ", "", 1)
    if problem:
        raise tunnel.Fatal("--remote: " + problem)
    if there.password:
        raise tunnel.Fatal("--remote: no password here; ssh asks for it")
    return there


class Lock:
    """What one run of install.py holds while it looks at and changes what is installed for a home: all others wait
    for it. It goes with its process. Where nothing can be locked nobody waits.

    :param folder: the home; nothing in it changes by this
    :param say: called with one line when this has to wait
    """

    def __init__(self, folder, say):
        self.folder, self.say = folder, say
        self.held = None  # a descriptor of the folder, on Windows the handle of a mutex

    def __enter__(self):
        """:raises Fatal: another run has held it for too long"""
        take = self._take_mutex if os.name == "nt" else self._take_folder
        if take(0):
            return
        self.say("waiting: another install.py is at work")
        if not take(LOCK_SECONDS):
            self.__exit__()
            raise tunnel.Fatal(BUSY.format(LOCK_SECONDS), 1)

    def __exit__(self, *error):
        if os.name == "nt":
            import ctypes

            ctypes.windll.kernel32.ReleaseMutex(ctypes.c_void_p(self.held))
            ctypes.windll.kernel32.CloseHandle(ctypes.c_void_p(self.held))
        elif self.held is not None:
            os.close(self.held)

    def _take_folder(self, seconds):
        """Whether the lock could be had within ``seconds``, or cannot be had at all."""
        import fcntl
        import signal

        def give_up(*_):
            raise BlockingIOError

        before = signal.signal(signal.SIGALRM, give_up)
        try:
            try:
                self.held = os.open(self.folder, os.O_RDONLY) if self.held is None else self.held
                signal.setitimer(signal.ITIMER_REAL, seconds)
                fcntl.flock(self.held, fcntl.LOCK_EX if seconds else fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        except BlockingIOError:
            return False
        except OSError:
            pass  # the folder cannot be opened, or its file system has no locks
        return True

    def _take_mutex(self, seconds):
        """Whether the mutex could be had within ``seconds``, or cannot be had at all."""
        import ctypes

        kernel32 = ctypes.windll.kernel32
        kernel32.CreateMutexW.restype = ctypes.c_void_p
        self.held = self.held or kernel32.CreateMutexW(None, False, "tunnel-install")
        ended = kernel32.WaitForSingleObject(ctypes.c_void_p(self.held), int(seconds * 1000))
        return ended != 0x102  # WAIT_TIMEOUT


class Output:
    """Standard output, line by line. When it has nowhere to go, the work goes on without."""

    def __init__(self):
        self.error = None

    def say(self, text):
        self.error = self.error or write(sys.stdout, text)

    def end(self, code, text):
        """Say on standard error what is to be said; returns the exit code."""
        if self.error and not isinstance(self.error, BrokenPipeError):  # a reader such as head has seen enough
            code, text = code or 1, text or "the output could not be written: {}".format(self.error.strerror)
        if text:
            write(sys.stderr, "install.py: " + text)
        return code


def write(stream, text):
    """Write a line; returns the error if that cannot be done."""
    if stream is None:  # closed by whoever has started this
        return None
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError as error:
        # Python tries again at its end what could not be written; then it goes nowhere in peace.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


class Installer:
    """One run: ``options``, and ``platform``, ``environ`` and ``home`` of the machine.

    :raises Fatal: an argument is bad
    """

    source = SOURCE

    def __init__(self, argv, platform=sys.platform, environ=os.environ, home=None, say=None):
        self.platform, self.environ, self.home = platform, environ, home
        self.say = say or Output().say
        self.options = Parser.make().parse(argv)
        both = not self.options.front_end and not self.options.kernel
        self.front_end, self.kernel = both or self.options.front_end, both or self.options.kernel

    def run(self):
        """:returns: the exit code, 1 when something failed"""
        if self.options.help:
            self.say(Parser.make().format_help().rstrip("\n"))
            return 0
        if self.options.version:
            self.say("tunnel " + tunnel.VERSION)
            return 0
        if self.options.remote:
            return self.run_remote(self.options.remote)
        self.home = self.home or home_directory(self.platform, self.environ)
        bases = base_directories(self.platform, self.environ, self.home)
        with Lock(self.home or tempfile.gettempdir(), self.say):
            folders = self.uninstall(bases) if self.options.uninstall else self.install(bases)
        return 1 if any(folder.failed for folder in folders) else 0

    def folders(self, bases, name, shared=False):
        """The folders ``name`` in ``bases``, each once."""
        separator = "\\" if self.platform == "win32" and os.sep == "\\" else "/"
        distinct = {}
        for base in bases:
            path = os.path.abspath(base + separator + name)
            distinct.setdefault(os.path.realpath(path), path)
        return [Folder(path, self.home, self.say, self.options.dry_run, shared) for path in distinct.values()]

    def uninstall(self, bases):
        folders = []
        if self.front_end:
            folders += self.folders([user for user, _ in bases.values()], "FrontEnd")
        if self.kernel:
            folders += self.folders([path for pair in bases.values() for path in pair], "Kernel")
        for folder in folders:
            folder.uninstall()
        remove_folders(path for folder in folders for path in folder.left)
        if not any(folder.found or folder.failed for folder in folders):
            self.say("nothing of Tunnel is installed in " + ", ".join(folder.path for folder in folders))
        return folders

    def install(self, bases):
        folders, here = [], products_here(bases, self.environ)
        if self.front_end:
            self._refuse_sudo()
            folders += self.folders([bases[product][0] for product in here], "FrontEnd")
            files = front_end_files(self.source, self.platform, base_python(self.platform))
            for folder in folders:
                Update(folder, files).run()
        if self.kernel:
            files = [File("tunnel.m", read_source(self.source, "tunnel.m"), 0o644)]
            for product in here:
                folder = self._kernel_folder(product, *bases[product])
                if os.path.realpath(folder.path) not in [os.path.realpath(each.path) for each in folders]:
                    folders.append(folder)
                    Update(folder, files).run()
        return folders

    def _kernel_folder(self, product, user, system):
        """That of the base directory, unless a variable names the other alone, or it cannot be written."""
        (user,), (system,) = self.folders([user], "Kernel"), self.folders([system], "Kernel", shared=True)
        if named(product, "_USERBASE", self.environ) and not named(product, "_BASE", self.environ):
            return user
        if system.writable:
            return system
        self.say("{} cannot be written: tunnel.m goes to this user's {}".format(system.path, user.path))
        return user

    def _refuse_sudo(self):
        user = self.environ.get("SUDO_USER", "root")
        if self.platform != "win32" and user != "root" and os.geteuid() == 0:
            raise tunnel.Fatal(
                "--front-end: with sudo the files would be root's, not {}'s; run it without sudo, and with sudo"
                " only --kernel".format(user)
            )

    def run_remote(self, there):
        """Have a shell on the kernel machine do the same. It reads its script from standard input, so
        neither its kind nor any quoting matters; ssh asks for passwords on the terminal."""
        program, client = tunnel.find_client(None, self.environ)
        if client is not tunnel.OpenSSH:
            raise tunnel.Fatal("--remote: needs OpenSSH's ssh; name it with TUNNEL_SSH", tunnel.EX_UNAVAILABLE)
        options = [("ConnectTimeout", str(tunnel.CONNECT_SECONDS)), ("RemoteCommand", "none")]
        argv = [program, "-T"] + tunnel.OpenSSH.words(self.options.ssh_options + options, there)
        done = subprocess.run(
            argv + [there.host, "sh"],
            input=self.remote_script(),
            stdout=subprocess.PIPE,
            env=tunnel.client_environment(self.environ),
        )
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        said = [text for _, mark, text in (line.partition(MARK) for line in lines) if mark]
        for text in said:
            if text != "end":
                self.say("{}: {}".format(there.host, text))
        if "end" not in said:
            what = "ssh ended with exit code {}".format(done.returncode)
            if done.returncode != tunnel.OpenSSH.failure:
                what += ", and no shell there has run the script to its end; it needs Linux or macOS"
            self.say("failed: {}: {}".format(there, what))
            return 1
        return 1 if done.returncode else 0

    def remote_script(self):
        content = read_source(self.source, "tunnel.m")
        text = REMOTE_SCRIPT.format(
            task="uninstall" if self.options.uninstall else "install",
            dry="yes" if self.options.dry_run else "",
            digest=digest(content),
            content=content.decode("utf-8"),
            mark=MARK,
            share=SHARE,
            record=RECORD,
            title=RECORD_TITLE,
            most=RECORD_BYTES,
            damaged=DAMAGED,
            unknown=UNKNOWN,
            seconds=LOCK_SECONDS,
            busy=BUSY.format(LOCK_SECONDS),
            aside=ASIDE,
            new=NEW,
        )
        return text.encode("utf-8")


def main(argv=None):
    output = Output()
    argv = sys.argv[1:] if argv is None else argv
    return output.end(*tunnel.guarded(lambda: Installer(argv, say=output.say).run()))


if __name__ == "__main__":
    sys.exit(main())
