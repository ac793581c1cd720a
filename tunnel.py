#!/usr/bin/env python3
"""Launch a Mathematica kernel on a remote machine, with every MathLink (WSTP) connection carried by SSH.

A front end creates a main link, runs this script with the link's name, and expects it to stay until the
kernel quits. The script starts OpenSSH's ``ssh`` (or PuTTY's ``plink``) with one forward for each port of
each link, has it run the kernel with a link name that is valid over there, and watches it to the end.

The file reads in one direction: values, parsed and checked once; plans, pure functions from values to
argument lists; the world, where things are found, started and watched; ``main``. Imports that few launches
need stay inside the functions that need them, since start-up time is a feature.
"""

import os
import sys
import time

VERSION = "1.0.0"
LOOPBACK = "127.0.0.1"
WINDOWS = os.name == "nt"

CONTROLLER, COMPUTE = "controller kernel", "compute kernel"
CLASSIC, CALLBACK = "classic", "callback"  # who listens for the preemptive and the service link

TRIES = 5  # blocks of ports, or connections that the server dropped before login
CONNECT_SECONDS = 15  # a host that does not answer is given up
LOGIN_SECONDS = 150  # so is a login: longer than servers wait for somebody to type (LoginGraceTime: 120)
ALIVE_SECONDS, ALIVE_COUNT = 15, 3  # a server that has fallen silent is noticed within 15 * (3 + 1)
VERIFY_SECONDS = 0.3  # how long a path that has not been seen to run may still turn out to be wrong
SHARED_SECONDS = 20  # how long the process behind a shared connection may take to answer
SESSION_SECONDS = 1.0  # until an old client that shares a connection and says no more is taken to have a session
HUNG_SECONDS = 3.0  # until a connection over which no session comes is given up
NEW_SECONDS = 60  # the same from its login on: what the server does for that may go on
LOST_SECONDS = 5.0  # from the main link's end to that of a kernel which has not noticed
STALL_SECONDS = 60  # how long a front end may take none of what its kernel has left behind
QUIET_SECONDS = 5  # how long nothing may come, after the kernel's end, from who still holds its connections
LATE_SECONDS = 5.0  # how long the client may go on once nothing of ours is left
KNOWN_SECONDS = 2.0  # the same where the kernel's exit code is known already
KILL_SECONDS = 1.0  # from SIGTERM to SIGKILL
FRONT_END_SECONDS = 1.0  # how often to look whether there is still a front end, until its kernel connects
CALLBACK_SECONDS = 120  # a kernel that has not called back by then is noted in the log
NAMES_SECONDS = 300  # how long the switchboard looks for link names
HOLD_SECONDS = 0.2  # how long it holds the beginning of what may become a link name
CERTAIN_SECONDS = 2.0  # the same where the length before it says that there is more to come
SMALL = 4096  # bytes; a peer that writes less at once, and again, may be waiting for the first to be acknowledged
LOG_BYTES = 1 << 20  # of what a client, a server or a kernel says, how much goes into the log
RELAY_SECONDS = 60  # until a relay that has been sent has to answer
VIA_LENGTH = 4096  # of a command, in characters
PATH_LENGTH = 4096  # of a kernel's path: more no system takes
RELAY_MINUTES = 60  # how long a relay's kernels wait for a lost connection to come back
SHARE_SECONDS = 60  # how long a shared connection outlives its last kernel
# Prompts that are no attempt at a login: what is not answered is passed over, or refused on this machine.
HARMLESS = (
    "Enter passphrase for ",
    "Enter PIN for ",
    "The authenticity of host ",
    "Are you sure ",
    "Confirm ",
    "Please type ",
)
PREFIXED = (8, 5)  # from here on OpenSSH says who asks, when a server asks
SAYS_SESSION = (8, 5)  # and at the latest from here on that a session over a shared connection stands
ENDING = ("SIGTERM", "SIGINT", "SIGHUP")  # signals that ask a launch to end
TOO_MANY_FILES = (23, 24)  # ENFILE, EMFILE
NO_ROOM = (28, 122, 69)  # ENOSPC, EDQUOT on Linux and macOS

# What makes ssh ask without a terminal.
ASKING = ("DISPLAY", "WAYLAND_DISPLAY", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE")
DEFECT = "a defect of tunnel stopped the launch{}; TUNNEL_DEBUG=1 logs where"
TOO_SHORT = "link name {} is too short to be replaced: left alone; create links with -LinkHost 127.0.0.1"
FAREWELLS = ("Connection to ", "Shared connection to ")  # the rest is "closed."; ssh's own, on stderr
SAYS_NOTHING = FAREWELLS + ("debug1: ", "OpenSSH_", "Killed by signal ")  # a jump host's client is as verbose
NO_REASON = ("Authenticated to ", "Forwarded port opened", "Warning: Permanently added ")  # for a client's end
QUOTED_LENGTH = 200  # of what somebody else has said, how much goes into a line
BY_SIGNAL = "by a signal (out of memory?)"
REFUSED_TERMINAL = "PTY allocation request failed"  # as the client of a shared connection has it on stderr
NO_TERMINAL = "the server allows no terminal: a computing kernel may outlive the connection"
EXPOSED = (
    "this server opens the forwarded ports to its whole network (GatewayPorts yes in its sshd_config), and only"
    " it can change that; --relay forwards none"
)

EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE = 2, 69, 70

USAGE = """\
usage: {script}.py [options] [user[:password]@]host[:port] kernel_path link_name

Launches a Mathematica {role} on a remote machine, its links carried by SSH.

  -o NAME=VALUE   an OpenSSH option, as for ssh; wins over the built-in ones
  --client NAME   ssh or plink, or the path of one (else TUNNEL_SSH, else what the system has)
  --links KIND    auto, classic (up to 11.0) or callback (11.1 and later)
  --share         one login for many compute kernels on a host (tunnel_sub, OpenSSH)
  --relay[=MIN]   carry the links through a relay on the kernel machine: no forwarded ports, and the kernel waits
                  MIN minutes (60) for a connection that is lost to come back
  --via COMMAND   run the kernel through COMMAND there, such as "srun -n1 -u -c 8"; implies --relay
  --dry-run       print the command line and the ports, without secrets, and do nothing
  --check         with host and kernel_path: launch, report each step, stop the kernel
  --version, --help

Logs: Logs/YYYY-MM-DD beside this script. Manual: MANUAL.md.
"""


class Fatal(Exception):
    """What a user is told when a launch cannot go on; caught in ``main`` only.

    :param text: one line: what was tried, what happened, what to try next
    :param code: the exit code
    """

    def __init__(self, text, code=EX_USAGE):
        super().__init__(text)
        self.text, self.code = text, code


# ---------------------------------------------------------------------------------------------- values


def has_control_characters(text):
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


def parse_number(text):
    """An integer from one to five decimal digits, and nothing else; None for any other text."""
    digits = 1 <= len(text) <= 5 and all(character in "0123456789" for character in text)
    return int(text) if digits else None


def parse_port(text):
    """A TCP port from its decimal digits; None when ``text`` is none from 1 to 65535."""
    number = parse_number(text)
    return number if number and number <= 65535 else None


class Destination:
    """Where to log in: ``user``, ``password``, ``host`` and ``port``; None for what was not given.

    The host is kept as written, since it may be an alias from ``~/.ssh/config``.
    """

    __slots__ = ("user", "password", "host", "port")

    def __init__(self, user, password, host, port):
        self.user, self.password, self.host, self.port = user, password, host, port

    def __str__(self):
        login = "{}{}@".format(self.user, ":***" if self.password else "") if self.user else ""
        host = "[{}]".format(self.host) if ":" in self.host and self.port else self.host
        return login + host + (":{}".format(self.port) if self.port else "")

    @classmethod
    def parse(cls, text):
        """Take ``[user[:password]@]host[:port]`` apart, the form that the shell scripts took.

        The host begins after the last ``@`` and the password after the first ``:``, so a password may hold
        both. IPv6 addresses stand in brackets when a port follows. Messages never repeat the text: a
        mistyped destination has its password anywhere.

        :raises Fatal: the text has not that form, or its host could be taken for an option
        """
        expected = "expected [user[:password]@]host[:port]"
        login, at, place = text.rpartition("@")
        user, _, password = login.partition(":")
        if place.startswith("["):
            host, bracket, rest = place[1:].partition("]")
            if not bracket or ":" not in host or (rest and not rest.startswith(":")):
                raise Fatal("host: an IPv6 address stands in brackets, as in [::1]:22; " + expected)
            port = rest[1:] if rest else None
        elif place.count(":") == 1:
            host, _, port = place.partition(":")
        else:
            host, port = place, None
        if at and not user:
            raise Fatal("host: the user before '@' is empty; " + expected)
        if not host:
            raise Fatal("host: the host is empty; " + expected)
        for part in (user, host):
            if part.startswith("-") or has_control_characters(part) or part != "".join(part.split()):
                raise Fatal("host: user and host hold no blanks and begin with no '-'; " + expected)
        if has_control_characters(password):
            raise Fatal("host: the password holds a control character; " + expected)
        number = None if port is None else parse_port(port)
        if port is not None and number is None:
            raise Fatal("host: the port is not a number from 1 to 65535; " + expected)
        return cls(user or None, password or None, host, number)


class LinkName:
    """The name of a TCPIP link: the port for data, the port for urgent messages, a host for each."""

    __slots__ = ("data_port", "data_host", "message_port", "message_host")

    def __init__(self, data_port, data_host, message_port, message_host):
        self.data_port, self.data_host = data_port, data_host
        self.message_port, self.message_host = message_port, message_host

    def __str__(self):
        return "{}@{},{}@{}".format(self.data_port, self.data_host, self.message_port, self.message_host)

    @property
    def ends(self):
        """Where its two channels lead: host and port for data, the same for messages."""
        return (self.data_host, self.data_port), (self.message_host, self.message_port)

    @classmethod
    def parse(cls, text):
        """Parse ``PORT@HOST,PORT@HOST``, as MathLink writes it; hosts are IPv4, IPv6 or names.

        :raises Fatal: the text has not that form
        """
        parts = text.split(",")
        ends = [part.partition("@")[::2] for part in parts]
        ports = [parse_port(port) for port, _ in ends]
        hosts = [host[1:-1] if host[:1] + host[-1:] == "[]" else host for _, host in ends]
        if len(parts) != 2 or None in ports or not all(map(is_link_host, hosts)) or ports[0] == ports[1]:
            raise Fatal(
                "link_name: expected PORT@HOST,PORT@HOST with two ports from 1 to 65535,"
                " as in 53994@127.0.0.1,39359@127.0.0.1"
                " (a link created with -LinkProtocol TCPIP has such a name)"
            )
        return cls(ports[0], hosts[0], ports[1], hosts[1])


def is_link_host(text):
    """Whether ``text`` can be the host in a link name: an address or a name, nothing that means more."""
    plain = text.replace(".", "").replace("-", "").replace(":", "").replace("_", "").replace("%", "")
    ascii_only = all(ord(character) < 128 for character in plain)
    if ":" not in text and not all(0 < len(label) < 64 for label in text.split(".")):
        return False
    return plain.isalnum() and ascii_only and text[0] not in "-.%" and len(text) <= 255


class Forward:
    """One forwarded port: ``flag`` is ``-R`` or ``-L``, ``port`` the loopback port that listens."""

    __slots__ = ("flag", "port", "host", "to")

    def __init__(self, flag, port, host, to):
        self.flag, self.port, self.host, self.to = flag, port, host, to

    def __str__(self):
        host = "[{}]".format(self.host) if ":" in self.host else self.host
        return "{}:{}:{}:{}".format(LOOPBACK, self.port, host, self.to)


class Kernel:
    """The kernel program on the remote machine, and what its path says about it."""

    __slots__ = ("path", "version")

    def __init__(self, path):
        """:raises Fatal: the path is empty, or cannot be quoted for the remote shell"""
        if not path.strip() or has_control_characters(path):
            raise Fatal("kernel_path: expected the kernel's path on the remote machine, without line breaks")
        if len(path) > PATH_LENGTH:
            raise Fatal("kernel_path: expected at most {} characters".format(PATH_LENGTH))
        self.path = path
        self.version = version_in(path)
        if self.on_windows and ('"' in path or "%" in path):
            raise Fatal('kernel_path: a Windows path cannot hold " or %; write the directory out')

    @property
    def on_windows(self):
        drive = self.path[:1].isalpha() and self.path[1:3] in (":\\", ":/")
        return drive or self.path.startswith("\\\\")

    @property
    def switch(self):
        """``-wstp`` from version 10 on, when MathLink got its new name; ``-mathlink`` before."""
        program = self.path.replace("\\", "/").rpartition("/")[2]
        is_new = self.version >= (10,) if self.version else program.lower().startswith("wolfram")
        return "-wstp" if is_new else "-mathlink"

    @property
    def links(self):
        """Up to 11.0 the kernel listens for the second and third link; later, the front end does."""
        return CLASSIC if self.version and self.version < (11, 1) else CALLBACK

    @property
    def quoted(self):
        """The path in double quotes, which all shells and cmd.exe understand.

        What a shell would still expand inside them is written in the one way that sh, csh and fish read alike:
        between single quotes, or after a backslash outside of quotes. A leading ``~/`` or ``$HOME/`` is left
        to the remote shell, which alone can resolve it.
        """
        if self.on_windows:
            return '"{}"'.format(self.path)
        prefix, rest = '"', self.path
        for start, written in (("~/", '~/"'), ("$HOME/", '"$HOME/')):
            if self.path.startswith(start):
                prefix, rest = written, self.path[len(start) :]
        return prefix + "".join(QUOTED.get(character, character) for character in rest) + '"'


QUOTED = {"\\": '"\\\\"', "!": '"\\!"', "$": "\"'$'\"", "`": "\"'`'\"", '"': '"\'"\'"'}


def version_in(path):
    """The version that a kernel's path names, as ``(major, minor)``, or ``(major,)``; None for none.

    It is the last ``N.N`` that stands alone or after a blank, ``-`` or ``_`` in a directory's name
    (``Mathematica 10.4.app``, ``Wolfram/14.1``), else the last directory that is just a number.
    """
    found = None
    for name in path.replace("\\", "/").split("/")[:-1]:
        if name.endswith(".app"):
            name = name[: -len(".app")]
        word = name.replace("-", " ").replace("_", " ").rpartition(" ")[2]
        numbers = word.split(".")
        values = [parse_number(number) if len(number) <= 2 else None for number in numbers]
        if None in values:
            continue
        if len(values) > 1:
            found = tuple(values[:2])
        elif word == name and found is None and values[0] >= 6 and values[0] != 11:  # 11.0 and 11.1 differ
            found = (values[0],)
    return found


class Request:
    """One launch, as the command line asked for it."""

    def __init__(self, role):
        self.role, self.options, self.client, self.links = role, [], None, "auto"
        self.share = self.dry_run = self.check = False
        self.relay = None  # for how many minutes a relay keeps a lost connection's kernels; None for forwards
        self.via = None  # the command through which the relay runs the kernel
        self.destination = self.kernel = self.link = None

    @property
    def callback(self):
        """Whether the front end may create links that only a switchboard can carry."""
        return self.role is CONTROLLER and (self.kernel.links if self.links == "auto" else self.links) == CALLBACK

    @property
    def inward(self):
        """Whether the kernel may create links, as it does up to 11.0."""
        unknown = self.links == "auto" and not self.kernel.version
        return self.role is CONTROLLER and (unknown or not self.callback)

    def option(self, name):
        """The value that ``-o`` gave ``name``, else None; as for ssh, the first one wins."""
        return next((value for each, value in self.options if each.lower() == name.lower()), None)


def take_flags(request, rest):
    """Take the options from the front of ``rest``; return what follows them.

    :raises Fatal: an option is unknown, or its value is bad
    """
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            flag, equals, attached = word.partition("=")
            attached = attached if equals else None
        else:
            flag, attached = word[:2], word[2:] or None
        if flag == "--relay":
            request.relay = RELAY_MINUTES if attached is None else parse_number(attached)
        elif flag in ("-o", "--client", "--links", "--via"):
            if attached is None and not rest:
                raise Fatal("{}: a value has to follow".format(flag))
            take_value(request, flag, rest.pop(0) if attached is None else attached)
        elif flag in ("--share", "--dry-run", "--check") and attached is None:
            setattr(request, flag[2:].replace("-", "_"), True)
        else:
            name = flag if flag.replace("-", "").isalnum() else "this option"
            raise Fatal("{}: not known; --help lists the options".format(name))
        if flag == "--relay" and request.relay is None:
            raise Fatal("--relay: expected --relay or --relay=MINUTES, from 0 to 99999")
    return rest


def take_value(request, flag, value):
    """Take an option that has a value."""
    if flag == "-o":
        request.options.append(parse_option(value))
    elif flag == "--via":
        request.via = value.strip()
        if not request.via or has_control_characters(value) or len(value) > VIA_LENGTH:
            raise Fatal('--via: expected one argument, a command of one line, as in --via "srun -n1 -u"')
    elif flag == "--client":
        request.client = value
        if not value or has_control_characters(value):
            raise Fatal("--client: expected ssh, plink, or the path of one")
    else:
        request.links = value
        if value not in ("auto", CLASSIC, CALLBACK):
            raise Fatal("--links: expected auto, classic or callback")


def parse_arguments(role, argv):
    """Parse the command line.

    :param argv: the arguments, without the program
    :returns: a :class:`Request`
    :raises Fatal: an argument is bad; the text names it
    """
    request = Request(role)
    rest = take_flags(request, list(argv))
    names = ["host", "kernel_path"] + ([] if request.check else ["link_name"])
    if request.check and len(rest) == 3:
        names.append("link_name")  # an existing configuration with --check put in front: not needed
    if len(rest) != len(names):
        missing = names[len(rest)] + " is missing" if len(rest) < len(names) else "too many arguments"
        raise Fatal("{}; expected: {}".format(missing, " ".join(names)))
    request.destination = Destination.parse(rest[0])
    request.kernel = Kernel(rest[1])
    if request.via and request.relay is None:
        request.relay = RELAY_MINUTES
    if request.relay is not None and request.kernel.on_windows:
        text = "{}: needs sh and Python 3 on the kernel machine, and this is a Windows path; leave it out"
        raise Fatal(text.format("--via" if request.via else "--relay"))
    if len(rest) == 3:
        request.link = LinkName.parse(rest[2])
    return request


def parse_option(text):
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name.isalnum() or not value or has_control_characters(value):
        raise Fatal("-o: expected NAME=VALUE, as in -o Compression=no")
    return name, value


# ----------------------------------------------------------------------------------------------- plans


class Plan:
    """What one try at a launch forwards and runs.

    ``link`` is the main link as the kernel sees it, ``forwards`` all forwards in the order in which the
    shell scripts gave them, ``pairs`` the remote ports for links that the front end creates, ``command``
    the remote command line.
    """

    def __init__(self, request, settings, relays):
        """:param relays: where the launcher listens in place of the front end: for the main link's channels, then
        for those of further links; empty for what the shell scripts would have forwarded
        """
        data, message = settings.ports
        base = max(settings.ports)
        self.link = LinkName(data, LOOPBACK, message, LOOPBACK)
        ends = [(LOOPBACK, relay) for relay in relays[:2]] or request.link.ends
        self.forwards = [Forward("-R", port, *end) for port, end in zip(settings.ports, ends)]
        if request.role is CONTROLLER:
            self.forwards += [Forward("-L", base + n, LOOPBACK, base + n) for n in (1, 2, 3, 4)]
        ports = [base + n for n in (5, 6, 7, 8)] if request.callback else []
        self.pairs = list(zip(ports[::2], ports[1::2]))
        self.forwards += [
            Forward("-R", port, LOOPBACK, relay) for port, relay in zip(ports, relays[2:] or (0,) * 4)
        ]
        # For the remote shell, which takes only the path apart.
        self.command = " ".join([request.kernel.quoted] + kernel_words(request.kernel, request.role, self.link))
        if settings.guarded:
            # A server that allows no terminal runs the kernel all the same, while ssh gives up: it would be
            # run a second time. Where that is not known yet, the server is asked first.
            self.command = "test -t 0 && " + self.command

    @property
    def forward_words(self):
        """The forwards as arguments; OpenSSH and plink take the same."""
        return [word for forward in self.forwards for word in (forward.flag, str(forward))]


def kernel_words(kernel, role, link):
    """What the kernel is called with; the words are those of the shell scripts."""
    words = [kernel.switch, "-LinkMode", "Connect", "-LinkProtocol", "TCPIP", "-LinkName", str(link)]
    own = "-initfile tunnel.m -lmverbose" if role is CONTROLLER else "-lmverbose -subkernel -noinit"
    return words + own.split() + ["-remotelaunch"]


def first_ports(request):
    """The main link's remote ports for the first try: the local ones, unless the block does not fit."""
    ports = (request.link.data_port, request.link.message_port)
    span = 0 if request.role is COMPUTE else 8 if request.callback else 4
    return ports if max(ports) + span <= 65535 else draw_ports()


def draw_ports():
    """Another block: drawn from 10000 to 32759, below every system's ephemeral ports (Linux: 32768 up,
    IANA: 49152 up). Blocks start at multiples of ten, so that two never overlap in part."""
    base = 10000 + 10 * (int.from_bytes(os.urandom(4), "big") % 2276)
    return base, base + 1


class Settings:
    """How one try is made. Never changed; :meth:`but` makes others."""

    __slots__ = (
        "ports",  # data and message port of the main link on the kernel machine; None: another block
        "block",  # how many blocks of ports have been tried with this one
        "drops",  # how many tries a server, or a shared connection, has turned away before this one
        "share",  # the control socket of a connection that launches share; empty: one that has to be found first
        "terminal",  # whether the kernel gets one, so that the server hangs up on it
        "guarded",  # whether it is only run where that is granted
        "forced",  # whether the user insists on one
        "separate",  # whether ssh's own words come through a pipe of their own
        "lenient",  # whether forwards may fail, since one of the user's configuration does
        "modern",  # whether ssh has the options of OpenSSH 8.7
        "any_family",  # whether the configuration's AddressFamily is overruled
        "asks",  # whether there may be somebody whom ssh can ask
        "own",  # whether a connection that the user shares is passed over
    )

    def __init__(self, ports, **others):
        self.ports, self.block, self.drops, self.share = ports, 1, 0, None
        self.terminal = self.modern = self.asks = True
        self.guarded = self.forced = self.own = self.separate = self.lenient = self.any_family = False
        for name, value in others.items():
            setattr(self, name, value)

    def __repr__(self):
        return "Settings({})".format(", ".join("{}={!r}".format(n, getattr(self, n)) for n in self.__slots__))

    def but(self, **changes):
        """A copy, changed."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return Settings(**dict(values, **changes))


# The stages of a try. What a line means depends on when it comes.
SILENT, ANSWERED, LOGGED_IN, STARTED = range(4)


class Form:
    """A line as a client prints it, ``*`` for what differs; a line is matched as a whole.

    Not regular expressions: importing ``re`` would cost each launch more than all that is matched here.
    """

    __slots__ = ("first", "middle", "last", "event", "stages")

    def __init__(self, text, event, stages=(SILENT, ANSWERED, LOGGED_IN, STARTED)):
        """:param event: what the line means
        :param stages: those in which it does
        """
        self.first, *self.middle = text.split("*")
        self.last = self.middle.pop() if self.middle else None
        self.event, self.stages = event, stages

    def match(self, line):
        """What stands for each ``*``; None where the line has another form."""
        if not line.startswith(self.first):
            return None
        if self.last is None:
            return [] if line == self.first else None
        position, end, found = len(self.first), len(line) - len(self.last), []
        if end < position or not line.endswith(self.last):
            return None
        for text in self.middle:
            at = line.find(text, position, end)
            if at < 0:
                return None
            found.append(line[position:at])
            position = at + len(text)
        return found + [line[position:end]]


def event_in(forms, line, stage):
    """What a client's line means.

    :returns: the event and what stands for each ``*`` of its form; None for a line that has none
    """
    for form in forms:
        if stage in form.stages:
            words = form.match(line)
            if words is not None:
                return form.event, words
    return None


BEFORE_LOGIN, BEFORE_START = (SILENT, ANSWERED), (SILENT, ANSWERED, LOGGED_IN)


class OpenSSH:
    """How to say it to OpenSSH 7.6 and later, and what its ``-v`` says back."""

    kind = "ssh"
    failure = 255  # its exit code when it is ssh that failed

    # Lines of the client, read in the sources of OpenSSH 7.6 to 10 (ssh.c, sshconnect.c, sshconnect2.c,
    # clientloop.c, channels.c, nchan.c, mux.c, kex.c, misc.c).
    forms = (
        Form("OpenSSH_*", "version", (SILENT,)),
        Form("debug1: OpenSSH_*", "version", (SILENT,)),  # since 10.0
        Form("debug1: Connecting to * port *.", "name", (SILENT,)),
        Form("debug1: Executing proxy command: *", "proxy", (SILENT,)),
        Form("debug1: Executing proxy dialer command: *", "proxy", (SILENT,)),
        Form("debug1: Server host key: *", "host key", BEFORE_LOGIN),
        Form("debug1: Server host certificate: *", "host key", BEFORE_LOGIN),
        Form("debug1: Authentication succeeded (*).", "login", BEFORE_LOGIN),
        Form("Authenticated to *.", "login", BEFORE_LOGIN),
        Form('Authenticated using "*" with partial success.', "first step", BEFORE_LOGIN),
        Form("Authenticated with partial success.", "first step", BEFORE_LOGIN),  # up to 8.4
        Form("kex_exchange_identification: Connection closed by remote host", "dropped", (SILENT,)),
        Form("kex_exchange_identification: read: *", "dropped", (SILENT,)),
        Form("ssh_exchange_identification: Connection closed by remote host", "dropped", (SILENT,)),
        Form("ssh_exchange_identification: read: *", "dropped", (SILENT,)),
        Form("command-line: line 0: Bad configuration option: *", "bad option", (SILENT,)),
        Form("Couldn't open logfile *", "no log", (SILENT,)),
        # A connection that is shared.
        Form("debug1: mux_client_request_session: master session id: *", "session", BEFORE_START),
        Form("debug1: Requesting forwarding of *", "shared", (SILENT,)),
        Form("mux_client_request_session: session request failed: *", "full", BEFORE_START),
        Form("Control socket connect(*): *", "stale", (SILENT,)),
        Form('debug1: Control socket "*" does not exist', "stale", (SILENT,)),
        Form("muxclient: master * failed", "stale", BEFORE_START),
        Form("mux_client_request_session: read from master failed: *", "stale", BEFORE_START),
        Form("mux_client_forward: write packet: *", "stale", BEFORE_START),
        Form("mux_client_forward: forwarding request failed: *", "mux forward", BEFORE_START),
        # Forwards.
        Form("Error: remote port forwarding failed for listen port *", "port", BEFORE_START),
        Form("Warning: remote port forwarding failed for listen port *", "port", BEFORE_START),
        Form("channel_setup_fwd_listener_tcpip: cannot listen to port: *", "port", BEFORE_START),
        Form("Error: remote port forwarding failed for listen path *", "foreign forward", BEFORE_START),
        Form("Warning: remote port forwarding failed for listen path *", "foreign forward", BEFORE_START),
        Form("unix_listener: *", "foreign forward", BEFORE_START),
        Form("Could not request local forwarding.", "foreign forward", BEFORE_START),  # after what it was
        Form("channel_setup_fwd_listener_tcpip: getaddrinfo(127.0.0.1): *", "family", BEFORE_START),
        Form("connect_to 127.0.0.1: unknown host (*)", "family"),
        Form("debug1: Remote: Server has disabled port forwarding.", "no forwarding", BEFORE_START),
        Form(
            'debug1: Remote: Forwarding listen address "*" overridden by server GatewayPorts',
            "exposed",
            BEFORE_START,
        ),
        # The session.
        Form("debug1: Sending command: *", "session", (LOGGED_IN,)),
        Form("PTY allocation request failed on channel *", "no terminal"),
        Form("channel *: open failed: administratively prohibited: *", "no session", (LOGGED_IN,)),
        Form("channel *: open failed: connect failed: open failed", "no session", (LOGGED_IN,)),
        Form("channel *: open failed: administratively prohibited: *", "no opening", (STARTED,)),
        Form("debug1: client_input_channel_req: channel * rtype exit-status reply *", "ended", (STARTED,)),
        Form("debug1: client_input_channel_req: channel * rtype exit-signal reply *", "signal", (STARTED,)),
        Form("debug1: Exit status *", "status", (STARTED,)),
    )
    # The same for what stands on stderr besides: a jump host's client, before the session.
    aside_forms = (
        Form("*@*: Permission denied (*).", "refused", BEFORE_LOGIN),
        Form("Permission denied (*).", "refused", BEFORE_LOGIN),
        Form("stdio forwarding failed", "jump failed", BEFORE_LOGIN),
        Form("Host key verification failed.", "jump failed", BEFORE_LOGIN),
    )
    # Options that came with 8.7; an older ssh says so, and is asked again without.
    modern = (
        ("SessionType", "default"),
        ("ForkAfterAuthentication", "no"),
        ("StdinNull", "no"),
        ("LogVerbose", "none"),
    )

    @classmethod
    def read(cls, line, stage, aside=False):
        """The event in a line, as :func:`event_in`.

        :param aside: whether it came through stderr, where servers, jump hosts and kernels speak too
        """
        found = event_in(cls.aside_forms, line, stage)
        if found and not any(set(" ()") & set(word) for word in found[1]):
            return found
        return None if aside else event_in(cls.forms, line, stage)

    @classmethod
    def check(cls, request):
        """:raises Fatal: an ``-o`` that would take away what a launch needs"""
        for name, _ in request.options:
            if name.lower() in ("remotecommand", "sessiontype", "forkafterauthentication", "clearallforwardings"):
                raise Fatal("-o {}: not with a launch; leave it out".format(name))

    @classmethod
    def defaults(cls, request, settings):
        """Options that stand after the user's own ``-o``, so that those win."""
        values = [
            # Known keys are checked. `no` would accept a changed one, and then refuse all forwards.
            ("StrictHostKeyChecking", "accept-new"),
            # A kernel whose tunnel does not stand must not start; but a forward of the user's own
            # configuration is not part of it.
            ("ExitOnForwardFailure", "no" if settings.lenient else "yes"),
            ("ClearAllForwardings", "no" if request.relay is None else "yes"),  # with "yes" ours would go too
            ("ConnectTimeout", str(CONNECT_SECONDS)),
            ("ServerAliveInterval", str(ALIVE_SECONDS)),
            ("ServerAliveCountMax", str(ALIVE_COUNT)),
            # A connection that the user shares already is used, but none is left behind.
            ("ControlMaster", "no"),
            ("RemoteCommand", "none"),
            # With a terminal the server hangs up on the kernel when the connection ends. Without one a
            # computing kernel stays, and keeps its licence.
            ("RequestTTY", "force" if settings.terminal and request.relay is None else "no"),
            ("ForwardAgent", "yes"),
            ("ForwardX11", "no"),  # a kernel shows no windows, and many servers refuse
            ("Tunnel", "no"),  # the same for a network device
            ("Compression", "yes" if request.role is CONTROLLER else "no"),
            ("NumberOfPasswordPrompts", "1"),  # whoever is wrong three times is soon shut out
        ]
        values += cls.modern if settings.modern else ()
        values += [("AddressFamily", "any")] if settings.any_family else []
        if request.destination.password:
            values += [("BatchMode", "no")]
        elif not settings.asks:
            values += [("BatchMode", "yes")]  # ssh would send an empty password
        return values

    @classmethod
    def login(cls, request, settings, extra=()):
        """The arguments that say where and how to log in: options, user, port, host.

        :param extra: options that come even before the user's
        """
        share = [("ControlPath", settings.share or "none")] if settings.share or settings.own else []
        options = share + list(extra) + request.options + cls.defaults(request, settings)
        return cls.words(options, request.destination) + [request.destination.host]

    @staticmethod
    def words(options, there):
        """Options, then user and port of the destination ``there``, as arguments."""
        arguments = []
        for name, value in options:
            arguments += ["-o", "{}={}".format(name, value)]
        arguments += ["-l", there.user] if there.user else []
        arguments += ["-p", str(there.port)] if there.port else []
        return arguments

    @classmethod
    def arguments(cls, request, plan, settings, log=None):
        """The client's arguments, all but its own name.

        :param log: the file that takes its own words; without one they come with the server's and the kernel's
        """
        flags = ["-v"] + (["-E", log] if log else [])
        if settings.share:
            # Over a connection that has been made, never one of its own should that be full or gone.
            flags += ["-o", "ProxyCommand=false"] + (["-F", os.devnull] if settings.lenient else [])
        return flags + plan.forward_words + cls.login(request, settings) + [plan.command]


class Plink:
    """How to say it to PuTTY's plink, and what its ``-v`` says back."""

    kind = "plink"
    failure = 1

    # Lines of its event log, read in the sources of PuTTY 0.70 to 0.83.
    forms = (
        Form("Connecting to *", "name", (SILENT,)),
        Form("Starting local proxy command: *", "proxy", (SILENT,)),
        Form("ssh-*", "host key", (SILENT,)),
        Form("ecdsa-sha2-*", "host key", (SILENT,)),
        Form("Access granted", "login", BEFORE_LOGIN),
        Form("Further authentication required", "first step", BEFORE_LOGIN),
        Form("Started a shell/command", "session", (LOGGED_IN,)),
        Form("Server refused to allocate pty", "told no terminal", (LOGGED_IN,)),
        Form("Forwarded connection refused by remote: Administratively prohibited*", "no opening", (STARTED,)),
        Form("Session sent command exit status *", "status", (STARTED,)),
        Form("Server sent command exit status *", "status", (STARTED,)),  # up to 0.70
        Form("Session exited on *", "signal", (STARTED,)),
        Form("Server exited on signal *", "signal", (STARTED,)),
        Form("Main session channel closed", "ended", (STARTED,)),
        Form("Remote port forwarding from *:* refused*", "port", BEFORE_START),
        Form("Local port *:* forwarding to * failed: *", "port", BEFORE_START),
        Form("Local IPv4 port *:* forwarding to * failed: *", "port", BEFORE_START),
        Form("Remote debug message: Server has disabled port forwarding.", "no forwarding", BEFORE_START),
        Form(
            'Remote debug message: Forwarding listen address "*" overridden by server GatewayPorts',
            "exposed",
            BEFORE_START,
        ),
        Form('plink: unknown option "-pwfile"', "old plink", (SILENT,)),
        Form("FATAL ERROR: Cannot answer interactive prompts in batch mode", "refused", BEFORE_LOGIN),
        Form("FATAL ERROR: Configured password was not accepted", "refused", BEFORE_LOGIN),
        Form("FATAL ERROR: No supported authentication methods available (*)", "refused", BEFORE_LOGIN),
        Form("Remote side unexpectedly closed network connection", "dropped", (SILENT,)),
        Form("FATAL ERROR: Server unexpectedly closed network connection", "dropped", (SILENT,)),
        Form("FATAL ERROR: Remote side unexpectedly closed network connection", "dropped", (SILENT,)),
        Form("FATAL ERROR: Network error: Connection reset by peer", "dropped", (SILENT,)),
        Form("FATAL ERROR: Connection reset by peer", "dropped", (SILENT,)),
    )

    # The options of OpenSSH that plink has in its own words: flag for a value, or flag for yes and no.
    translated = {"port": "-P", "user": "-l", "identityfile": "-i"}
    switches = {"compression": ("-C", None), "forwardagent": ("-A", "-a")}

    @classmethod
    def read(cls, line, stage, aside=False):
        """The event in a line, as :func:`event_in`; plink has one stream for all that it says."""
        return event_in(cls.forms, line, stage)

    @classmethod
    def check(cls, request):
        """:raises Fatal: an ``-o`` that plink has no word for, or no such value"""
        for name, value in request.options:
            if name.lower() not in cls.translated and name.lower() not in cls.switches:
                known = "Compression, ForwardAgent, Port, User and IdentityFile"
                raise Fatal("-o {}: plink has no such option; it takes {}".format(name, known))
            if name.lower() in cls.switches and value.lower() not in ("yes", "no"):
                raise Fatal("-o {}: expected yes or no".format(name))
            if name.lower() == "port" and parse_port(value) is None:
                raise Fatal("-o Port: expected a number from 1 to 65535")
            if value.startswith("-"):
                raise Fatal("-o {}: a value for plink cannot begin with '-'".format(name))

    @classmethod
    def arguments(cls, request, plan, program, password=()):
        """The client's arguments, all but its own name.

        :param program: its path, which tells Quest's build; that one can accept an unknown host key by itself
        :param password: the arguments that hand over the password
        """
        there = request.destination
        # -batch: without it an unanswered prompt ends with exit code 0. -t: as RequestTTY for OpenSSH.
        # Compression costs plink more than it can gain, so it takes an option to have it.
        arguments = ["-batch", "-v", "-ssh", "-x", "-t" if request.relay is None else "-T"]
        arguments += ["-auto_store_key_in_cache"] if "quest" in program.lower() else []
        for name, (yes, no) in sorted(cls.switches.items()):
            chosen = (request.option(name) or ("yes" if name == "forwardagent" else "no")).lower()
            flag = yes if chosen == "yes" else no
            arguments += [flag] if flag else []
        for name, value in (("port", there.port), ("user", there.user), ("identityfile", None)):
            chosen = request.option(name) or value
            arguments += [cls.translated[name], str(chosen)] if chosen else []
        return arguments + plan.forward_words + list(password) + [there.host, plan.command]


def client_environment(environ):
    """A copy of ``environ`` for the client: Mathematica's own libraries, which a Linux front end puts on
    ``LD_LIBRARY_PATH`` and whose libcrypto breaks ssh, are taken out; nothing else is."""
    environment = dict(environ)
    paths = environment.pop("LD_LIBRARY_PATH", "").split(":")
    kept = [path for path in paths if "SystemFiles/Libraries" not in path]
    if any(kept):
        environment["LD_LIBRARY_PATH"] = ":".join(kept)
    return environment


def is_password_prompt(prompt, user, host, alone, prefixed=True):
    """Whether ssh asks for the password of this very login, and for nothing else.

    :param user: whom ssh logs in
    :param host: the host as ssh knows it, aliases resolved
    :param alone: whether no jump host could be the one that asks
    :param prefixed: whether this ssh is known to say who asks

    OpenSSH writes ``user@host's password: `` for password authentication, cut to 30 and 128 characters
    (sshconnect2.c), and puts ``(user@host) `` before what the server asks for keyboard-interactive, since
    8.5. Where that prefix may be missing, any server could ask in these words: then it is only trusted when
    nobody else can ask.
    """
    prompt = prompt.strip()
    if prompt == "{}@{}'s password:".format(user[:30], host[:128]):
        return alone or prefixed
    prefix = "({}@{}) ".format(user, host)
    if prompt.startswith(prefix):
        prompt = prompt[len(prefix) :]
    elif not alone:
        return False
    asked = prompt.strip().lower()
    forms = ("password:", "password for {0}:", "{0}'s password:", "password for {0}@{1}:", "{0}@{1}'s password:")
    return asked in [form.format(user, host).lower() for form in forms]


def loopback_of(length):
    """127.0.0.1 written with ``length`` characters, zero-padded or shortened as inet_aton(3) reads it.

    :returns: the text, or None where it takes more characters
    """
    for head in ("127.0.0.", "127.0.", "127."):
        if length > len(head):
            return head + "1".zfill(length - len(head))
    return None


def rewritten(name, ports):
    """A link name with other ports, on the loopback, each of its two parts as long as before.

    :param name: the text of a link name
    :returns: the text, or None where a part is too short
    """
    parts = []
    for part, port in zip(name.split(","), ports):
        host = loopback_of(len(part) - len(str(port)) - 1)
        if host is None:
            return None
        parts.append("{}@{}".format(port, host))
    return ",".join(parts)


class Names:
    """What the two sides are told for each other's link names. Pure: no sockets, no clock.

    :param main: the texts that name the main link itself; they stay as they are
    :param pairs: the ports that take the place of those in the first names, in this order
    """

    def __init__(self, main, pairs):
        self.main, self.pairs = tuple(main), list(pairs)
        self.given = {}  # name: what is told for it
        self.short = []  # names that were too short to be replaced

    def replace(self, text):
        """What is told for a link name; None for one that has to stay as it is."""
        if text in self.main or text in self.given or self.finished:
            return self.given.get(text)
        told = rewritten(text, self.pairs[len(self.given)])
        if told is None:
            self.short += [] if text in self.short else [text]
            return None
        self.given[text] = told
        return told

    def target(self, position):
        """Where the link leads whose channel came in at one of the ports.

        :param position: the port's place among all of the pairs
        :returns: host and port; None when nobody has been told that port yet
        """
        names = list(self.given)
        if position // 2 >= len(names):
            return None
        return LinkName.parse(names[position // 2]).ends[position % 2]

    @property
    def finished(self):
        """Whether no name can be replaced any more."""
        return len(self.given) == len(self.pairs)


class NameReplacer:
    """Replaces link names in a stream of bytes, one chunk after the other, at equal length.

    :param replace: called with the text of a link name, returns what to put there, or None

    Strings travel in the data channel as ``~``, their length, their bytes: below 64 the length is one byte
    0x40 + n, from there on decimal digits and a blank (measured, WSTP revision 48). A string whose length is told
    is a name as a whole or not at all. The beginning of what may become a name is held back: where a length
    stands before it, if that fits; where none does, as with a library that writes strings in another way, unless
    it follows a blank, a colon or a letter, which leaves the numbers of the greeting alone.
    """

    LONGEST = 2 * (5 + 1 + 255) + 1  # bytes of a name
    HISTORY = 1024  # how far back is looked for the string in which a text stands

    start = None  # the first of the patterns

    def __init__(self, replace):
        self.replace = replace
        self.held = b""
        self.before = b""  # the bytes that went on last
        self.prepare()

    @classmethod
    def prepare(cls):
        """Make the patterns, unless that has been done: it takes some milliseconds that nobody should wait for."""
        if cls.start:
            return
        import re

        host = rb"[0-9A-Za-z.:_%-]"
        end = rb"\d{1,5}@" + host + rb"{1,255}"
        # The byte before may be a length or a quote; with a digit, a dot or a comma it is no beginning.
        start = rb"(?<![0-9.,])"
        cls.start = re.compile(start + rb"\d{1,5}@")
        cls.whole = re.compile(end + rb"," + end)
        cls.alone = re.compile(cls.whole.pattern + rb"(?=[^0-9A-Za-z.:_%@,-])")
        # The beginning of a name, or a name of which it is not certain that it ends here.
        part = host + rb"{0,255}"
        cls.beginning = re.compile(start + rb"\d{1,5}(@" + part + rb"(,(\d{1,5}(@" + part + rb")?)?)?)?\Z")
        cls.mark = re.compile(rb"~(?:[@-\x7f]|\d{2,9} )")

    @property
    def is_certain(self):
        """Whether what is held is the beginning of a string of which more has to come."""
        return bool(self.held) and length_before(self.before, len(self.before)) is not None

    def feed(self, data):
        """Take the next bytes; return those that can go on. The rest waits for more, or for :meth:`flush`."""
        first = len(self.before)
        data = self.before + self.held + bytes(data)
        done, position = [], first
        found = self.start.search(data, first) if b"@" in data else None
        while found:
            text = self._name_at(data, found.start())
            if text:
                done += [data[position : found.start()], self._told(text)]
                position = found.start() + len(text)
            found = self.start.search(data, max(found.end(), position))
        # No beginning lies further back than a name is long.
        tail = self.beginning.search(data, max(position, len(data) - self.LONGEST))
        end = tail.start() if tail and self._may_go_on(data, tail.start()) else len(data)
        self.held = data[end:]
        return self._passed(b"".join(done) + data[position:end])

    def flush(self):
        """Return the bytes that were held."""
        data, self.held = self.held, b""
        return self._passed(data)

    def _passed(self, data):
        self.before = (self.before + data)[-self.HISTORY :]
        return data

    def _name_at(self, data, position):
        """The name that stands in ``data`` at ``position``; None for none, or for one that is not all there."""
        length = length_before(data, position)
        if length is not None:
            text = data[position : position + length]
            return text if len(text) == length and self.whole.fullmatch(text) else None
        match = self.alone.match(data, position)
        return match.group() if match and not self._within(data, position) else None

    def _within(self, data, position):
        """Whether ``position`` lies within a string whose length is told."""
        marks = self.mark.finditer(data, max(0, position - self.HISTORY), position)
        return any(mark.end() + length_before(data, mark.end()) > position for mark in marks)

    def _may_go_on(self, data, position):
        """Whether the beginning of a name that ``data`` ends with may become a whole one."""
        text, length = data[position:], length_before(data, position)
        if length is not None:
            return len(text) + missing(text) <= length <= self.LONGEST and len(text) < length
        ordinary = data[position - 1 : position].isalpha() or data[position - 1 : position] in (b" ", b":")
        return (len(text) > 3 or not ordinary) and not self._within(data, position)

    def _told(self, name):
        text = name.decode("ascii")
        try:
            LinkName.parse(text)
        except Fatal:
            return name
        return (self.replace(text) or text).encode("ascii")


def missing(beginning):
    """How many bytes the beginning of a link name lacks at least."""
    one, comma, other = beginning.partition(b",")
    # Of a digit, an @, a host.
    has = [bool(part) + (b"@" in part) + bool(part.partition(b"@")[2]) for part in (one, other)]
    return 7 - sum(has) - len(comma)


def length_before(data, position):
    """The length that stands before a string in the data channel; None where none does."""
    if position >= 2 and data[position - 2] == 0x7E and 0x40 <= data[position - 1] < 0x80:
        return data[position - 1] - 0x40
    if position >= 4 and data[position - 1] == 0x20:
        digits = data[max(0, position - 11) : position - 1].rpartition(b"~")
        if digits[1] and digits[2].isdigit():
            return int(digits[2])
    return None


# ----------------------------------------------------------------------------------- tries: facts, verdicts

# What may come between a try and a kernel that runs. Of several the one that stands first here counts: what
# it says is the more certain.
OBSTACLES = ("refused", "jump failed", "asked")
OBSTACLES += ("no session", "no forwarding", "no opening", "old plink", "no log", "bad option")
OBSTACLES += ("held", "port", "foreign forward", "family")
OBSTACLES += ("no terminal", "guard", "stale", "lost", "full", "dropped")
# With these a client ends by itself.
ENDS_ITSELF = ("refused", "jump failed", "old plink", "no log", "bad option", "dropped")


class Facts:
    """What one try has found out: data only."""

    def __init__(self):
        self.stage = SILENT
        self.connected = False  # the kernel has
        self.ended = False  # the kernel has
        self.status = None  # the kernel's exit code
        self.code = None  # the client's
        self.shared = False  # the client shares a connection that was there
        self.proxy = False  # others may speak before the server does
        self.tried = False  # the client has begun to connect
        self.reached = False  # the server itself has spoken
        self.exposed = False  # the server opens the forwarded ports to its network
        self.half = None  # the line that says that a login needs more than the step which was accepted
        self.signal = False  # a signal has ended the kernel
        self.version = (0,)  # OpenSSH's
        self.obstacle = self.evidence = None  # one of OBSTACLES, and the line that says so
        self.stopped_by = None  # why the try was ended: the first reason
        self.killed = False  # whether the client was, so that its code means nothing
        self.said, self.notes = [], []  # the client's messages and debug notes: the last ones of each
        self.aside, self.printed = [], []  # what servers and jump hosts said; what the kernel printed

    def meet(self, obstacle, evidence):
        """Note an obstacle, unless a more certain one is known."""
        if self.obstacle is None or OBSTACLES.index(obstacle) < OBSTACLES.index(self.obstacle):
            self.obstacle, self.evidence = obstacle, evidence

    @property
    def on_the_way(self):
        """Whether nobody has spoken yet but who stands between here and the server."""
        return self.proxy and not self.reached

    @property
    def told(self):
        """What servers and jump hosts have said; plink marks that."""
        return self.aside + [line[2:] for line in self.said if line.startswith("| ")]

    @property
    def kernel_ended(self):
        """Whether the kernel's end ended the launch. A client that shares a connection tells by its code, which
        is 255 when the connection is lost."""
        over_shared = self.shared and self.stage == STARTED and not self.killed
        return self.ended or (over_shared and self.code not in (None, 255))

    @property
    def kernel_code(self):
        """The kernel's exit code; None when it is not known, as of a client that had to be ended. One that ended
        by itself with another code than it had told has lost the connection, and maybe data, after that."""
        if self.code is not None and not self.killed and self.kernel_ended:
            return self.code
        return self.status


STAGE_AFTER = {
    "proxy": ANSWERED,
    "host key": ANSWERED,
    "login": LOGGED_IN,
    "shared": LOGGED_IN,
    "session": STARTED,
}


def note(facts, settings, plan, event, words, line):
    """Take an event of the client's into ``facts``.

    :param plan: says which ports are the launch's own
    """
    facts.stage = max(facts.stage, STAGE_AFTER.get(event, SILENT))
    facts.tried = facts.tried or event in ("name", "proxy")
    arrived = event == "host key" or facts.stage >= LOGGED_IN
    facts.reached = facts.reached or arrived
    if arrived and facts.obstacle in ("refused", "jump failed", "dropped"):
        facts.obstacle = facts.evidence = None  # said by somebody else
    if event in ("ended", "proxy", "exposed"):
        setattr(facts, event, True)
    elif event == "first step":
        facts.half = line
    elif event == "signal":
        facts.ended = facts.signal = True
    elif event == "status":
        number = parse_number(words[0])  # ssh writes -1 where it has heard of none
        facts.status, facts.ended = number, facts.ended or number is not None
    elif event == "version":
        facts.version = version_of_openssh(words[0])
    elif event == "shared":
        facts.shared = True
    obstacle = obstacle_in(settings, plan, event, words)
    if obstacle and not facts.connected:
        facts.meet(obstacle, line)


def obstacle_in(settings, plan, event, words):
    """The obstacle that an event is for a try with these settings; None for none."""
    if event in ("port", "mux forward"):
        text = words[event == "port" and len(words) > 2] if words else ""
        number = parse_port(text.rpartition(" ")[2].rstrip("."))
        names_ours = event == "mux forward" and settings.share  # so where it names none, it is none of ours
        ours = any(forward.port == number for forward in plan.forwards) or (number is None and not names_ours)
        event = "port" if ours else "foreign forward"
    applies = {
        "foreign forward": not settings.lenient,
        "stale": settings.share,
        "no opening": not plan.pairs and any(forward.flag == "-L" for forward in plan.forwards),
        "bad option": words and words[0].lower() in [name.lower() for name, _ in OpenSSH.modern],
    }
    return event if event in OBSTACLES and applies.get(event, True) else None


def version_of_openssh(text):
    """``9.2p1 Debian-2, ...`` as ``(9, 2)``; ``(0,)`` where it says something else."""
    major, _, rest = text.partition(".")
    numbers = parse_number(major), parse_number(rest[:1])
    return (0,) if None in numbers else numbers


class Next:
    """Another try: its settings, how long to wait before it (seconds), and why, for the log."""

    __slots__ = ("settings", "why", "pause")

    def __init__(self, settings, why, pause=0.0):
        self.settings, self.why, self.pause = settings, why, pause


def after(facts, settings):
    """What follows a try.

    :returns: a :class:`Next`, whose ports are None for another block; None when the launch is over
    """
    over = facts.kernel_ended and facts.obstacle not in ("no terminal", "guard")
    if over or facts.obstacle not in RULES or facts.stopped_by not in (None, "obstacle"):
        return None
    why, rule = RULES[facts.obstacle]
    changes = rule(settings)
    pause = 0.2 * 2**settings.drops if facts.obstacle == "dropped" else 0.0
    return Next(settings.but(**changes), why, pause) if changes else None


# Rules: functions from the settings of a try to what changes for the next one; None where none follows.


def once(name, value, **more):
    """A rule that changes one setting, and ``more`` with it, if that has not been done before."""
    return lambda settings: None if getattr(settings, name) == value else dict(more, **{name: value})


def another_block(settings):
    return {"ports": None, "block": settings.block + 1} if settings.block < TRIES else None


def try_again_later(settings):
    """The server closes connections before a login when too many wait for one."""
    return {"drops": settings.drops + 1} if settings.drops < TRIES - 1 else None


def another_connection(settings):
    """A shared one again, but for the last try."""
    share = "" if settings.drops < TRIES - 1 else None
    return {"share": share, "drops": settings.drops + 1} if settings.drops < TRIES else None


def no_terminal(settings):
    """Without one, and on other ports: the server may have run the kernel all the same, and that must not get the
    links."""
    return None if settings.forced else once("terminal", False, guarded=False, ports=None)(settings)


def any_family(settings):
    """The address family counts where a forward leads to, which is the shared connection where there is one."""
    return once("any_family", True, share=settings.share and "")(settings)


def full(settings):
    """A connection takes no further session: one of ours, or one of the user's."""
    return another_connection(settings) if settings.share else once("own", True)(settings)


RULES = {
    "no log": ("this ssh cannot write where it is told", once("separate", False)),
    "bad option": ("this ssh is older than OpenSSH 8.7", once("modern", False)),
    "held": ("a port that the kernel would listen on is in use on its machine", another_block),
    "port": ("forwards were refused", another_block),
    "foreign forward": ("a forward of the ssh configuration failed: without regard to it", once("lenient", True)),
    "family": ("AddressFamily of the ssh configuration leaves out 127.0.0.1: any", any_family),
    "no terminal": (NO_TERMINAL, no_terminal),
    "guard": (
        "the login has no terminal at its standard input: the kernel is run without a look",
        once("guarded", False),
    ),
    "stale": ("the shared connection is gone", another_connection),
    "lost": ("the shared connection that has just been made is gone: without one", once("share", None)),
    "full": ("the shared connection takes no further kernel, or does not answer", full),
    "dropped": ("the server closed the connection before the login", try_again_later),
}


UNANSWERED = (
    "{host} did not answer{seconds}{each}",
    "check the name, the port, firewalls and VPN; -o ConnectTimeout=60 waits longer",
)
CHECK_LOGIN = "check user, password and keys (password-less login needs a key that the server knows): {by_hand}"

# What a client says when a launch fails (a regular expression that its whole message has to match), what that
# means, and what to try next. The first that is found counts, so the more specific stand first.
DIAGNOSES = (
    (
        r"@\s+WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!\s+@|WARNING - POTENTIAL SECURITY BREACH!"
        r"|(?:\S+ h|H)ost key for \S+ has changed and you have requested strict checking\."
        r"|(?:FATAL ERROR: )?Host key (?:not|did not appear) in manually configured list",
        "the host key of {host} has changed: this may be another machine, or an attack",
        "if the change is known to be right, remove the old key with"
        " `ssh-keygen -R {host}` (PuTTY: connect once with putty) and try again",
    ),
    (
        r"The (?:server's )?host key is not cached.*|No \S+ host key is known for \S+ and .*"
        r"|(?:FATAL ERROR: )?Cannot confirm a host key in batch mode",
        "the host key of {host} is unknown{fingerprint}",
        "check it, then accept it once by hand: {by_hand}",
    ),
    (
        r".*host key.* is marked as revoked.*|.* host key for .* was revoked .*",
        "the host key of {host} has been revoked here (known_hosts)",
        "ask who runs that machine: this may be an attack",
    ),
    (
        r"Host key verification failed\.",
        "the host key of {host} was refused",
        "connect once by hand: {by_hand}",
    ),
    (
        r"(?:\S+: Could not resolve host\S* \S+: |(?:FATAL ERROR: )?Unable to open connection: ?)?"
        r"(?:Temporary failure in name resolution|This is usually a temporary error during hostname resolution.*"
        r"|Non-recoverable failure in name resolution)",
        "the name {host} could not be looked up",
        "no name server answers: check the network and VPN",
    ),
    (
        r"bind \S+: .*|getifaddrs: .*",
        "this machine lacks the address from which ssh is to connect ({found})",
        "connect the VPN that has it, or take BindAddress out of ~/.ssh/config",
    ),
    (
        r"\S+: Could not resolve host.*"
        r"|(?:FATAL ERROR: |\S+: )?(?:Unable to open connection:.*)?[Hh]ost does not exist"
        r"|(?:Unable to open connection: ?)?(?:Name or service not known|nodename nor servname.*"
        r"|No address associated with hostname|Host not found)",
        "no machine named {host} is known here",
        "check the name, or its Host entry in ~/.ssh/config",
    ),
    (
        r"command-line:? line 0: unsupported option \"accept-new\".*|.*Bad configuration option: remotecommand",
        "this ssh is older than OpenSSH 7.6",
        "install a newer one and name it with --client or TUNNEL_SSH",
    ),
    (
        r'plink: unknown option "-pwfile"',
        "this plink is older than 0.77, and would need the password in its arguments, where all can read it",
        "install a newer PuTTY, or log in with a key",
    ),
    (
        r"\S+ line \d+: (?:[Bb]ad|[Uu]nsupported|[Mm]issing|[Gg]arbage|[Ii]nvalid|no argument|extra arguments) .*"
        r"|Bad owner or permissions on .*|plink: (?:unknown )?option .*|command-line:? line 0: .*"
        r"|.*: terminating, \d+ bad configuration options",
        "the client rejected its options",
        "check -o and ~/.ssh/config: {found}",
    ),
    (
        r"ssh: connect to host \S+ port \S+: Connection refused"
        r"|FATAL ERROR: (?:Network error: )?Connection refused",
        "{host} refused the connection: no SSH server listens there",
        "check the port, and that the SSH server runs",
    ),
    (
        r"ssh: connect to host \S+ port \S+: (?:Connection|Operation) timed out"
        r"|FATAL ERROR: (?:Network error: )?Connection timed out|Connection timed out during banner exchange"
        r"|(?:banner exchange: )?Connection to \S+ port \d+(?: timed out|: Connection timed out)",
        *UNANSWERED,
    ),
    (
        r"ssh: connect to host \S+ port \S+: (?:No route to host|(?:Network|Host) is (?:unreachable|down))"
        r"|FATAL ERROR: (?:Network error: )?(?:No route to host|(?:Network|Host) is (?:unreachable|down))",
        "there is no route to {host}",
        "check the network, VPN or jump host",
    ),
    (
        r"Received disconnect from \S+ port \d+:\d+: Too many authentication failures"
        r"|Disconnecting .*: Too many authentication failures|\"Too many authentication failures\"",
        "{host} ended the login after too many keys were offered",
        "name the right key with IdentityFile and set IdentitiesOnly=yes",
    ),
    (
        r"Unable to negotiate with .*|no matching .* found.*|(?:FATAL ERROR: )?Couldn't agree an? .*",
        "client and server share no algorithm",
        "update one of them: {found}",
    ),
    (
        r"(?:\S+@\S+: )?Permission denied \((?P<methods>[^)]*)\)\.|(?:FATAL ERROR: |Disconnected: )?No supported"
        r" authentication methods available \(server sent: (?P<sent>[^)]*)\)|Access denied"
        r"|(?:FATAL ERROR: )?(?:Configured password was not accepted"
        r"|Cannot answer interactive prompts in batch mode|Unable to authenticate)"
        r"|Disconnected: Unable to authenticate",
        "{host} refused the login{methods}",
        CHECK_LOGIN,
    ),
    (r"Permission denied, please try again\.", "{host} refused the login", CHECK_LOGIN),
    (
        r"(?:kex|ssh)_exchange_identification: (?:Connection closed by remote host|read: .*|No banner received)"
        r"|(?:FATAL ERROR: )?(?:Remote side|Server) unexpectedly closed .*"
        r"|Connection (?:closed|reset) by .*|FATAL ERROR: (?:Network error: )?Connection reset by peer",
        "{host} {closed}",
        "{advice}{aside}",
    ),
)
# The same for a connection that ended in use, wherever ssh was just then; the least specific.
LOST_DIAGNOSES = (
    (
        r"Connection to .* closed by remote host\.|client_loop: send disconnect: .*"
        r"|\w+: .*: (?:Broken pipe|Connection reset by peer)",
        "{host} {closed}",
        "{advice}{aside}",
    ),
)
DIAGNOSES += LOST_DIAGNOSES
# When a server has closed a connection, and what to do: before the key exchange, after it, and after the login.
CLOSED_WORDS = (
    {
        "closed": "closed the connection before the login",
        "advice": "it may be overloaded (MaxStartups), or refuse this machine; try again later",
    },
    {
        "closed": "closed the connection during the login",
        "advice": "it may not let this account in, or not wait as long as the login takes; ask who runs it",
    },
    {
        "closed": "closed the connection right after the login",
        "advice": "the network may have failed, or the server cannot give this account a session (ChrootDirectory,"
        " PAM); try again, or ask who runs it",
    },
)

# The same for what a server says of an account that it lets in, but not to do anything.
ACCOUNT_DIAGNOSES = (
    (
        r"(?:\| )?You are required to change your password .*|(?:WARNING: )?Your password has expired\.?"
        r"|Password expired\. .*|Password change required but no TTY available\.",
        "the password on {host} has expired",
        "log in by hand and change it: {login} ({found})",
    ),
    (
        r"(?:There were )?[Tt]oo many logins for .*",
        "{host} lets this account in no more often at the same time",
        "end what else it runs there ({found})",
    ),
)

# The same for what a jump host's client says.
JUMP_DIAGNOSES = (
    (
        r"\S+@(?P<who>\S+): Permission denied \((?P<methods>[^)]*)\)\.",
        "{who}, on the way to {host}, refused the login{methods}",
        CHECK_LOGIN,
    ),
    (
        r"channel \d+: open failed: (?:connect failed|administratively prohibited): .*|stdio forwarding failed",
        "the jump host does not reach {host} ({found})",
        "check the name, the port, and that the SSH server runs there",
    ),
)

# The same for a kernel that ended before it called back, from its exit code and what it printed: the code is
# asked first, since words can stand in a path, too.
KERNEL_CODES = {
    127: ("there is no kernel {kernel} on {host}", "check the path with: {by_hand}"),
    126: ("{kernel} on {host} cannot be executed", "check the path and its permissions with: {by_hand}"),
}
# The same for a script at the kernel's path that ends in that way itself, or that nothing here can run; the path
# stands before what it, or a shell, says of it.
SCRIPT_DIAGNOSES = (
    (
        r".*{}: (?:(?:line )?\d+: .*|.*\bbad interpreter\b.*|.*\brequired file not found)",
        "{kernel} on {host} could not start the kernel: {found}",
        "run it by hand: {by_hand}",
    ),
)
LIBRARY_DIAGNOSES = (
    (
        r"the kernel cannot be started: .*",  # says the relay
        "{found} ({kernel} on {host})",
        "what a kernel needs may have run out there: processes, open files, terminals, ports",
    ),
    (
        r".*(?:error while loading shared libraries|symbol lookup error|version `\S+' not found).*"
        r"|.*Library not loaded.*",
        "the kernel {kernel} lacks a library: {found}",
        "what sets it up for you by hand (a module, LD_LIBRARY_PATH) has to stand in the file that the login shell"
        " on {host} reads without a terminal; try: {by_hand}",
    ),
)
AMISS = r"\b(?:no|not|cannot|can't|unable|invalid|expired|denied|failed|failure|exceeded|error)\b"
LICENCE_DIAGNOSES = (
    (
        r".*\bvalid password\b.*|.*\bnot activated\b.*|.*\bactivation\b.*"
        r"|.*{0}.*\blicen[sc]e.*|.*\blicen[sc]e.*{0}.*".format(AMISS),
        "the kernel {kernel} found no licence",
        "activate it on {host}, or free a licence: {found}",
    ),
)
# Shells whose exit code does not tell (csh, cmd.exe) say it in a line that names the path.
SHELL_DIAGNOSES = (
    (r".*(?:No such file or directory|Command not found|not recognized as|cannot find).*", *KERNEL_CODES[127]),
    (r".*(?:Permission denied|cannot execute|Exec format error|is a directory)\.?", *KERNEL_CODES[126]),
)


def diagnose(table, lines, words, any_case=False):
    """Explain a failure.

    :param table: rows of pattern, meaning, advice
    :param lines: what was said
    :param words: a dict for the words in braces
    :returns: one line, or None when no row fits
    """
    import re

    flags = re.IGNORECASE if any_case else 0
    for pattern, what, advice in table:
        for line in lines:
            match = re.match("(?:{})$".format(pattern), line.strip(), flags)
            if match:
                groups = match.groupdict()
                methods = groups.get("methods") or groups.get("sent")
                key = re.search(r"(?:SHA256:|ssh-\S+ \d+ )\S+", "\n".join(lines))
                words = dict(
                    words,
                    found=line.strip(),
                    methods=" (it offers: {})".format(methods) if methods else "",
                    fingerprint=" ({})".format(key.group()) if key else "",
                    who=groups.get("who"),
                )
                return "{}; {}".format(what, advice).format(**words)
    return None


def verdict(dialect, facts, signal=None):
    """The exit code of a launch.

    :param dialect: the client's, which knows how it fails
    :param signal: the number of the signal that ended the launcher, if one did
    """
    if signal:
        return 128 + signal
    if facts.stopped_by == "checked":
        return 0
    if facts.stopped_by == "front end gone":
        return 128 + 1  # the kernel has been hung up on
    if facts.kernel_ended:
        code = facts.kernel_code
        return dialect.failure if code is None else code if code or facts.connected else 1
    return dialect.failure if facts.killed else facts.code or 1


def explain(launch, facts, settings, request=None):
    """Why a launch has failed, and what to try next: one line, from what its last try has found out.

    :param launch: for its client, and how long it has waited
    :param request: another than the launch's own
    """
    request = request or launch.request
    words = words_for(launch, facts, settings, request)
    why = explain_kernel(facts, words) or explain_connection(launch.dialect, facts, settings, words)
    return "launching {} on {}: {}".format(request.role, request.destination, why)


def words_for(launch, facts, settings, request):
    """What stands for the words in braces."""
    there, ssh = request.destination, launch.dialect is OpenSSH
    login = ["ssh" if ssh else os.path.basename(launch.program)]
    login += ["-p" if ssh else "-P", str(there.port)] if there.port else []
    login += ["-l", there.user] if there.user else []
    terminal = settings and settings.terminal and request.relay is None
    kernel = [there.host, (request.via + " " if request.via else "") + request.kernel.quoted]
    aside = last_of(facts.told) if facts.proxy or facts.reached else ""
    silent = [line for line in facts.notes if line.startswith("debug1: connect to address ")]
    addresses = sum(line.endswith(" timed out") for line in silent)
    return dict(
        CLOSED_WORDS[2 if facts.stage >= LOGGED_IN else facts.reached],
        host=there.host,
        kernel=request.kernel.path,
        login=printable_command(login + [there.host]),
        by_hand=printable_command(login + kernel),
        at_terminal=printable_command(login + (["-tt" if ssh else "-t"] if terminal else []) + kernel),
        shell="; a start-up file there may start another shell where there is a terminal: try --relay"
        if terminal
        else "",
        seconds=" within {} s".format(launch.connect_seconds) if launch.connect_seconds else "",
        each=" at each of {} addresses".format(addresses) if addresses > 1 else "",
        aside="; {}: {}".format("on the way there" if facts.on_the_way else "it said", aside) if aside else "",
    )


def last_of(lines):
    """The last line that says something; empty for none."""
    found = [line.strip() for line in lines if not line.startswith(SAYS_NOTHING)]
    return ([""] + [line for line in found if any(map(str.isalnum, line))])[-1][:QUOTED_LENGTH]


NOT_CALLED_BACK = "the kernel has not called back within {} s; run it by hand: {at_terminal}{shell}"


def explain_kernel(facts, words):
    """What became of a kernel that had been started; None where none had."""
    if facts.stopped_by == "no kernel":
        return NOT_CALLED_BACK.format(CALLBACK_SECONDS, **words)
    if facts.obstacle in EXPLAINED or facts.stage < STARTED:
        return None
    if facts.stopped_by == "links held" and facts.connected:
        return (
            "the kernel has ended; its exit code is not known, since the front end, or a process that the kernel"
            " has left behind, keeps its links open"
        )
    if not facts.kernel_ended:
        said = [line for line in facts.said if not line.startswith(NO_REASON)]
        last = (["it said nothing"] + facts.printed + said)[-1].strip()
        if not facts.killed and 128 < (facts.code or 0) < 160:
            last = "the client was ended by signal {}".format(facts.code - 128)
        return "the connection was lost ({}); the kernel is hung up on when the server notices".format(last)
    code = facts.kernel_code
    if facts.signal:
        text = "the kernel {kernel} was ended {} before it called back; run it by hand: {by_hand}"
        return text.format(BY_SIGNAL, **words)
    path = words["kernel"]  # which may hold any words
    found = diagnose(LIBRARY_DIAGNOSES, facts.printed, words, any_case=True) if code else None
    if code in KERNEL_CODES:
        found = found or diagnose(of_script(path), facts.printed[::-1], words)
        found = found or "; ".join(KERNEL_CODES[code]).format(**words)
    about = [line for line in facts.printed if path in line or "\\" in path]  # cmd.exe does not name it
    about = [line.replace(path, "") for line in about if code in (None, 1, 9009)]
    printed = [line.replace(path, "") for line in facts.printed]
    found = found or diagnose(SHELL_DIAGNOSES, about, words, any_case=True)
    found = found or diagnose(LICENCE_DIAGNOSES, printed, words, any_case=True)
    last = last_of(facts.printed)
    how = (", " + ending(facts, code) if code is not None else "") + (" ({})".format(last) if last else "")
    text = "the kernel {kernel} ended before it called back{}; run it by hand: {by_hand}"
    return found or text.format(how, **words)


def ending(facts, code):
    """How a kernel has ended, as far as that is known. A client that shares a connection hears of no signal."""
    if facts.signal:
        return BY_SIGNAL
    return "with exit code {}".format(code) + (", or " + BY_SIGNAL if facts.shared and code == 255 else "")


def of_script(path):
    """SCRIPT_DIAGNOSES for a kernel's path, of which the shell may have put the beginning in place."""
    import re

    for start in ("~", "$HOME"):
        path = path[len(start) :] if path.startswith(start + "/") else path
    return [(row[0].replace("{}", re.escape(path)),) + row[1:] for row in SCRIPT_DIAGNOSES]


SECOND_FACTOR = " a second factor log in by hand and share that connection (ControlMaster of OpenSSH)"
# What an obstacle means to which there is no further try, or why no connection was waited for any longer.
EXPLAINED = {
    "no answer": "; ".join(UNANSWERED),
    "front end gone": "the front end has closed the main link, and nothing is run for it",
    "no login": "the login on {host} did not come to an end within {limit} s; try: {by_hand}",
    "asked": "the login on {host} asks for what nobody can answer here ({evidence}); a jump host needs a key; for"
    + SECOND_FACTOR,
    "half": "the login on {host} needs a second step, which nobody has taken here ({half}); check the password, if"
    " it is that; a step that asks nothing, such as a push, needs -o BatchMode=no; for" + SECOND_FACTOR,
    "no forwarding": "the server forwards no ports; use --relay, which needs none, or set AllowTcpForwarding"
    " yes in its sshd_config; if it forwards those of others, see what it says to {login}{aside}",
    "port": "{blocks} blocks of ports were refused ({evidence}); if the server forbids forwarding, use"
    " --relay, which needs none, or set AllowTcpForwarding yes in its sshd_config{aside}",
    "held": "{blocks} blocks of ports were tried, and each had one in use on the kernel machine ({evidence})",
    "family": "AddressFamily leaves out the loopback address 127.0.0.1, where links are; take the option away",
    "no session": "the server allows no session on this connection (MaxSessions in its sshd_config)",
    "no opening": "the server lets nobody reach its loopback, where kernels up to 11.0 listen; use --relay, which"
    " needs no forwards, or set AllowTcpForwarding yes and PermitOpen any in its sshd_config",
    "no terminal": "the server allows no terminal, and the kernel was not run ({evidence})",
}


def explain_connection(dialect, facts, settings, words):
    """Why no kernel was started."""
    if facts.reached and facts.obstacle in (None, "no forwarding", "port"):
        found = diagnose(ACCOUNT_DIAGNOSES, facts.told, words)
        if found:
            return found
    half = facts.half if facts.obstacle == "refused" else None
    for reason in ("half" if half else None, facts.obstacle, facts.stopped_by):
        if reason in EXPLAINED:
            values = dict(words, blocks=settings.block, limit=LOGIN_SECONDS, half=half)
            return EXPLAINED[reason].format(evidence=(facts.evidence or "").strip(), **values)
    on_the_way = facts.on_the_way
    said = facts.said + (facts.aside if on_the_way or not facts.said else [])
    notes = [line.partition("debug1: ")[2] for line in facts.notes if " line " not in line]
    found = diagnose(JUMP_DIAGNOSES, facts.aside, words) if on_the_way else None
    found = found or diagnose(DIAGNOSES, said, words)
    if facts.obstacle == "refused":  # the client may have been ended before it could say so
        found = found or "{host} refused the login; ".format(**words) + CHECK_LOGIN.format(**words)
    found = found or diagnose(DIAGNOSES, notes, words)
    said = facts.printed + [line for line in said if not line.startswith(NO_REASON)]
    if facts.stage == LOGGED_IN and not (said or facts.killed):
        found = found or "{host} {closed}; {advice}".format(**words)
    last = (["it said nothing"] + said)[-1].strip()
    text = "{} failed with exit code {}: {}; try: {by_hand}"
    return found or text.format(dialect.kind, facts.code, last, **words)


# ----------------------------------------------------------------------------------------------- world


def visible(text):
    """A text without anything that a terminal would act upon: what others have said goes through here on its way
    to a terminal, a log or an error line.

    :returns: the text, in which a tab is a blank, line breaks stay, and every other character that has no glyph
        (control characters, marks that turn the direction of writing, line separators, bytes that are no UTF-8)
        is written as an escape
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else escaped(each) for each in text)


def escaped(character):
    """A character that has no glyph, in letters and digits; a byte that was no UTF-8 as that byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    form = "\\x{:02x}" if code < 0x100 else "\\u{:04x}" if code < 0x10000 else "\\U{:08x}"
    return " " if character == "\t" else form.format(code)


def say(text):
    """One line for whoever looks; a front end shows it to nobody."""
    put(sys.stderr, "tunnel: {}\n".format(visible(text)))


def show(text, paint=str):
    """Print what was asked for; where it has nowhere to go, that is no failure.

    :param paint: called with the text once it is safe to show, returns it in colours
    :returns: 0
    """
    encoding = sys.stdout.encoding if sys.stdout else None
    text = paint(visible(text))
    put(sys.stdout, text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8"))
    return 0


def put(stream, text):
    """Write to a standard stream, though there may be none, nobody may read it, or its disk may be full."""
    try:
        if stream:
            stream.write(text)
            stream.flush()
    except OSError:
        # What is left in the buffer must not fail again when Python ends, which would exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def find_client(name, environ):
    """Find the SSH client.

    :param name: ``--client``, or None
    :returns: its path and its class, :class:`OpenSSH` or :class:`Plink`
    :raises Fatal: there is none (exit code 69)
    """
    wanted = name or environ.get("TUNNEL_SSH")
    if wanted:
        places = [wanted] if os.path.dirname(wanted) else which_places(wanted, environ)
    elif WINDOWS:
        places = windows_places(environ)
    else:
        places = which_places("ssh", environ)
    for place in places:
        if os.path.isfile(place) and os.access(place, os.X_OK):
            program = os.path.basename(place).lower()
            return place, Plink if program.startswith("plink") else OpenSSH
    text = "no SSH client found; looked for {}; install one, or name it with --client or TUNNEL_SSH"
    raise Fatal(text.format(", ".join(places)), EX_UNAVAILABLE)


def which_places(name, environ):
    """Where a program may lie. A front end's PATH is minimal, so the usual places come after it."""
    folders = [folder for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    if not WINDOWS:
        for folder in ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin", "/opt/local/bin"):
            folders += [folder] if folder not in folders else []
        return [os.path.join(folder, name) for folder in folders]
    if name == "plink":
        return windows_places(environ)[:-1]
    name = name if name.lower().endswith(".exe") else name + ".exe"
    folders.append(windows_openssh(environ))
    return [os.path.join(folder, name) for folder in folders]


def windows_places(environ):
    """plink where the batch scripts looked, Quest's build first; on PATH; then Windows' own ssh."""
    join = os.path.join
    roots = [environ.get(name) for name in ("ProgramFiles", "ProgramFiles(x86)")]
    roots = [root for root in roots if root] or ["C:\\Program Files", "C:\\Program Files (x86)"]
    places = [join(root, "Quest Software", "PuTTY", "plinkw.exe") for root in roots]
    places += [join(root, "Quest Software", "PuTTY", "plink.exe") for root in roots]
    places += [join(root, "PuTTY", "plink.exe") for root in roots]
    places += [join(folder, "plink.exe") for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    return places + [join(windows_openssh(environ), "ssh.exe")]


def windows_openssh(environ):
    return os.path.join(environ.get("SystemRoot", "C:\\Windows"), "System32", "OpenSSH")


def private_folder(environ):
    """A folder of this user's own for what is temporary; made when missing.

    :raises OSError: there is none, or somebody else's stands in its place
    """
    if WINDOWS:
        path = os.path.join(environ.get("TEMP") or environ.get("TMP") or "C:\\Temp", "tunnel")
        os.makedirs(path, exist_ok=True)
        return path
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime) and os.access(runtime, os.W_OK):
        path = os.path.join(runtime, "tunnel")
    else:
        path = os.path.join(environ.get("TMPDIR") or "/tmp", "tunnel-{}".format(os.getuid()))  # noqa: S108
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    found = os.lstat(path)
    if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:
        raise PermissionError("{} is not a private folder of this user".format(path))
    return path


class Log:
    """The log of one launch: all that a user of a front end has. Never fails once it is open.

    Each line goes out at once, since the launcher may be ended at any moment. Of what others say only so much
    is kept that no kernel and no server can fill a disk.
    """

    def __init__(self, folder, script, environ):
        self.path, self.descriptor = None, None
        self.room = {}  # who speaks: how many bytes of it there is still room for
        now = time.time()
        day = time.strftime("%Y-%m-%d", time.localtime(now))
        name = "{}_{}_{}".format(script, time.strftime("%Y-%m-%d-%H%M%S", time.localtime(now)), os.getpid())
        try:
            self._open(os.path.join(folder, "Logs"), day, name)
            return
        except OSError as error:
            reason = error.strerror
        try:
            self._open(os.path.join(private_folder(environ), "Logs"), day, name)
            say("no log can be written below {} ({}): it is {}".format(folder, reason, self.path))
        except OSError as error:
            say("no log can be written ({}; {})".format(reason, error.strerror or error))

    def _open(self, logs, day, name):
        folder = os.path.join(logs, day)
        os.makedirs(logs, 0o700, exist_ok=True)
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            if not WINDOWS and os.stat(folder).st_mode & 0o077:
                os.chmod(folder, 0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
        number, path = 1, os.path.join(folder, name + ".log")
        while self.descriptor is None:
            try:
                self.descriptor = os.open(path, flags, 0o600)
            except FileExistsError:
                number += 1
                path = os.path.join(folder, "{}_{}.log".format(name, number))
        self.path = path

    @classmethod
    def at(cls, path):
        """A log that another launch has begun."""
        log = cls.__new__(cls)
        log.path, log.room = path, {}
        try:
            log.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError:
            log.descriptor = None
        return log

    def write(self, text):
        """Write a line. A full disk ends the log, not the launch."""
        if self.descriptor is None:
            return
        line = "{} {}\n".format(time.strftime("%H:%M:%S"), visible(text))
        try:
            os.write(self.descriptor, line.encode("utf-8", "surrogateescape"))
        except OSError as error:
            self.descriptor = None
            say("the log {} ends here: {}".format(self.path, error.strerror))

    def quote(self, who, line):
        """Write a line that somebody else has said, while there is room for it."""
        room = self.room.get(who, LOG_BYTES)
        self.room[who] = room - len(line) - len(who)
        if self.room[who] > 0:
            self.write("{}: {}".format(who, line))
        elif room > 0:
            self.write("{}: ... what comes from here on is not logged".format(who))


class Loop:
    """Waits for whatever comes first: something to read, room to write, or a moment in time."""

    def __init__(self):
        import select

        self.select = select.select
        self.readers, self.writers, self.timers = {}, {}, []
        self.count = 0  # makes each timer unique, so that their actions are never compared

    def after(self, seconds, action):
        """Have ``action()`` called once, ``seconds`` from now; returns the timer, for :meth:`cancel`."""
        self.count += 1
        timer = (time.monotonic() + seconds, self.count, action)
        self.timers.append(timer)
        return timer

    def cancel(self, timer):
        if timer in self.timers:
            self.timers.remove(timer)

    def step(self):
        """Wait for the next event and handle it."""
        wait = None
        if self.timers:
            wait = max(0, min(self.timers)[0] - time.monotonic())
        writers = list(self.writers)
        # Windows tells of a connection that has failed among the exceptions.
        readable, writable, failed = self.select(list(self.readers), writers, writers if WINDOWS else (), wait)
        for ready, actions in ((writable, self.writers), (failed, self.writers), (readable, self.readers)):
            for each in ready:
                if each in actions:
                    actions[each]()
        for timer in [timer for timer in self.timers if timer[0] <= time.monotonic()]:
            if timer in self.timers:
                self.timers.remove(timer)
                timer[2]()


class Timers:
    """Timers with names, of which each runs once at a time."""

    def __init__(self, loop):
        self.loop, self.running = loop, {}

    def __contains__(self, name):
        return name in self.running

    def within(self, name, seconds, action):
        """Have ``action()`` called unless the timer is disarmed, or set again, before."""
        self.disarm(name)

        def act():
            del self.running[name]
            action()

        self.running[name] = self.loop.after(seconds, act)

    def disarm(self, *names):
        """Stop timers; without names, all."""
        for name in names or list(self.running):
            self.loop.cancel(self.running.pop(name, None))


class Lines:
    """Takes output in pieces and hands it on in lines.

    :param on_line: called with each line, without its end
    """

    def __init__(self, on_line):
        self.on_line, self.partial = on_line, b""

    def feed(self, data):
        """Hand the whole lines on; at the end of the output, which is empty data, the unfinished one too."""
        lines = (self.partial + data).split(b"\n")
        self.partial = lines.pop()[-65536:] if data else b""
        for line in lines:
            text = line.decode("utf-8", "surrogateescape").rstrip("\r")
            if text:
                self.on_line(text)


class Client:
    """The SSH client as a process in a session of its own, with its output and its end in a loop.

    A session of its own has no terminal, so no prompt waits at one; and its group holds what the client
    starts, such as a ``ProxyCommand``. Should this launcher be killed without a chance to act, a watchdog
    that holds the other end of a pipe ends the group.

    :param sinks: for ``out`` and ``err`` a function that takes their bytes, empty ones at the end
    :param inherit: descriptors that the client shall have, closed here afterwards
    :param watched: whether it needs a watchdog: not when it ends by itself
    :param line: for a client whose output and input are the caller's, as ``source`` and ``sink``: the watchdog's
        command as a function of a process id, and the last word that it says in place of the launcher
    :param afterwards: what the watchdog has to run in the end, as arguments
    """

    # By force in the end: a client may not listen, or just have been forked, its group not yet being there.
    WATCHDOG = [
        "/bin/sh",
        "-c",
        'read -r _&&exit;kill -s TERM -- "-$1";sleep 1;kill -s KILL -- "-$1";shift;"$@"',
        "tunnel-watchdog",
    ]

    def __init__(self, loop, argv, environment, sinks, inherit=(), watched=True, line=None, afterwards=()):
        self.loop, self.sinks, self.code, self.leash = loop, sinks, None, None
        self.source = self.sink = near = None
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        self.streams = {"out": out, "err": err}
        if line:
            self.source = self.streams.pop("out")
            near, self.sink = os.pipe()
        gate = os.pipe() if watched else ()
        self.pid = spawn(argv, environment, (near, out_end, err_end), inherit, gate[:1], gate[1:])
        for descriptor in (out_end, err_end) + ((near,) if line else ()) + tuple(inherit):
            os.close(descriptor)
        for name, descriptor in self.streams.items():
            os.set_blocking(descriptor, False)
            loop.readers[descriptor] = lambda name=name: self._read(name)
        if watched:
            leash, self.leash = os.pipe()
            command, word = line or (lambda pid: self.WATCHDOG + [str(pid)] + list(afterwards), b"")
            os.write(self.leash, word)
            unneeded = (self.leash,) + gate  # which would leave no room for others where few may be open
            spawn(command(self.pid), {"PATH": "/usr/bin:/bin"}, (leash, self.sink, None), unneeded=unneeded)
            os.write(gate[1], b"\n")
            for descriptor in (leash,) + gate:
                os.close(descriptor)

    def _read(self, name):
        descriptor = self.streams[name]
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.sinks[name](data)
        if not data:
            self.loop.readers.pop(descriptor, None)
        return bool(data)

    def poll(self):
        """Whether the client has ended; then ``code`` is its exit code, 128+n after signal n."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
                self._close()
        return self.code is not None

    def reap(self):
        """End the client by force and wait for its end, which is immediate."""
        if not self.poll():
            self.end(force=True)
            os.waitpid(self.pid, 0)
            self.code = 128 + 9
            self._close()

    def _close(self):
        for name, descriptor in self.streams.items():
            # Not to the end of the file: what the client started may hold the pipe longer than it lives.
            for _ in range(1000):
                if not self._read(name):
                    break
            self.loop.readers.pop(descriptor, None)
            os.close(descriptor)
        for descriptor in (self.source, self.sink):
            if descriptor is not None:
                os.close(descriptor)
        if self.leash is not None:
            try:
                os.write(self.leash, b"\n")  # no need to bite
            except OSError:
                pass  # somebody has ended the watchdog
            os.close(self.leash)

    def end(self, force=False):
        """End the client and what it started: at once, or, where it does not listen, by force."""
        import _signal

        try:
            os.killpg(self.pid, _signal.SIGKILL if force else _signal.SIGTERM)
        except OSError:
            pass


def fork():
    """:func:`os.fork`; that there are too many processes is no defect.

    :raises Fatal: there are
    """
    try:
        return os.fork()
    except OSError as error:
        text = "no further process can be started ({}): raise the limit (ulimit -u)"
        raise Fatal(text.format(error.strerror), EX_UNAVAILABLE) from None


def spawn(argv, environment, streams, inherit=(), gate=(), unneeded=()):
    """Start a program in a session of its own; ``subprocess`` alone would cost more than all else here.

    :param streams: descriptors for input, output, errors; None for nothing
    :param gate: a descriptor from which a byte has to come first: if this process dies before, nothing is started
    :param unneeded: descriptors that the program is not to wait with
    :returns: the process id
    """
    import _signal  # without its enumerations, which cost each launch 4 ms

    pid = fork()
    if pid:
        return pid
    try:
        os.setsid()
        _signal.set_wakeup_fd(-1)
        ready = False
        for name in ("SIGPIPE", "SIGXFSZ") + ENDING:
            number = getattr(_signal, name)
            # What Python ignores the program would go on ignoring; what this process handles would be lost.
            if name not in ENDING or callable(_signal.getsignal(number)):
                _signal.signal(number, _signal.SIG_DFL)
        for descriptor in unneeded:
            os.close(descriptor)
        if gate and not os.read(gate[0], 1):
            os._exit(127)
        null = os.open(os.devnull, os.O_RDWR)
        for number, descriptor in enumerate(streams):
            os.dup2(null if descriptor is None else descriptor, number)
        ready = True
        for descriptor in inherit:
            os.set_inheritable(descriptor, True)
        os.execve(argv[0], argv, environment)
    except OSError as error:
        if ready:  # else this would go to the caller's standard error
            os.write(2, "cannot run {}: {}\n".format(argv[0], error.strerror).encode("utf-8", "replace"))
    finally:
        os._exit(127)


class WindowsClient:
    """:class:`Client` on Windows, where only sockets can be waited for: threads copy the pipes to them."""

    def __init__(self, loop, argv, environment, sinks, inherit=(), watched=True, line=None, afterwards=()):
        import subprocess

        self.loop, self.sinks, self.code = loop, sinks, None
        self.source = self.sink = None
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if line else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            creationflags=0x08000000,  # CREATE_NO_WINDOW
        )
        self.pumps = []
        for name, pipe in (("out", self.process.stdout), ("err", self.process.stderr)):
            near = in_thread(
                lambda far, pipe=pipe: copy(lambda: os.read(pipe.fileno(), 65536), far.sendall, pipe, far)
            )
            if name == "out" and line:
                self.source = near
                continue
            self.pumps.append(near)
            loop.readers[near] = lambda name=name, near=near: self._read(name, near)
        if line:
            pipe = self.process.stdin
            self.sink = in_thread(
                lambda far: copy(lambda: far.recv(65536), lambda data: write_all(pipe, data), far, pipe)
            )

    def _read(self, name, near):
        data = near.recv(65536)
        self.sinks[name](data)
        if not data:
            del self.loop.readers[near]
            near.close()
            self.pumps.remove(near)

    def poll(self):
        if self.code is None and not self.pumps:  # the pipes are at their end
            self.code = self.process.wait()
            for each in (self.source, self.sink):
                if each:
                    each.close()
        return self.code is not None

    def end(self, force=False):
        self.process.terminate()


CLIENT = WindowsClient if WINDOWS else Client


def in_thread(work):
    """A socket whose other end is handed to ``work``, in a thread."""
    import socket
    import threading

    near, far = socket.socketpair()
    threading.Thread(target=work, args=(far,), daemon=True).start()
    return near


def copy(read, write, *closed):
    """Hand on what is read until its end, then close what is named."""
    try:
        for data in iter(read, b""):
            write(data)
    except OSError:
        pass  # the other side has gone
    for each in closed:
        each.close()


def write_all(pipe, data):
    pipe.write(data)
    pipe.flush()


def catch_signals(loop, on_signal):
    """Have ``on_signal(number)`` called for what asks this process to end, and ``loop`` wake up for it and for the
    end of any child. It is the loop that calls it: a handler could come in the middle of anything.

    :returns: what has to be kept for as long as that shall go on
    """
    import _signal

    if WINDOWS:
        from socket import socketpair
    else:
        from _socket import socketpair

        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        # Who has started this may have blocked them, as programs with threads do.
        blocked = [getattr(_signal, name) for name in ENDING]
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, blocked + [_signal.SIGCHLD])
    near, far = socketpair()
    near.setblocking(False)
    far.setblocking(False)
    pending = []

    def wake():
        near.recv(512)
        while pending:
            on_signal(pending.pop(0))

    _signal.set_wakeup_fd(far.fileno())
    loop.readers[near] = wake
    for name in ENDING + ("SIGBREAK",):
        number = getattr(_signal, name, None)
        if number is None or (name == "SIGHUP" and _signal.getsignal(number) == _signal.SIG_IGN):
            continue  # nohup means it
        _signal.signal(number, lambda number, _: pending.append(number))
    return near, far


def join_windows_job():
    """Put this process, and so all that it starts, into a job that ends with it, however it ends.

    Source: CreateJobObject and JOBOBJECT_EXTENDED_LIMIT_INFORMATION in Microsoft's documentation of
    kernel32; 144 and 112 are its sizes in a 64-bit and a 32-bit process.

    :returns: the job's handle, which has to stay open; None where Windows refuses
    """
    import ctypes

    kernel32 = ctypes.windll.kernel32
    kernel32.CreateJobObjectW.restype = kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    wide = ctypes.sizeof(ctypes.c_void_p) == 8
    limits = (ctypes.c_byte * (144 if wide else 112))()
    ctypes.c_uint32.from_buffer(limits, 16).value = 0x2000  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
    job = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
    done = kernel32.SetInformationJobObject(job, 9, limits, len(limits))
    this = ctypes.c_void_p(kernel32.GetCurrentProcess())
    return job if done and kernel32.AssignProcessToJobObject(job, this) else None


def is_deserted(host, port):
    """Whether nobody listens any more on a port of this machine, as far as can be told without a connection."""
    import _socket

    if host != "localhost" and host.strip("0123456789.:abcdefABCDEF"):
        return False  # a name that would have to be looked up
    probe = _socket.socket(_socket.AF_INET6 if ":" in host else _socket.AF_INET)
    try:
        if WINDOWS:  # where one address and all of them are no conflict otherwise
            probe.setsockopt(_socket.SOL_SOCKET, _socket.SO_EXCLUSIVEADDRUSE, 1)
        probe.bind((host, port))
    except OSError:
        return False  # somebody does, or it is another machine's
    finally:
        probe.close()
    return True


def watch_front_end(timers, link, gone, first=FRONT_END_SECONDS):
    """Look for the front end while nothing connects to it, which would tell that it has gone.

    :param timers: :class:`Timers`, of which ``front end`` has to be disarmed when the kernel connects
    :param gone: called once when nobody listens any more where the front end waits for the main link
    :param first: seconds until the first look
    """

    def look():
        if is_deserted(link.data_host, link.data_port):
            gone()
        else:
            timers.within("front end", FRONT_END_SECONDS, look)

    timers.within("front end", first, look)


def listen(path=None, backlog=5):
    """A socket that listens on a port of the loopback which the system chooses.

    :param path: that of a Unix socket instead
    :param backlog: how many may wait to be accepted
    """
    import _socket  # without what socket adds to it, which costs each launch 7 ms

    listener = _socket.socket(_socket.AF_UNIX if path else _socket.AF_INET)
    listener.bind(path or (LOOPBACK, 0))
    listener.listen(backlog)
    listener.setblocking(False)  # who has knocked may have gone before accept() looks
    return listener


def accept(listener, log=None):
    """The next connection; None when it has gone again, or is another user's.

    :param log: where it is noted that another user was turned away; without one whoever connects is let in
    """
    import _socket

    try:
        descriptor, _ = listener._accept()
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise  # it would be there again at once
        return None
    connection = _socket.socket(listener.family, listener.type, listener.proto, descriptor)
    user = None if log is None else peer_user(connection)
    if user is not None and user not in (os.getuid(), 0):
        who = "another user (number {})".format(user) if user >= 0 else "a process that has gone already"
        log.write("a connection from {} was turned away".format(who))
        connection.close()
        return None
    connection.setblocking(False)
    return connection


def dial(loop, host, port, done, seconds=5):
    """Connect without waiting for it.

    :param done: called once with the socket, or with None and why there is none
    """
    import _socket

    def attempt(addresses, reason):
        if not addresses:
            done(None, reason)
            return
        family, address = addresses[0]
        connection = None
        try:
            connection = _socket.socket(family)
            connection.setblocking(False)
            connection.connect(address)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise
            if connection:
                connection.close()
            attempt(addresses[1:], error.strerror)
            return
        timer = loop.after(seconds, lambda: settle("no answer within {} s".format(seconds)))

        def settle(late=None):
            loop.cancel(timer)
            loop.writers.pop(connection, None)
            code = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
            if late or code:
                connection.close()
                attempt(addresses[1:], late or os.strerror(code))
            else:
                done(connection, None)

        loop.writers[connection] = settle

    resolve(loop, host, port, attempt)


def resolve(loop, host, port, done):
    """The addresses of a host, without waiting for a name server.

    :param done: called with pairs of family and address, and the reason why there are none
    """
    import _socket

    def look_up(flags=0):
        found = _socket.getaddrinfo(host, port, 0, _socket.SOCK_STREAM, 0, flags)
        return [(family, address) for family, _, _, _, address in found]

    if host == "localhost":
        done([(_socket.AF_INET, (LOOPBACK, port)), (_socket.AF_INET6, ("::1", port))], None)
        return
    try:
        done(look_up(_socket.AI_NUMERICHOST), None)
        return
    except (_socket.gaierror, UnicodeError):
        pass  # a name: asking for it may take long
    answer = []

    def ask(far):
        try:
            answer.append((look_up(), None))
        except (OSError, UnicodeError) as error:
            answer.append(([], str(error)))
        far.close()

    def heard():
        del loop.readers[near]
        near.close()
        done(*answer[0])

    near = in_thread(ask)
    loop.readers[near] = heard


class SocketEnd:
    """One end of a channel: a socket. It begins paused.

    ``on_data(data)`` gets what comes in, valid during the call only; ``on_finish()`` tells that no more will,
    ``on_room()`` that all that waited has been written, ``on_close()`` that the end has broken, and
    ``on_gone()``, where somebody wants to know, that the peer has left while nothing was read.
    """

    BUFFER = memoryview(bytearray(1 << 18))

    def __init__(self, loop, connection):
        import _socket

        self.loop, self.socket = loop, connection
        self.on_data = self.on_finish = self.on_room = self.on_close = lambda *_: None
        self.on_gone = self.timer = None
        self.pending, self.finishing = b"", False
        self.deaf = False  # whether the peer takes nothing any more
        self.quick = getattr(_socket, "TCP_QUICKACK", None)  # Linux
        try:
            connection.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        except OSError:
            self.quick = None  # it has gone already, as macOS says here; reading will tell

    def resume(self):
        """Read on."""
        self.loop.readers[self.socket] = self._read

    def pause(self):
        """Read nothing for the time being, but look every second whether the peer has gone."""
        if self.loop.readers.pop(self.socket, None) and self.on_gone and not self.timer:
            self.timer = self.loop.after(1, self._look)

    def _look(self):
        self.timer = None
        if self.socket in self.loop.readers or self.socket.fileno() < 0:
            return
        if has_hung_up(self.socket):
            self.on_gone()
        else:
            self.timer = self.loop.after(1, self._look)

    def _read(self):
        try:
            count = self.socket.recv_into(self.BUFFER)
        except BlockingIOError:
            return
        except OSError:
            self.on_close()
            return
        if count:
            if count < SMALL and self.quick:
                self.socket.setsockopt(6, self.quick, 1)  # IPPROTO_TCP; holds for this once
            self.on_data(self.BUFFER[:count])
        else:
            self.loop.readers.pop(self.socket, None)
            self.on_finish()

    def write(self, data):
        """Send; what cannot be sent now waits.

        :returns: whether all has been sent; if not, ``on_room`` is called when it has
        """
        if self.pending:
            self.pending += bytes(data)
            return False
        try:
            sent = len(data) if self.deaf else self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.deaf, sent = True, len(data)  # what it has said before can still be read
        if sent == len(data):
            return True
        self.pending = bytes(data[sent:])
        self.loop.writers[self.socket] = self._write
        return False

    def _write(self):
        data, self.pending = self.pending, b""
        del self.loop.writers[self.socket]
        if self.write(data):
            if self.finishing:
                self.finish()
            self.on_room()

    def finish(self):
        """Nothing more will be written: close that direction once all has been sent."""
        import _socket

        self.finishing = True
        if not self.pending:
            try:
                self.socket.shutdown(_socket.SHUT_WR)
            except OSError:
                pass  # it has gone; reading will tell

    @property
    def left(self):
        """How many bytes the peer has not taken yet, those that the system holds for it included."""
        return len(self.pending) + (0 if self.deaf else unsent(self.socket))

    def close(self):
        self.loop.cancel(self.timer)
        self.loop.readers.pop(self.socket, None)
        self.loop.writers.pop(self.socket, None)
        self.socket.close()
        self.on_data = self.on_finish = self.on_room = self.on_close = lambda *_: None
        self.pending, self.finishing = b"", False


def unsent(connection):
    """How many bytes the system still holds for a peer (tcp(7): SIOCOUTQ); 0 where it does not tell."""
    try:
        if sys.platform == "darwin":
            return connection.getsockopt(0xFFFF, 0x1024)  # SOL_SOCKET, SO_NWRITE
        import fcntl

        return int.from_bytes(fcntl.ioctl(connection, 0x5411, b"\0\0\0\0"), sys.byteorder)
    except (OSError, ImportError):
        return 0


def has_hung_up(connection):
    """Whether the peer has closed a connection, though there may be data before that; False where no one tells."""
    import select

    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(connection, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0)) or has_closed(connection)


def has_closed(connection):
    """The same for a peer on this machine whose farewell waits behind data that nobody reads: Linux tells of its
    socket (proc(5), ``/proc/net/tcp``), which is gone or on its way out."""
    theirs, ours = peer_rows(connection)
    return ours is not None and (theirs is None or theirs[2] == b"04")  # FIN-WAIT-1


def peer_user(connection):
    """The user whose process holds the other end of a connection within this machine.

    :returns: the user's number; -1 where that process has closed its end already; None where the system does not
        tell (Windows, macOS; WSL 1, whose table is empty)
    """
    theirs, ours = peer_rows(connection)
    if ours is None:
        return None
    # Once a socket is closed Linux shows it as root's, without an inode.
    gone = theirs is None or (theirs[2] != b"01" and theirs[8] == b"0")
    return -1 if gone else int(theirs[6])


def peer_rows(connection):
    """What Linux tells of the two sockets of a connection within this machine (proc(5), ``/proc/net/tcp``).

    :returns: the words of the peer's row and of this side's, without the row's number; None for a row that is not
        there, and for both where the peer is elsewhere or the system does not tell
    """
    try:
        ends = connection.getpeername(), connection.getsockname()
    except OSError:
        return None, None
    if not ends[0][0].startswith("127."):
        return None, None
    rows = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):  # a socket of both families stands in the second
        try:
            with open(table, "rb") as stream:
                rows += [line.split()[1:] for line in stream.read().splitlines()[1:]]
        except OSError:
            pass  # no Linux, or one without that family
    theirs, ours = [
        b"%08X:%04X" % (int.from_bytes(bytes(map(int, host.split("."))), sys.byteorder), port)
        for host, port in ends
    ]
    return row_between(rows, theirs, ours), row_between(rows, ours, theirs)


def row_between(rows, one, other):
    """The row of the socket at ``one`` that is connected to ``other``; None where there is none."""
    return next((row for row in rows if row[0].endswith(one) and row[1].endswith(other)), None)


class Channel:
    """Two ends joined: bytes both ways, half-closes included. An end is read only while the other has taken
    all that came before, so memory never grows.

    :param to_kernel, to_front_end: :class:`NameReplacer` for what goes that way, or None
    :param is_main: whether it is the main link's data channel, with which a front end goes
    """

    def __init__(self, board, kernel, front_end, to_kernel=None, to_front_end=None, is_main=False):
        self.board, self.kernel, self.front_end, self.is_main = board, kernel, front_end, is_main
        self.replacers = {kernel: to_front_end, front_end: to_kernel}  # by where the bytes come from
        self.holding = {}
        self.over = set()  # the ends from which nothing more comes
        self.is_open = True
        if to_kernel or to_front_end:
            board.loop.after(NAMES_SECONDS, self._stop_looking)
        for end in (kernel, front_end):
            end.on_data = lambda data, end=end: self.data(end, data)
            end.on_finish = lambda end=end: self.finished(end)
            end.on_room = lambda end=end: self.room(end)
            end.on_close = lambda end=end: self.closed(end)
        for end in (kernel, front_end):
            if self.is_open:
                end.resume()

    def other(self, end):
        return self.front_end if end is self.kernel else self.kernel

    @property
    def delivered(self):
        """Whether the front end has all that the kernel has sent."""
        return not self.is_open or (self.kernel in self.over and not self.front_end.left)

    def data(self, end, data):
        """Bytes have come from ``end``."""
        if self.board.kernel_over and end is self.front_end:
            return  # to write them to a client that is about to close would cost what it has not handed on yet
        if self.replacers[end]:
            data = self._look(end, data)
        if data and not self.other(end).write(data):
            end.pause()
        self.board.on_moved()

    def _look(self, end, data):
        replacer = self.replacers[end]
        self.board.loop.cancel(self.holding.pop(end, None))
        data = replacer.feed(data)
        if replacer.names.finished:
            data += replacer.flush()
            self.replacers[end] = None
        elif replacer.held:
            seconds = CERTAIN_SECONDS if replacer.is_certain else HOLD_SECONDS
            self.holding[end] = self.board.loop.after(seconds, lambda: self._release(end))
        return data

    def _release(self, end):
        """What looked like a name's beginning has not gone on: the other side may be waiting for it."""
        replacer = self.replacers[end]
        held = replacer.flush() if replacer and self.is_open else b""
        if held and not self.other(end).write(held):
            end.pause()

    def _stop_looking(self):
        for end in list(self.replacers):
            self._release(end)
            self.replacers[end] = None

    def room(self, end):
        """``end`` has taken all that waited."""
        other = self.other(end)
        if other not in self.over:
            other.resume()
        self.board.on_moved()
        self._close_if_over()

    def finished(self, end):
        """Nothing more comes from ``end``."""
        self._release(end)
        if not self.is_open:
            return
        self.over.add(end)
        self.other(end).finish()
        self.board.left(self, end)
        self._close_if_over()

    def _close_if_over(self):
        if len(self.over) == 2 and not self.kernel.pending and not self.front_end.pending:
            self.close()  # what the system holds still arrives: nobody has anything to say to this any more

    def closed(self, end):
        """``end`` has broken. The other still gets what has come from it, and what it says goes nowhere."""
        if self.is_open:
            self._release(end)
            end.pause()
            end.deaf, end.pending = True, b""
            self.finished(end)

    def close(self):
        """Close both ends at once."""
        if self.is_open:
            self.is_open = False
            for end in (self.kernel, self.front_end):
                end.close()
            self.board.on_moved()


class Switchboard:
    """Joins the kernel's connections to the front end's.

    A front end of 11.1 or later tells its kernel after the launch where it listens for two further links. When
    a name goes by on the main link's data channel, the next pair of the kernel's ports takes its place, and
    who comes in there is connected to where the front end waits. What a kernel up to 11.0 tells its front
    end is treated in the same way, where ``way`` has ports for that.

    :param link: the main link, as the front end listens for it
    :param told: the same, as the kernel sees it
    :param pairs: the kernel's ports for links that the front end creates
    :param way: how connections are carried; see :class:`Forwards`
    """

    def __init__(self, loop, log, link, told, pairs, way):
        self.loop, self.log, self.link, self.way = loop, log, link, way
        main = (str(link), str(told))
        self.outward = Names(main, pairs)  # what the kernel is told
        self.inward = Names(main, way.inward_pairs)  # what the front end is told
        self.channels = []
        self.on_connected = self.on_lost = self.on_moved = lambda: None
        self.connected = self.kernel_over = False

    def arrived(self, position, end):
        """A connection has come from the kernel.

        :param position: 0 and 1 are the main link's data and message channel, then those of further links
        """
        target = self.link.ends[position] if position < 2 else self.outward.target(position - 2)
        if target is None:  # nobody has been told this port yet
            end.close()
            return
        dial(self.loop, *target, lambda *found: self._join(position, end, target, *found))

    def _join(self, position, kernel, target, connection, reason):
        if connection is None:
            self.log.write("the front end does not answer at {1}@{0}: {2}".format(*target, reason))
            kernel.close()
            return
        to_kernel = self._replacer(self.outward, "link {} of the front end is {} for the kernel", position)
        to_front_end = self._replacer(self.inward, "link {} of the kernel is {} for the front end", position)
        front_end = SocketEnd(self.loop, connection)
        if position == 0:
            front_end.on_gone = lambda: self.on_lost()
        channel = Channel(self, kernel, front_end, to_kernel, to_front_end, is_main=position == 0)
        self.channels.append(channel)
        if position == 0 and not self.connected:
            self.connected = True
            self.on_connected()

    def _replacer(self, names, text, position):
        """What replaces names in a main data channel; None for any other."""
        if position or names.finished:
            return None

        def replace(name):
            new = name not in names.given and name not in names.short
            told = names.replace(name)
            if told and new:
                self.log.write(text.format(name, told))
            elif new and name in names.short:
                self.log.write(TOO_SHORT.format(name))
            return told

        replacer = NameReplacer(replace)
        replacer.names = names
        return replacer

    def called(self, position, end):
        """The front end has connected to a port that it has been told for a link of the kernel's."""
        target = self.inward.target(position)
        if target is None:
            end.close()
            return

        def opened(kernel):
            if kernel is None:
                end.close()
            else:
                self.channels.append(Channel(self, kernel, end))

        self.way.open(*target, opened)

    def left(self, channel, end):
        """One end of a channel has finished or broken."""
        if channel.is_main and end is channel.front_end and channel.kernel not in channel.over:
            self.on_lost()
        self.on_moved()

    @property
    def delivered(self):
        """Whether the front end has all that the kernel has sent."""
        return all(channel.delivered for channel in self.channels)

    @property
    def under_way(self):
        """How many bytes the front end has not taken yet."""
        return sum(channel.front_end.left for channel in self.channels if channel.is_open)

    def close(self):
        for channel in self.channels:
            channel.close()


class Delivery:
    """Waits, after a kernel's end, until its front end has all that is left, as long as it goes on taking it.

    :param done: called once then, or when nothing moves any more
    """

    def __init__(self, loop, board, done):
        self.timers, self.board, self.done = Timers(loop), board, done
        self.under_way = 0
        board.kernel_over = True
        board.on_moved = lambda: self._look(moved=True)
        board.on_moved()

    def _look(self, moved=False):
        """Look whether the front end has all.

        :param moved: whether data has come, or a channel has closed
        """
        under_way = self.board.under_way
        if moved or under_way != self.under_way:
            self.under_way = under_way
            # Who still holds a kernel's connections, but says nothing, is no reason to wait for long.
            self.timers.within("stall", STALL_SECONDS if under_way else QUIET_SECONDS, self._give_up)
        self.timers.disarm("look")
        if self.board.delivered:
            self._end()
        elif under_way:  # what the system holds goes without a word
            self.timers.within("look", 0.05, self._look)

    def _give_up(self):
        if self.under_way:
            text = "the front end has taken nothing for {} s: {} bytes are given up"
            self.board.log.write(text.format(STALL_SECONDS, self.under_way))
        self._end()

    def _end(self):
        self.stop()
        self.done()

    def stop(self):
        """Wait no longer."""
        self.board.on_moved = lambda: None
        self.timers.disarm()


class Forwards:
    """Carries connections through ports that the client forwards: one of the ways there are.

    :param count: how many of the kernel's ports lead here
    :param inward: how many ports the front end may be told instead of the kernel's
    :param avoid: ports that somebody else is going to listen on

    ``ports`` are where the client's remote forwards have to lead, in the order of the kernel's ports;
    ``inward_pairs`` what the front end may be told.
    """

    def __init__(self, loop, log, count, inward=0, avoid=()):
        self.loop, self.log = loop, log
        found, passed_over = [], []
        while len(found) < count + inward:
            listener = listen()
            (passed_over if listener.getsockname()[1] in avoid else found).append(listener)
        for listener in passed_over:
            listener.close()
        self.kernel_side, self.front_end_side = found[:count], found[count:]
        ports = [listener.getsockname()[1] for listener in found]
        self.ports, self.inward_pairs = ports[:count], list(zip(ports[count::2], ports[count + 1 :: 2]))

    def serve(self, board):
        """Have ``board`` told who comes in, the first at each port."""
        for listeners, tell in ((self.kernel_side, board.arrived), (self.front_end_side, board.called)):
            for position, listener in enumerate(listeners):
                self.loop.readers[listener] = lambda one=listener, at=position, to=tell: self._accept(one, at, to)

    def _accept(self, listener, position, tell):
        connection = accept(listener, self.log)
        if connection is None:
            return
        end = SocketEnd(self.loop, connection)
        tell(position, end)
        if connection.fileno() >= 0:  # it was wanted: nobody else is
            self.loop.readers.pop(listener, None)
            listener.close()

    def open(self, host, port, done):
        """Connect to where a kernel listens, which the client forwards under the same number.

        :param done: called with an end, or with None
        """
        dial(self.loop, LOOPBACK, port, lambda found, _: done(found and SocketEnd(self.loop, found)))

    def close(self):
        for listener in self.kernel_side + self.front_end_side:
            self.loop.readers.pop(listener, None)
            listener.close()


class Probe:
    """Looks whether somebody listens already where the kernel is going to: ports that the client forwards.

    Who connects to such a port is cut off at once where nobody listens behind it. A port at which this does
    not happen, though it has at another, is held by somebody.

    :param held: called with such a port
    """

    PATIENCE = 1.0  # seconds that one port may take longer than the first

    def __init__(self, loop, ports, held):
        self.loop, self.held, self.timer = loop, held, None
        self.open = {}
        for port in ports:
            dial(loop, LOOPBACK, port, lambda found, _, port=port: self._dialled(port, found))

    def _dialled(self, port, connection):
        if connection is None or self.open is None:
            if connection:
                connection.close()
            return
        self.open[port] = connection
        self.loop.readers[connection] = lambda: self._read(port)

    def _read(self, port):
        connection = self.open.pop(port)
        del self.loop.readers[connection]
        try:
            answered = bool(connection.recv(1))
        except OSError:
            answered = False
        connection.close()
        if answered:
            self._found(port)
        elif self.timer is None:
            self.timer = self.loop.after(self.PATIENCE, self._compare)

    def _compare(self):
        for port in sorted(self.open or ())[:1]:
            self._found(port)

    def _found(self, port):
        self.cancel()
        self.held(port)

    def cancel(self):
        """Stop looking; harmless when that is over."""
        self.loop.cancel(self.timer)
        for connection in (self.open or {}).values():
            del self.loop.readers[connection]
            connection.close()
        self.open = None


class PasswordKeeper:
    """Answers ssh's password prompt, once, through the script itself as ``SSH_ASKPASS`` helper.

    The helper knows only where to ask and a token; the password stays in this process until the prompt
    of this very login has been shown to it. No file, argument or environment variable holds it.

    After a prompt that nobody answers ssh must not go on: it would send an empty answer, and a jump host's, which
    gets none of our options, would do so three times. So there is a keeper without a password, too.

    :param settings: those of the try, which say whom ssh logs in (``ssh -G`` tells)
    :param version: called for ssh's version
    :param on_asked: called with a prompt that ssh must not go on after, and whether it asks for the password again
    """

    def __init__(self, launch, settings, version, on_asked):
        self.launch, self.loop, self.log = launch, launch.loop, launch.log
        self.version, self.on_asked = version, on_asked
        self.password = launch.request.destination.password
        self.has_password = self.password is not None
        self.token = os.urandom(16).hex()
        self.callers, self.prompts = {}, []  # callers in the order of arrival, each with its timer
        self.held = []  # those whose ssh is being ended
        self.client, self.said, self.login = None, b"", None
        self.question = [launch.program, "-G"] + OpenSSH.login(launch.request, settings)
        self.listener = listen(backlog=128)
        self.loop.readers[self.listener] = self._accept

    def environment(self, environ):
        """``environ`` with what makes ssh ask us: ``DISPLAY`` for versions before 8.4, and
        ``SSH_ASKPASS_REQUIRE`` since then. The helper's ``env python3`` needs a ``PATH`` that has one.

        :raises Fatal: the helper cannot be executed
        """
        helper = os.environ.get("TUNNEL_DROPIN") or os.path.abspath(__file__)
        if not os.access(helper, os.X_OK):
            if not self.has_password:
                return environ
            raise Fatal("host: for a password {0} has to be executable; try: chmod +x {0}".format(helper))
        # The launcher itself goes without what is set for Python.
        environment = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
        environment["SSH_ASKPASS"] = helper
        if self.has_password:  # else a ProxyCommand may have a terminal at which it is answered
            environment["SSH_ASKPASS_REQUIRE"] = "force"
        environment["DISPLAY"] = environment.get("DISPLAY") or "tunnel:0"
        environment["PATH"] = environ.get("PATH", "/usr/bin:/bin") + ":" + os.path.dirname(sys.executable)
        environment["TUNNEL_ASKPASS"] = "{}:{}".format(self.listener.getsockname()[1], self.token)
        return environment

    def _accept(self):
        caller = accept(self.listener)
        if caller is None:
            return
        heard = [b""]
        while len(self.callers) >= 32:  # strangers, with nothing to say
            self._drop(next(iter(self.callers)))
        self.callers[caller] = self.loop.after(5, lambda: self._drop(caller))

        def read():
            try:
                more = caller.recv(4096)
            except OSError:
                more = None
            heard[0] += more or b""
            if more is None or len(heard[0]) > 65536:
                self._drop(caller)
            elif not more:
                self.loop.cancel(self.callers.pop(caller))
                del self.loop.readers[caller]
                self._heard(caller, heard[0].decode("utf-8", "replace"))

        self.loop.readers[caller] = read

    def _heard(self, caller, text):
        token, _, prompt = text.partition("\n")
        if token != self.token:
            self._drop(caller)
            return
        self.prompts.append((caller, prompt.strip()))
        if self.login or not self.has_password:
            self._ask(b"")
        elif self.client is None:  # it takes as long as the look-ups do that the configuration asks for
            sinks = {"out": self._ask, "err": lambda data: None}
            self.client = Client(self.loop, self.question, self.launch.environment, sinks, watched=False)

    def _ask(self, data):
        """ssh tells who is logging in; at the end of that, look at what is asked."""
        self.said += data
        if data:
            return
        self.login = self.login or login_in(self.said)
        prompts, self.prompts = self.prompts, []
        prefixed = self.version() >= PREFIXED
        for caller, prompt in prompts:
            shown = prompt if not has_control_characters(prompt) else repr(prompt)
            ours = self.has_password and is_password_prompt(prompt, *self.login, prefixed)
            if ours and self.password:
                self._answer(caller)
                continue
            self.log.write("asked for something else than the password, not answered: {}".format(shown))
            if prompt.startswith(HARMLESS):
                self._drop(caller)
            else:
                self.held.append(caller)
                self.on_asked(shown, ours)

    def _answer(self, caller):
        answer, self.password = self.password, None
        try:
            caller.sendall(answer.encode("utf-8", "surrogateescape") + b"\n")
            self.log.write("the password prompt has been answered")
        except OSError as error:
            self.log.write("the password helper could not be answered: {}".format(error.strerror))
        self._drop(caller)

    def _drop(self, caller):
        self.loop.readers.pop(caller, None)
        self.loop.cancel(self.callers.pop(caller, None))
        caller.close()

    def close(self):
        """Stop listening; harmless when that is over."""
        for caller in list(self.callers) + [caller for caller, _ in self.prompts] + self.held:
            self._drop(caller)
        if self.client:
            self.client.reap()
        if self.listener.fileno() >= 0:
            self.loop.readers.pop(self.listener, None)
            self.listener.close()


def login_in(text):
    """User, host and whether nobody else can ask, from what ``ssh -G`` has printed."""
    lines = text.decode("utf-8", "replace").splitlines()
    values = dict(reversed([line.partition(" ")[::2] for line in lines]))
    proxies = [values.get(name, "none") for name in ("proxyjump", "proxycommand")]
    return (
        values.get("user", ""),
        values.get("hostkeyalias") or values.get("hostname", ""),
        proxies == ["none", "none"] and bool(values.get("hostname")),  # it may have said nothing
    )


def ask_password(prompt):
    """What the script does as ssh's helper: hand the prompt to the launcher, print its answer.

    :returns: the exit code, 1 without an answer
    """
    import socket

    port, _, token = os.environ["TUNNEL_ASKPASS"].partition(":")
    answer = b""
    with socket.create_connection((LOOPBACK, int(port)), LOGIN_SECONDS) as connection:
        connection.sendall("{}\n{}".format(token, prompt).encode("utf-8", "surrogateescape"))
        connection.shutdown(socket.SHUT_WR)
        while len(answer) < 65536:
            more = connection.recv(4096)
            if not more:
                break
            answer += more
    sys.stdout.buffer.write(answer)
    return 0 if answer else 1


def can_ask(environ, program):
    """Whether ssh can ask somebody without a terminal: it needs to be told so, and a program that does it.

    :param program: ssh, into which the path of that program is compiled, in case ``SSH_ASKPASS`` names none
    """
    if not any(environ.get(name) for name in ASKING):
        return False
    path = environ.get("SSH_ASKPASS")
    if not path:
        try:
            with open(program, "rb") as stream:
                before, found, _ = stream.read().partition(b"/ssh-askpass")
        except OSError:
            return True
        path = os.fsdecode(before[-PATH_LENGTH:].replace(b" ", b"\0").rpartition(b"\0")[2] + found)
        if not found or not path.startswith("/"):
            return True  # it starts another program
    return "/" not in path or os.access(path, os.X_OK)


def memory_path(request, program, log):
    """Where this destination is remembered; None where there is no private folder, and on Windows."""
    if WINDOWS:
        return None
    import zlib

    there = request.destination
    words = [program, str(there.user), there.host, str(there.port)]
    words += ["{}={}".format(*option) for option in request.options]
    name = "{:08x}".format(zlib.crc32("\0".join(words).encode("utf-8", "surrogateescape")))
    try:
        return os.path.join(private_folder(os.environ), name)
    except OSError as error:
        log.write("nothing is remembered from launch to launch: {}".format(error))
        return None


def share_path(path):
    """Where control sockets can be: ssh takes 104 characters, adds 17 while it makes one, and reads more
    into some characters."""
    plain = not path.strip("/._-+,@=" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    if len(path) > 78 or not plain:
        path = os.path.join(private_folder({}), os.path.basename(path))
    return path


class Memory:
    """What launches to one destination tell later ones: lines of a key and a value, in a private file.

    Known keys: ``terminal`` (``yes`` or ``no``), ``kernel PATH`` (when it was last seen to run), ``died`` (how
    the last one ended that did not connect), ``room`` (how many sessions a connection takes), ``session N PID``
    (who has one on shared connection N), ``exposed`` (the ports that it forwards are open to a network),
    ``refused`` (logins need a person).
    """

    def __init__(self, path):
        """:param path: the file; None remembers nothing"""
        self.path = path

    def read(self):
        return self.change(lambda values: None)

    def change(self, alter):
        """Have ``alter(values)`` change the dict of all that is known, while nobody else does.

        :returns: the dict; empty where nothing can be remembered
        """
        values, descriptor = {}, None
        try:
            if self.path:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
                lock_soon(descriptor)
                text = os.read(descriptor, 1 << 20).decode("utf-8", "surrogateescape")
                values.update(line.rpartition("\t")[::2] for line in text.split("\n") if "\t" in line)
            before = dict(values)
            alter(values)
            if values != before and descriptor is not None:
                text = "".join("{}\t{}\n".format(*each) for each in values.items())
                os.ftruncate(descriptor, os.pwrite(descriptor, text.encode("utf-8", "surrogateescape"), 0))
        except OSError:
            if not values:
                alter(values)  # it cannot be had, or is locked for long: then this launch knows nothing
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return values

    def keep(self, key, value):
        """Remember one value; None forgets it."""

        def alter(values):
            values.pop(key, None)
            if value is not None:
                values[key] = value.replace("\t", " ").replace("\n", " ")

        self.change(alter)


def lock_soon(descriptor):
    """Lock a file that others lock for a moment only.

    :raises OSError: somebody holds it for more than a second
    """
    import fcntl

    for _ in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            time.sleep(0.05)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class SharedConnections:
    """Connections that all compute kernels of one destination share; the next is made when one is full.

    :param launch: whose kernel is to go over one
    :param memory: knows how many sessions a connection takes, and who has one
    :param path: where their control sockets are, but for a number at the end
    """

    def __init__(self, launch, memory, path):
        self.launch, self.memory, self.path = launch, memory, path
        self.settings = None  # with which this launch logs in
        self.number = None  # of the connection that is ours to use
        self.socket = None  # what stands at its control socket's path
        self.made = set()  # those that this launch has made
        self.full = set()  # those that have refused it
        self.pipe = None  # through which one speaks that this launch has made, until its kernel has connected

    def take(self, settings):
        """Find room on a connection, and make that where there is none.

        :returns: the path of its control socket; None when this launch needs a connection of its own
        :raises Fatal: the login failed, so one of its own would fail too
        """
        self.release()
        self.settings = settings
        known = self.memory.change(self._choose)
        if "refused" in known and self._users_own():
            self.release()
            return None
        path = self._path
        lock = self._lock(path)
        if lock is None:
            return None
        try:
            # Whether anybody answers there, the try itself will tell.
            self.socket = identity(path)
            if self.socket is None:
                # -f and -N say themselves what the options of 8.7 would.
                if not self._log_in(settings.but(share=path, modern=False)):
                    self.release()
                    return None
                self.made.add(self.number)
                self.socket = identity(path)
        finally:
            os.close(lock)
        return path

    @property
    def patience(self):
        """How many seconds a session on our connection may take to come."""
        age = time.time() - self.socket[1] / 1e9 if self.socket else NEW_SECONDS
        return max(HUNG_SECONDS, NEW_SECONDS - abs(age))

    @property
    def _path(self):
        return "{}-{}".format(self.path, self.number)

    def _choose(self, values):
        sessions = {}
        for key in [key for key in values if key.startswith("session ")]:
            number, _, pid = key[len("session ") :].partition(" ")
            if number.isdecimal() and pid.isdecimal() and is_running(int(pid)):
                sessions[int(number)] = sessions.get(int(number), 0) + 1
            else:
                del values[key]
        if not sessions:
            values.pop("room", None)  # it may be another server by now
        room = self._room(values) or 1 << 20
        self.number = 0
        while self.number in self.full or sessions.get(self.number, 0) >= room:
            self.number += 1
        values["session {} {}".format(self.number, os.getpid())] = "asked"

    def _lock(self, path, seconds=LOGIN_SECONDS):
        """Wait for our turn to look for, or make, the connection at ``path``. The other launch may be waiting for
        somebody to type a second factor.

        :returns: a descriptor, ours until it is closed; None where this launch has to do without
        """
        import fcntl

        try:
            lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self.launch.log.write("nothing can be shared: {}".format(error))
            return None
        end = time.monotonic() + seconds
        while not self.launch.signal:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                if time.monotonic() >= end:
                    break
                self.launch.pause(0.01)
        os.close(lock)
        if seconds and not self.launch.signal:
            self.launch.log.write("another launch has been logging in for too long: this one does without")
        return None

    def _log_in(self, settings):
        """Log in and leave a connection in the background.

        :returns: whether there is one; where the login needs a person, one that the user has made may serve
        :raises Fatal: that failed
        """
        facts, settings = self.launch.follow(settings, login=True)
        if facts.code == 0 or self.launch.signal:
            return True
        if facts.obstacle in ("asked", "refused") and self._users_own():
            self.memory.keep("refused", "yes")  # and not tried again as long as that one is there
            return False
        raise Fatal(explain(self.launch, facts, settings), verdict(self.launch.dialect, facts))

    def _users_own(self):
        """Whether there is a connection to share that the user has made."""
        found = self.launch.ask_connection("check", self.settings.but(share=None)) == 0
        if found:
            self.launch.log.write("a connection that you share yourself is used: --share has no login of its own")
        else:
            self.memory.keep("refused", None)
        return found

    def started(self):
        """The kernel of this launch has a session."""
        if self.number is None:
            return

        def alter(values):
            values[self._key] = "started"
            there = "session {} ".format(self.number)
            if values.get("room") == str(sum(key.startswith(there) for key in values)):
                self.launch.loop.after(0, self._prepare)

        self.memory.change(alter)

    def overhear(self, pipe):
        """Go on listening to a connection that this launch has made: of what its forwards lead to nobody else
        hears.

        :param pipe: a :class:`LogPipe`
        """
        self.hush()
        self.pipe = pipe
        pipe.lines.on_line = self._overheard

    def _overheard(self, line):
        event = OpenSSH.read(line, LOGGED_IN)
        if self.launch.current and event and event[0] in ("exposed", "family", "no forwarding"):
            self.launch.current.hear(event, line)

    def hush(self):
        """Listen no longer; harmless when that is over."""
        if self.pipe:
            self.pipe.close()
            self.pipe = None

    def _prepare(self):
        """The last place is taken: log in for the next launch, which is likely to follow at once."""
        path = "{}-{}".format(self.path, self.number + 1)
        lock = self._lock(path, 0)
        if lock is None:
            return
        try:
            if not os.path.exists(path):
                self._log_in(self.settings.but(share=path, modern=False))
        except (Fatal, OSError) as error:  # the kernel that runs is not concerned
            self.launch.log.write("no connection for the next launch: {}".format(error))
        finally:
            os.close(lock)

    def refused(self):
        """The connection takes no more: as many sessions as are on it are what a connection takes, unless another
        launch has asked for one and does not know yet.

        :returns: whether there is any use in trying another
        """
        self.full.add(self.number)
        others = []

        def alter(values):
            there = "session {} ".format(self.number)
            others[:] = [value for key, value in values.items() if key.startswith(there) and key != self._key]
            known = self._room(values) if "asked" in others else 1
            if known:
                values["room"] = str(max(others.count("started"), known))

        self.memory.change(alter)
        return bool(others) or self.number not in self.made

    @staticmethod
    def _room(values):
        """How many sessions a connection takes, as far as that is known; 0 where it is not."""
        return parse_number(values.get("room", "")) or 0

    def gone(self):
        """Nobody answers any more at the control socket: it is in the way, unless there is a new one by now."""
        lock = self._lock(self._path)
        if lock is None:
            return
        if identity(self._path) == self.socket:
            remove_if_there(self._path)
        os.close(lock)

    def release(self):
        """This launch's session is over."""
        self.hush()
        if self.number is not None:
            self.memory.keep(self._key, None)
            self.number = None

    @property
    def _key(self):
        return "session {} {}".format(self.number, os.getpid())


def identity(path):
    """What tells a file from any other that had its path before; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def is_running(pid):
    try:
        os.kill(pid or 1 << 30, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def remove_if_there(path):
    try:
        os.remove(path)
    except OSError:
        pass  # gone already


class LogPipe:
    """A named pipe through which ssh alone speaks (``-E``), gone as soon as ssh has opened it.

    :raises OSError: there is no private folder
    """

    def __init__(self, loop, on_line):
        self.loop, self.lines = loop, Lines(on_line)
        folder = private_folder(os.environ)
        for name in os.listdir(folder):  # what a launcher has left that was killed in the wrong moment
            pid = name.split("-")[1] if name.startswith("log-") else ""
            if pid.isdecimal() and not is_running(int(pid)):
                remove_if_there(os.path.join(folder, name))
        self.path = os.path.join(folder, "log-{}-{}".format(os.getpid(), os.urandom(4).hex()))
        os.mkfifo(self.path, 0o600)
        # For both directions: so it has a writer from the beginning, and is never at its end.
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        loop.readers[self.descriptor] = self.read

    def read(self):
        """Take what has come; returns whether there was anything."""
        try:
            data = os.read(self.descriptor, 65536)
        except OSError:
            return False
        if self.path:
            remove_if_there(self.path)
            self.path = None
        self.lines.feed(data)
        return True

    def close(self):
        while self.read():
            pass
        self.loop.readers.pop(self.descriptor, None)
        os.close(self.descriptor)
        if self.path:
            remove_if_there(self.path)


class PlinkPassword:
    """How plink gets a password: from a descriptor, or, on Windows, from a file that is removed as soon as it has
    been read. ``words`` are its arguments, ``inherit`` the descriptors that it has to have."""

    def __init__(self, password):
        self.words, self.inherit, self.path = (), (), None
        if not password:
            return
        data = password.encode("utf-8", "surrogateescape") + b"\n"
        if WINDOWS:
            import tempfile

            descriptor, self.path = tempfile.mkstemp(prefix="tunnel-")
            os.write(descriptor, data)
            os.close(descriptor)
            self.words = ("-pwfile", self.path)
        else:
            reader, writer = os.pipe()
            os.write(writer, data)
            os.close(writer)
            self.words, self.inherit = ("-pwfile", "/dev/fd/{}".format(reader)), (reader,)

    def remove(self):
        """Take the file away; where plink has it open still, on Windows, the next call does."""
        if self.path:
            try:
                os.remove(self.path)
                self.path = None
            except OSError:
                pass


class Transcript:
    """Sorts what a client's streams bring by who says it: the client, servers and jump hosts, the kernel. Keeps
    the last of each in the facts, logs it, and hands on what means something.

    :param on_event: called with an event, or None, and its line
    :param separate: whether the client's own words come through a pipe of their own
    """

    def __init__(self, dialect, facts, log, separate, on_event):
        self.dialect, self.facts, self.log, self.separate, self.on_event = dialect, facts, log, separate, on_event

    def client(self, line):
        """The client itself."""
        is_note = line.startswith(("debug1: ", "OpenSSH_", "Transferred: ", "Bytes per second: "))
        keep_last(self.facts.notes if is_note else self.facts.said, line)
        self.log.quote(self.dialect.kind, line)
        self.on_event(self.dialect.read(line, self.facts.stage), line)

    def errors(self, line):
        """stderr: with a pipe for the client's own words, only what others say."""
        facts = self.facts
        if not self.separate:
            self.client(line)
            return
        if facts.stage == STARTED:
            self.output(line)
            return
        keep_last(facts.aside, line)
        self.log.quote("aside", line)
        if facts.proxy and not facts.reached:  # a jump host may have refused, which must not be tried again
            self.on_event(self.dialect.read(line, facts.stage, aside=True), line)
        elif facts.stage == SILENT and line.startswith(("command-line", "Couldn't open logfile")):
            self.client(line)  # said before ssh has opened its log

    def output(self, line):
        """The kernel."""
        keep_last(self.facts.printed, line)
        self.log.quote("kernel", line)


class Try:
    """One try at a launch: a client process and all that belongs to it. What it has found out is in ``facts``;
    nothing else of it outlives :meth:`run`.

    :param launch: what tries have in common: request, program, log, loop, and who hears of its steps
    :param name: what the log calls it
    :param login: whether this is only the login of a shared connection
    :param session: that of a relay, whose connection this is
    """

    def __init__(self, launch, settings, name, login=False, session=None):
        self.launch, self.settings, self.name, self.is_login = launch, settings, name, login
        self.session = session
        self.loop, self.log, self.dialect = launch.loop, launch.log, launch.dialect
        self.facts = Facts()
        self.said = Transcript(self.dialect, self.facts, self.log, settings.separate, self.hear)
        self.timers = Timers(self.loop)
        self.delivery, self.delivered = None, False
        self.client = self.keeper = self.pipe = self.probe = self.board = self.way = None
        self.password = PlinkPassword(None)
        request = launch.request
        if not login and not session:
            # No client tells whether a channel still carries data, nor which side has closed it: all lead through
            # here.
            block = range(max(settings.ports), max(settings.ports) + 9)  # which the client may listen on here
            self.way = Forwards(
                self.loop, self.log, 6 if request.callback else 2, 4 if request.inward else 0, block
            )
        self.plan = session.plan if session else Plan(request, settings, self.way.ports if self.way else ())
        if self.way:
            plan = self.plan
            self.board = Switchboard(self.loop, self.log, request.link, plan.link, plan.pairs, self.way)
            self.board.on_connected, self.board.on_lost = self._connected, self._lost
            self.way.serve(self.board)

    def run(self):
        """Start the client, and see it to its end.

        :returns: the facts
        """
        try:
            self._start()
            while not self._over():
                if self.launch.signal and "kill" not in self.timers and "leave" not in self.timers:
                    # It came before there was a client to end, or while another try ran.
                    self.session.leave() if self.session else self.end("signal")
                self.loop.step()
        finally:
            self._clean_up()
        facts = self.facts
        facts.code = self.client.code
        if facts.stage < LOGGED_IN and facts.code == self.dialect.failure:
            self.client.end()  # a chain of jump hosts may not end with the first of its clients
        if self.settings.guarded and facts.code == 1 and not facts.connected:
            if facts.shared and REFUSED_TERMINAL in facts.printed + facts.aside:
                facts.meet("no terminal", REFUSED_TERMINAL)
            elif facts.kernel_ended and all(line.startswith(FAREWELLS) for line in facts.printed):
                facts.meet("guard", "exit code 1, without a word")  # a kernel that fails says why
        self.log.write("the client ended with exit code {}".format(self.client.code))
        return facts

    def _start(self):
        request, environment = self.launch.request, self.launch.environment
        argv = [self.launch.program]
        password = request.destination.password
        if self.dialect is Plink:
            self.password = PlinkPassword(password)
            argv += Plink.arguments(request, self.plan, self.launch.program, self.password.words)
        else:
            if self.settings.separate:
                self.pipe = LogPipe(self.loop, self.said.client)
            if password or not (self.settings.asks or (self.settings.share and not self.is_login)):
                self.keeper = PasswordKeeper(self.launch, self.settings, lambda: self.facts.version, self._asked)
                environment = self.keeper.environment(environment)
            argv += self._openssh(self.pipe and self.pipe.path)
        self.log.write("{}: {}".format(self.name, printable_command(argv)))
        for forward in [] if self.is_login else self.plan.forwards:
            self.log.write("  {} {}".format(forward.flag, forward))
        sinks = {"out": Lines(self.said.output).feed, "err": Lines(self.said.errors).feed}
        line = self.session and self.session.line
        afterwards = ()
        if self.dialect is OpenSSH and not (self.is_login or self.session):  # it may share a connection
            afterwards = self.launch.asking("cancel", self.settings, self.plan.forward_words)
        inherit = self.password.inherit
        self.client = CLIENT(self.loop, argv, environment, sinks, inherit, line=line, afterwards=afterwards)
        if self.session:
            self.session.attach(self.client)
        if self.board and (request.callback or request.inward):
            NameReplacer.prepare()  # while the server is asked
        if not self.is_login and (not self.session or (self.launch.check and not request.via)):
            self.expect_kernel()
        self.timers.within("login", LOGIN_SECONDS, lambda: self.end("no login"))
        if not (self.session and (self.session.attached or request.share)):  # those have several, or know it
            watch_front_end(self.timers, request.link, lambda: self.end("front end gone"))
        self._expect_answer()

    def _openssh(self, log):
        request, settings = self.launch.request, self.settings
        if not self.is_login:
            return OpenSSH.arguments(request, self.plan, settings, log)
        extra = [("ControlMaster", "auto"), ("ControlPersist", str(SHARE_SECONDS)), ("ClearAllForwardings", "yes")]
        return ["-v"] + (["-E", log] if log else []) + ["-f", "-N"] + OpenSSH.login(request, settings, extra)

    def _over(self):
        """Whether the client has ended, and the front end has what the kernel has sent."""
        if not self.client.poll():
            return False
        if self.board and self.facts.stopped_by is None:
            self._deliver()
            return self.delivered
        return True

    def _clean_up(self):
        self.timers.disarm()
        if self.probe:
            self.probe.cancel()
        if self.delivery:
            self.delivery.stop()
        if self.is_login and self.pipe and self.client and self.client.code == 0:
            self.launch.shared.overhear(self.pipe)
            self.pipe = None
        for each in (self.board, self.way, self.keeper, self.pipe):
            if each:
                each.close()
        if self.client and self.client.code is None and not self.session:
            self.client.end(force=True)  # only a defect leaves one; that of a relay has to say goodbye first
        self.password.remove()

    def _expect_answer(self):
        """Give the server another while to go on with the key exchange. ssh's own ``ConnectTimeout`` ends
        with the server's first line, and plink has none."""
        if self.facts.stage == SILENT and self.settings.share and not self.is_login:
            self.timers.within("answer", SHARED_SECONDS, self._hung)  # ssh may be reading its configuration
        elif self.facts.stage == SILENT:
            seconds = self.session.patience if self.session else self.launch.connect_seconds
            if seconds:
                self.timers.within("answer", seconds + 0.5, self._no_answer)
        else:
            self.timers.disarm("answer")

    def _no_answer(self):
        if self.dialect is Plink or self.facts.tried or self.settings.own or self.session or self.is_login:
            self.end("no answer")
        else:  # ssh has not even begun to connect: it may be waiting for the process behind a connection to share
            self._hung()

    def end(self, why):
        """End the client; the first reason is the one that counts."""
        self.facts.stopped_by = self.facts.stopped_by or why
        if self.client and self.client.code is None and "kill" not in self.timers:
            self.facts.killed = True
            self.client.end()
            self.timers.within("kill", KILL_SECONDS, lambda: self.client.end(force=True))
            if self.delivery:
                self.delivery.stop()

    def answered(self):
        """The relay over there has said hello."""
        self.timers.disarm("relay", "login", "front end")
        self.facts.connected = True

    def leave(self, seconds, why="signal"):
        """End the client once it has passed on the last words, ``seconds`` from now at the latest."""
        self.facts.stopped_by = self.facts.stopped_by or why
        self.timers.within("leave", seconds, lambda: self.end(why))

    def expect_kernel(self):
        self.timers.within("connect", CALLBACK_SECONDS, self._no_connection)

    def _no_connection(self):
        if not self.facts.connected:
            words = words_for(self.launch, self.facts, self.settings, self.launch.request)
            self.log.write(NOT_CALLED_BACK.format(CALLBACK_SECONDS, **words))
        if self.launch.check and self.session:
            self.facts.stopped_by = "no kernel"
            self.session.leave()
        elif self.launch.check:
            self.end("no kernel")

    # -- what is said

    def hear(self, event, line):
        """Take an event into the facts, and act on what has changed."""
        self.password.remove()
        if event is None or (self.is_login and event[0] == "stale"):  # it is about to be made
            self._expect_answer()
            return
        facts = self.facts
        before = facts.stage, facts.exposed
        note(facts, self.settings, self.plan, event[0], event[1], line)
        self._expect_answer()
        if self.keeper and facts.stage >= LOGGED_IN:
            self.keeper.close()
        self._report(event[0], line)
        if facts.obstacle and facts.obstacle not in ENDS_ITSELF:
            self.end("obstacle")
        if facts.stage == STARTED and before[0] != STARTED:
            self._started()
        if facts.exposed and not before[1]:
            self.launch.step("server", EXPOSED)
        if event[0] == "shared" and not self.is_login:
            self._watch_shared()
        if facts.ended:
            self.timers.disarm("lost")
            self._deliver()

    def _watch_shared(self):
        """The process behind a shared connection may hang, or its connection have died unnoticed."""
        if self.session:
            self.timers.within("login", SHARED_SECONDS, lambda: self.end("no login"))
            return
        if not self.settings.share:
            self.timers.within("login", SHARED_SECONDS, self._hung)
        if self.facts.version < SAYS_SESSION:
            self.timers.within("session", SESSION_SECONDS, self._session_stands)
        elif self.settings.share:
            self.timers.within("session", self.launch.shared.patience, self._hung)

    def _report(self, event, line):
        """An event may be a step of the launch."""
        if event in ("name", "proxy", "host key", "login"):
            for start in ("debug1: ", "Connecting to ", "Server host key: ", "Executing proxy command: "):
                line = line[len(start) :] if line.startswith(start) else line
            self.launch.step(event, line.strip())
        elif event == "told no terminal":
            self.log.write(NO_TERMINAL)

    # -- what happens

    def _session_stands(self):
        if self.facts.stage != STARTED:
            self.facts.stage = STARTED
            self._started()

    def _asked(self, prompt, again):
        """ssh asks for what nobody here can answer."""
        self.facts.meet("refused" if again else "asked", prompt)
        self.end("obstacle")

    def _hung(self):
        if self.facts.stage != STARTED:
            self.facts.meet("stale" if self.settings.share else "full", "the shared connection does not answer")
            self.end("obstacle")

    def _started(self):
        """The forwards stand, and the server has been told to run the kernel."""
        self.timers.disarm("login", "answer", "session")
        if self.facts.obstacle:
            return
        if self.session:
            self.timers.within("relay", RELAY_SECONDS, self.session.give_up)
            return
        request = self.launch.request
        self.launch.step("forwards", "{} ports".format(len(self.plan.forwards)))
        self.launch.step("kernel", "started")
        if request.role is CONTROLLER and not request.callback:
            ports = [forward.port for forward in self.plan.forwards if forward.flag == "-L"]
            self.probe = Probe(self.loop, ports, self._held)
        self.launch.started(self)

    def _held(self, port):
        self.facts.meet("held", "port {} is in use on the kernel machine".format(port))
        self.log.write(self.facts.evidence)
        self.end("obstacle")

    def _connected(self):
        self.facts.connected, self.facts.stage = True, STARTED  # whatever the client has said of it
        self.timers.disarm("connect", "answer", "login", "session", "front end")
        if self.probe:
            self.probe.cancel()
        if self.launch.shared:
            self.launch.shared.hush()
        self.log.write("the kernel has called back after {:.1f} s".format(self.launch.seconds))
        self.launch.runs()

    def _lost(self):
        """The front end has closed the main link, or has died. The kernel has a while to see that for itself."""
        if not self.facts.ended:
            self.timers.within("lost", LOST_SECONDS, lambda: self.end("front end gone"))

    def _deliver(self):
        """The kernel has ended, or the client has: what is left is delivered before all connections are closed."""
        if self.board and not self.delivery and not self.facts.stopped_by:
            self.delivery = Delivery(self.loop, self.board, self._let_go)

    def _let_go(self):
        """Close all connections: a front end may keep its side open for ever, and so may what a kernel has left
        behind. The client then ends by itself, unless it carries others, and tells the kernel's exit code."""
        self.delivered = True
        self.board.close()
        known = self.facts.status is not None  # as plink tells it
        self.timers.within("late", KNOWN_SECONDS if known else LATE_SECONDS, lambda: self.end("links held"))


def the_relay():
    """The module that has a file of its own.

    :raises Fatal: it is not there
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    if folder not in sys.path:  # an embeddable Python, or a safe path
        sys.path.insert(0, folder)
    try:
        try:
            import tunnel_relay
        except DAMAGED:
            forget_byte_code()
            import tunnel_relay
    except ModuleNotFoundError:
        text = "--relay: tunnel_relay.py is not beside tunnel.py; run install.py again"
        raise Fatal(text, EX_UNAVAILABLE) from None
    return tunnel_relay


# What Python raises for byte code that was cut short, as a disk that is full does: it trusts the first bytes. The
# drop-ins and tunnel_sub.py know them too, since this file may be the one. Without a tag only sources are read.
DAMAGED = (EOFError, TypeError, ValueError)


def forget_byte_code():
    """Read sources only, and remove the byte code of these files, so that the next launch makes it anew."""
    sys.implementation.cache_tag = None
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__pycache__")
    try:
        for name in os.listdir(folder):
            if name.startswith("tunnel"):
                os.remove(os.path.join(folder, name))
    except OSError:
        pass  # then the sources are read each time


def call_hub(path):
    """A connection to the process that runs the kernels of a destination; None where there is none."""
    import _socket

    if not path or not os.path.exists(path):
        return None
    caller = _socket.socket(_socket.AF_UNIX)
    caller.settimeout(LOGIN_SECONDS)
    try:
        caller.connect(path)
    except OSError:
        caller.close()
        return None
    return caller


def become_hub(path):
    """Listen for launches to come, unless another launch does by now.

    :returns: a connection to that one, or None, and the listening socket, or None
    :raises OSError: something is in the way
    """
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_soon(lock)
        caller = call_hub(path)
        if caller:
            return caller, None
        remove_if_there(path)
        return None, listen(path, 128)
    finally:
        os.close(lock)


def hub_path(launch):
    """Where the one process for all compute kernels of this destination listens; None without one."""
    request = launch.request
    shared = request.share and request.role is COMPUTE and request.relay is not None and not request.check
    return share_path(launch.memory.path) + "-hub" if shared and launch.memory.path else None


def ask_hub(launch, caller, words):
    """What the hub answers to the words of a launch; None where it does not.

    A blank comes at once, and the rest when the kernel runs, which may take long: it ends with that process.
    """
    heard, over = [], []

    def read():
        try:
            heard.append(caller.recv(65536))
        except BlockingIOError:
            return
        except OSError:
            heard.append(b"")  # it has gone
        launch.loop.cancel(timer)
        over.extend([] if heard[-1] else [True])

    try:
        caller.sendall(("\0".join(words) + "\n").encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # it has gone
    launch.caught = launch.caught or catch_signals(launch.loop, launch.on_signal)
    caller.setblocking(False)
    timer = launch.loop.after(CONNECT_SECONDS, lambda: over.append(False))
    launch.loop.readers[caller] = read
    while not over and not launch.signal:
        launch.loop.step()
    del launch.loop.readers[caller]
    caller.close()
    return b"".join(heard) if over and over[0] else None


def hand_kernel_over(launch, caller):
    """Have the hub run the kernel.

    :param caller: a connection to it
    :returns: the exit code; None where it has gone without a word
    :raises Fatal: the kernel has not been started
    :raises TimeoutError: it is there, but does not answer
    """
    request = launch.request
    words = (str(request.link), request.kernel.path, request.links, launch.log.path or os.devnull)
    answer = ask_hub(launch, caller, words + (request.via or "",))
    if launch.signal:
        launch.log.write("ended by signal {}".format(launch.signal))
        return 128 + launch.signal
    if answer is None:
        raise TimeoutError("the process that runs the kernels of this host does not answer")
    if answer == b" " and request.via:
        raise Fatal("the process that ran the kernels of this host has ended before this one's job ran", 255)
    answer = answer.lstrip()
    if not answer:
        return None
    code, _, text = answer.decode("utf-8", "replace").partition(" ")
    number = parse_number(code)
    if text and number != 0:
        raise Fatal(text, number or 255)
    if number != 0:
        return 255 if number is None else number
    launch.teller.tell(0, text)
    if text and launch.teller.descriptor is None:
        say(text)
    return 0


def keep_last(lines, line):
    """Add a line to those of which the last 200 are kept."""
    lines.append(line)
    del lines[:-200]


class Launch:
    """One launch: the loop over its tries, and what they have in common.

    :param teller: hears the exit code as soon as it is known that the launch stands or has failed; a launcher
        that returns early does so then
    """

    def __init__(self, request, program, dialect, log, teller):
        self.request, self.program, self.dialect, self.log, self.teller = request, program, dialect, log, teller
        self.loop = Loop()
        self.environment = client_environment(os.environ)
        self.signal = None  # the number of the one that has come
        self.spared = lambda number: False  # whether one that comes does not end everything
        self.current = self.check = self.shared = self.caught = None
        self.died = ""  # what is to be said of an earlier kernel
        self.told = []  # what the server has said at the login of a shared connection
        self.begin = time.monotonic()
        self.memory = Memory(memory_path(request, program, log))

    @property
    def seconds(self):
        return time.monotonic() - self.begin

    @property
    def connect_seconds(self):
        """How long a host may take to answer; 0 for as long as the system waits."""
        return parse_seconds(self.request.option("ConnectTimeout"), CONNECT_SECONDS)

    def run(self):
        """Launch, watch, explain.

        :returns: the exit code
        :raises Fatal: the launch failed; the text says why
        """
        request = self.request
        self.caught = self.caught or catch_signals(self.loop, self.on_signal)
        if WINDOWS and not join_windows_job():
            self.log.write("Windows allows no job: kill the client too, should this launcher be killed")
        if request.check:
            self.check = Check(self)
        if request.link and request.callback and rewritten(str(request.link), (65535, 65535)) is None:
            self.step("link names", TOO_SHORT.format(request.link))
        if request.check:
            request.link = self.check.link
            version = self.quietly([self.program, "-V"])[1].splitlines()
            self.step("client", "{}, {}".format(self.program, (version or ["version unknown"])[0].strip()))
        if request.destination.password and self.dialect is OpenSSH and WINDOWS:
            raise Fatal("host: a password needs plink on Windows; ssh there takes keys only")
        if request.relay is not None:
            return self._relayed()
        try:
            facts, settings = self.follow(self._first_settings())
        finally:
            if self.shared:
                self.shared.release()
        return self._finish(facts, settings)

    def join_hub(self):
        """Have the hub run the kernel, where there is one that does.

        :returns: the exit code, or None
        :raises Fatal: the kernel has not been started
        """
        caller = call_hub(hub_path(self))
        try:
            return hand_kernel_over(self, caller) if caller else None
        except TimeoutError as error:
            self.log.write("{}: this kernel gets a relay of its own".format(error))
            self.request.share = False
            return None

    def _relayed(self):
        """The same through a relay, which has a file of its own."""
        tunnel_relay = the_relay()
        listener, path = None, hub_path(self)
        while path and listener is None:
            code = None
            try:
                caller, listener = become_hub(path)
                code = hand_kernel_over(self, caller) if caller else None
            except OSError as error:
                self.log.write("nothing can be shared: {}".format(error))
                path = None
            if code is not None:
                return code
        return tunnel_relay.launch_through_relay(
            sys.modules[__name__], self, self._first_settings(), listener, path
        )

    def _first_settings(self):
        request, known = self.request, self._recall()
        ssh = self.dialect is OpenSSH
        separate = ssh and self.memory.path is not None
        wish = (request.option("RequestTTY") or "").lower()
        asked = ssh and wish in ("", "force") and not request.kernel.on_windows
        if request.share and request.relay is None:
            if ssh and separate:
                self.shared = SharedConnections(self, self.memory, share_path(self.memory.path))
            else:
                self.log.write("--share needs OpenSSH on Linux or macOS: this kernel gets its own connection")
        if known.get("terminal") == "no":
            self.step("terminal", NO_TERMINAL)
        if known.get("exposed") and self.shared:
            self.step("server", EXPOSED)
        return Settings(
            first_ports(request),
            terminal=known.get("terminal") != "no",
            guarded=asked and "terminal" not in known and request.relay is None,
            forced=wish == "force",
            separate=separate,
            asks=WINDOWS or not ssh or can_ask(os.environ, self.program),
            share="" if self.shared else None,
        )

    def _recall(self):
        """What earlier launches to this destination have left word of."""
        known = self.memory.read()
        if "died" in known:
            self.died = "an earlier " + known["died"]
            self.log.write(self.died)
        return known

    def follow(self, settings, login=False, session=None):
        """Try until a kernel runs and has ended, or until there is nothing left to try.

        :param login: whether it is only about the login of a shared connection
        :param session: that of a relay, whose next connection it is about
        :returns: facts and settings of the last try
        """
        number = 0
        while True:
            if self.signal:
                return Facts(), settings
            number += 1
            if settings.ports is None:
                settings = settings.but(ports=draw_ports())
                self.log.write("the next block of ports is {}".format(settings.ports[0]))
            if settings.share == "":
                settings = settings.but(share=self.shared.take(settings))
            name = "shared connection" if login else "try {}".format(number)
            outer, self.current = self.current, Try(self, settings, name, login, session)
            plan = self.current.plan
            try:
                facts = self.current.run()
            finally:
                self.current = outer
            if facts.shared and not login:
                taken = self._take_forwards_back(settings, plan)
                if taken and facts.code == 255 and facts.stage == STARTED and not facts.killed:
                    facts.ended = True  # that is what the kernel has ended with
                elif not taken and facts.connected and not facts.killed:
                    facts.code = 255  # nobody is there any more: the connection was lost before all had come
            self._learn(facts, settings, login)
            following = after(facts, settings)
            if following is None or self.signal:
                return facts, settings
            self.log.write("{}: trying again".format(following.why))
            if self.check:
                self.check.report("again", following.why)
            settings = following.settings
            # Launches that were dropped in the same moment part here.
            self.pause(following.pause * (1 + os.urandom(1)[0] / 255))

    def _learn(self, facts, settings, login):
        """Remember for later launches what a try has found out."""
        if facts.obstacle == "no terminal":
            self.memory.keep("terminal", "no")
        elif facts.stage == STARTED and settings.guarded and facts.connected:
            self.memory.keep("terminal", "yes")
        if login:
            self.told = facts.told
        if not self.shared or not settings.share or login:
            return
        facts.aside[:0] = self.told  # who goes over that connection has been told so, too
        if facts.obstacle == "full" and not self.shared.refused():
            facts.obstacle = "no session"
        if facts.obstacle == "family":
            self.ask_connection("exit", settings)
        if facts.obstacle in ("stale", "family"):
            self.shared.gone()
        if facts.obstacle == "stale" and self.shared.number in self.shared.made:
            facts.obstacle = "lost"  # another one would be
        if facts.stage == STARTED and self.shared.number in self.shared.made:
            self.memory.keep("exposed", "yes" if facts.exposed else None)

    def _take_forwards_back(self, settings, plan):
        """Forwards stay on a shared connection when the session that asked for them ends.

        :returns: whether that connection is still there
        """
        code = self.ask_connection("cancel", settings, plan.forward_words)
        self.log.write("forwards taken back from the shared connection: exit code {}".format(code))
        return code == 0

    def ask_connection(self, command, settings, words=()):
        """Have the process behind a shared connection do something; returns ssh's exit code."""
        return self.quietly(self.asking(command, settings, words))[0]

    def asking(self, command, settings, words=()):
        """The arguments with which the process behind a shared connection is asked to do something."""
        return [self.program, "-O", command] + list(words) + OpenSSH.login(self.request, settings)

    # -- what tries call

    def step(self, name, text):
        """A step of the launch has been taken."""
        self.log.write("{:.2f} s: {}: {}".format(self.seconds, name, text))
        if self.check:
            self.check.report(name, text)

    def started(self, one):
        """A try has come so far that the server runs the kernel."""
        if self.shared:
            self.shared.started()
        if self.request.role is COMPUTE and not self.check:
            if "kernel " + self.request.kernel.path in self.memory.read():
                self._tell()
            else:
                # Nobody has seen this path run: if it does not exist, the server will say so about now.
                # If it has connected by then, that is known already, and may be out of date.
                self.loop.after(
                    VERIFY_SECONDS, lambda: one.client.code is None and not self.teller.told and self.runs()
                )

    def runs(self):
        """The kernel does: its path is a good one."""
        if self.request.role is COMPUTE:
            self.memory.keep("kernel " + self.request.kernel.path, time.strftime("%Y-%m-%d %H:%M:%S"))
            self._tell()

    def _tell(self):
        """The launch stands; what has been kept of an earlier one is said now."""
        if self.died and not self.teller.told:
            self.memory.keep("died", None)
        self.teller.tell(0, self.died)

    # -- events

    def pause(self, seconds):
        """Let ``seconds`` pass; a signal ends it."""
        over = []
        self.loop.after(seconds, lambda: over.append(True))
        while not over and not self.signal:
            self.loop.step()

    def quietly(self, argv):
        """Run a command that ends by itself, 5 s at most.

        :returns: its exit code and what it printed
        """
        said, before = [], self.signal  # what is put in order after a signal takes its time all the same
        sinks = {"out": said.append, "err": said.append}
        client = CLIENT(self.loop, argv, self.environment, sinks, watched=False)
        timer = self.loop.after(5, lambda: client.end(force=True))
        while not client.poll():
            if self.signal != before:
                client.end(force=True)
            self.loop.step()
        self.loop.cancel(timer)
        return client.code, b"".join(said).decode("utf-8", "replace")

    def on_signal(self, number):
        if self.signal is None and self.spared(number):
            return
        self.signal = self.signal or number
        if self.current and self.current.session:
            self.current.session.leave()
        elif self.current:
            self.current.end("signal")

    # -- the end

    def _finish(self, facts, settings):
        """The exit code of a launch that is over.

        :raises Fatal: it has failed
        """
        code = verdict(self.dialect, facts, self.signal)
        if self.signal:
            self.log.write("ended by signal {}".format(self.signal))
            return code
        if self.check and facts.stopped_by == "checked":
            return 0
        if facts.stopped_by == "front end gone" and facts.stage == STARTED:
            self.log.write("the front end has closed the main link: the kernel has been hung up on")
            return code
        if facts.kernel_ended and facts.connected and facts.kernel_code is not None:
            text = "the kernel has ended after {:.0f} s {}"
            if facts.signal:
                text = "the kernel was ended {1} after {0:.0f} s"
            self.log.write(text.format(self.seconds, ending(facts, code)))
            return code
        text = explain(self, facts, settings)
        if self.request.role is COMPUTE and self.teller.told and not facts.connected:
            self.remember_death(text, self.request)
        raise Fatal(text, code)

    def remember_death(self, text, request):
        """Have the next launch tell that a kernel ended before it connected, though its launch had returned."""
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self.memory.keep("died", "launch, at {}, failed after it had returned: {}".format(when, text))
        self.memory.keep("kernel " + request.kernel.path, None)


def parse_seconds(text, otherwise):
    """A time as ssh takes it: ``90``, ``1m``, ``1h30m``; 0 and ``none`` stand for no limit.

    :param text: the option's value, or None
    :param otherwise: what is right for None, and for what ssh itself is going to refuse
    :returns: seconds (sshd_config(5), TIME FORMATS)
    """
    if text is None or text.lower() == "none":
        return otherwise if text is None else 0
    total, digits = 0, ""
    for character in text.lower() + ("" if text[-1:].isalpha() else "s"):
        if character in "0123456789":
            digits += character
            continue
        unit = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}.get(character)
        if not digits or unit is None:
            return otherwise
        total, digits = total + int(digits) * unit, ""
    return min(total, 1 << 30)


class Check:
    """``--check``: plays the front end, reports each step, and stops the kernel when it has called back."""

    def __init__(self, launch):
        self.launch = launch
        self.listeners = data, message = listen(), listen()
        self.link = LinkName(data.getsockname()[1], LOOPBACK, message.getsockname()[1], LOOPBACK)
        launch.loop.readers[data] = lambda: self._accept(data, "data channel")
        launch.loop.readers[message] = lambda: self._accept(message, "message channel")
        self.seen = {}
        self.colours = bool(sys.stdout) and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def report(self, name, text):
        line = "{:6.2f} s  ok  {}: {}\n".format(self.launch.seconds, name, text)
        show(line, lambda text: text.replace("ok", "\033[32mok\033[0m", 1) if self.colours else text)

    def _accept(self, listener, name):
        connection = accept(listener, self.launch.log)
        if connection is None:
            return
        del self.launch.loop.readers[listener]
        self.seen[name] = connection
        self.launch.step(name, "the kernel has connected")
        if name == "data channel":
            self.launch.loop.readers[connection] = lambda: self._answer(connection)
        if len(self.seen) == 2:
            current = self.launch.current
            current.session.cut() if current.session else current.end("checked")

    def _answer(self, connection):
        """A connecting link asks which message port it may use, and opens that after this answer."""
        del self.launch.loop.readers[connection]
        try:
            if connection.recv(64):
                connection.sendall(b"OKY")
        except OSError:
            pass  # it has gone again: its end will be told


def printable_command(argv):
    """A command line as a POSIX shell would take it; for logs and eyes only."""
    words = []
    for word in argv:
        plain = word.translate({ord(character): None for character in "@%+=:,./-_~"})
        words.append(word if plain.isalnum() else "'{}'".format(word.replace("'", "'\\''")))
    return " ".join(words)


def dry_run(request, program, dialect):
    """Print what would be run, and the ports."""
    request.link = request.link or LinkName(49152, LOOPBACK, 49153, LOOPBACK)
    settings = Settings(first_ports(request))
    if request.relay is None:
        plan = Plan(request, settings, ())
    else:
        tunnel_relay = the_relay()
        plan = tunnel_relay.NoForwards()
    if dialect is Plink:
        password = ("-pwfile", "***") if request.destination.password else ()
        argv = Plink.arguments(request, plan, program, password)
    else:
        argv = OpenSSH.arguments(request, plan, settings)
    show(printable_command([program] + argv) + "\n")
    for forward in plan.forwards:
        arrow = "to the front end" if forward.flag == "-R" else "to the kernel"
        target = forward.to or "a port of the launcher, chosen at launch"
        show("{} {}:{} -> {}:{}  {}\n".format(forward.flag, LOOPBACK, forward.port, forward.host, target, arrow))
    if request.relay is not None:
        return show(tunnel_relay.preview(sys.modules[__name__], request))
    return show("link name for the kernel: {}\n".format(plan.link))


# ------------------------------------------------------------------------------------------------ main


class Teller:
    """Tells exit code and line of a launch, once: to whoever waits at the other end of a pipe, if anybody does."""

    def __init__(self, descriptor=None):
        self.descriptor, self.told = descriptor, False

    def tell(self, code, text):
        if self.descriptor is None or self.told:
            return
        self.told = True
        try:
            os.write(self.descriptor, "{} {}".format(code, text).encode("utf-8", "backslashreplace"))
        except OSError:
            pass  # whoever waited has gone
        os.close(self.descriptor)

    @staticmethod
    def hear(data):
        """The exit code that :meth:`tell` has written; its line goes to stderr."""
        code, _, text = data.decode("utf-8", "replace").partition(" ")
        if text:
            say(text)
        number = parse_number(code)
        return EX_SOFTWARE if number is None else number


def launch_logged(request, program, dialect, log, teller):
    """Launch; whatever goes wrong stands in the log too.

    :returns: the exit code
    :raises Fatal: the launch failed
    """
    return logged(log, lambda: Launch(request, program, dialect, log, teller).run())


def logged(log, work):
    """What ``work()`` returns; what it raises stands in the log."""
    try:
        return work()
    except Fatal as error:
        log.write(error.text)
        raise
    except Exception as error:
        if os.environ.get("TUNNEL_DEBUG"):
            import traceback

            log.write(traceback.format_exc())
        log.write(line_for(error)[1])
        raise


def line_for(error):
    """Exit code and line for an error that nobody has foreseen."""
    if getattr(error, "errno", None) in TOO_MANY_FILES or "Too many open files" in str(error):
        return EX_UNAVAILABLE, "too many open files: a launch needs about 40; raise the limit (ulimit -n)"
    if getattr(error, "errno", None) in NO_ROOM:
        return EX_UNAVAILABLE, "no room is left below {}: {}".format(place_of(error), error.strerror)
    if isinstance(error, MemoryError):
        return EX_UNAVAILABLE, "there is not enough memory: raise the limit (ulimit -v)"
    return EX_SOFTWARE, DEFECT.format(" ({})".format(type(error).__name__))


def place_of(error):
    """The file that an error is about; where it names none it is one of those that are made for a while."""
    try:
        return error.filename or private_folder(os.environ)
    except OSError as other:
        return other.filename or "the temporary folder"


def guarded(work):
    """Run ``work()``; whatever happens becomes an exit code and at most one line.

    :returns: code and line
    """
    try:
        return work(), ""
    except Fatal as error:
        return error.code, error.text
    except KeyboardInterrupt:
        return 130, "interrupted"
    except Exception as error:
        return line_for(error)


def main(script="tunnel", role=CONTROLLER, argv=None):
    """The program.

    :param script: its name, for logs and usage
    :param role: :data:`CONTROLLER` or :data:`COMPUTE`
    :param argv: the arguments, by default the process's
    :returns: the exit code
    """
    argv = sys.argv[1:] if argv is None else argv
    if "TUNNEL_ASKPASS" in os.environ and len(argv) == 1:
        return guarded(lambda: ask_password(argv[0]))[0]
    if argv[:1] in (["--help"], ["-h"]):
        return show(USAGE.format(script=script, role=role))
    if argv[:1] == ["--version"]:
        return show("tunnel " + VERSION + "\n")
    code, text = guarded(lambda: start(script, role, argv))
    if text:
        say(text)
    return code


def start(script, role, argv):
    """Launch, in the background where the role asks for it; returns the exit code."""
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")  # it has been removed, and some modules could not be imported
    if sys.implementation.cache_tag is None:
        forget_byte_code()  # it was damaged
    folder = os.path.dirname(os.path.abspath(__file__))
    inside = "TUNNEL_DETACHED" in os.environ
    if inside:
        argv = detached_arguments()
    request = parse_arguments(role, argv)
    in_front = role is CONTROLLER or request.dry_run or request.check
    if WINDOWS and not in_front and not inside:
        return detach_on_windows(os.path.join(folder, script + ".py"), argv)
    program, dialect = find_client(request.client, os.environ)
    dialect.check(request)
    if request.dry_run:
        return dry_run(request, program, dialect)
    let_go_of_descriptors()
    log = Log(folder, script, os.environ)
    log.write("tunnel {}, {}.py, Python {}, {}".format(VERSION, script, sys.version.split()[0], sys.platform))
    log.write("{} {} {}".format(request.destination, request.kernel.path, request.link or "--check"))
    if in_front:
        return launch_logged(request, program, dialect, log, Teller())
    if request.share and request.relay is not None:
        code = logged(log, lambda: Launch(request, program, dialect, log, Teller()).join_hub())
        if code is not None:
            return code

    def work(teller):
        code, text = guarded(lambda: launch_logged(request, program, dialect, log, teller))
        teller.tell(code, text)
        return code

    return work(Teller(1)) if inside else detach(work)


def let_go_of_descriptors():
    """Close what the caller has open, a front end's listening sockets among it, and make sure that there are three
    standard streams: whatever is opened next would take their places."""
    if WINDOWS:
        return
    try:
        names = [int(name) for name in os.listdir("/dev/fd") if name.isdigit()]
    except OSError:
        names = range(256)
    for descriptor in names:
        if descriptor > 2:
            try:
                os.close(descriptor)
            except OSError:
                pass  # the one that listed them
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def detach(work):
    """Launch in a process of its own, and return as soon as the launch stands or has failed.

    The parallel tools start one kernel after the other, so this has to return; but somebody has to stay
    and end the client when its kernel has ended.

    :param work: called with a :class:`Teller`
    """
    import _signal

    reader, writer = os.pipe()
    child = fork()
    if not child:
        try:
            os.close(reader)
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            os.close(null)
            work(Teller(writer))
        finally:
            os._exit(0)
    os.close(writer)
    for name in ENDING:
        _signal.signal(getattr(_signal, name), lambda number, _: os.kill(child, number))
    return Teller.hear(b"".join(iter(lambda: os.read(reader, 4096), b"")))


def detach_on_windows(path, argv):
    """:func:`detach` where nothing forks: the script starts itself again, without a console. The arguments
    go through a pipe, since others may read those of a process."""
    import json
    import subprocess

    child = subprocess.Popen(
        [sys.executable, "-Es", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, TUNNEL_DETACHED="1"),
        creationflags=0x08000000,  # CREATE_NO_WINDOW
    )
    child.stdin.write(json.dumps(argv).encode("ascii"))
    child.stdin.close()
    return Teller.hear(child.stdout.read())


def detached_arguments():
    """The arguments that :func:`detach_on_windows` has sent."""
    import json

    del os.environ["TUNNEL_DETACHED"]
    return json.loads(sys.stdin.buffer.read().decode("ascii"))


if __name__ == "__main__":
    sys.exit(main())
