"""What the tests of whole launches have in common: kinds of kernels, what ends well, what ends in one line."""

import re
import sys
import time

import pytest

import rig
from rig import frontend, product

ROLES = ("classic", "callback", "compute", "shared")  # a shared one is a compute kernel on a shared connection
clients = pytest.mark.parametrize("client", ["ssh", "plink"])
roles = pytest.mark.parametrize("role", ["classic", "callback", "compute"])
DIAL = "dial.py"  # the program that a test has ssh connect through
MASTER = "ControlPersist=60"  # a word in the command line of a shared connection

# Lines that mean something when a client says them, and nothing when anybody else does.
FAKED = [
    "debug1: Authentication succeeded (none).",
    'Authenticated to nowhere ([192.0.2.1]:22) using "none".',
    "debug1: Executing proxy command: exec nowhere",
    "debug1: Sending command: true",
    "debug1: Requesting forwarding of remote forward 127.0.0.1:2000 -> 127.0.0.1:2000",
    "debug1: mux_client_request_session: master session id: 2",
    "mux_client_request_session: session request failed: Session open refused by peer",
    "debug1: client_input_channel_req: channel 0 rtype exit-status reply 0",
    "debug1: Exit status 4",
    "Session sent command exit status 4",
    "Started a shell/command",
    "Main session channel closed",
    "Connecting to nowhere: Connection timed out",
    "ssh: connect to host nowhere port 22: Connection refused",
    "ssh: Could not resolve hostname nowhere: Name or service not known",
    "kex_exchange_identification: Connection closed by remote host",
    "Permission denied (publickey).",
    "john@nowhere: Permission denied (publickey,password).",
    "Error: remote port forwarding failed for listen port 2000",
    "Remote port forwarding from 127.0.0.1:2000 refused",
    "PTY allocation request failed on channel 0",
    "debug1: Remote: Server has disabled port forwarding.",
    "Couldn't open logfile /nowhere: Permission denied",
    "command-line: line 0: Bad configuration option: sessiontype",
    "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @",
    "Host key verification failed.",
    "the kernel has called back",
    "There is no valid password or licence; command not found: No such file or directory",
]


def kinds(client):
    """The kinds of launches that a client is there for: plink shares no connections."""
    return [role for role in ROLES if client == "ssh" or role != "shared"]


def failure(client):
    return 255 if client == "ssh" else 1


def launched(desk, machine, role, *arguments, **options):
    """Launch a kernel of one of ROLES.

    :param slow: with a kernel that takes as long to boot as real ones; other options as for ``desk.launch``
    """
    launch = desk.slow if options.pop("slow", False) else desk.launch
    if role == "callback":
        # Ports that nobody has: the ones after these are forwarded as well, so a second try could come by chance.
        first = rig.free_port()
        options.setdefault("ports", (first, first + 1))
    if role == "shared":
        return launch(machine, "compute", "--share", *arguments, **options)
    return launch(machine, role, *arguments, **options)


def works(desk, machine, roles=ROLES, arguments=(), **options):
    """Launch kernels of all kinds at the same moment. All of them have to work, and to end with their own exit
    code; returns their logs."""
    ends = [launched(desk, machine, role, *arguments, **options) for role in roles]
    for end in ends:
        desk.accept(end)
        end.echo(1000)
        end.tell(b"!quit 7\n")
    for end in ends:
        assert end.wait()[0] == (0 if end.role == "compute" else 7)
    nothing_else(desk)
    logs = [log_of(desk, end) for end in ends]
    for log in logs:
        assert log.splitlines()[-1].endswith("with exit code 7"), log
    return logs


def ends_with(desk, end, code, words, seconds=10):
    """Assert that a launch ends with ``code`` and with one line, on stderr and in its log, that holds ``words``;
    returns that line."""
    found, errors = end.wait(seconds)
    assert found == code, errors
    assert len(errors.splitlines()) == 1, errors
    assert re.search(words, errors), errors
    nothing_else(desk)
    assert log_of(desk, end).splitlines()[-1].partition(" ")[2] == errors.strip().partition(": ")[2]
    return errors


def log_of(desk, end):
    """The log of a launch; empty until there is one."""
    return "".join(log for log in desk.logs() if " {}\n".format(end.link) in log)


def tries(log):
    return len(re.findall(" try [0-9]+: ", log))


def masters(desk):
    """Shared connections, which outlive their kernels."""
    return [pid for pid in desk.processes() if MASTER in rig.command_line(pid)]


def nothing_else(desk):
    """Wait until nothing that was launched runs, shared connections and the proxies that carry them apart."""

    def left():
        lines = {pid: rig.command_line(pid) for pid in desk.processes()}
        found = [pid for pid in lines if MASTER not in lines[pid]]
        proxies = [pid for pid in found if "-W" in lines[pid] or any(DIAL in word for word in lines[pid])]
        return found if len(proxies) > len(lines) - len(found) else [pid for pid in found if pid not in proxies]

    try:
        rig.wait_until(lambda: not left(), 5, "the end of all that was launched")
    except AssertionError as error:
        raise AssertionError("{}: {}".format(error, [rig.command_line(pid) for pid in left()])) from None


def server_of(request, machine):
    """For a fixture: what has the machine's server started again with lines of its own. It has its defaults again
    after the test."""

    def start(*lines, **options):
        machine.restart_server(*lines, **options)
        return machine

    yield start
    request.getfixturevalue("desk").close()  # what is still launched ends with a server that is there
    machine.restart_server()


def parent(pid):
    try:
        with open("/proc/{}/stat".format(pid)) as stream:
            return int(stream.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def configured(machine, *lines):
    """ssh with further lines in its configuration."""
    lines = [line.replace("{folder}", machine.folder) for line in lines]
    return machine.make_ssh("configured", ["Host *"] + machine.client_lines + lines)[1]


def patched(desk, machine, role, values, *arguments, **options):
    """``desk.slow`` with a launcher whose constants are others.

    :param values: for each name the expression of another value, see ``product.setting``
    """
    end = frontend.FrontEnd(role)
    desk.front_ends.append(end)
    code = product.launching(role, **values)
    host, kernel = options.pop("host", machine.destination), options.pop("kernel", machine.slow_classic)
    command = [sys.executable, "-c", code, str(desk.folder)] + list(arguments) + [host, kernel]
    return end.launch(command=command, environment=desk.environment(machine, **options.pop("env", {})))


def key_lines(machine, key=True):
    """The lines with which ssh logs in on ``machine``, with its key or without any."""
    if key:
        return list(machine.client_lines)
    lines = [line for line in machine.client_lines if not line.startswith("Identity")]
    return lines + ["IdentityFile none", "IdentityAgent none", "PubkeyAuthentication no"]


def sharing_ssh(machine, tmp_path, key=True):
    """ssh with a configuration that shares a connection, and logs in with a key or cannot."""
    lines = ["Host *", "ControlPath {}".format(tmp_path / "users"), "StrictHostKeyChecking no"]
    return machine.make_ssh("users" if key else "no-key", lines + key_lines(machine, key))[1]


def share_by_hand(machine, tmp_path):
    """Make the connection that it shares, as a user does; returns that ssh."""
    wrapper = sharing_ssh(machine, tmp_path)
    rig.must(wrapper, "-M", "-f", "-N", machine.address)
    return wrapper


def fails(desk, end, code, words, seconds):
    """Assert that a launch ends with ``code``, in time, and with ``words`` in one line on stderr, which is
    the last line of its log too."""
    begin = time.monotonic()
    found, errors = end.wait(seconds + 5)
    took = time.monotonic() - begin
    assert found == code, errors
    assert took < seconds
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert re.search(words, lines[0]), lines[0]
    logs = desk.logs()
    assert logs
    desk.no_process()
    last = desk.logs()[-1].splitlines()[-1]
    assert last.partition(" ")[2] == lines[0].partition(": ")[2]
    assert not re.search(r"Traceback|internal", errors)
    return lines[0]


def launch_through(desk, machine, role, code, *arguments, host_of_links="127.0.0.1", main=None):
    """A front end whose launcher is started by Python ``code``: that ends with ``run()``, which becomes the
    launcher, or with ``stay()``, which is it in the same process.

    :param arguments: options of the launcher
    :param main: two sockets that listen for the main link
    """
    end = frontend.FrontEnd(role)
    desk.front_ends.append(end)
    desk.machines.append(machine)
    if main:
        end.close_listeners()
        end.main = main
    end.link = frontend.name_of(end.main, host_of_links)
    script = "tunnel_sub" if role == "compute" else "tunnel"
    begin = (
        "import os, sys, socket, resource, time\n"
        "folder = sys.argv.pop(1)\n"
        "def run():\n"
        "    os.execv(sys.executable, [sys.executable, os.path.join(folder, {!r})] + sys.argv[1:])\n"
        "def stay():\n"
        "    sys.path.insert(0, folder)\n"
        "    import tunnel\n"
        "    sys.exit(tunnel.main({!r}, tunnel.{}))\n"
    ).format(script + ".py", script, "COMPUTE" if role == "compute" else "CONTROLLER")
    kernel = machine.modern if role == "callback" else machine.classic
    end.launch(
        *(list(arguments) + [machine.destination, kernel]),
        command=[sys.executable, "-c", begin + code, str(desk.folder)],
        environment=desk.environment(machine),
    )
    return end
