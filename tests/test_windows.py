"""The Windows branch: a real Windows Python under Wine, the batch drop-ins through cmd, a recording plink.exe."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
import rig
from rig import frontend, logins, product

KERNEL = "C:\\Program Files\\Wolfram Research\\Mathematica\\10.1\\math.exe"
LINK = "53994@127.0.0.1,39359@127.0.0.1"
PLACE = "\\Wolfram\\FrontEnd\\tunnel.bat"  # one of two: a new user has neither layout


class Wine:
    """A Windows of its own: a prefix with install.py's work and a stand-in plink.exe."""

    def __init__(self, folder):
        self.folder = folder
        self.prefix = os.path.join(folder, "prefix")
        self.wine = rig.must("sh", "-c", "PATH=$PATH:/usr/lib/wine; command -v wine64").strip()
        self.environ = dict(os.environ, WINEPREFIX=self.prefix, WINEDEBUG="-all", WINEARCH="win64", DISPLAY="")
        self.run("wineboot", "-i")
        self.drive = os.path.join(self.prefix, "drive_c")
        self.putty = os.path.join(self.drive, "Program Files", "PuTTY")
        os.makedirs(self.putty)
        compiler = ["x86_64-w64-mingw32-gcc", "-municode", "-O1", "-o", os.path.join(self.putty, "plink.exe")]
        rig.must(*(compiler + [os.path.join(rig.HERE, "standin_plink.c"), "-lws2_32"]))
        self.source = os.path.join(self.drive, "source of tunnel")
        os.makedirs(self.source)
        product.copy_to(self.source)
        for name in ("install.py", "tunnel.m"):
            shutil.copy(product.path(name), self.source)

    def install(self, python):
        """Have install.py put the launchers there for ``python``."""
        self.python = python
        self.installed = self.run(python, self.windows(os.path.join(self.source, "install.py")), "--front-end")
        assert self.installed[0] == 0, self.installed
        (bat,) = [path for path in self.installed[1].split("\n") if path.rstrip().endswith(PLACE)]
        self.front_end = bat.partition(": ")[2].strip()[: -len("\\tunnel.bat")]

    @staticmethod
    def windows(path):
        """The name that a path of this machine has under Wine."""
        return "Z:" + path.replace("/", "\\")

    def unix(self, path):
        return os.path.join(self.drive, path[len("C:\\") :].replace("\\", "/"))

    def run(self, *argv, seconds=90, **environ):
        """Run a Windows program; returns exit code and output. Pipes, since Wine's Python needs them."""
        process = self.start(*argv, **environ)
        process.stdin.close()
        process.wait(seconds)
        return (process.returncode,) + tuple(map(whatever_is_in, (process.stdout, process.stderr)))

    def start(self, *argv, **environ):
        return subprocess.Popen(
            [self.wine] + list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(self.environ, **environ),
        )

    def end(self):
        subprocess.call(["wineserver", "-k"], env=self.environ)
        subprocess.call(["wineserver", "-w"], env=self.environ)


def whatever_is_in(pipe):
    """What a program has written to a pipe, though what it has started may still hold it (as under Wine)."""
    os.set_blocking(pipe.fileno(), False)
    data = pipe.read() or b""
    pipe.close()
    return data.decode("utf-8", "replace")


class Machine:
    """The Windows machine of one test: launches through the batch files, and reads what plink.exe got."""

    def __init__(self, wine, folder):
        self.wine, self.folder = wine, str(folder)
        self.record = os.path.join(self.folder, "record")
        self.logs_before = set(self.log_paths())

    def command(self, script, *words):
        """A batch file that holds the command as a kernel configuration has it."""
        line = " ".join(['"{}\\{}"'.format(self.wine.front_end, script)] + ['"{}"'.format(word) for word in words])
        path = os.path.join(self.folder, "launch.bat")
        with open(path, "wb") as stream:
            stream.write(("@" + line.replace("%", "%%") + "\r\n").encode("utf-8"))
        return self.wine.windows(path)

    def environ(self, behaviour):
        record = self.wine.windows(self.record)
        return {"PLINK_RECORD": record, "PLINK_BEHAVIOUR": behaviour, "PATH": os.environ["PATH"]}

    def launch(self, script, *words, behaviour=""):
        return self.wine.run("cmd", "/c", self.command(script, *words), **self.environ(behaviour))

    def start(self, script, *words, behaviour=""):
        return self.wine.start("cmd", "/c", self.command(script, *words), **self.environ(behaviour))

    def stop(self):
        with open(self.record + ".stop", "w"):
            pass

    def recorded(self, key="arg"):
        """What the last plink.exe was given."""
        with open(self.record, encoding="utf-8") as stream:
            text = stream.read().rpartition("pid=")[2]
        return [line.partition("=")[2] for line in text.splitlines() if line.startswith(key + "=")]

    def called(self, seconds=30):
        """Wait until there is a plink.exe: a launcher of compute kernels may return before."""
        rig.wait_until(lambda: os.path.exists(self.record) and self.recorded(), seconds, "plink.exe")

    def log_paths(self):
        found = []
        for root, _, names in os.walk(self.wine.unix(self.wine.front_end)):
            found += [os.path.join(root, name) for name in names if name.endswith(".log")]
        return sorted(found)

    def log(self):
        (path,) = [path for path in self.log_paths() if path not in self.logs_before]
        with open(path, encoding="utf-8") as stream:
            return os.path.basename(path), stream.read()

    def plinks(self):
        return self.processes(lambda argv: "plink.exe" in argv[0])

    def launchers(self):
        return self.processes(lambda argv: "tunnel.main()" in " ".join(argv))

    def processes(self, wanted):
        """Process ids in this Wine whose arguments are ``wanted``."""
        lines = [(pid, rig.command_line(pid)) for pid in rig.processes_with(self.wine.prefix)]
        return [pid for pid, argv in lines if argv and wanted(argv)]


PYTHONS = os.environ.get("TUNNEL_WINDOWS_PYTHONS", "").split(os.pathsep)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    missing = [] if all(PYTHONS) else ["a Windows Python (TUNNEL_WINDOWS_PYTHONS)"]
    path = os.environ.get("PATH", "") + ":/usr/lib/wine"
    missing += [
        name for name in ("wine64", "wineserver", "x86_64-w64-mingw32-gcc") if not shutil.which(name, path=path)
    ]
    if missing:
        reason = "needs {}; `python3 tests/run.py` installs them".format(" and ".join(missing))
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    wine = Wine(str(tmp_path_factory.mktemp("wine")))
    yield wine
    wine.end()
    shutil.rmtree(wine.folder, ignore_errors=True)


@pytest.fixture(
    scope="module", params=PYTHONS, ids=[path.rpartition("windows-")[2].partition("/")[0] for path in PYTHONS]
)
def wine(request, prefix):
    prefix.install(request.param)
    return prefix


@pytest.fixture
def windows(wine, tmp_path):
    machine = Machine(wine, tmp_path)
    yield machine
    machine.stop()
    rig.wait_until(lambda: not machine.plinks(), 10, "the end of plink.exe")


def test_install_puts_batch_files_and_pins_this_python(wine):
    code, output, errors = wine.installed
    assert code == 0, output + errors
    assert "AppData\\Roaming\\Wolfram\\FrontEnd" in wine.front_end
    with open(os.path.join(wine.unix(wine.front_end), "tunnel.bat"), "rb") as stream:
        text = stream.read().decode()
    assert "pythonw.exe" in text
    assert text.count("\r\n") == text.count("\n")


def test_a_controller_kernel(windows):
    launcher = windows.start("tunnel.bat", "john@host.example.com:2222", KERNEL, LINK)
    windows.called()
    assert launcher.poll() is None  # it stays as long as its kernel does
    arguments = windows.recorded()
    assert arguments[1:8] == ["-batch", "-v", "-ssh", "-x", "-t", "-A", "-P"]
    assert arguments[8:11] == ["2222", "-l", "john"]
    forwards = [word.rpartition(":") for word in arguments[12:15:2]]
    assert arguments[11:15:2] == ["-R", "-R"]
    assert [forward[0] for forward in forwards] == ["127.0.0.1:53994:127.0.0.1", "127.0.0.1:39359:127.0.0.1"]
    with socket.socket() as front_end:  # who connects to a forward reaches it through the launcher
        front_end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        front_end.bind(("127.0.0.1", 53994))
        front_end.listen(1)
        front_end.settimeout(30)
        kernel = socket.create_connection(("127.0.0.1", int(forwards[0][2])), 30)
        with kernel, front_end.accept()[0] as link:
            kernel.sendall(b"from the kernel")
            assert link.recv(100) == b"from the kernel"
    assert arguments[-2] == "host.example.com"
    assert arguments[-1] == (
        '"{}" -wstp -LinkMode Connect -LinkProtocol TCPIP -LinkName {}'
        " -initfile tunnel.m -lmverbose -remotelaunch".format(KERNEL, LINK)
    )
    windows.stop()
    output, errors = launcher.communicate(timeout=30)
    assert (launcher.returncode, output, errors) == (0, b"", b"")
    name, text = windows.log()
    assert re.match(r"tunnel_\d{4}-\d\d-\d\d-\d{6}_\d+\.log$", name)
    assert "the kernel has called back" in text
    assert "with exit code 0" in text.splitlines()[-1]


def test_a_compute_kernel_is_launched_detached(windows):
    begin = time.monotonic()
    code, output, errors = windows.launch("tunnel_sub.bat", "host", "/opt/My Kernels/10.1/math", LINK)
    assert (code, output, errors) == (0, "", "")
    assert time.monotonic() - begin < 20
    windows.called()
    assert windows.plinks()  # and it still runs
    assert windows.recorded()[-1].startswith('"/opt/My Kernels/10.1/math" -wstp -LinkMode Connect')
    windows.stop()
    rig.wait_until(lambda: "with exit code 0" in windows.log()[1], 15, "the end of the log")
    assert windows.log()[0].startswith("tunnel_sub_")


def test_a_password_goes_through_a_file_that_is_gone_at_once(windows):
    host = "john:{}@host".format(rig.PASSWORD.replace("!", "&"))
    code, _, errors = windows.launch("tunnel_sub.bat", host, KERNEL, LINK)
    assert (code, errors) == (0, "")
    secret = rig.PASSWORD.replace("!", "&")
    windows.called()
    assert windows.recorded("password") == [secret]
    arguments = windows.recorded()
    assert secret not in " ".join(arguments)
    file = arguments[arguments.index("-pwfile") + 1]
    rig.wait_until(lambda: not os.path.exists(windows.wine.unix(file)), 5, "the removal of the file")
    assert secret not in windows.log()[1]


@pytest.mark.parametrize("script", ["tunnel.bat", "tunnel_sub.bat"])
def test_exit_codes_of_kernels_that_end_too_early(windows, script):
    code, output, errors = windows.launch(script, "host", KERNEL, LINK, behaviour="end")
    had_to_return = code == 0 and script == "tunnel_sub.bat"  # on a busy machine
    assert code == 7 or had_to_return, (code, output, errors, windows.log())
    rig.wait_until(lambda: "ended before it called back, with exit code 7" in windows.log()[1].splitlines()[-1])


def test_refused_forwards_are_tried_on_other_ports_and_then_explained(windows):
    code, _, _ = windows.launch("tunnel_sub.bat", "host", KERNEL, LINK, behaviour="refuse")
    assert code == 1
    _, text = windows.log()
    assert "try 5:" in text
    assert "AllowTcpForwarding" in text.splitlines()[-1]
    assert not windows.plinks()


@pytest.mark.parametrize("script", ["tunnel.bat", "tunnel_sub.bat"])
def test_bad_arguments_end_with_2(windows, script):
    assert windows.launch(script, "host", KERNEL, "no link")[0] == 2
    assert windows.launch(script, "host:x", KERNEL, LINK)[0] == 2
    assert not os.path.exists(windows.record)


def test_no_client_ends_with_69(windows):
    plink = os.path.join(windows.wine.putty, "plink.exe")
    os.rename(plink, plink + ".away")
    try:
        assert windows.launch("tunnel.bat", "host", KERNEL, LINK)[0] == 69
    finally:
        os.rename(plink + ".away", plink)


def test_what_a_person_asks_for_is_printed(windows):
    code, output, _ = windows.launch("tunnel.bat", "--dry-run", "john:secret@host", KERNEL, LINK)
    assert code == 0
    assert "C:\\Program Files\\PuTTY\\plink.exe" in output
    assert "secret" not in output


def test_the_client_ends_with_a_launcher_that_is_killed(windows):
    launcher = windows.start("tunnel.bat", "host", KERNEL, LINK)
    rig.wait_until(lambda: os.path.exists(windows.record) and windows.plinks(), 30, "plink.exe")
    pythons = windows.launchers()
    assert pythons
    for pid in pythons:
        os.kill(pid, signal.SIGKILL)
    rig.wait_until(lambda: not windows.plinks(), 10, "the end of plink.exe")
    launcher.communicate(timeout=20)


# -- the relay


class Server:
    """What the stand-in plink.exe carries bytes to: runs commands as a server would.

    :param machine: where they run
    :param status: the file that gets their exit codes
    """

    def __init__(self, machine, status):
        self.machine, self.status, self.logins = machine, status, 0
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(5)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return  # closed
            self.logins += 1
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection):
        command = frontend.wire.read_until(connection, b"\n").decode("utf-8")
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=connection,
            stdout=connection,
            stderr=subprocess.DEVNULL,
            env=self.machine.environment(),
            cwd=self.machine.folder,
        )
        with open(self.status, "w") as stream:
            stream.write(str(process.wait()))
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client has gone before
        connection.close()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def kernel_machine(windows):
    with logins.Machine() as machine:
        machine.server = Server(machine, windows.record + ".status")
        yield machine
        machine.server.close()


def relayed(windows, machine, role):
    """A front end that launches a kernel through a relay; with the launcher's process."""
    script = "tunnel_sub.bat" if role == "compute" else "tunnel.bat"
    end = frontend.FrontEnd(role)
    kernel = machine.kernel(*["classic"] * (role == "classic"))
    behaviour = "carry {}".format(machine.server.port)
    words = ("--relay", "john@host.example.com", kernel, end.link)
    return end, windows.start(script, *words, behaviour=behaviour)


def stands(end, windows):
    try:
        end.accept()
    except OSError as error:
        raise AssertionError("{!r}; {}".format(error, windows.log()[1])) from None


def test_a_relay_comes_back_and_tells_the_kernels_exit_code(windows, kernel_machine):
    end, launcher = relayed(windows, kernel_machine, "callback")
    with end:
        stands(end, windows)
        end.echo(100000)
        for number in (1, 2):
            for pid in windows.plinks():
                os.kill(pid, signal.SIGKILL)
            end.echo(100000)
            assert kernel_machine.server.logins == 1 + number
        end.tell(b"!quit 7\n")
        launcher.wait(30)
        assert launcher.returncode == 7
    arguments = windows.recorded()
    assert "-T" in arguments and "-R" not in arguments
    text = windows.log()[1]
    assert text.count("the connection is lost: ") == 2
    assert len(re.findall(r"the connection is back after \d+\.\d s", text)) == 2
    assert text.splitlines()[-1].endswith("with exit code 7")
    rig.wait_until(lambda: not windows.plinks() and not windows.launchers(), 10, "the end of all")
    kernel_machine.no_process()


@pytest.mark.parametrize("role", ["classic", "compute"])
def test_a_relay_with_other_links(windows, kernel_machine, role):
    end, launcher = relayed(windows, kernel_machine, role)
    with end:
        stands(end, windows)
        for pid in windows.plinks():
            os.kill(pid, signal.SIGKILL)
        end.echo(100000)
        end.tell(b"!flood 1000000\n")
        end.expect_flood(1000000)
    launcher.wait(30)
    rig.wait_until(lambda: not windows.plinks() and not windows.launchers(), 20, "the end of all")
    assert "the connection is back after" in windows.log()[1]
    kernel_machine.no_process()


def test_a_relay_that_is_killed_is_told(windows, kernel_machine):
    end, launcher = relayed(windows, kernel_machine, "callback")
    with end:
        stands(end, windows)
        for pid in kernel_machine.keepers():
            rig.end_process(pid)
        assert launcher.wait(30) == 255
    assert "is gone: killed" in windows.log()[1].splitlines()[-1]
    rig.wait_until(lambda: not windows.plinks() and not windows.launchers(), 10, "the end of all")
    for pid in kernel_machine.processes():  # its kernel, which nobody has reaped
        rig.end_process(pid)
