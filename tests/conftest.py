"""Fixtures: the launchers in a folder as users have it, and kernel machines with a real sshd."""

import os
import pathlib
import re
import shutil
import sys
import tempfile

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import frontend
import rig

CLASSIC = "usr/local/Wolfram/Mathematica/10.1/Executables/MathKernel"
CALLBACK = "usr/local/Wolfram/Wolfram/14.1/Executables/WolframKernel"


def start(machine):
    """Start a kernel machine; where that is not possible, skip, but in CI fail."""
    try:
        return machine.__enter__()
    except rig.Unavailable as reason:
        if os.environ.get("CI"):
            raise
        return pytest.skip(str(reason))


def make_machine(request, **options):
    machine = start(rig.KernelMachine(**options))
    desk = request.getfixturevalue("desk") if request.scope == "function" else None

    def end():
        if desk:
            desk.close()  # while the machine is still there: a client notices late that it is gone
        machine.__exit__(None, None, None)

    request.addfinalizer(end)
    machine.classic = machine.install_kernel(CLASSIC)
    machine.behave(machine.classic, "classic")
    machine.modern = machine.install_kernel(CALLBACK)
    return machine


@pytest.fixture(scope="module")
def machine(request):
    """A kernel machine that lets ``john`` in with a key or a password."""
    return make_machine(request, password=True)


@pytest.fixture
def own_machine(request):
    """The same for a single test, which may break it."""
    return make_machine(request, password=True)


@pytest.fixture
def front_end_folder(tmp_path):
    """The launchers in a folder as on a user's machine: with blanks, and letters beyond ASCII."""
    folder = tmp_path / "Bücher und Möbel" / "FrontEnd"
    folder.mkdir(parents=True)
    for name in ("tunnel.py", "tunnel_sub.py"):
        shutil.copy(os.path.join(rig.LAUNCHERS, name), str(folder))
    return folder


class Desk:
    """The front end machine of one test: launches kernels and looks at what is left."""

    def __init__(self, folder, runtime):
        self.folder, self.runtime = folder, runtime
        self.front_ends, self.machines = [], []

    def environment(self, machine, client="ssh", **more):
        return dict(
            {
                "TUNNEL_SSH": machine.client(client),
                "TUNNEL_DEBUG": "1",
                "XDG_RUNTIME_DIR": str(self.runtime),
            },
            **more,
        )

    def launch(self, machine, role, *arguments, client="ssh", host=None, kernel=None, env=None, **options):
        """A front end that has launched a kernel on ``machine``; ended with the test."""
        links = options.pop("host_of_links", "127.0.0.1")
        end = frontend.FrontEnd(role, host=links, **options)
        self.front_ends.append(end)
        self.machines += [] if machine in self.machines else [machine]
        kernel = kernel or (machine.modern if role == "callback" else machine.classic)
        script = os.path.join(str(self.folder), "tunnel_sub.py" if role == "compute" else "tunnel.py")
        end.launch(
            *(list(arguments) + [host or machine.destination, kernel]),
            environment=self.environment(machine, client, **(env or {})),
            script=script,
        )
        return end

    def close(self):
        """Quit all front ends, and see to it that everything else ends by itself."""
        for end in self.front_ends:
            end.__exit__()
        for pid in self.processes():
            if "ControlPersist=60" in rig.command_line(pid):  # a shared connection outlives its kernels
                rig.end_process(pid)
        try:
            self.no_process()
        finally:
            for pid in self.processes():
                rig.end_process(pid)

    def logs(self):
        """The text of all logs, in the order of their names."""
        return [path.read_bytes().decode("utf-8") for path in sorted(self.folder.glob("Logs/*/*.log"))]

    def local_ports(self):
        """The ports on this machine that the launchers' logs speak of: local forwards, switchboards, links."""
        found = re.findall(r" -L 127\.0\.0\.1:(\d+):| -R \S+:(\d+)$", "\n".join(self.logs()), re.MULTILINE)
        return [int(port) for pair in found for port in pair if port]

    def processes(self):
        """What was launched here and still runs, shared connections apart."""
        return rig.processes_with("XDG_RUNTIME_DIR=" + str(self.runtime))

    def no_process(self, seconds=5):
        try:
            rig.wait_until(lambda: not self.processes(), seconds, "the end of all that was launched")
        except AssertionError as error:
            left = [(pid, rig.command_line(pid)) for pid in self.processes()]
            facts = [rig.run("ss", "-tnp").stdout] + [machine.describe() for machine in self.machines]
            facts += self.logs()
            raise AssertionError("{}; left: {}\n{}".format(error, left, "\n".join(facts))) from None


@pytest.fixture
def desk(front_end_folder):
    runtime = pathlib.Path(tempfile.mkdtemp(prefix="tunnel-run-"))  # short enough for sockets, as real ones
    desk = Desk(front_end_folder, runtime)
    yield desk
    desk.close()
    shutil.rmtree(str(runtime), ignore_errors=True)
