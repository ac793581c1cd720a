#!/usr/bin/env python3
"""Launch a Mathematica kernel on a remote machine, with every MathLink (WSTP) connection carried by SSH.

A front end creates a main link, runs this script with the link's name, and expects it to stay until the
kernel quits. The script starts OpenSSH's ``ssh`` (or PuTTY's ``plink``) with one forward for each port of
each link, has it run the kernel with a link name that is valid over there, and watches it to the end.

It holds what the shell scripts did that it replaces, and works alone; each file of the folder ``tunnel_lib``,
loaded when it is needed, does one thing that they did not. The parts, each built on those before it:

    values             what a user gave, parsed and checked once: Destination, LinkName, Kernel, Request
    plans              pure functions from values to argument lists: Plan, Settings, OpenSSH, Plink
    tries              what a try finds out, and what follows: Facts, note(), after(), verdict()
    world              finding, logging, waiting, starting: find_client(), Log, Loop, Client
    channels           the bytes of links: SocketEnd, Channel, Switchboard, Delivery, Forwards
    one launch         Askpass, LogPipe, Transcript, Try, ForwardedTry, Launch
    main               from the arguments to the exit code: main(), start(), detach()
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
SHARED_SECONDS = 20  # how long the process behind a shared connection may take to answer ssh
SESSION_SECONDS = 1.0  # until an old client that shares a connection and says no more is taken to have a session
NOTICE_SECONDS = 5.0  # from the main link's end to that of a kernel which has not noticed
STALL_SECONDS = 60  # how long a front end may take none of what its kernel has left behind
QUIET_SECONDS = 5  # how long nothing may come, after the kernel's end, from who still holds its connections
LATE_SECONDS = 5.0  # how long the client may go on once the links of this launch are closed
KNOWN_SECONDS = 2.0  # how long the client may go on where it has told the kernel's exit code already
KILL_SECONDS = 1.0  # from SIGTERM to SIGKILL
FRONT_END_SECONDS = 1.0  # how often to look whether there is still a front end, until its kernel connects
CALLBACK_SECONDS = 120  # a kernel that has not called back by then is noted in the log
SMALL = 4096  # bytes; a peer that writes less at once, and again, may be waiting for the first to be acknowledged
LOG_BYTES = 1 << 20  # of what a client, a server or a kernel says, how much goes into the log
VIA_LENGTH = 4096  # of a command, in characters
PATH_LENGTH = 4096  # of a kernel's path: more no system takes
RELAY_MINUTES = 60  # how long a relay's kernels wait for a lost connection to come back
# Prompts that are no attempt at a login: what is not answered is passed over, or refused on this machine.
HARMLESS = ("Enter passphrase for ", "Enter PIN for ", "The authenticity of host ", "Are you sure ")
HARMLESS += ("Confirm ", "Please type ", "Add key ", "Allow ")
PREFIXED = (8, 5)  # from here on OpenSSH says who asks, when a server asks
SAYS_SESSION = (8, 5)  # and at the latest from here on that a session over a shared connection stands
ENDING = ("SIGTERM", "SIGINT", "SIGHUP")  # signals that ask a launch to end
TOO_MANY_FILES = (23, 24)  # ENFILE, EMFILE
NO_ROOM = (28, 122, 69)  # ENOSPC, EDQUOT on Linux and macOS

DEFECT = "a defect of tunnel stopped the launch{}; TUNNEL_DEBUG=1 logs where"
FAREWELLS = ("Connection to ", "Shared connection to ")  # begin ssh's own last line on stderr, "... closed."
BY_SIGNAL = "by a signal (out of memory?)"
REFUSED_TERMINAL = "PTY allocation request failed"  # as the client of a shared connection has it on stderr
NO_TERMINAL = "the server allows no terminal: a computing kernel may outlive the connection"
EXPOSED = "this server opens the forwarded ports to its whole network (GatewayPorts yes in its sshd_config), "
EXPOSED += "and only it can change that; --relay forwards none"

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
        text = text[len("ssh://") :].rstrip("/") if text.startswith("ssh://") else text  # as ssh itself takes it
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
    """Whether ``text`` can be the host in a link name: an address or a name, and nothing else."""
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
    quotes = {"\\": '"\\\\"', "!": '"\\!"', "$": "\"'$'\"", "`": "\"'`'\"", '"': '"\'"\'"'}

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
        return prefix + "".join(self.quotes.get(character, character) for character in rest) + '"'


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
        """Whether the front end may create links, on ports that it chooses after the launch (11.1 and later)."""
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
    try:
        return read_arguments(request, list(argv))
    except Fatal as error:
        usage = room_if_there("usage")
        error.text = usage.guess(argv, request, error.text) if usage else error.text
        raise


def read_arguments(request, words):
    """Parse the words of the command line into ``request``; returns it."""
    rest = take_flags(request, words)
    names = ["host", "kernel_path"] + ([] if request.check else ["link_name"])
    if request.check and len(rest) == 3 and "@" in rest[2] and "," in rest[2]:
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
    request.link = LinkName.parse(rest[2]) if len(rest) == 3 else None
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
        # Of these words the remote shell expands or splits the path alone, which is quoted therefore.
        self.command = " ".join([request.kernel.quoted] + kernel_words(request.kernel, request.role, self.link))
        if settings.guarded:
            # A server that refuses a terminal starts the kernel all the same, while ssh gives up: the next try
            # would start a second one. So the kernel is started only where its standard input is a terminal.
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
    """The main link's remote ports for the first try: the local numbers, unless those after them exceed 65535."""
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
        "terminal",  # whether the kernel gets a terminal, so that the server hangs up on it
        "guarded",  # whether the kernel is only run where the server has granted the terminal
        "forced",  # whether the user insists on a terminal
        "separate",  # whether ssh's own words come through a pipe of their own
        "lenient",  # whether ssh goes on where a forward fails, since one of the user's configuration has failed
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


OVERRIDDEN = 'Forwarding listen address "*" overridden by server GatewayPorts'  # as a server says it
BEFORE_LOGIN, BEFORE_START = (SILENT, ANSWERED), (SILENT, ANSWERED, LOGGED_IN)


class OpenSSH:
    """How to say it to OpenSSH 7.6 and later, and what its ``-v`` says back."""

    kind = "ssh"
    failure = 255  # its exit code when it is ssh that failed

    # What ssh prints: taken from the sources of OpenSSH 7.6 to 10 (ssh.c, sshconnect.c, sshconnect2.c,
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
        Form("debug1: mux_client_request_session: master session id: *", "command", BEFORE_START),
        Form("debug1: Requesting forwarding of *", "shared", (SILENT,)),
        Form("mux_client_request_session: session request failed: *", "full", BEFORE_START),
        Form("Control socket connect(*): *", "stale", (SILENT,)),
        Form('debug1: Control socket "*" does not exist', "stale", (SILENT,)),
        Form("muxclient: master * failed", "stale", BEFORE_START),
        Form("mux_client_request_session: read from master failed: *", "stale", BEFORE_START),
        Form("mux_client_forward: write packet: *", "stale", BEFORE_START),
        Form("mux_client_forward: forwarding request failed: *", "mux forward", BEFORE_START),
        # Lines about forwards that fail, or that are more than was asked for.
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
        Form("debug1: Remote: " + OVERRIDDEN, "exposed", BEFORE_START),
        # The session.
        Form("debug1: Sending command: *", "command", (LOGGED_IN,)),
        Form("PTY allocation request failed on channel *", "no terminal"),
        Form("channel *: open failed: administratively prohibited: *", "no session", (LOGGED_IN,)),
        Form("channel *: open failed: connect failed: open failed", "no session", (LOGGED_IN,)),
        Form("channel *: open failed: administratively prohibited: *", "no opening", (STARTED,)),
        Form("debug1: client_input_channel_req: channel * rtype exit-status reply *", "ended", (STARTED,)),
        Form("debug1: client_input_channel_req: channel * rtype exit-signal reply *", "signal", (STARTED,)),
        Form("debug1: Exit status *", "status", (STARTED,)),
    )
    # Lines on stderr, where a jump host's client speaks before the session.
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
            ("Tunnel", "no"),  # a kernel needs no network device, and many servers refuse one
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
        Form("Started a shell/command", "command", (LOGGED_IN,)),
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
        Form("Remote debug message: " + OVERRIDDEN, "exposed", BEFORE_START),
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

    OpenSSH writes ``user@host's password: `` for password authentication, cut to 30 and 128 characters
    (sshconnect2.c), and since 8.5 ``(user@host) `` before what the server asks for keyboard-interactive. Where
    that prefix may be missing, a prompt is only trusted when nobody else can ask.

    :param host: the host as ssh knows it, aliases resolved
    :param alone: whether no jump host could be the one that asks
    :param prefixed: whether this ssh is known to say who asks
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


# ----------------------------------------------------------------------------------------------- tries

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
        self.connected = False  # whether the kernel has connected to its main link
        self.ended = False  # whether the kernel has ended
        self.status = None  # the kernel's exit code
        self.code = None  # the client's
        self.shared = False  # the client shares a connection that was there
        self.proxy = False  # others may speak before the server does
        self.tried = False  # the client has begun to connect
        self.reached = False  # the server itself has spoken
        self.exposed = False  # the server opens the forwarded ports to its network
        self.half = None  # the line that says that a login needs more than the step which was accepted
        self.signal = False  # a signal has ended the kernel
        self.unanswered = None  # the line on a front end that did not answer when the kernel had connected
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
        """True until the server itself has sent a line; a proxy's lines do not count."""
        return self.proxy and not self.reached

    @property
    def said_by_others(self):
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
    "command": STARTED,
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
        "the login has no terminal at its standard input: no look before the kernel",
        once("guarded", False),
    ),
    "stale": ("the shared connection is gone", another_connection),
    "lost": ("the shared connection that has just been made is gone: without one", once("share", None)),
    "full": ("the shared connection takes no further kernel, or does not answer", full),
    "dropped": ("the server closed the connection before the login", try_again_later),
}


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


def ending(facts, code):
    """How a kernel has ended, as far as that is known. A client that shares a connection hears of no signal."""
    if facts.signal:
        return BY_SIGNAL
    return "with exit code {}".format(code) + (", or " + BY_SIGNAL if facts.shared and code == 255 else "")


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
        places = room("windows", "Windows needs").windows_places(environ)
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
    if WINDOWS:
        return room("windows", "Windows needs").which_on_windows(name, environ, folders)
    for folder in ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin", "/opt/local/bin"):
        folders += [folder] if folder not in folders else []
    return [os.path.join(folder, name) for folder in folders]


def private_folder(environ):
    """A folder of this user's own for what is temporary; made when missing.

    :raises OSError: there is none, or somebody else's stands in its place
    """
    if WINDOWS:
        return room("windows", "Windows needs").temporary_folder(environ)
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


def has_private_folder():
    """Whether there is one in which sockets and named pipes can be."""
    try:
        return not WINDOWS and bool(private_folder(os.environ))
    except OSError:
        return False


class Log:
    """The log of one launch: all that a user of a front end has. Never fails once it is open. Of what others say
    only so much is kept that nobody can fill a disk.
    """

    path = descriptor = None
    on_quote = staticmethod(lambda who, line: None)  # hears what others say

    def __init__(self, folder, script, environ):
        self.room = {}  # who speaks: how many bytes there is room for
        now = time.localtime()
        day = time.strftime("%Y-%m-%d", now)
        name = "{}_{}_{}".format(script, time.strftime("%Y-%m-%d-%H%M%S", now), os.getpid())
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
        self.on_quote(who, line)
        room = self.room.get(who, LOG_BYTES)
        self.room[who] = room - len(line) - len(who)
        if self.room[who] > 0:
            self.write("{}: {}".format(who, line))
        elif room > 0:
            self.write("{}: ... what comes from here on is not logged".format(who))


class Loop:
    """Waits for whatever comes first: something to read, room to write, or a moment in time."""

    def __init__(self):
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
        import select  # not before: the first step comes after the client's start

        wait = None
        if self.timers:
            wait = max(0, min(self.timers)[0] - time.monotonic())
        writers = list(self.writers)
        # Windows tells of a connection that has failed among the exceptions.
        readable, writable, failed = select.select(list(self.readers), writers, writers if WINDOWS else (), wait)
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

    A session of its own has no terminal, so no prompt waits at one; and its group holds what the client starts.
    Should this launcher be killed, a watchdog that holds the other end of a pipe ends that group.

    :param sinks: for ``out`` and ``err`` a function that takes their bytes, empty ones at the end
    :param inherit: descriptors that the client shall have, closed here afterwards
    :param watched: whether the client needs a watchdog: not when it ends by itself
    :param line: for a client whose output and input are the caller's, as ``source`` and ``sink``: the watchdog's
        command as a function of a process id, and the last word that the watchdog says in place of the launcher
    :param afterwards: what the watchdog has to run in the end, as arguments
    """

    # By force in the end, and by its own number too: a client that has just been forked leads no group yet.
    WATCHDOG = 'read -r _&&exit;kill -s TERM -- "-$1";sleep 1;kill -s KILL -- "-$1" "$1";shift;"$@"'
    WATCHDOG = ["/bin/sh", "-c", WATCHDOG, "tunnel-watchdog"]

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
                os.write(self.leash, b"\n")  # tells the watchdog that the client has ended by itself
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
    """:func:`os.fork`.

    :raises Fatal: there are too many processes, which is no defect
    """
    try:
        return os.fork()
    except OSError as error:
        text = "no further process can be started ({}): raise the limit (ulimit -u)"
        raise Fatal(text.format(error.strerror), EX_UNAVAILABLE) from None


def spawn(argv, environment, streams, inherit=(), gate=(), unneeded=()):
    """Start a program in a session of its own.

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
            os.write(2, "it cannot be executed ({})\n".format(error.strerror).encode("utf-8", "replace"))
    finally:
        os._exit(127)


def client_class():
    """How this system runs a client: :class:`Client`, or what stands for it on Windows."""
    return room("windows", "Windows needs").WindowsClient if WINDOWS else Client


def catch_signals(loop, on_signal):
    """Have the loop call ``on_signal(number)`` when this process is asked to end, and wake up for a child's end.

    :returns: what has to be referred to for as long as that shall go on
    """
    import _signal

    if WINDOWS:
        from socket import socketpair
    else:
        from _socket import socketpair

        _signal.signal(_signal.SIGCHLD, lambda *_: None)
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
    if not WINDOWS:
        # detach() blocks these signals, and so do programs with threads: those that have come are delivered now.
        blocked = [getattr(_signal, name) for name in ENDING]
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, blocked + [_signal.SIGCHLD])
    return near, far


def watch_front_end(timers, link, gone, first=FRONT_END_SECONDS):
    """Look for the front end while nothing connects to it; see ``tunnel_lib/system.py``."""
    system = room_if_there("system")
    if system:
        system.look_for_front_end(timers, link, gone, first)


# -------------------------------------------------------------------------------------------- channels


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
    stranger = log is not None and ask_system("stranger_at", connection, None)
    if stranger:
        log.write("a connection from {} was turned away".format(stranger))
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
    system = room_if_there("system")
    if system:
        system.look_up_in_thread(loop, look_up, done)
        return
    try:
        done(look_up(), None)
    except (OSError, UnicodeError) as error:
        done([], str(error))


def ask_system(question, connection, otherwise):
    """What ``tunnel_lib/system.py`` tells of a connection.

    :param question: a function of that file
    :param otherwise: the answer where that file is not there
    """
    system = room_if_there("system")
    return getattr(system, question)(connection) if system else otherwise


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
        if ask_system("has_hung_up", self.socket, False):
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
            self.deaf, sent = True, len(data)  # what the peer has sent before can still be read
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
    def untaken(self):
        """How many bytes the peer has not taken yet, those that the system holds for it included."""
        return len(self.pending) + (0 if self.deaf else ask_system("unsent", self.socket, 0))

    def close(self):
        self.loop.cancel(self.timer)
        self.loop.readers.pop(self.socket, None)
        self.loop.writers.pop(self.socket, None)
        self.socket.close()
        self.on_data = self.on_finish = self.on_room = self.on_close = lambda *_: None
        self.pending, self.finishing = b"", False


class Channel:
    """Two ends joined: bytes both ways, half-closes included. An end is read only while the other has taken
    all that came before, so memory never grows.

    :param to_kernel, to_front_end: what replaces link names on that way, a ``NameFilter``, or None
    :param is_main: whether this is the main link's data channel, with which a front end goes
    """

    def __init__(self, board, kernel, front_end, to_kernel=None, to_front_end=None, is_main=False):
        self.board, self.kernel, self.front_end, self.is_main = board, kernel, front_end, is_main
        self.filters = {kernel: to_front_end, front_end: to_kernel}  # by where the bytes come from
        self.over = set()  # the ends from which nothing more comes
        self.is_open = True
        for end in (kernel, front_end):
            end.on_data = lambda data, end=end: self.data(end, data)
            end.on_finish = lambda end=end: self.finished(end)
            end.on_room = lambda end=end: self.room(end)
            end.on_close = lambda end=end: self.closed(end)
            if self.filters[end]:
                self.filters[end].on_release = lambda data, end=end: self._pass_on(end, data)
        for end in (kernel, front_end):
            if self.is_open:
                end.resume()

    def other(self, end):
        return self.front_end if end is self.kernel else self.kernel

    @property
    def delivered(self):
        """Whether the front end has all that the kernel has sent."""
        return not self.is_open or (self.kernel in self.over and not self.front_end.untaken)

    def data(self, end, data):
        """Bytes have come from ``end``."""
        if self.board.kernel_over and end is self.front_end:
            return  # to write them to a client that is about to close would cost what it has not handed on yet
        if self.filters[end]:
            data = self.filters[end].feed(data)
            if self.filters[end].is_over:
                self.filters[end] = None
        self._pass_on(end, data)
        self.board.on_moved()

    def _pass_on(self, end, data):
        if data and self.is_open and not self.other(end).write(data):
            end.pause()

    def _release(self, end):
        """Nothing more comes from ``end``: what was held as the beginning of a link name goes on."""
        if self.filters[end]:
            self.filters[end].stop()

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
        self.board.end_finished(self, end)
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
                if self.filters[end]:
                    self.filters[end].stop()
                end.close()
            self.board.on_moved()


class Switchboard:
    """Joins the kernel's connections to the front end's: those of the main link, however ``way`` carries them.

    Further links, whose names the two sides tell each other later, are the matter of ``NamingSwitchboard`` in
    ``tunnel_lib/names.py``, which gives :meth:`target`, :meth:`filters` and :meth:`called` more to do.

    :param link: the main link, as the front end listens for it
    :param way: how connections are carried; see :class:`Forwards`

    Called back, each to be set by the owner, from within the loop's steps; none may close the board:

    - ``on_connected()``: the kernel's main data channel has been joined to the front end's, for the first time
    - ``on_front_end_gone()``: the front end has closed the main link, or has died, while the kernel has not
    - ``on_moved()``: bytes have moved, or a channel has closed
    """

    def __init__(self, loop, log, link, way):
        self.loop, self.log, self.link, self.way = loop, log, link, way
        self.channels = []
        self.on_connected = self.on_front_end_gone = self.on_moved = lambda: None
        self.connected = self.kernel_over = False
        self.unanswered = None  # the line on a front end that did not answer while the kernel had connected

    def target(self, position):
        """Where the channel leads that comes in at the kernel's port of this position.

        :param position: 0 and 1 are the main link's data and message channel, then those of further links
        :returns: host and port; None when nobody has been told that port yet
        """
        return self.link.ends[position] if position < 2 else None

    def filters(self, position):
        """What replaces link names in a channel, on its way to the kernel and on that to the front end."""
        return None, None

    def arrived(self, position, end):
        """A connection has come from the kernel, at its port of this position."""
        target = self.target(position)
        if target is None:
            end.close()
            return
        dial(self.loop, *target, lambda *found: self._join(position, end, target, *found))

    def _join(self, position, kernel, target, connection, reason):
        if connection is None:
            self.unanswered = "the front end does not answer at {1}@{0}: {2}".format(*target, reason)
            self.log.write(self.unanswered)
            kernel.close()
            return
        front_end = SocketEnd(self.loop, connection)
        if position == 0:
            front_end.on_gone = lambda: self.on_front_end_gone()
        channel = Channel(self, kernel, front_end, *self.filters(position), is_main=position == 0)
        self.channels.append(channel)
        if position == 0 and not self.connected:
            self.connected = True
            self.on_connected()

    def called(self, position, end):
        """The front end has connected to a port that it has been told for a link of the kernel's."""
        end.close()

    def end_finished(self, channel, end):
        """One end of a channel has finished or broken."""
        if channel.is_main and end is channel.front_end and channel.kernel not in channel.over:
            self.on_front_end_gone()
        self.on_moved()

    @property
    def delivered(self):
        """Whether the front end has all that the kernel has sent."""
        return all(channel.delivered for channel in self.channels)

    @property
    def under_way(self):
        """How many bytes the front end has not taken yet."""
        return sum(channel.front_end.untaken for channel in self.channels if channel.is_open)

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


# ------------------------------------------------------------------------------------------- one launch


class Askpass:
    """Answers ssh's password prompt, once, through the script itself as ``SSH_ASKPASS`` helper, which knows only
    where to ask, and a token. No file, argument or environment variable holds the password.

    After a prompt that nobody answers ssh must not go on: it would send an empty answer, and a jump host's ssh
    three of them. So each ssh without a desktop has this helper, with a password or without one.

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
    kind = "Confirm " if "SSH_ASKPASS_PROMPT" in os.environ else ""  # so since 8.4: wants a yes, or to be seen
    answer = b""
    with socket.create_connection((LOOPBACK, int(port)), LOGIN_SECONDS) as connection:
        connection.sendall("{}\n{}{}".format(token, kind, prompt).encode("utf-8", "surrogateescape"))
        connection.shutdown(socket.SHUT_WR)
        while len(answer) < 65536:
            more = connection.recv(4096)
            if not more:
                break
            answer += more
    sys.stdout.buffer.write(answer)
    return 0 if answer else 1


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
        notes = room_if_there("notes")
        if notes:
            notes.sweep(folder)
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
            self.path = room("windows", "Windows needs").temporary_file(data)
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


def report_step(launch, event, line):
    """An event may be a step of the launch."""
    if event in ("name", "proxy", "host key", "login"):
        for start in ("debug1: ", "Connecting to ", "Server host key: ", "Executing proxy command: "):
            line = line[len(start) :] if line.startswith(start) else line
        launch.step(event, line.strip())
    elif event == "told no terminal":
        launch.log.write(NO_TERMINAL)


class Try:
    """One try at a connection: a client process, what it says, and how long that may take. What the try has found
    out is in ``facts``; nothing else of it outlives :meth:`run`.

    There are three kinds: :class:`ForwardedTry`, ``LoginTry`` in ``share.py``, ``RelayedTry`` in ``relay.py``. The
    methods below the line "what a kind does" are where they differ.

    :param launch: what tries have in common: request, program, log, loop, and who hears of its steps
    :param plan: what the client forwards and runs
    """

    def __init__(self, launch, settings, plan):
        self.launch, self.settings, self.plan = launch, settings, plan
        self.loop, self.log, self.dialect = launch.loop, launch.log, launch.dialect
        self.facts = Facts()
        self.said = Transcript(self.dialect, self.facts, self.log, settings.separate, self.hear)
        self.timers = Timers(self.loop)
        self.client = self.askpass = self.pipe = None
        self.password = PlinkPassword(None)
        self.may_ask = settings.asks  # whether ssh may ask somebody, or will ask for nothing
        self.client_options = {}  # what else the client's process needs; see Client

    def run(self, name):
        """Start the client, and see it to its end.

        :param name: what the log calls this try
        :returns: the facts
        """
        try:
            self._start(name)
            while not self.is_over():
                if self.launch.signal and "kill" not in self.timers and "leave" not in self.timers:
                    self.interrupt()  # it came before there was a client to end, or while another try ran
                self.loop.step()
        finally:
            self.clean_up()
        facts = self.facts
        facts.code = self.client.code
        if facts.stage < LOGGED_IN and facts.code == self.dialect.failure:
            self.client.end()  # a chain of jump hosts may not end with the first of its clients
        self.log.write("the client ended with exit code {}".format(self.client.code))
        if facts.stage == SILENT and facts.code in (126, 127):  # with which no client ends by itself
            said = ["it ended with exit code {}".format(facts.code)] + facts.aside + facts.said
            raise Fatal("no SSH client: {}: {}".format(self.launch.program, said[-1].strip()), EX_UNAVAILABLE)
        return facts

    def _start(self, name):
        environment, argv = self.launch.environment, [self.launch.program]
        password = self.launch.request.destination.password
        if self.dialect is Plink:
            self.password = PlinkPassword(password)
            words = self.password.words
            argv += Plink.arguments(self.launch.request, self.plan, self.launch.program, words)
        else:
            if self.settings.separate:
                self.pipe = LogPipe(self.loop, self.said.client)
            if password or not self.may_ask:
                self.askpass = Askpass(self.launch, self.settings, lambda: self.facts.version, self._asked)
                environment = self.askpass.environment(environment)
            argv += self.openssh_words(self.pipe and self.pipe.path)
        self.log.write("{}: {}".format(name, printable_command(argv)))
        sinks = {"out": Lines(self.said.output).feed, "err": Lines(self.said.errors).feed}
        inherit = self.password.inherit
        self.client = client_class()(self.loop, argv, environment, sinks, inherit, **self.client_options)
        self.timers.within("login", LOGIN_SECONDS, lambda: self.end("no login"))
        self.begin()
        self._expect_answer()

    def _expect_answer(self):
        """Give the server another while to go on with the key exchange. ssh's own ``ConnectTimeout`` ends
        with the server's first line, and plink has none."""
        if self.facts.stage == SILENT:
            seconds = self.answer_seconds()
            if seconds:
                self.timers.within("answer", seconds, self.no_answer)
        else:
            self.timers.disarm("answer")

    def end(self, why):
        """End the client; the first reason is the one that counts."""
        self.facts.stopped_by = self.facts.stopped_by or why
        if self.client and self.client.code is None and "kill" not in self.timers:
            self.facts.killed = True
            self.client.end()
            self.timers.within("kill", KILL_SECONDS, lambda: self.client.end(force=True))

    def hear(self, event, line):
        """Take an event into the facts, and act on what has changed."""
        self.password.remove()
        if event is None or event[0] in self.ignored:
            self._expect_answer()
            return
        facts = self.facts
        before = facts.stage, facts.exposed
        note(facts, self.settings, self.plan, event[0], event[1], line)
        self._expect_answer()
        if self.askpass and facts.stage >= LOGGED_IN:
            self.askpass.close()
        report_step(self.launch, event[0], line)
        if facts.obstacle and facts.obstacle not in ENDS_ITSELF:
            self.end("obstacle")
        if facts.stage == STARTED and before[0] != STARTED:
            self.started()
        if facts.exposed and not before[1]:
            self.launch.step("server", EXPOSED)
        if event[0] == "shared":
            self.shares()
        if facts.ended:
            self.kernel_ended()

    def _asked(self, prompt, again):
        """ssh asks for what nobody here can answer."""
        self.facts.meet("refused" if again else "asked", prompt)
        self.end("obstacle")

    def hung(self):
        """A shared connection does not answer."""
        if self.facts.stage != STARTED:
            self.facts.meet("stale" if self.settings.share else "full", "the shared connection does not answer")
            self.end("obstacle")

    # -- what a kind does

    ignored = ()  # events that say nothing to this kind
    ends_client = True  # whether a client that a defect has left is ended by force

    def openssh_words(self, log):
        """ssh's arguments.

        :param log: the file that takes its own words, if any
        """
        return OpenSSH.arguments(self.launch.request, self.plan, self.settings, log)

    def begin(self):
        """The client has been started."""

    def answer_seconds(self):
        """How many seconds the server may take until it goes on with the key exchange; 0 for no limit."""
        seconds = self.launch.connect_seconds
        return seconds and seconds + 0.5

    def no_answer(self):
        """That time is over."""
        self.end("no answer")

    def shares(self):
        """The client goes over a connection that was there already."""

    def started(self):
        """The server has been told to run what the plan says; the forwards stand.

        :returns: whether nothing is in the way
        """
        self.timers.disarm("login", "answer", "ssh session")
        return not self.facts.obstacle

    def kernel_ended(self):
        """The client has told that the remote command has ended."""

    def interrupt(self):
        """A signal asks the launch to end."""
        self.end("signal")

    def is_over(self):
        """Whether the client has ended, and nothing is left to do."""
        return self.client.poll()

    def clean_up(self):
        """Leave nothing behind."""
        self.timers.disarm()
        for each in (self.askpass, self.pipe):
            if each:
                each.close()
        self.password.remove()
        if self.ends_client and self.client and self.client.code is None:
            self.client.end(force=True)  # only a defect leaves one

    def learn(self):
        """This try is over: take back what it has left, and remember for later launches what it has found out."""
        facts, settings = self.facts, self.settings
        share = facts.shared and room_if_there("share")
        if share:
            share.take_forwards_back(self.launch, facts, settings, self.plan)
        if facts.obstacle == "no terminal":
            self.launch.memory.remember("terminal", "no")
        elif facts.stage == STARTED and settings.guarded and facts.connected:
            self.launch.memory.remember("terminal", "yes")
        if self.launch.shared and settings.share:
            self.launch.shared.learn(facts, settings)


class ForwardedTry(Try):
    """A try at a launch through forwarded ports: as the shell scripts did it, but watched."""

    def __init__(self, launch, settings):
        request, loop = launch.request, launch.loop
        # No client tells whether a channel still carries data, nor which side has closed it: so all lead through
        # this process.
        block = range(max(settings.ports), max(settings.ports) + 9)  # which the client may listen on here
        names = names_room(request)
        inward = 4 if names and request.inward else 0
        self.way = Forwards(loop, launch.log, 6 if request.callback else 2, inward, block)
        super().__init__(launch, settings, Plan(request, settings, self.way.ports))
        plan = self.plan
        if names:
            self.board = names.NamingSwitchboard(loop, self.log, request.link, self.way, plan.link, plan.pairs)
        else:
            self.board = Switchboard(loop, self.log, request.link, self.way)
        self.board.on_connected, self.board.on_front_end_gone = self._connected, self._front_end_gone
        self.way.serve(self.board)
        self.names, self.probe, self.delivery, self.delivered = names, None, None, False
        self.may_ask = settings.asks or bool(settings.share)
        if self.dialect is OpenSSH:  # should this launcher be killed: forwards stay on a connection that is shared
            self.client_options = {"afterwards": launch.asking("cancel", settings, plan.forward_words)}

    def begin(self):
        request = self.launch.request
        for forward in self.plan.forwards:
            self.log.write("  {} {}".format(forward.flag, forward))
        if self.names:
            self.names.NameReplacer.prepare()  # while the server is asked
        self.timers.within("connect", CALLBACK_SECONDS, self._no_connection)
        watch_front_end(self.timers, request.link, lambda: self.end("front end gone"))

    def answer_seconds(self):
        # The process behind a shared connection takes longer: ssh may be reading its configuration.
        return SHARED_SECONDS if self.settings.share else super().answer_seconds()

    def no_answer(self):
        # ssh that has not even begun to connect may be waiting for the process behind a connection to share.
        waits = self.dialect is OpenSSH and not (self.facts.tried or self.settings.own)
        if self.settings.share or waits:
            self.hung()
        else:
            self.end("no answer")

    def _no_connection(self):
        if not self.facts.connected:
            why = room_if_there("why")
            tell = why and why.not_called_back(self.launch, self.facts, self.settings)
            self.log.write(tell or "the kernel has not called back within {} s".format(CALLBACK_SECONDS))
        if self.launch.check:
            self.end("no kernel")

    def end(self, why):
        super().end(why)
        if self.delivery:
            self.delivery.stop()

    def checked(self):
        """``--check`` has seen what it wanted to see."""
        self.end("checked")

    def shares(self):
        """The process behind a shared connection may hang, or its connection have died unnoticed."""
        if not self.settings.share:
            self.timers.within("login", SHARED_SECONDS, self.hung)
        if self.facts.version < SAYS_SESSION:
            self.timers.within("ssh session", SESSION_SECONDS, self._session_stands)
        elif self.settings.share:
            self.timers.within("ssh session", self.launch.shared.patience, self.hung)

    def _session_stands(self):
        if self.facts.stage != STARTED:
            self.facts.stage = STARTED
            self.started()

    def started(self):
        request = self.launch.request
        if not super().started():
            return
        self.launch.step("forwards", "{} ports".format(len(self.plan.forwards)))
        if self.launch.check is None:  # nobody knows yet whether there is such a kernel
            self.launch.step("kernel", "started")
        if request.role is CONTROLLER and not request.callback:
            ports = [forward.port for forward in self.plan.forwards if forward.flag == "-L"]
            probe = room_if_there("probe")
            self.probe = probe and probe.Probe(self.loop, ports, self._held)
        self.launch.started(self)

    def _held(self, port):
        self.facts.meet("held", "port {} is in use on the kernel machine".format(port))
        self.log.write(self.facts.evidence)
        if not self.facts.connected:  # else the front end's link is taken: no other try can have it
            self.end("obstacle")

    def _connected(self):
        self.facts.connected, self.facts.stage = True, STARTED  # whatever the client has said of it
        self.timers.disarm("connect", "answer", "login", "ssh session", "front end")
        if self.probe:
            self.probe.kernel_is_there()
        if self.launch.shared:
            self.launch.shared.hush()
        self.log.write("the kernel has called back after {:.1f} s".format(self.launch.seconds))
        self.launch.path_is_right()

    def _front_end_gone(self):
        """The front end has closed the main link, or has died. The kernel has a while to see that for itself."""
        if not self.facts.ended:
            self.timers.within("notice", NOTICE_SECONDS, lambda: self.end("front end gone"))

    # -- the end

    def kernel_ended(self):
        self.timers.disarm("notice")
        self._deliver()

    def is_over(self):
        """Whether the client has ended, and the front end has what the kernel has sent."""
        if not self.client.poll():
            return False
        if self.facts.stopped_by is None:
            self._deliver()
            return self.delivered
        return True

    def _deliver(self):
        """The kernel has ended, or the client has: what is under way is delivered before all connections are
        closed."""
        if not self.delivery and not self.facts.stopped_by:
            self.delivery = Delivery(self.loop, self.board, self._let_go)

    def _let_go(self):
        """Close all connections: a front end may keep its side open for ever, and so may what a kernel has left
        behind. The client then ends by itself, unless it carries others, and tells the kernel's exit code."""
        self.delivered = True
        self.board.close()
        known = self.facts.status is not None  # as plink tells it
        self.timers.within("late", KNOWN_SECONDS if known else LATE_SECONDS, lambda: self.end("links held"))

    def learn(self):
        facts = self.facts
        facts.unanswered = self.board.unanswered
        if self.settings.guarded and facts.code == 1 and not facts.connected:
            if facts.shared and REFUSED_TERMINAL in facts.printed + facts.aside:
                facts.meet("no terminal", REFUSED_TERMINAL)
            elif facts.kernel_ended and all(line.startswith(FAREWELLS) for line in facts.printed):
                facts.meet("guard", "exit code 1, without a word")  # a kernel that fails says why
        super().learn()

    def clean_up(self):
        for each in (self.probe, self.delivery):
            if each:
                each.stop()
        self.board.close()
        self.way.close()
        super().clean_up()


def names_room(request):
    """``tunnel_lib/names.py``, for a launch whose links may be named later; None for any other.

    :raises Fatal: a front end of 11.1 or later needs that file, and it is not there
    """
    if request.callback:
        return room("names", "controller kernels of 11.1 and later need")
    if not request.inward:
        return None
    return room_if_there("names")  # without it a kernel up to 11.0 is reached at its own ports, as by the scripts


def room(name, who):
    """Load a file of ``tunnel_lib``; each of those files does one thing that the shell scripts did not do.

    :param name: the file's, without its ending
    :param who: who needs the file, for the error
    :returns: the module, loaded when this is called first
    :raises Fatal: the file is not there, or belongs to another version
    """
    name = "tunnel_lib." + name
    if name in sys.modules:
        return sys.modules[name]
    folder = os.path.dirname(os.path.abspath(__file__))
    if folder not in sys.path:  # an embeddable Python, or a safe path
        sys.path.insert(0, folder)
    try:
        try:
            __import__(name)
        except DAMAGED:
            forget_byte_code()
            __import__(name)
    except ImportError as error:
        text = "{} the folder tunnel_lib beside tunnel.py, all of it and of its version ({}); run install.py again"
        raise Fatal(text.format(who, error), EX_SOFTWARE) from None
    if not sys.modules["tunnel_lib"].is_of_one_version():
        del sys.modules[name]
        raise Fatal("Tunnel has been updated while this launch ran; launch again", EX_SOFTWARE)
    return sys.modules[name]


def room_if_there(name):
    """A file of ``tunnel_lib`` that a launch can do without; None where it is not there."""
    try:
        return room(name, "nobody needs")
    except Fatal:
        return None


# What Python raises for byte code that was cut short, as a disk that is full does: it trusts the first bytes. The
# drop-ins and tunnel_sub.py know them too, since this file may be the one. Without a tag only sources are read.
DAMAGED = (EOFError, TypeError, ValueError)


def forget_byte_code():
    """Read sources only, and remove the byte code of these files, so that the next launch makes it anew."""
    sys.implementation.cache_tag = None
    here = os.path.dirname(os.path.abspath(__file__))
    for folder in (here, os.path.join(here, "tunnel_lib"), os.path.join(here, "tunnel_lib", "sent")):
        folder = os.path.join(folder, "__pycache__")
        try:
            for name in os.listdir(folder):
                if name.startswith("tunnel") or folder != os.path.join(here, "__pycache__"):
                    os.remove(os.path.join(folder, name))
        except OSError:
            pass  # then the sources are read each time


def keep_last(lines, line):
    """Add a line to those of which the last 200 are kept."""
    lines.append(line)
    del lines[:-200]


class NoMemory:
    """Stands for the notes of earlier launches where ``tunnel_lib`` is not there: none is known, none kept."""

    path = None

    def read(self):
        return {}

    def remember(self, key, value):
        pass


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
        self.begin = time.monotonic()
        notes = room_if_there("notes")
        self.memory = notes.Memory(notes.memory_path(request, program, log)) if notes else NoMemory()

    @property
    def seconds(self):
        return time.monotonic() - self.begin

    @property
    def connect_seconds(self):
        """How long a host may take to answer; 0 for as long as the system waits."""
        text, system = self.request.option("ConnectTimeout"), room_if_there("system")
        return system.parse_seconds(text, CONNECT_SECONDS) if system else 0 if text else CONNECT_SECONDS

    def run(self):
        """Launch, watch, explain.

        :returns: the exit code
        :raises Fatal: the launch failed; the text says why
        """
        request = self.request
        names = names_room(request)
        self.caught = self.caught or catch_signals(self.loop, self.on_signal)
        if WINDOWS and not room("windows", "Windows needs").join_windows_job():
            self.log.write("Windows allows no job: kill the client too, should this launcher be killed")
        if request.check:
            self.check = room("check", "--check needs").Check(self)
        if request.link and request.callback and not names.fits(request.link):
            self.step("link names", names.TOO_SHORT.format(request.link))
        if request.check:
            self.check.begin()
        if request.destination.password and self.dialect is OpenSSH and WINDOWS:
            raise Fatal("host: a password needs plink on Windows; ssh there takes keys only")
        if request.relay is not None:
            if request.share:
                return room("hub", "--share needs").launch_through_hub(self)
            return room("relay", "--relay needs").launch_through_relay(self)
        try:
            facts, settings = self.follow(self.first_settings())
        finally:
            if self.shared:
                self.shared.release()
        return self._finish(facts, settings)

    def first_settings(self):
        """The settings of the first try, from what the request says and earlier launches have learned."""
        request, known, system = self.request, self.recall(), room_if_there("system")
        ssh = self.dialect is OpenSSH
        separate = ssh and has_private_folder()
        wish = (request.option("RequestTTY") or "").lower()
        asked = ssh and wish in ("", "force") and not request.kernel.on_windows
        if request.share and request.relay is None:
            share = room("share", "--share needs")
            path = separate and share.share_path(self.memory.path)
            if path:
                self.shared = share.SharedConnections(self, self.memory, path)
            else:
                self.log.write(share.SHARES_NOTHING)
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
            asks=WINDOWS or not ssh or not system or system.can_ask(os.environ, self.program),
            share="" if self.shared else None,
        )

    def recall(self):
        """What earlier launches to this destination have left word of."""
        known = self.memory.read()
        if "died" in known:
            self.died = "an earlier " + known["died"]
            self.log.write(self.died)
        return known

    def follow(self, settings, kind=ForwardedTry, name="try {}"):
        """Try until a kernel runs and has ended, or until there is nothing left to try.

        :param kind: makes a :class:`Try` of this launch and settings
        :param name: what the log calls a try
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
            outer, self.current = self.current, kind(self, settings)
            current = self.current
            try:
                facts = current.run(name.format(number))
            finally:
                self.current = outer
            current.learn()
            following = after(facts, settings)
            if following is None or self.signal:
                return facts, settings
            self.log.write("{}: trying again".format(following.why))
            if self.check:
                self.check.report("again", following.why)
            settings = following.settings
            # Launches that were dropped in the same moment part here.
            self.pause(following.pause * (1 + os.urandom(1)[0] / 255))

    def asking(self, command, settings, words=()):
        """The arguments with which the process behind a shared connection is asked to do something."""
        return [self.program, "-O", command] + list(words) + OpenSSH.login(self.request, settings)

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
                still = lambda: one.client.code is None and not self.teller.has_told  # noqa: E731
                self.loop.after(VERIFY_SECONDS, lambda: still() and self.path_is_right())

    def path_is_right(self):
        """The kernel has connected, or runs at least: remember its path."""
        if self.request.role is COMPUTE:
            self.memory.remember("kernel " + self.request.kernel.path, time.strftime("%Y-%m-%d %H:%M:%S"))
            self._tell()

    def _tell(self):
        """The launch stands; what has been kept of an earlier one is said now."""
        if self.died and not self.teller.has_told:
            self.memory.remember("died", None)
        self.teller.tell(0, self.died)

    def pause(self, seconds):
        """Let ``seconds`` pass; a signal ends it."""
        over = []
        self.loop.after(seconds, lambda: over.append(True))
        while not over and not self.signal:
            self.loop.step()

    def on_signal(self, number):
        """A signal has come that asks this process to end."""
        if self.signal is None and self.spared(number):
            return
        self.signal = self.signal or number
        if self.current:
            self.current.interrupt()

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
        if self.request.role is COMPUTE and self.teller.has_told and not facts.connected:
            self.remember_death(text, self.request)
        raise Fatal(text, code)

    def remember_death(self, text, request):
        """Have the next launch tell that a kernel ended before it connected, though its launch had returned."""
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self.memory.remember("died", "launch, at {}, failed after it had returned: {}".format(when, text))
        self.memory.remember("kernel " + request.kernel.path, None)


def explain(launch, facts, settings, request=None):
    """Why a launch has failed, and what to try next: one line, from what its last try has found out.

    :param launch: for its client, and how long it has waited
    :param request: another than the launch's own
    """
    request, why = request or launch.request, room_if_there("why")
    if why:
        text = why.reason(launch, facts, settings, request)
    else:
        last = (["it said nothing"] + facts.aside + facts.printed + facts.said)[-1].strip()
        text = "{} ended with exit code {} ({}); the folder tunnel_lib beside tunnel.py would tell more"
        text = text.format(launch.dialect.kind, facts.code, last)
    return "launching {} on {}: {}".format(request.role, request.destination, text)


def printable_command(argv):
    """A command line as a POSIX shell would take it; for logs and eyes only."""
    words = []
    for word in argv:
        plain = word.translate({ord(character): None for character in "@%+=:,./-_~"})
        words.append(word if plain.isalnum() else "'{}'".format(word.replace("'", "'\\''")))
    return " ".join(words)


# ------------------------------------------------------------------------------------------------ main


class Teller:
    """Tells exit code and line of a launch, once: to whoever waits at the other end of a pipe, if anybody does."""

    def __init__(self, descriptor=None):
        self.descriptor, self.has_told = descriptor, False

    def tell(self, code, text):
        if self.descriptor is None or self.has_told:
            return
        self.has_told = True
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
        forget_byte_code()  # whoever started this has found it damaged
    folder = os.path.dirname(os.path.abspath(__file__))
    inside = "TUNNEL_DETACHED" in os.environ
    if inside:
        argv = room("windows", "Windows needs").detached_arguments()
    request = parse_arguments(role, argv)
    in_front = role is CONTROLLER or request.dry_run or request.check
    if WINDOWS and not in_front and not inside:
        return room("windows", "Windows needs").detach_on_windows(os.path.join(folder, script + ".py"), argv)
    program, dialect = find_client(request.client, os.environ)
    dialect.check(request)
    if request.dry_run:
        return room("check", "--dry-run needs").dry_run(request, program, dialect)
    system = room_if_there("system")
    if system:
        system.hide_password(request.destination.password)
        system.let_go_of_descriptors()
    log = Log(folder, script, os.environ)
    log.write("tunnel {}, {}.py, Python {}, {}".format(VERSION, script, sys.version.split()[0], sys.platform))
    log.write("{} {} {}".format(request.destination, request.kernel.path, request.link or "--check"))

    def run(teller):
        return logged(log, lambda: Launch(request, program, dialect, log, teller).run())

    if in_front:
        return run(Teller())
    if request.share and request.relay is not None:
        hub = room("hub", "--relay needs")
        code = logged(log, lambda: hub.join_hub(Launch(request, program, dialect, log, Teller())))
        if code is not None:
            return code

    def work(teller):
        code, text = guarded(lambda: run(teller))
        teller.tell(code, text)
        return code

    return work(Teller(1)) if inside else detach(work)


def detach(work):
    """Launch in a process of its own, and return as soon as the launch stands or has failed.

    The parallel tools start one kernel after the other, so this has to return; but somebody has to stay
    and end the client when its kernel has ended.

    :param work: called with a :class:`Teller`
    """
    import _signal

    reader, writer = os.pipe()
    # A signal waits until the process that gets it can act on it; in the child catch_signals() unblocks them.
    blocked = [getattr(_signal, name) for name in ENDING]
    _signal.pthread_sigmask(_signal.SIG_BLOCK, blocked)
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
    for number in blocked:
        _signal.signal(number, lambda number, _: os.kill(child, number))
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, blocked)
    return Teller.hear(b"".join(iter(lambda: os.read(reader, 4096), b"")))


if __name__ == "__main__":
    sys.modules["tunnel"] = sys.modules["__main__"]  # as which the files of tunnel_lib import this one
    sys.exit(main())
