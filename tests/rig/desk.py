"""The front end machine of a test, which launches kernels, and the kernel machines that it launches them on."""

import os
import re
import sys

import pytest

import rig
from rig import frontend, product

# As install.py has it, but for byte code that is damaged.
DROP_IN = """import sys
sys.path = [sys.argv.pop(1)] + [path for path in sys.path if path]
import {0}
sys.exit({0}.main())"""
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
    """A kernel machine with kernels of both kinds, for as long as ``request`` lasts.

    ``classic`` and ``modern`` are there at once; ``slow_classic`` and ``slow_modern`` take their time to boot, as
    real ones do. The launchers have to serve both, in whatever order things then happen.
    """
    machine = start(rig.KernelMachine(quick=True, **options))
    desk = request.getfixturevalue("desk") if request.scope == "function" else None

    def end():
        if desk:
            desk.close()  # while the machine is still there: a client notices late that it is gone
        machine.__exit__(None, None, None)

    request.addfinalizer(end)
    machine.classic = machine.install_kernel(CLASSIC, "classic", "boot=0")
    machine.modern = machine.install_kernel(CALLBACK, "boot=0")
    machine.slow_classic = machine.install_kernel("slow/" + CLASSIC, "classic")
    machine.slow_modern = machine.install_kernel("slow/" + CALLBACK)
    return machine


class Desk:
    """The front end machine of one test: launches kernels and looks at what is left."""

    def __init__(self, folder, runtime, temporary):
        self.folder, self.runtime, self.temporary = folder, runtime, temporary
        self.front_ends, self.machines = [], []

    def environment(self, machine, client="ssh", **more):
        return dict(
            {
                "TUNNEL_SSH": machine.client(client),
                "TUNNEL_DEBUG": "1",
                "XDG_RUNTIME_DIR": str(self.runtime),
                "TMPDIR": str(self.temporary),
            },
            **more,
        )

    def launch(self, machine, role, *arguments, client="ssh", host=None, kernel=None, env=None, **options):
        """A front end that has launched a kernel on ``machine``; ended with the test.

        :param arguments: options of the launcher
        :param kernel: its path; else the one of ``machine`` for that role that is there at once
        :param env: what else is in the launcher's environment
        :param options: those of ``frontend.FrontEnd``; ``host_of_links`` is its host
        """
        links = options.pop("host_of_links", "127.0.0.1")
        end = frontend.FrontEnd(role, host=links, **options)
        self.front_ends.append(end)
        self.machines += [] if machine in self.machines else [machine]
        kernel = kernel or (machine.modern if role == "callback" else machine.classic)
        script = "tunnel_sub" if role == "compute" else "tunnel"
        end.launch(
            *(list(arguments) + [host or machine.destination, kernel]),
            environment=self.environment(machine, client, **(env or {})),
            command=[sys.executable, "-SEs", "-c", DROP_IN.format(script), str(self.folder)],
        )
        return end

    def slow(self, machine, role, *arguments, **options):
        """``launch`` with a kernel that takes as long to boot as real ones."""
        kernel = machine.slow_modern if role == "callback" else machine.slow_classic
        return self.launch(machine, role, *arguments, kernel=kernel, **options)

    def alter(self, **constants):
        """Have this desk's launchers, and the relay that they send, take other values for these constants.

        Their own last too long for a test, or too short for a busy machine.
        """
        product.alter(self.folder, **constants)

    def accept(self, end):
        """All channels of ``end``, once they stand; fails as soon as its launcher has ended."""
        return end.accept()

    def wait_until(self, end, condition, seconds=10.0, what="the condition"):
        """The first true value of ``condition()``; fails as soon as the launcher has failed."""

        def failed():
            code = end.launcher.poll()
            return code and "the launcher ended with exit code {}".format(code)

        return rig.wait_until(condition, seconds, what, unless=failed)

    def close(self):
        """Quit all front ends, and see to it that everything else ends by itself."""
        for end in self.front_ends:
            end.leave()
        for end in self.front_ends:
            end.__exit__()
        try:
            rig.wait_until(self._end_shared, 5, "the end of shared connections")
            self.no_process()
        finally:
            for pid in self.processes():
                rig.end_process(pid)

    def _end_shared(self):
        """Shared connections outlive their kernels, and one may just be going into the background."""
        found = [pid for pid in self.processes() if "ControlPersist=60" in rig.command_line(pid)]
        for pid in found:
            rig.end_process(pid)
        return not found

    def logs(self):
        """The text of all logs, in the order of their names."""
        return [path.read_bytes().decode("utf-8") for path in sorted(self.folder.glob("Logs/*/*.log"))]

    def facts(self):
        """All that is known about the launches; the report of a test that fails has it."""
        found = [rig.run("ss", "-tnp").stdout] + [machine.describe() for machine in self.machines]
        return "\n".join(found + self.logs())

    def left_files(self):
        """What the launchers have left in their temporary folder, which is the test's own."""
        return sorted(os.listdir(str(self.temporary)))

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
            raise AssertionError("{}; left: {}".format(error, left)) from None
