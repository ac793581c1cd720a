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
ALIVE_SECONDS, ALIVE_COUNT = 15, 3  # a server that has fallen silent is noticed within 15 * (3 + 1)
START_SECONDS = 2.0  # how long a compute kernel that has not called back yet may still fail to start
DRAIN_SECONDS = 1.0  # from the kernel's end to the end of a client that still holds connections
KILL_SECONDS = 1.0  # from SIGTERM to SIGKILL
CALLBACK_SECONDS = 120  # a kernel that has not called back by then is noted in the log
NAMES_SECONDS = 300  # how long the switchboard looks for link names
HOLD_SECONDS = 0.2  # how long it holds the beginning of what may become a link name
KERNEL_LINES = 1000  # of what a kernel prints, how much goes into the log
SHARE_SECONDS = 60  # how long a shared connection outlives its last kernel

DEFECT = "a defect of tunnel stopped the launch{}; TUNNEL_DEBUG=1 logs where"

EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE = 2, 69, 70

USAGE = """\
usage: {script}.py [options] [user[:password]@]host[:port] kernel_path link_name

Launches a Mathematica {role} on a remote machine, its links carried by SSH.

  -o NAME=VALUE   an OpenSSH option, as for ssh; wins over the built-in ones
  --client NAME   ssh or plink, or the path of one (else TUNNEL_SSH, else what the system has)
  --links KIND    auto, classic (up to 11.0) or callback (11.1 and later)
  --share         one login for all compute kernels on a host (tunnel_sub, OpenSSH)
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

    def __repr__(self):
        return "Destination({})".format(self)

    def __str__(self):
        host = "[{}]".format(self.host) if ":" in self.host and self.port else self.host
        return "{}{}{}{}".format(
            self.user or "",
            ":***" if self.password else "",
            "@" + host if self.user else host,
            ":{}".format(self.port) if self.port else "",
        )

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

    def __repr__(self):
        return "LinkName({})".format(self)

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
    return plain.isalnum() and ascii_only and text[0] not in "-.%" and len(text) <= 255


class Forward:
    """One forwarded port: ``flag`` is ``-R`` or ``-L``, ``port`` the loopback port that listens."""

    __slots__ = ("flag", "port", "host", "to")

    def __init__(self, flag, port, host, to):
        self.flag, self.port, self.host, self.to = flag, port, host, to

    def __str__(self):
        host = "[{}]".format(self.host) if ":" in self.host else self.host
        return "{}:{}:{}:{}".format(LOOPBACK, self.port, host, self.to)

    def __repr__(self):
        return "Forward({} {})".format(self.flag, self)


class Kernel:
    """The kernel program on the remote machine, and what its path says about it."""

    __slots__ = ("path", "version")

    def __init__(self, path):
        """:raises Fatal: the path is empty, or cannot be quoted for the remote shell"""
        if not path.strip() or has_control_characters(path):
            raise Fatal("kernel_path: expected the kernel's path on the remote machine, without line breaks")
        self.path = path
        self.version = version_in(path)
        if self.on_windows and ('"' in path or "%" in path):
            raise Fatal('kernel_path: a Windows path cannot hold " or %; write the directory out')

    @property
    def on_windows(self):
        return self.path[1:3] in (":\\", ":/") or self.path.startswith("\\\\")

    @property
    def switch(self):
        """``-wstp`` from version 10 on, when MathLink got its new name; ``-mathlink`` before."""
        if self.version:
            return "-wstp" if self.version >= (10,) else "-mathlink"
        program = self.path.replace("\\", "/").rpartition("/")[2]
        return "-wstp" if program.lower().startswith("wolfram") else "-mathlink"

    @property
    def links(self):
        """Up to 11.0 the kernel listens for the second and third link; later, the front end does."""
        return CLASSIC if self.version and self.version < (11, 1) else CALLBACK

    @property
    def quoted(self):
        """The path in double quotes, which a POSIX shell and cmd.exe both understand.

        A POSIX shell would still expand inside them, so that is escaped, but for a leading ``~/`` or
        ``$HOME/``, which only the remote shell can resolve.
        """
        if self.on_windows:
            return '"{}"'.format(self.path)
        prefix, rest = "", self.path
        for start, written in (("~/", '~/"'), ("$HOME/", '"$HOME/')):
            if self.path.startswith(start):
                prefix, rest = written, self.path[len(start) :]
        for special in '\\$`"':
            rest = rest.replace(special, "\\" + special)
        return (prefix or '"') + rest + '"'


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
        if all(number.isdigit() and len(number) <= 2 for number in numbers):
            if len(numbers) > 1:
                found = (int(numbers[0]), int(numbers[1]))
            elif word == name and found is None and int(word) >= 6:
                found = (int(word),) if int(word) != 11 else None  # 11.0 and 11.1 differ
    return found


class Request:
    """One launch, as the command line asked for it."""

    def __init__(self, role):
        self.role, self.options, self.client, self.links = role, [], None, "auto"
        self.share = self.dry_run = self.check = False
        self.destination = self.kernel = self.link = None

    @property
    def callback(self):
        """Whether the front end may create links that only a switchboard can carry."""
        return self.role is CONTROLLER and (self.kernel.links if self.links == "auto" else self.links) == CALLBACK

    def option(self, name):
        """The value that ``-o`` gave ``name``, else None; as for ssh, the first one wins."""
        for each, value in self.options:
            if each.lower() == name.lower():
                return value
        return None


def take_flags(request, rest):
    """Take the options from the front of ``rest``; return what follows them.

    :raises Fatal: an option is unknown, or its value is bad
    """

    def value(flag, attached):
        if attached is None and not rest:
            raise Fatal("{}: a value has to follow".format(flag))
        return rest.pop(0) if attached is None else attached

    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            flag, equals, attached = word.partition("=")
            attached = attached if equals else None
        else:
            flag, attached = word[:2], word[2:] or None
        if flag == "-o":
            request.options.append(parse_option(value(flag, attached)))
        elif flag == "--client":
            request.client = value(flag, attached)
            if not request.client or has_control_characters(request.client):
                raise Fatal("--client: expected ssh, plink, or the path of one")
        elif flag == "--links":
            request.links = value(flag, attached)
            if request.links not in ("auto", CLASSIC, CALLBACK):
                raise Fatal("--links: expected auto, classic or callback")
        elif flag in ("--share", "--dry-run", "--check") and attached is None:
            setattr(request, flag[2:].replace("-", "_"), True)
        else:
            name = flag if flag.replace("-", "").isalnum() else "this option"
            raise Fatal("{}: not known; --help lists the options".format(name))
    return rest


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

    def __init__(self, request, ports, relays):
        """:param ports: data and message port of the main link on the kernel machine
        :param relays: where the switchboard listens, main link first; empty without one
        """
        here = request.link
        data, message = ports
        base = max(ports)
        self.link = LinkName(data, LOOPBACK, message, LOOPBACK)
        main = (LOOPBACK, relays[0]) if relays else (here.data_host, here.data_port)
        self.forwards = [
            Forward("-R", data, *main),
            Forward("-R", message, here.message_host, here.message_port),
        ]
        if request.role is CONTROLLER:
            self.forwards += [Forward("-L", base + n, LOOPBACK, base + n) for n in (1, 2, 3, 4)]
        self.pairs = [(base + 5, base + 6), (base + 7, base + 8)] if relays else []
        self.forwards += [
            Forward("-R", port, LOOPBACK, relay)
            for port, relay in zip([port for pair in self.pairs for port in pair], relays[1:])
        ]
        self.command = remote_command(request.kernel, request.role, self.link)

    @property
    def forward_words(self):
        """The forwards as arguments; OpenSSH and plink take the same."""
        return [word for forward in self.forwards for word in (forward.flag, str(forward))]

    def owns(self, port):
        return any(forward.port == port for forward in self.forwards)


def remote_command(kernel, role, link):
    """The command line for the remote shell; its words are those of the shell scripts."""
    words = [kernel.quoted, kernel.switch, "-LinkMode Connect -LinkProtocol TCPIP -LinkName", str(link)]
    words.append("-initfile tunnel.m -lmverbose" if role is CONTROLLER else "-lmverbose -subkernel -noinit")
    return " ".join(words + ["-remotelaunch"])


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


class OpenSSH:
    """How to say it to OpenSSH 7.6 and later, and what its ``-v`` says back."""

    kind = "ssh"
    failure = 255  # its exit code when it is ssh that failed

    # What to look for in a line of the client's, in this order, and what it means.
    events = (
        ("Connecting to ", "name"),
        ("Executing proxy command", "proxy"),
        ("Server host key: ", "host key"),
        ("Authenticated to ", "login"),
        ("Requesting forwarding of ", "shared"),
        ("session request failed", "share refused"),
        ("Control socket connect(", "stale"),
        ('" does not exist', "stale"),  # Control socket "..."
        ("master session id: ", "started"),
        ("Sending command: ", "started"),
        ("client_request_forwarded_tcpip: listen ", "callback"),
        ("PTY allocation request failed", "no terminal"),
        ("rtype exit-", "ended"),
        ("Server has disabled port forwarding", "forwarding disabled"),
        ("remote port forwarding failed for listen port ", "port"),
        ("cannot listen to port: ", "port"),
        ("forwarding request failed", "port"),
        ("Exit status ", "status"),
        ("Permission denied (", "refused"),  # by a jump host, when the connection is dropped as well
        ("exchange_identification: ", "dropped"),
    )

    @staticmethod
    def defaults(request, lenient=False):
        """Options that stand after the user's own ``-o``, so that those win."""
        compression = "yes" if request.role is CONTROLLER else "no"
        values = [
            # Known keys are checked. `no` would accept a changed one, and then refuse all forwards.
            ("StrictHostKeyChecking", "accept-new"),
            # A kernel whose tunnel does not stand must not start. Lenient: when it was a forward of the
            # user's own configuration that failed, which is none of our business.
            ("ExitOnForwardFailure", "no" if lenient else "yes"),
            ("ConnectTimeout", str(CONNECT_SECONDS)),
            ("ServerAliveInterval", str(ALIVE_SECONDS)),
            ("ServerAliveCountMax", str(ALIVE_COUNT)),
            # A connection that the user shares already is used, but none is left behind.
            ("ControlMaster", "no"),
            ("RemoteCommand", "none"),
            # With a terminal the server hangs up on the kernel when the connection ends. Without one a
            # computing kernel stays, and keeps its licence.
            ("RequestTTY", "force"),
            ("ForwardAgent", "yes"),
            ("Compression", compression),
        ]
        if request.destination.password:
            values.append(("NumberOfPasswordPrompts", "1"))
        return values

    @classmethod
    def login(cls, request, extra=(), lenient=False):
        """The arguments that say where and how to log in, but for the host: options, user, port."""
        options = list(extra) + request.options + cls.defaults(request, lenient)
        return cls.words(options, request.destination)

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
    def arguments(cls, request, plan, extra=(), lenient=False):
        """The client's arguments, all but its own name.

        :param extra: options that come even before the user's
        :param lenient: whether forwards of the user's configuration may fail
        """
        login = cls.login(request, extra, lenient)
        return ["-v"] + plan.forward_words + login + [request.destination.host, plan.command]


class Plink:
    """How to say it to PuTTY's plink, and what its ``-v`` says back."""

    kind = "plink"
    failure = 1

    events = (
        ("Connecting to ", "name"),
        ("Starting local proxy command", "proxy"),
        ("ssh-", "host key"),
        ("Access granted", "login"),
        ("Started a shell/command", "started"),
        ("Received remote port ", "callback"),
        ("Session sent command exit status ", "status"),
        ("Session exited on ", "ended"),  # a signal
        ("Main session channel closed", "ended"),
        ("Remote port forwarding from ", "remote verdict"),
        ("Local port ", "local verdict"),
        ("Local IPv4 port ", "local verdict"),
        ('unknown option "-pwfile"', "old plink"),
        ("Remote side unexpectedly closed network connection", "dropped"),
        ("Connection reset by peer", "dropped"),
    )

    # The options of OpenSSH that plink has in its own words: flag for a value, or flag for yes and no.
    translated = {"port": "-P", "user": "-l", "identityfile": "-i"}
    switches = {"compression": ("-C", None), "forwardagent": ("-A", "-a")}

    @classmethod
    def check(cls, request):
        """:raises Fatal: an ``-o`` that plink has no word for, or no such value"""
        for name, value in request.options:
            known = name.lower() in cls.translated or name.lower() in cls.switches
            if not known:
                raise Fatal(
                    "-o {}: plink has no such option; it takes Compression, ForwardAgent,"
                    " Port, User and IdentityFile".format(name)
                )
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
        arguments = ["-batch", "-v", "-ssh", "-x", "-t"]
        arguments += ["-auto_store_key_in_cache"] if "quest" in program.lower() else []
        for name, (yes, no) in sorted(cls.switches.items()):
            chosen = (request.option(name) or ("yes" if name == "forwardagent" else "no")).lower()
            flag = yes if chosen == "yes" else no
            arguments += [flag] if flag else []
        values = {"port": there.port, "user": there.user, "identityfile": None}
        for name in ("port", "user", "identityfile"):
            chosen = request.option(name) or values[name]
            arguments += [cls.translated[name], str(chosen)] if chosen else []
        return arguments + plan.forward_words + list(password) + [there.host, plan.command]


def client_environment(environ):
    """A copy of ``environ`` for the client: Mathematica's own libraries, which a Linux front end puts on
    ``LD_LIBRARY_PATH`` and whose libcrypto breaks ssh, are taken out; nothing else is."""
    environment = dict(environ)
    paths = environment.get("LD_LIBRARY_PATH")
    if paths is not None:
        kept = [path for path in paths.split(":") if "SystemFiles/Libraries" not in path]
        environment["LD_LIBRARY_PATH"] = ":".join(kept)
        if not any(kept):
            del environment["LD_LIBRARY_PATH"]
    return environment


def is_password_prompt(prompt, user, host, alone):
    """Whether ssh asks for the password of this very login, and for nothing else.

    :param user: whom ssh logs in
    :param host: the host as ssh knows it, aliases resolved
    :param alone: whether no jump host could be the one that asks

    OpenSSH writes ``user@host's password: `` for password authentication, cut to 30 and 128 characters
    (sshconnect2.c), and puts ``(user@host) `` before what the server asks for keyboard-interactive since
    8.4. Without that prefix a server's own prompt is only trusted when nobody else can ask.
    """
    prompt = prompt.strip()
    if prompt == "{}@{}'s password:".format(user[:30], host[:128]):
        return True
    prefix = "({}@{}) ".format(user, host)
    if prompt.startswith(prefix):
        prompt = prompt[len(prefix) :]
    elif not alone:
        return False
    asked = prompt.strip().lower()
    names = (user.lower(), "{}@{}".format(user, host).lower())
    return (
        asked == "password:"
        or asked in ["password for {}:".format(name) for name in names]
        or asked in ["{}'s password:".format(name) for name in names]
    )


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


class NameReplacer:
    """Replaces link names in a stream of bytes, one chunk after the other, at equal length.

    :param replace: called with the text of a link name, returns what to put there, or None

    A name is replaced only if it is certain where it begins and ends. Strings travel in the data channel
    as plain ASCII with their length before them, so nothing else may change.
    """

    def __init__(self, replace):
        import re

        self.replace = replace
        self.held = b""
        self.before = b""  # the byte that went on last
        host = rb"[0-9A-Za-z.:_%-]"
        end = rb"(\d{1,5}@" + host + rb"{1,255})"
        # The byte before may be a length or a quote; with a digit, a dot or a comma it is no beginning.
        start = rb"(?<![0-9.,])"
        self.name = re.compile(start + end + rb"," + end + rb"(?=[^0-9A-Za-z.:_%@,-])")
        # The beginning of a name, or a name of which it is not certain that it ends here.
        part = host + rb"{0,255}"
        self.beginning = re.compile(start + rb"\d{1,5}(@" + part + rb"(,(\d{1,5}(@" + part + rb")?)?)?)?\Z")

    def feed(self, data):
        """Take the next bytes; return those that can go on. The rest waits for more, or for :meth:`flush`."""
        first = len(self.before)
        data = self.before + self.held + bytes(data)
        done, position = [], first
        name = self.name.search(data, first) if b"@" in data else None
        while name:
            done += [data[position : name.start()], self._substitute(name)]
            position = name.end()
            name = self.name.search(data, position)
        # A name has at most 2 * (5 + 1 + 255) + 1 bytes, so no beginning lies further back.
        held = self.beginning.search(data, max(position, len(data) - 523))
        end = held.start() if held else len(data)
        self.held = data[end:]
        return self._passed(b"".join(done) + data[position:end])

    def flush(self):
        """Return the bytes that were held."""
        data, self.held = self.held, b""
        return self._passed(data)

    def _passed(self, data):
        self.before = data[-1:] or self.before
        return data

    def _substitute(self, match):
        text = match.group().decode("ascii")
        try:
            LinkName.parse(text)
        except Fatal:
            return match.group()
        return (self.replace(text) or text).encode("ascii")


# What the client or the remote shell says when a launch fails (a regular expression), what that means,
# and what to try next. The first that is found counts, so the more specific stand first.
DIAGNOSES = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|POTENTIAL SECURITY BREACH|host key does not match",
        "the host key of {host} has changed: this may be another machine, or an attack",
        "if the change is known to be right, remove the old key with"
        " `ssh-keygen -R {host}` (PuTTY: connect once with putty) and try again",
    ),
    (
        r"host key is not cached|No \S+ host key is known|host key (?:is )?not (?:in|manually)",
        "the host key of {host} is unknown{fingerprint}",
        "check it, then accept it once by hand: {by_hand}",
    ),
    (
        r"Host key verification failed",
        "the host key of {host} was refused",
        "connect once by hand: {by_hand}",
    ),
    (
        r"Could not resolve hostname|Name or service not known|[Hh]ost does not exist|nodename nor servname",
        "no machine named {host} is known here",
        "check the name, or its Host entry in ~/.ssh/config",
    ),
    (
        r"unsupported option \"accept-new\"|Bad configuration option: remotecommand",
        "this ssh is older than OpenSSH 7.6",
        "install a newer one and name it with --client or TUNNEL_SSH",
    ),
    (
        r"Bad configuration option|[Uu]nsupported option|line 0: |Bad owner or permissions|unknown option",
        "the client rejected its options",
        "check -o and ~/.ssh/config: {last}",
    ),
    (
        r"Connection refused",
        "{host} refused the connection: no SSH server listens there",
        "check the port, and that the SSH server runs",
    ),
    (
        r"timed out|Timeout while|Connection timeout",
        "{host} did not answer within {seconds} s",
        "check the name, the port, firewalls and VPN; -o ConnectTimeout=60 waits longer",
    ),
    (
        r"No route to host|Network is unreachable|Network is down",
        "there is no route to {host}",
        "check the network, VPN or jump host",
    ),
    (
        r"Too many authentication failures",
        "{host} ended the login after too many keys were offered",
        "name the right key with IdentityFile and set IdentitiesOnly=yes",
    ),
    (
        r"Unable to negotiate|no matching .* found|Couldn't agree",
        "client and server share no algorithm",
        "update one of them: {last}",
    ),
    (
        r"Permission denied \((?P<methods>[^)]*)\)|server sent: (?P<sent>[^)]*)\)|Access denied"
        r"|Cannot (?:answer|confirm)|password was not accepted|Permission denied, please",
        "{host} refused the login{methods}",
        "check user, password and keys (password-less login needs a key that the server knows): {by_hand}",
    ),
    (
        r"exchange_identification|Remote side unexpectedly closed|Connection reset by|Connection closed by",
        "{host} closed the connection before the login",
        "it may be overloaded (MaxStartups), or refuse this machine; try again later",
    ),
)

# The same for a kernel that ended before it called back, from its exit code and what it printed.
KERNEL_DIAGNOSES = (
    (
        r"(?i)no valid password|licen[sc]e|activat",
        "the kernel {kernel} found no licence",
        "activate it on {host}, or free a licence: {said}",
    ),
    (
        r"(?i)No such file|not found|not recognized|cannot find the (?:path|file)|code=127\b",
        "there is no kernel {kernel} on {host}",
        "check the path with: {by_hand}",
    ),
    (
        r"(?i)Permission denied|cannot execute|Exec format error|is a directory|code=126\b",
        "{kernel} on {host} cannot be executed",
        "check the path and its permissions with: {by_hand}",
    ),
    (
        r"",
        "the kernel {kernel} ended before it called back{code}",
        "run it by hand: {by_hand}",
    ),
)


def diagnose(table, text, facts):
    """Explain a failure.

    :param table: rows of pattern, meaning, advice
    :param text: what was said, lines joined
    :param facts: a dict for the words in braces
    :returns: one line, or None when no row fits
    """
    import re

    for pattern, what, advice in table:
        match = re.search(pattern, text)
        if match:
            facts = dict(facts)
            groups = match.groupdict()
            methods = groups.get("methods") or groups.get("sent")
            facts["methods"] = " (it offers: {})".format(methods) if methods else ""
            key = re.search(r"(?:SHA256:|ssh-\S+ \d+ )\S+", text)
            facts["fingerprint"] = " ({})".format(key.group()) if key else ""
            return "{}; {}".format(what.format(**facts), advice.format(**facts))
    return None


# ----------------------------------------------------------------------------------------------- world


def say(text):
    """One line for whoever looks; a front end shows it to nobody."""
    if sys.stderr:
        try:
            sys.stderr.write("tunnel: {}\n".format(text))
            sys.stderr.flush()
        except OSError:
            pass  # whoever was to read it has gone


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
    raise Fatal(
        "no SSH client found; looked for {}; install one, or name it with --client or TUNNEL_SSH".format(
            ", ".join(places)
        ),
        EX_UNAVAILABLE,
    )


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

    Each line goes out at once, since the launcher may be ended at any moment.
    """

    def __init__(self, folder, script, environ):
        self.path, self.descriptor = None, None
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
        for number in range(1, 1000):
            path = os.path.join(folder, name + ("_{}".format(number) if number > 1 else "") + ".log")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
            try:
                self.descriptor = os.open(path, flags, 0o600)
            except FileExistsError:
                continue
            self.path = path
            return
        raise FileExistsError(17, "a thousand logs of this second exist")

    def write(self, text):
        """Write a line. A full disk ends the log, not the launch."""
        if self.descriptor is None:
            return
        line = "{} {}\n".format(time.strftime("%H:%M:%S"), text)
        try:
            os.write(self.descriptor, line.encode("utf-8", "surrogateescape"))
        except OSError as error:
            self.descriptor = None
            say("the log {} ends here: {}".format(self.path, error.strerror))


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
        readable, writable, _ = self.select(list(self.readers), list(self.writers), [], wait)
        for ready, actions in ((writable, self.writers), (readable, self.readers)):
            for each in ready:
                if each in actions:
                    actions[each]()
        for timer in [timer for timer in self.timers if timer[0] <= time.monotonic()]:
            if timer in self.timers:
                self.timers.remove(timer)
                timer[2]()


class Lines:
    """Takes a client's output in pieces, and hands it on in lines.

    :param on_output: called with ``"out"`` or ``"err"`` and a line
    """

    def __init__(self, on_output):
        self.on_output = on_output
        self.partial = {"out": b"", "err": b""}

    def feed(self, name, data):
        """Hand the whole lines on; at the end of the output, which is empty data, the unfinished one too."""
        lines = (self.partial[name] + data).split(b"\n")
        self.partial[name] = lines.pop()[-65536:] if data else b""
        for line in lines:
            text = line.decode("utf-8", "surrogateescape").rstrip("\r")
            if text:
                self.on_output(name, text)


class Client:
    """The SSH client as a process in a session of its own, with its output and its end in a loop.

    A session of its own has no terminal, so no prompt waits at one; and its group holds what the client
    starts, such as a ``ProxyCommand``. Should this launcher be killed without a chance to act, a watchdog
    that holds the other end of a pipe ends the group.
    """

    def __init__(self, loop, argv, environment, on_output, inherit=()):
        """:param on_output: as for :class:`Lines`
        :param inherit: descriptors that the client shall have, closed here afterwards
        """
        self.loop, self.lines = loop, Lines(on_output)
        self.code = None
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        self.streams = {"out": out, "err": err}
        self.pid = spawn(argv, environment, (None, out_end, err_end), inherit)
        for descriptor in (out_end, err_end) + tuple(inherit):
            os.close(descriptor)
        for name, descriptor in self.streams.items():
            os.set_blocking(descriptor, False)
            loop.readers[descriptor] = lambda name=name: self._read(name)
        leash, self.leash = os.pipe()
        watchdog = ["/bin/sh", "-c", 'read -r _ || kill -s TERM -- "-$1"', "tunnel-watchdog", str(self.pid)]
        spawn(watchdog, {"PATH": "/usr/bin:/bin"}, (leash, None, None))
        os.close(leash)

    def _read(self, name):
        descriptor = self.streams[name]
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.lines.feed(name, data)
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

    def _close(self):
        for name, descriptor in self.streams.items():
            # Not to the end of the file: what the client started may hold the pipe longer than it lives.
            while self._read(name):
                pass
            self.loop.readers.pop(descriptor, None)
            os.close(descriptor)
        os.write(self.leash, b"\n")  # no need to bite
        os.close(self.leash)

    def end(self, force=False):
        """End the client and what it started: at once, or, where it does not listen, by force."""
        import signal

        try:
            os.killpg(self.pid, signal.SIGKILL if force else signal.SIGTERM)
        except OSError:
            pass


def spawn(argv, environment, streams, inherit=()):
    """Start a program in a session of its own; ``subprocess`` alone would cost more than all else here.

    :param streams: descriptors for input, output, errors; None for nothing
    :returns: the process id
    """
    import signal

    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number, descriptor in enumerate(streams):
            os.dup2(null if descriptor is None else descriptor, number)
        for descriptor in inherit:
            os.set_inheritable(descriptor, True)
        for name in ("SIGPIPE", "SIGXFSZ"):  # which Python ignores, and a child would go on ignoring
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.execve(argv[0], argv, environment)
    except OSError as error:
        os.write(2, "cannot run {}: {}\n".format(argv[0], error.strerror).encode("utf-8", "replace"))
    finally:
        os._exit(127)


class WindowsClient:
    """:class:`Client` on Windows, where only sockets can be waited for: threads copy the pipes to them."""

    def __init__(self, loop, argv, environment, on_output, inherit=()):
        import subprocess

        self.loop, self.lines = loop, Lines(on_output)
        self.code = None
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            creationflags=0x08000000,  # CREATE_NO_WINDOW
        )
        self.pumps = []
        for name, pipe in (("out", self.process.stdout), ("err", self.process.stderr)):
            self._pump(name, pipe)

    def _pump(self, name, pipe):
        import socket
        import threading

        near, far = socket.socketpair()

        def copy():
            while True:
                data = os.read(pipe.fileno(), 65536)
                if not data:
                    break
                far.sendall(data)
            far.close()
            pipe.close()

        threading.Thread(target=copy, daemon=True).start()
        self.pumps.append(near)
        self.loop.readers[near] = lambda: self._read(name, near)

    def _read(self, name, near):
        data = near.recv(65536)
        self.lines.feed(name, data)
        if not data:
            del self.loop.readers[near]
            near.close()
            self.pumps.remove(near)

    def poll(self):
        if self.code is None and not self.pumps:  # both pipes are at their end
            self.code = self.process.wait()
        return self.code is not None

    def end(self, force=False):
        self.process.terminate()


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


def run_quietly(argv, environment):
    """Run a command that ends by itself, 5 s at most.

    :returns: its exit code and what it printed; 1 and nothing when it did not come to an end
    """
    import subprocess

    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        done = subprocess.run(argv, stdin=null, stdout=pipe, stderr=subprocess.STDOUT, env=environment, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return 1, ""
    return done.returncode, done.stdout.decode("utf-8", "replace")


def listen():
    """A socket that listens on a port of the loopback which the system chooses."""
    import socket

    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen(5)
    listener.setblocking(False)  # who has knocked may have gone before accept() looks
    return listener


def accept(listener):
    """The next connection; None when it has gone again."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    connection.setblocking(True)
    return connection


class PasswordKeeper:
    """Answers ssh's password prompt, once, through the script itself as ``SSH_ASKPASS`` helper.

    The helper knows only where to ask and a token; the password stays in this process until the prompt
    of this very login has been shown to it. No file, argument or environment variable holds it.
    """

    def __init__(self, loop, request, program, log):
        self.loop, self.request, self.program, self.log = loop, request, program, log
        self.password = request.destination.password
        self.token = os.urandom(16).hex()
        self.listener = listen()
        loop.readers[self.listener] = self._accept

    def environment(self, environ):
        """``environ`` with what makes ssh ask us: ``DISPLAY`` for versions before 8.4, and
        ``SSH_ASKPASS_REQUIRE`` since then. The helper's ``env python3`` needs a ``PATH`` that has one.

        :raises Fatal: the helper cannot be executed
        """
        helper = os.environ.get("TUNNEL_DROPIN") or os.path.abspath(__file__)
        if not os.access(helper, os.X_OK):
            raise Fatal("host: for a password {0} has to be executable; try: chmod +x {0}".format(helper))
        environment = dict(environ)
        environment["SSH_ASKPASS"] = helper
        environment["SSH_ASKPASS_REQUIRE"] = "force"
        environment.setdefault("DISPLAY", "tunnel:0")
        environment["PATH"] = environ.get("PATH", "/usr/bin:/bin") + ":" + os.path.dirname(sys.executable)
        environment["TUNNEL_ASKPASS"] = "{}:{}".format(self.listener.getsockname()[1], self.token)
        return environment

    def _accept(self):
        connection = accept(self.listener)
        if connection is None:
            return
        connection.settimeout(5)
        try:
            token, _, prompt = read_all(connection).decode("utf-8", "replace").partition("\n")
            if token == self.token:
                connection.sendall(self._answer(prompt.strip()))
        except OSError as error:
            self.log.write("the password helper could not be answered: {}".format(error))
        finally:
            connection.close()

    def _answer(self, prompt):
        shown = prompt if not has_control_characters(prompt) else repr(prompt)
        if self.password is None:
            self.log.write("asked again, not answered: {}".format(shown))
            return b""
        if not is_password_prompt(prompt, *self._login()):
            self.log.write("asked for something else than the password, not answered: {}".format(shown))
            return b""
        answer, self.password = self.password, None
        self.log.write("the password prompt has been answered")
        return answer.encode("utf-8", "surrogateescape") + b"\n"

    def _login(self):
        """User, host and whether there is no jump host, as ssh's configuration has them."""
        argv = [self.program, "-G"] + OpenSSH.login(self.request) + [self.request.destination.host]
        lines = run_quietly(argv, client_environment(os.environ))[1].splitlines()
        values = dict(reversed([line.partition(" ")[::2] for line in lines]))
        host = values.get("hostkeyalias") or values.get("hostname", self.request.destination.host)
        proxies = [values.get(name, "none") for name in ("proxyjump", "proxycommand")]
        return values.get("user", ""), host, proxies == ["none", "none"]

    def close(self):
        self.loop.readers.pop(self.listener, None)
        self.listener.close()


def read_all(connection):
    """All bytes that a peer sends until it closes its side; 64 KiB at most."""
    data = b""
    while len(data) < 65536:
        more = connection.recv(4096)
        if not more:
            break
        data += more
    return data


def ask_password(prompt):
    """What the script does as ssh's helper: hand the prompt to the launcher, print its answer.

    :returns: the exit code, 1 without an answer
    """
    import socket

    port, _, token = os.environ["TUNNEL_ASKPASS"].partition(":")
    with socket.create_connection((LOOPBACK, int(port)), 10) as connection:
        connection.sendall("{}\n{}".format(token, prompt).encode("utf-8", "surrogateescape"))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    sys.stdout.buffer.write(answer)
    return 0 if answer else 1


class Switchboard:
    """Carries the links whose names a front end of 11.1 or later tells its kernel after the launch.

    Four remote ports are forwarded to listeners here before anybody knows what they are for. The main
    link's data channel passes through, and when a link name goes by, the next pair of remote ports takes
    its place and its listeners are told where the front end waits.
    """

    def __init__(self, loop, link, log):
        """:param link: the main link, as the front end listens for it"""
        import socket

        self.loop, self.main, self.log, self.socket = loop, link, log, socket
        self.kernel_link = None  # the main link, as the kernel sees it
        self.pairs = []  # the remote ports, in the order in which they are given out
        self.given = {}  # link name: what the kernel has been told for it
        self.buffer = memoryview(bytearray(1 << 18))
        self.listeners = [listen() for _ in range(5)]
        for position, listener in enumerate(self.listeners):
            loop.readers[listener] = lambda position=position: self._accept(position)
        self.targets = [(link.data_host, link.data_port), None, None, None, None]
        # The local ports: main data channel, then data and message channel of each further link.
        self.ports = [listener.getsockname()[1] for listener in self.listeners]

    def _accept(self, position):
        listener = self.listeners[position]
        kernel, target = accept(listener), self.targets[position]
        if kernel is None:
            return
        if target is None:  # nobody has been told this port yet
            kernel.close()
            return
        del self.loop.readers[listener]
        listener.close()
        try:
            front_end = self.socket.create_connection(target, 5)
        except OSError as error:
            self.log.write("the front end does not answer at {}@{}: {}".format(target[1], target[0], error))
            kernel.close()
            return
        replacer = NameReplacer(self._replace) if position == 0 else None
        Channel(self, kernel, front_end, replacer)

    def _replace(self, text):
        """What the kernel is told for a link name; None for a name that has to stay as it is."""
        if text in (str(self.main), str(self.kernel_link)):
            return None
        if text not in self.given:
            if self.finished:
                return None
            pair = self.pairs[len(self.given)]
            told = rewritten(text, pair)
            if told is None:
                self.log.write("link name {} is too short to be replaced: left alone".format(text))
                return None
            name, position = LinkName.parse(text), 1 + 2 * len(self.given)
            self.targets[position] = (name.data_host, name.data_port)
            self.targets[position + 1] = (name.message_host, name.message_port)
            self.given[text] = told
            self.log.write("link {} of the front end is {} for the kernel".format(text, told))
        return self.given[text]

    @property
    def finished(self):
        return len(self.given) == len(self.pairs)


class Channel:
    """One connection through the switchboard: bytes both ways, half-closes included.

    A side is read only while the other has taken all that came before, so memory never grows.
    """

    def __init__(self, board, kernel, front_end, replacer=None):
        self.board, self.loop, self.replacer = board, board.loop, replacer
        self.sides = {kernel: front_end, front_end: kernel}
        self.pending, self.open = {}, {kernel, front_end}
        self.front_end, self.holding = front_end, None
        for side in self.sides:
            side.setblocking(False)
            side.setsockopt(board.socket.IPPROTO_TCP, board.socket.TCP_NODELAY, 1)
            self._watch(side)
        if replacer:
            self.loop.after(NAMES_SECONDS, self._stop_looking)

    def _watch(self, side):
        self.loop.readers[side] = lambda: self._read(side)

    def _read(self, side):
        try:
            count = side.recv_into(self.board.buffer)
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        data = self.board.buffer[:count]
        if self.replacer and side is self.front_end:
            data = self._look(data)
        if not count:
            self.open.discard(side)
            self.loop.readers.pop(side, None)
        self._send(self.sides[side], data)

    def _look(self, data):
        self.loop.cancel(self.holding)
        data = self.replacer.feed(data) if data else self.replacer.flush()
        if self.board.finished:
            data += self.replacer.flush()
            self.replacer = None
        elif self.replacer.held:
            self.holding = self.loop.after(HOLD_SECONDS, self._release)
        return data

    def _release(self):
        """What looked like a name's beginning has not gone on: the other side may be waiting for it."""
        if self.replacer and self.front_end in self.sides:
            self._send(self.sides[self.front_end], self.replacer.flush())

    def _stop_looking(self):
        if self.replacer:
            self._release()
            self.replacer = None

    def _send(self, side, data):
        """Send what can be sent now; what is left waits, and so does the side that it came from."""
        if side in self.pending:
            self.pending[side] += bytes(data)
            return
        sent = 0
        try:
            sent = side.send(data) if len(data) else 0
        except BlockingIOError:
            pass
        except OSError:
            self._close()
            return
        if sent < len(data):
            self.pending[side] = bytes(data[sent:])
            self.loop.writers[side] = lambda: self._resume(side)
            self.loop.readers.pop(self.sides[side], None)
        elif self.sides[side] not in self.open:
            self._finish(side)

    def _resume(self, side):
        data = self.pending.pop(side)
        del self.loop.writers[side]
        self._send(side, data)
        source = self.sides.get(side)
        if side not in self.pending and source in self.open:
            self._watch(source)

    def _finish(self, side):
        """All has been passed on to a side from which the other has taken leave."""
        try:
            side.shutdown(self.board.socket.SHUT_WR)
        except OSError:
            self._close()
            return
        if not self.open and not self.pending:
            self._close()

    def _close(self):
        for side in list(self.sides):
            self.loop.readers.pop(side, None)
            self.loop.writers.pop(side, None)
            side.close()
        self.sides, self.open, self.pending, self.replacer = {}, set(), {}, None


class State:
    """What a client's output has said so far, in the course of one try."""

    def __init__(self):
        self.started = self.called_back = self.ended = False
        self.shared = self.share_refused = self.stale = self.forwarding_disabled = False
        self.port_failed = None  # the line that says so
        self.foreign_port = self.dropped = self.old_plink = False
        self.answered = False  # the server has shown its host key, or a proxy is to bound the wait
        self.gave_up = self.silent = self.no_terminal = self.refused = False
        self.status = None  # the exit code of the remote command
        self.said, self.printed = [], []  # the client's last lines; the remote side's

    @property
    def failed(self):
        return (
            self.port_failed
            or self.foreign_port
            or self.share_refused
            or self.old_plink
            or (self.no_terminal and not self.called_back)
        )


class Launch:
    """One launch, from the plan to the exit code.

    :param tell: called as ``tell(code, text)`` once the launch is known to stand (code 0) or to have failed;
        a launcher that returns early does so then
    """

    def __init__(self, request, program, client, log, tell=None):
        self.request, self.program, self.kind, self.log = request, program, client, log
        self.tell = tell or (lambda code, text: None)
        self.told = False
        self.loop = Loop()
        self.signal = None
        self.client = self.plan = self.state = None
        self.environment = client_environment(os.environ)
        self.switchboard = self.keeper = self.check = self.share = None
        self.lenient = self.old_plink = self.alone = self.no_terminal = False
        self.killed = False  # whether the client had to be ended, so that its exit code means nothing
        self.killer = self.patience = None  # timers
        self.password_file = self.share_log = None
        self.kernel_lines = 0
        self.begin = time.monotonic()

    def abandon(self):
        """End a client that still runs: only a defect leaves one."""
        if self.client and not self.client.poll():
            self.client.end(force=True)

    # -- one launch

    def run(self):
        """Launch, watch, explain.

        :returns: the exit code
        :raises Fatal: the launch failed; the text says why
        """
        request = self.request
        self._catch_signals()
        if request.check:
            self.check = Check(self)
            request.link = self.check.link
            self._step("client", "{}, {}".format(self.program, self._client_version()))
        if request.callback:
            self.switchboard = Switchboard(self.loop, request.link, self.log)
        if request.destination.password and self.kind is OpenSSH:
            if WINDOWS:
                raise Fatal("host: a password needs plink on Windows; ssh there takes keys only")
            self.keeper = PasswordKeeper(self.loop, request, self.program, self.log)
            self.environment = self.keeper.environment(self.environment)
        if request.share:
            self.share = self._shared_connection()
        try:
            return self._tries()
        finally:
            if self.keeper:
                self.keeper.close()

    def _tries(self):
        ports = first_ports(self.request)
        for number in range(1, TRIES + 1):
            self._try(number, ports)
            state = self.state
            if self.signal or self.check_done or state.forwarding_disabled:
                break
            if state.no_terminal and not self.no_terminal:
                self.no_terminal = True
                self.log.write("the server allows no terminal: a computing kernel may outlive the connection")
                continue
            if state.started and not state.failed:
                break
            if state.old_plink and not self.old_plink:
                self.old_plink = True
                self.log.write("this plink is older than 0.77: the password has to stand in its arguments")
            elif state.foreign_port and not self.lenient:
                self.lenient = True
                self.log.write("a forward of the ssh configuration failed: trying again without regard to it")
            elif state.port_failed:
                ports = draw_ports()
                self.log.write("forwards were refused: the next block of ports is {}".format(ports[0]))
            elif state.stale:
                self.log.write("the shared connection is gone: a new one then")
                stale, self.share = self.share, None
                remove_if_there(stale)
                self.share = self._shared_connection()
            elif self.share or state.share_refused:
                self.share, self.alone = None, True
                self.log.write("the shared connection takes no further kernel: one of its own then")
            elif state.dropped and not state.refused:
                self.log.write("the server closed the connection before the login: trying again")
                self._back_off(number)
            else:
                break
        return self._finish()

    @property
    def check_done(self):
        return bool(self.check and self.check.done)

    def _try(self, number, ports):
        self.plan = Plan(self.request, ports, self.switchboard.ports if self.switchboard else ())
        if self.switchboard:
            self.switchboard.pairs, self.switchboard.kernel_link = self.plan.pairs, self.plan.link
        self.state = State()
        argv, inherit = self._command()
        self.log.write("try {}: {}".format(number, printable(redacted(argv))))
        for forward in self.plan.forwards:
            self.log.write("  {} {}".format(forward.flag, forward))
        self._run_client(argv, inherit)
        if self.state.shared:
            self._take_forwards_back()

    def _command(self):
        """The client's command line for this try, and the descriptors that it refers to."""
        if self.kind is OpenSSH:
            path = self.share or ("none" if self.alone else None)
            extra = [("ControlPath", path)] if path else []
            extra += [("RequestTTY", "no")] if self.no_terminal else []
            return [self.program] + OpenSSH.arguments(self.request, self.plan, extra, self.lenient), ()
        password, inherit = self._plink_password()
        return [self.program] + Plink.arguments(self.request, self.plan, self.program, password), inherit

    def _plink_password(self):
        """How plink gets the password: from a descriptor, from a file that is removed as soon as it has
        been read, or, where plink is too old for both, in its arguments."""
        password = self.request.destination.password
        if not password:
            return (), ()
        if self.old_plink:
            return ("-pw", password), ()
        data = password.encode("utf-8", "surrogateescape") + b"\n"
        if WINDOWS:
            import tempfile

            descriptor, self.password_file = tempfile.mkstemp(prefix="tunnel-")
            os.write(descriptor, data)
            os.close(descriptor)
            return ("-pwfile", self.password_file), ()
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        return ("-pwfile", "/dev/fd/{}".format(reader)), (reader,)

    def _remove_password_file(self):
        if self.password_file:
            try:
                os.remove(self.password_file)
                self.password_file = None
            except OSError:
                pass  # still open in plink, on Windows: the next line of output tries again

    # -- watching

    def _run_client(self, argv, inherit=(), tail=None):
        """Start a client and handle events until it has ended.

        :param tail: what comes into this file is the client's output as well
        """
        factory = WindowsClient if WINDOWS else Client
        self.killed = False
        self.client = factory(self.loop, argv, self.environment, self._on_output, inherit)
        callback = self.loop.after(CALLBACK_SECONDS, self._no_callback)
        self._expect_answer()
        if self.signal:
            self._end_client()
        if tail:
            self._follow(self.client, tail, self._on_error_line)
        while not self.client.poll():
            self.loop.step()
        if tail:
            self._follow(self.client, tail, self._on_error_line)
        for timer in (callback, self.killer, self.patience):
            self.loop.cancel(timer)
        self.killer = None
        self._remove_password_file()
        self.log.write("the client ended with exit code {}".format(self.client.code))

    def _end_client(self):
        if self.killer is None and self.client and self.client.code is None:
            self.killed = True
            self.client.end()
            self.killer = self.loop.after(KILL_SECONDS, lambda: self.client.end(force=True))

    def _pause(self, seconds):
        """Let ``seconds`` pass; a signal ends it."""
        over = []
        self.loop.after(seconds, lambda: over.append(True))
        while not over and not self.signal:
            self.loop.step()

    def _back_off(self, number):
        """Let the server recover after failed try ``number``; launches of the same moment part here."""
        self._pause(0.1 * 2**number * (1 + os.urandom(1)[0] / 255))

    def _catch_signals(self):
        import signal

        if WINDOWS:
            import socket

            near, far = socket.socketpair()
            far.setblocking(False)
            read = near.recv
            wakeup, self._wakeup = far.fileno(), (near, far)
            self._job = join_windows_job()
            if not self._job:
                self.log.write("Windows allows no job: kill the client too, should this launcher be killed")
        else:
            near, wakeup = os.pipe()
            os.set_blocking(near, False)
            os.set_blocking(wakeup, False)

            def read(size):
                return os.read(near, size)

            signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup)
        self.loop.readers[near] = lambda: read(512)
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # nohup means it
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, _):
        self.signal = self.signal or number
        self._end_client()

    def _expect_answer(self):
        """Give the server another while to go on with the key exchange. ssh's own ``ConnectTimeout`` ends
        with the server's first line, and plink has none."""
        self.loop.cancel(self.patience)
        if not self.state.answered:
            client = self.client
            self.patience = self.loop.after(self.connect_seconds + 0.5, lambda: self._give_up(client))

    @property
    def connect_seconds(self):
        value = self.request.option("ConnectTimeout") or ""
        return int(value) if value.isdigit() and int(value) else CONNECT_SECONDS

    def _give_up(self, client):
        if client is self.client:
            self.state.gave_up = True
            self._end_client()

    def _no_callback(self):
        if not self.state.called_back and self.callback_visible:
            self.log.write("the kernel has not called back within {} s".format(CALLBACK_SECONDS))
        if self.check:
            self.state.silent = True
            self._end_client()

    @property
    def callback_visible(self):
        """Whether it is known when the kernel connects: a client that shares a connection which we did not
        make does not tell."""
        return not self.state.shared or self.share is not None

    def _on_output(self, stream, line):
        keep = self.state.printed if stream == "out" else self.state.said
        keep.append(line)
        del keep[:-200]
        if stream == "out":
            self._log_kernel(line)
            return
        self.log.write("{}: {}".format(self.kind.kind, line))
        self._remove_password_file()
        for words, event in self.kind.events:
            if words in line:
                self._on_event(event, line, line.partition(words)[2])
                break
        self._expect_answer()

    def _on_error_line(self, line):
        self._on_output("err", line)

    def _log_kernel(self, line):
        """A kernel may print without end; what it says at first is what helps."""
        self.kernel_lines += 1
        if self.kernel_lines <= KERNEL_LINES:
            self.log.write("kernel: {}".format(line))
        elif self.kernel_lines == KERNEL_LINES + 1:
            self.log.write("kernel: ... what it prints from here on is not logged")

    def _on_event(self, event, line, rest):
        """An event of the client's has a method ``_on_...`` here, or is just noted in the state."""
        action = getattr(self, "_on_" + event.replace(" ", "_"), None)
        if action:
            action(rest, line)
            return
        setattr(self.state, event.replace(" ", "_"), True)
        if self.state.failed:
            self._end_client()

    def _on_name(self, rest, line):
        self._step("name", rest.strip())

    def _on_proxy(self, rest, line):
        self.state.answered = True
        self._step("proxy", rest.strip())

    def _on_host_key(self, rest, line):
        self.state.answered = True
        self._step("host key", rest.strip())

    def _on_login(self, rest, line):
        self.state.answered = True
        self._step("login", line.strip())

    def _on_stale(self, rest, line):
        """Nobody answers at the shared connection's socket; one of the user's own is none of our business."""
        if self.share:
            self.state.stale = True
            self._end_client()

    def _on_port(self, rest, line):
        self._on_port_failed(rest.strip().rstrip("."), line)

    def _on_remote_verdict(self, rest, line):
        """plink: ``127.0.0.1:P enabled``, or ``... refused`` and why."""
        if " refused" in rest:
            self._on_port_failed(rest.split()[0].rpartition(":")[2], line)

    def _on_local_verdict(self, rest, line):
        """plink: ``127.0.0.1:P forwarding to ...``, with or without ``failed:`` and why."""
        if " failed: " in rest:
            self._on_port_failed(rest.split()[0].rpartition(":")[2], line)

    def _on_status(self, rest, line):
        number = parse_number((rest.split() or [""])[0])
        if number is not None:  # ssh writes -1 where it has heard of none
            self.state.status = number
            self._on_ended(rest, line)

    def _on_port_failed(self, port, line):
        """A forward was refused. When it is one of the user's configuration, it is none of ours."""
        number = parse_port(port)
        if number is not None and not self.plan.owns(number):
            self.state.foreign_port = not self.lenient
        else:
            self.state.port_failed = line.strip()
        if self.state.failed:
            self._end_client()

    def _on_started(self, rest, line):
        """The forwards stand, and the server has been told to run the kernel."""
        if self.state.started:
            return
        self.state.started = self.state.answered = True  # a shared connection shows no host key
        self._step("forwards", "{} ports".format(len(self.plan.forwards)))
        self._step("kernel", "started")
        client = self.client
        if self.request.role is COMPUTE:
            # One that has neither failed nor called back by then is for others to wait for.
            self.loop.after(START_SECONDS, lambda: client.code is None and self._tell(0, ""))
        if self.share:
            # Only the shared connection's own log tells when a kernel connects through it.
            recent = max(0, os.fstat(self.share_log).st_size - 4096)
            self._follow(client, Tail(self.share_log, recent), self._on_shared_line)

    def _follow(self, client, tail, on_line):
        """Hand on what comes into a file while ``client`` runs."""
        for line in tail.lines():
            on_line(line)
        if client is self.client and client.code is None:
            self.loop.after(0.005, lambda: self._follow(client, tail, on_line))

    def _on_shared_line(self, line):
        _, found, rest = line.partition("client_request_forwarded_tcpip: listen ")
        if found:
            self._on_callback(rest, line)

    def _on_callback(self, rest, line):
        if not self.state.called_back and self._port_in(rest) == self.plan.link.data_port:
            self.state.called_back = True
            self.log.write("the kernel has called back after {:.1f} s".format(self.seconds))
            self._tell(0, "")

    @staticmethod
    def _port_in(rest):
        """The port in ssh's ``127.0.0.1 port P, originator ...`` or plink's ``127.0.0.1:P open ...``."""
        words = rest.replace(",", " ").split() + ["", "", ""]
        return parse_port(words[2] if words[1] == "port" else words[0].rpartition(":")[2])

    def _on_ended(self, rest, line):
        """The kernel has ended. A front end that closes its links late, or never, keeps the client."""
        if not self.state.ended:
            self.state.ended = True
            client = self.client
            self.loop.after(DRAIN_SECONDS, lambda: client is self.client and self._end_client())

    def _step(self, name, text):
        self.log.write("{:.2f} s: {}: {}".format(self.seconds, name, text))
        if self.check:
            self.check.report(name, text)

    @property
    def seconds(self):
        return time.monotonic() - self.begin

    # -- shared connections

    def _shared_connection(self):
        """A connection that all compute kernels of one destination share; made when there is none.

        :returns: the path of its control socket; None when this launch needs a connection of its own
        """
        if self.kind is not OpenSSH or WINDOWS:
            self.log.write("--share needs OpenSSH on Linux or macOS: this kernel gets its own connection")
            return None
        import zlib

        login = OpenSSH.login(self.request) + [self.request.destination.host, self.program]
        try:
            name = "{:08x}".format(zlib.crc32("\0".join(login).encode("utf-8", "surrogateescape")))
            path = os.path.join(private_folder(os.environ), name)
            if len(path) > 80:  # of 104 in sockaddr_un; ssh adds 17 while it makes one
                path = os.path.join(private_folder({}), name)
            lock = os.open(path + ".log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            self.log.write("no shared connection: {}".format(error))
            return None
        self.share_log = lock
        if not self._lock(lock):
            self.log.write("another launch has been logging in for too long: this one goes its own way")
            return None
        try:
            # Whether anybody answers there, the launch itself will tell.
            return path if os.path.exists(path) else self._start_master(path, lock)
        finally:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_UN)

    def _lock(self, descriptor, seconds=120):
        """Wait for our turn to look for, or make, the shared connection. The other launch may be waiting
        for somebody to type a second factor."""
        import fcntl

        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.signal:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                self._pause(0.01)
        return False

    def _start_master(self, path, log):
        """Log in and leave a connection in the background.

        :returns: ``path``
        :raises Fatal: the login failed, so one of its own would fail too
        """
        extra = [
            ("ControlMaster", "auto"),
            ("ControlPath", path),
            ("ControlPersist", str(SHARE_SECONDS)),
            ("ClearAllForwardings", "yes"),
        ]
        os.ftruncate(log, 0)
        login = OpenSSH.login(self.request, extra) + ["-v", "-E", path + ".log", "-f", "-N"]
        argv = [self.program] + login + [self.request.destination.host]
        tail = Tail(log, 0)  # where its output goes, since that outlives this launch
        for number in range(1, TRIES + 1):
            self.state, self.plan = State(), Plan(self.request, first_ports(self.request), ())
            self.log.write("shared connection: {}".format(printable(argv)))
            self._run_client(argv, (), tail)
            if self.client.code == 0 or self.signal:
                return path
            if not self.state.dropped or number == TRIES:
                break
            self._back_off(number)
        raise Fatal(self._explain(), self.failure_code)

    def _client_version(self):
        lines = run_quietly([self.program, "-V"], self.environment)[1].splitlines()
        return (lines or ["version unknown"])[0].strip()

    def _take_forwards_back(self):
        """Forwards stay on a shared connection when the session that asked for them ends."""
        login = OpenSSH.login(self.request, [("ControlPath", self.share)] if self.share else [])
        argv = [self.program, "-O", "cancel"] + self.plan.forward_words + login
        code, _ = run_quietly(argv + [self.request.destination.host], self.environment)
        self.log.write("forwards taken back from the shared connection: exit code {}".format(code))

    # -- the end

    def _tell(self, code, text):
        if not self.told:
            self.told = True
            self.tell(code, text)

    def _finish(self):
        """The exit code of a launch that is over.

        :raises Fatal: it has failed
        """
        state, code = self.state, self.client.code
        if self.signal:
            text = "ended by signal {}".format(self.signal)
            self.log.write(text)
            self._tell(128 + self.signal, text)
            return 128 + self.signal
        if self.check_done:
            return 0
        if self.kernel_ended and (state.called_back or not self.callback_visible):
            code = state.status if state.status is not None else 0 if self.killed else code
            text = "the kernel has ended after {:.0f} s with exit code {}".format(self.seconds, code)
            if code == 0 or state.called_back:
                self.log.write(text)
                self._tell(code, text if code else "")
                return code
        raise Fatal(self._explain(), self.failure_code)

    @property
    def failure_code(self):
        """The client's own exit code; where it had to be ended, the one that it has for failures."""
        return self.kind.failure if self.killed else self.client.code or 1

    @property
    def kernel_ended(self):
        """Whether it was the kernel's end that ended the launch; for a client that shares another's
        connection its exit code tells, which is 255 when the connection is lost."""
        state = self.state
        return state.ended or (state.started and state.shared and self.client.code != 255)

    def _explain(self):
        state, host = self.state, self.request.destination
        said, printed = "\n".join(state.said), "\n".join(state.printed)
        code = state.status if state.status is not None else self.client.code
        facts = {
            "host": host.host,
            "kernel": self.request.kernel.path,
            "seconds": self.connect_seconds,
            "by_hand": self._by_hand(),
            "code": ", with exit code {}".format(code),
            "last": (last_words(state.said) or "it said nothing").strip(),
            "said": (state.printed or [""])[-1].strip(),
        }
        tried = "launching {} on {}".format(self.request.role, host)
        if state.forwarding_disabled:
            why = "the server forwards no ports; set AllowTcpForwarding yes in its sshd_config"
        elif state.port_failed:
            why = (
                "{} blocks of ports were refused ({}); if the server forbids forwarding, set"
                " AllowTcpForwarding yes in its sshd_config".format(TRIES, state.port_failed)
            )
        elif state.silent:
            why = "the kernel has not called back within {} s; run it by hand: {}".format(
                CALLBACK_SECONDS, facts["by_hand"]
            )
        elif self.kernel_ended:
            text = "{}\n{}\ncode={}".format(printed, said if not state.ended else "", code)
            why = diagnose(KERNEL_DIAGNOSES, text, facts)
        elif state.started:
            why = "the connection was lost ({}); the kernel has been hung up on".format(facts["last"])
        else:
            said += "\ntimed out" if state.gave_up else ""
            why = diagnose(DIAGNOSES, said, facts) or "{} failed with exit code {}: {}; try: {}".format(
                self.kind.kind, self.client.code, facts["last"], facts["by_hand"]
            )
        return "{}: {}".format(tried, why)

    def _by_hand(self):
        there = self.request.destination
        flag = ["-p" if self.kind is OpenSSH else "-P", str(there.port)] if there.port else []
        user = ["-l", there.user] if there.user else []
        program = os.path.basename(self.program) if self.kind is Plink else "ssh"
        return printable([program] + flag + user + [there.host, self.request.kernel.quoted])


def remove_if_there(path):
    try:
        os.remove(path)
    except FileNotFoundError:
        pass  # ssh has removed it meanwhile


def last_words(lines):
    """The last line of a client that is neither debugging output nor statistics."""
    for line in reversed(lines):
        if not line.startswith(("debug", "Transferred:", "Bytes per second:")):
            return line
    return None


class Tail:
    """What another process appends to a file, in lines."""

    def __init__(self, descriptor, position):
        self.descriptor, self.position = descriptor, position

    def lines(self):
        """The whole lines that have come since the last call, 64 KiB of them at most."""
        whole = os.pread(self.descriptor, 65536, self.position).split(b"\n")[:-1]
        self.position += sum(len(line) + 1 for line in whole)
        return [line.decode("utf-8", "replace").rstrip("\r") for line in whole]


class Check:
    """``--check``: plays the front end, reports each step, and stops the kernel when it has called back."""

    def __init__(self, launch):
        self.launch, self.done = launch, False
        data, message = listen(), listen()
        self.link = LinkName(data.getsockname()[1], LOOPBACK, message.getsockname()[1], LOOPBACK)
        launch.loop.readers[data] = lambda: self._accept(data, "data channel")
        launch.loop.readers[message] = lambda: self._accept(message, "message channel")
        self.seen = {}
        self.colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def report(self, name, text):
        mark = "\033[32mok\033[0m" if self.colours else "ok"
        print("{:6.2f} s  {}  {}: {}".format(self.launch.seconds, mark, name, text), flush=True)

    def _accept(self, listener, name):
        connection = accept(listener)
        if connection is None:
            return
        del self.launch.loop.readers[listener]
        self.seen[name] = connection
        self.launch._step(name, "the kernel has connected")
        if name == "data channel":
            self.launch.loop.readers[connection] = lambda: self._answer(connection)
        if len(self.seen) == 2:
            self.done = True
            self.launch._end_client()

    def _answer(self, connection):
        """A connecting link asks which message port it may use, and opens that after this answer."""
        del self.launch.loop.readers[connection]
        try:
            if connection.recv(64):
                connection.sendall(b"OKY")
        except OSError:
            pass  # it has gone again: its end will be told


def printable(argv):
    """A command line as a POSIX shell would take it; for logs and eyes only."""
    words = []
    for word in argv:
        plain = word.translate({ord(character): None for character in "@%+=:,./-_~"})
        words.append(word if plain.isalnum() else "'{}'".format(word.replace("'", "'\\''")))
    return " ".join(words)


def redacted(argv):
    """``argv`` without the password that an old plink needs in it."""
    hidden = list(argv)
    if "-pw" in hidden[:-1]:
        hidden[hidden.index("-pw") + 1] = "***"
    return hidden


def dry_run(request, program, client):
    """Print what would be run, and the ports."""
    request.link = request.link or LinkName(49152, LOOPBACK, 49153, LOOPBACK)
    relays = (0,) * 5 if request.callback else ()
    plan = Plan(request, first_ports(request), relays)
    if client is Plink:
        password = ("-pwfile", "***") if request.destination.password else ()
        argv = Plink.arguments(request, plan, program, password)
    else:
        argv = OpenSSH.arguments(request, plan)
    print(printable([program] + argv))
    for forward in plan.forwards:
        arrow = "to the front end" if forward.flag == "-R" else "to the kernel"
        target = forward.to or "a port of the switchboard, chosen at launch"
        print("{} {}:{} -> {}:{}  {}".format(forward.flag, LOOPBACK, forward.port, forward.host, target, arrow))
    print("link name for the kernel: {}".format(plan.link))
    return 0


# ------------------------------------------------------------------------------------------------ main


def prepare(request, script, folder):
    """Find the client and open the log.

    :returns: a function that launches; see :class:`Launch` for its argument ``tell`` and its result
    :raises Fatal: there is no client, or it has no word for an option
    """
    program, client = find_client(request.client, os.environ)
    if client is Plink:
        Plink.check(request)
    if request.dry_run:
        return lambda tell=None: dry_run(request, program, client)
    log = Log(folder, script, os.environ)
    log.write("tunnel {}, {}.py, Python {}, {}".format(VERSION, script, sys.version.split()[0], sys.platform))
    log.write("{} {} {}".format(request.destination, request.kernel.path, request.link or "--check"))

    def launch(tell=None):
        work = Launch(request, program, client, log, tell)
        try:
            return work.run()
        except Fatal as error:
            log.write(error.text)
            raise
        except Exception:
            if os.environ.get("TUNNEL_DEBUG"):
                import traceback

                log.write(traceback.format_exc())
            log.write(DEFECT.format(""))
            raise
        finally:
            work.abandon()

    return launch


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
        return EX_SOFTWARE, DEFECT.format(" ({})".format(type(error).__name__))


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
        print(USAGE.format(script=script, role=role), end="")
        return 0
    if argv[:1] == ["--version"]:
        print("tunnel " + VERSION)
        return 0
    code, text = guarded(lambda: start(script, role, argv))
    if text:
        say(text)
    return code


def start(script, role, argv):
    """Launch, in the background where the role asks for it; returns the exit code."""
    folder = os.path.dirname(os.path.abspath(__file__))
    inside = "TUNNEL_DETACHED" in os.environ
    if inside:
        argv = detached_arguments()
    request = parse_arguments(role, argv)
    in_front = role is CONTROLLER or request.dry_run or request.check
    if WINDOWS and not in_front and not inside:
        return detach_on_windows(os.path.join(folder, script + ".py"), argv)
    launch = prepare(request, script, folder)
    if in_front:
        return launch()
    return launch_told(launch, 1) if inside else detach(launch)


def launch_told(launch, descriptor):
    """Launch, and write exit code and line to ``descriptor`` as soon as they are known; then close it."""

    def tell(code, text):
        os.write(descriptor, "{} {}".format(code, text).encode("utf-8", "backslashreplace"))
        os.close(descriptor)

    told = []
    code, text = guarded(lambda: launch(lambda *verdict: told.append(tell(*verdict))))
    if not told:
        tell(code, text)
    return code


def hear(data):
    """The exit code that :func:`launch_told` has written; its line goes to stderr."""
    code, _, text = data.decode("utf-8", "replace").partition(" ")
    if text:
        say(text)
    return int(code) if code.isdigit() else EX_SOFTWARE


def detach(launch):
    """Launch in a process of its own, and return as soon as the launch stands or has failed.

    The parallel tools start one kernel after the other, so this has to return; but somebody has to stay
    and end the client when its kernel has ended.
    """
    import signal

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            launch_told(launch, writer)
        finally:
            os._exit(0)
    os.close(writer)
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), lambda number, _: os.kill(child, number))
    data = b""
    while True:
        more = os.read(reader, 4096)
        if not more:
            return hear(data)
        data += more


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
    return hear(child.stdout.read())


def detached_arguments():
    """The arguments that :func:`detach_on_windows` has sent."""
    import json

    del os.environ["TUNNEL_DETACHED"]
    return json.loads(sys.stdin.buffer.read().decode("ascii"))


if __name__ == "__main__":
    sys.exit(main())
