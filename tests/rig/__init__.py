"""What the tests stand on: stand-ins for all that launchers have to do with, and ways to look at what happens.

- ``machine``: a kernel machine with a real sshd, and what any test asks of this system; its names are also here
- ``desk``: the front end machine of one test
- ``frontend``, ``standin_kernel``, ``standin_plink.c``: stand-ins for the front end, the kernel, plink on Windows
- ``product``: the launchers' own names and files, wherever they lie
- ``launches``: kinds of launches, and how they end
- ``relays``, ``logins``: relays over a network that comes and goes; relays without an SSH client
- ``slurm``, ``via``: a cluster with a scheduler; launches through a command
- ``docs``: README and MANUAL, taken apart
"""

from .machine import (
    HERE,
    LAUNCHERS,
    PASSWORD,
    TESTS,
    KernelMachine,
    Ports,
    Unavailable,
    claim,
    command_line,
    end_process,
    exposed_ports,
    free_port,
    kernel_python,
    listening_ports,
    must,
    process_name,
    processes_in,
    processes_with,
    run,
    sweep,
    wait_until,
)

__all__ = [
    "HERE",
    "LAUNCHERS",
    "PASSWORD",
    "TESTS",
    "KernelMachine",
    "Ports",
    "Unavailable",
    "claim",
    "command_line",
    "end_process",
    "exposed_ports",
    "free_port",
    "kernel_python",
    "listening_ports",
    "must",
    "process_name",
    "processes_in",
    "processes_with",
    "run",
    "sweep",
    "wait_until",
]
