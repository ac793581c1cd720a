"""What the tests stand on: stand-ins for all that launchers have to do with, and ways to look at what happens.

- ``machine``: a kernel machine with a real sshd, and what any test asks of this system; its names are also here
- ``desk``: the front end machine of one test
- ``frontend``, ``standin_kernel``, ``standin_plink.c``: stand-ins for the front end, the kernel, plink on Windows
- ``product``: the launchers' own names and files, wherever they lie
- ``launches``, ``processes``: kinds of launches and how they end; their processes, and what is left of them
- ``servers``: servers that are no SSH servers
- ``tries``: what clients print, and what a try makes of it, without a client
- ``relays``, ``far``: relays over a network that comes and goes; their far end alone, which is this machine
- ``logins``, ``wires``: relays without an SSH client; two ends of a relay's connection without any process
- ``slurm``, ``via``: a cluster with a scheduler; launches through a command
- ``names``: link names as they travel
- ``installing``: install.py at work
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
