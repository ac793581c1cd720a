"""What the tests of whole launches have in common: kinds of kernels, what ends well, what ends in one line."""

import re
import sys

import frontend
import rig

ROLES = ("classic", "callback", "compute", "shared")  # a shared one is a compute kernel on a shared connection
MASTER = "ControlPersist=60"  # a word in the command line of a shared connection


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
    """Wait until nothing that was launched runs, shared connections and what they need of jump hosts apart."""

    def left():
        lines = {pid: rig.command_line(pid) for pid in desk.processes()}
        found = [pid for pid in lines if MASTER not in lines[pid]]
        hops = [pid for pid in found if "-W" in lines[pid]]
        return found if len(hops) > len(lines) - len(found) else [pid for pid in found if pid not in hops]

    try:
        rig.wait_until(lambda: not left(), 5, "the end of all that was launched")
    except AssertionError as error:
        raise AssertionError("{}: {}".format(error, [rig.command_line(pid) for pid in left()])) from None


def server_of(request, machine):
    """For a fixture: what has the machine's server started again with lines of its own. It has its defaults again
    after the test."""

    def start(*lines):
        machine.restart_server(*lines)
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

    :param values: for each name in ``tunnel`` the expression of another value
    """
    end = frontend.FrontEnd(role)
    desk.front_ends.append(end)
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); import tunnel; {}; sys.exit(tunnel.main({}))"
    kind = "'tunnel_sub', tunnel.COMPUTE" if role == "compute" else ""
    code = script.format("; ".join("tunnel.{} = {}".format(*each) for each in values.items()), kind)
    host, kernel = options.pop("host", machine.destination), options.pop("kernel", machine.slow_classic)
    command = [sys.executable, "-c", code, str(desk.folder)] + list(arguments) + [host, kernel]
    return end.launch(command=command, environment=desk.environment(machine, **options.pop("env", {})))


def key_lines(machine, key=True):
    """The lines with which ssh logs in on ``machine``, with its key or without any."""
    if key:
        return list(machine.client_lines)
    lines = [line for line in machine.client_lines if not line.startswith("Identity")]
    return lines + ["IdentityFile none", "IdentityAgent none", "PubkeyAuthentication no"]
