#!/usr/bin/env python3
"""Show what Tunnel does, on this machine alone: a throwaway SSH server, a stand-in front end, stand-in kernels.

Launches a controller kernel and two compute kernels through the launchers and prints what connected,
channel by channel; then leaves nothing behind.

usage: python3 tests/demo.py
"""

import os
import shutil
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import rig
import run
from rig import frontend, product


def show(title, end, begin):
    try:
        end.accept()
    except (OSError, frontend.LauncherEnded) as error:
        raise rig.Unavailable("no {}: {}".format(title, error)) from None
    print("{} stands after {:.2f} s".format(title, time.monotonic() - begin))
    end.echo(65536)
    for name, channel in zip(frontend.CHANNELS, end.channels):
        (here, there) = (channel.getsockname()[1], channel.getpeername()[1])
        print("  {:<24} front end's port {:>5} <-> {:>5}  64 KiB there and back".format(name, here, there))


def demo(machine, folder):
    modern = machine.install_kernel("usr/local/Wolfram/Wolfram/14.1/Executables/WolframKernel", "boot=0")
    environment = {"TUNNEL_SSH": machine.ssh}
    ends = []
    try:
        for role, title in (
            ("callback", "controller kernel"),
            ("compute", "compute kernel 1"),
            ("compute", "compute kernel 2"),
        ):
            begin = time.monotonic()
            end = frontend.FrontEnd(role)
            ends.append(end)
            name = "tunnel_sub.py" if role == "compute" else "tunnel.py"
            script = os.path.join(folder, name)
            end.launch(machine.destination, modern, environment=environment, script=script)
            show(title, end, begin)
        begin = time.monotonic()
        for end in ends:
            end.quit()
            code, errors = end.wait()
            if code:
                raise SystemExit("demo.py: a launcher failed with exit code {}: {}".format(code, errors.strip()))
        rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernels")
        rig.wait_until(lambda: not rig.processes_with(machine.ssh), 10, "the end of the launchers")
        print("all ended {:.2f} s after the front end quit; nothing is left".format(time.monotonic() - begin))
    finally:
        for end in ends:
            end.__exit__()


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if argv:
        print("demo.py: {}: not known; it takes no arguments".format(argv[0]), file=sys.stderr)
        return 2
    run.install_packages({name: run.PACKAGES[name] for name in ("sshd", "ssh", "ip", "openssl")})
    folder = tempfile.mkdtemp(prefix="tunnel-demo-")
    try:
        product.copy_to(folder)
        with rig.KernelMachine() as machine:
            where = "network namespace" if machine.as_root else "user namespace"
            print("a kernel machine with sshd on {} in a {}".format(machine.address, where))
            demo(machine, folder)
    except rig.Unavailable as reason:
        return "demo.py: {}".format(reason)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
