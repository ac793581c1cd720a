"""Tries at a launch without a client: what clients print, and the facts that a try makes of it.

The tables hold lines as the clients print them, read in their sources (OpenSSH 7.6 to 10.3, PuTTY 0.70 to 0.85) or
recorded from them.
"""

from rig import product
from rig.product import ANSWERED, LOGGED_IN, SILENT, STARTED, Facts, OpenSSH, Plan, Plink, Settings

LINK = "53994@127.0.0.1,39359@127.0.0.1"
KERNEL = "/usr/local/Wolfram/Wolfram/14.1/Executables/WolframKernel"
STAGES = (SILENT, ANSWERED, LOGGED_IN, STARTED)
BEFORE_LOGIN, BEFORE_START, ALWAYS = (SILENT, ANSWERED), (SILENT, ANSWERED, LOGGED_IN), STAGES


def request(*argv, role=product.CONTROLLER):
    return product.parse_arguments(role, list(argv) or ["john@host", KERNEL, LINK])


def settings(**others):
    return Settings((53994, 39359), **others)


def plan(**others):
    return Plan(request(), settings(**others), (1001, 1002, 1003, 1004, 1005, 1006))


# -- the clients' lines

# Line, event, the stages in which it has that meaning, what stands for the stars.
SSH_LINES = [
    ("OpenSSH_9.2p1 Debian-2+deb12u10, OpenSSL 3.0.19 27 Jan 2026", "version", (SILENT,), None),
    ("OpenSSH_for_Windows_8.1p1, LibreSSL 3.0.2", "version", (SILENT,), None),
    ("debug1: OpenSSH_10.0p1 Debian-7, OpenSSL 3.5.0 8 Apr 2025", "version", (SILENT,), None),
    ("debug1: Connecting to 127.0.0.1 [127.0.0.1] port 22.", "name", (SILENT,), ["127.0.0.1 [127.0.0.1]", "22"]),
    ("debug1: Connecting to math.example.com [2001:db8::1] port 2222.", "name", (SILENT,), None),
    ("debug1: Executing proxy command: exec nc -X 5 proxy 22", "proxy", (SILENT,), ["exec nc -X 5 proxy 22"]),
    ("debug1: Executing proxy command: exec ssh -l me -p 22 -v -W '[h]:22' jump", "proxy", (SILENT,), None),
    ("debug1: Executing proxy dialer command: exec dial", "proxy", (SILENT,), ["exec dial"]),
    (
        "debug1: Server host key: ssh-ed25519 SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
        "host key",
        BEFORE_LOGIN,
        None,
    ),
    ("debug1: Server host key: ecdsa-sha2-nistp256 SHA256:47DEQpj8HBSa", "host key", BEFORE_LOGIN, None),
    (
        "debug1: Server host certificate: ssh-ed25519-cert-v01@openssh.com SHA256:47DEQpj8HBSa, serial 7 ID"
        ' "host.example.com" CA ssh-ed25519 SHA256:TImW+5JCeuQeRkm5 valid from 2024-01-01T00:00:00 to'
        " 2034-01-01T00:00:00",
        "host key",  # it is printed instead of the key
        BEFORE_LOGIN,
        None,
    ),
    ("debug1: Authentication succeeded (publickey).", "login", BEFORE_LOGIN, ["publickey"]),  # up to 8.4
    ("Authenticated to host ([192.0.2.7]:22).", "login", BEFORE_LOGIN, None),
    ("Authenticated to host (via proxy).", "login", BEFORE_LOGIN, None),
    ('Authenticated to host ([192.0.2.7]:22) using "publickey".', "login", BEFORE_LOGIN, None),
    ('Authenticated to host (via proxy) using "keyboard-interactive".', "login", BEFORE_LOGIN, None),
    ('Authenticated using "publickey" with partial success.', "first step", BEFORE_LOGIN, ["publickey"]),
    ("Authenticated with partial success.", "first step", BEFORE_LOGIN, []),  # up to 8.4
    ("kex_exchange_identification: Connection closed by remote host", "dropped", (SILENT,), []),
    ("kex_exchange_identification: read: Connection reset by peer", "dropped", (SILENT,), None),
    ("ssh_exchange_identification: Connection closed by remote host", "dropped", (SILENT,), []),
    ("ssh_exchange_identification: read: Connection reset by peer", "dropped", (SILENT,), None),
    ("command-line: line 0: Bad configuration option: sessiontype", "bad option", (SILENT,), ["sessiontype"]),
    ("Couldn't open logfile /run/user/1/tunnel/log-1: Permission denied", "no log", (SILENT,), None),
    # A connection that is shared.
    ("debug1: mux_client_request_session: master session id: 2", "command", BEFORE_START, ["2"]),
    (
        "debug1: Requesting forwarding of remote forward 127.0.0.1:53994 -> 127.0.0.1:40001",
        "shared",
        (SILENT,),
        ["remote forward 127.0.0.1:53994 -> 127.0.0.1:40001"],
    ),
    (
        "debug1: Requesting forwarding of local forward 127.0.0.1:53995 -> 127.0.0.1:53995",
        "shared",
        (SILENT,),
        None,
    ),
    (
        "mux_client_request_session: session request failed: Session open refused by peer",
        "full",
        BEFORE_START,
        None,
    ),
    ("Control socket connect(/run/user/1/tunnel/x-0): Connection refused", "stale", (SILENT,), None),
    ('debug1: Control socket "/run/user/1/tunnel/x-0" does not exist', "stale", (SILENT,), None),
    ("muxclient: master hello exchange failed", "stale", BEFORE_START, None),
    ("mux_client_request_session: read from master failed: Broken pipe", "stale", BEFORE_START, None),
    ("mux_client_forward: write packet: Broken pipe", "stale", BEFORE_START, None),
    (
        "mux_client_forward: forwarding request failed: remote port forwarding failed for listen port 53994",
        "mux forward",
        BEFORE_START,
        ["remote port forwarding failed for listen port 53994"],
    ),
    ("mux_client_forward: forwarding request failed: Port forwarding failed", "mux forward", BEFORE_START, None),
    # Forwards.
    ("Error: remote port forwarding failed for listen port 53994", "port", BEFORE_START, ["53994"]),
    ("Warning: remote port forwarding failed for listen port 53994", "port", BEFORE_START, ["53994"]),
    ("channel_setup_fwd_listener_tcpip: cannot listen to port: 53995", "port", BEFORE_START, ["53995"]),
    (
        "Error: remote port forwarding failed for listen path /run/user/1/gnupg/S.gpg-agent",
        "foreign forward",
        BEFORE_START,
        None,
    ),
    ("Warning: remote port forwarding failed for listen path /run/s", "foreign forward", BEFORE_START, ["/run/s"]),
    ("Could not request local forwarding.", "foreign forward", BEFORE_START, []),
    ("unix_listener: cannot bind to path /tmp/s: Address already in use", "foreign forward", BEFORE_START, None),
    ("unix_listener: cannot listen on path /tmp/s: Not supported", "foreign forward", BEFORE_START, None),
    ('unix_listener: path "/tmp/sss" too long for Unix domain socket', "foreign forward", BEFORE_START, None),
    (
        "channel_setup_fwd_listener_tcpip: getaddrinfo(127.0.0.1): Address family for hostname not supported",
        "family",
        BEFORE_START,
        None,
    ),
    ("connect_to 127.0.0.1: unknown host (Address family for hostname not supported)", "family", ALWAYS, None),
    ("debug1: Remote: Server has disabled port forwarding.", "no forwarding", BEFORE_START, []),
    (
        'debug1: Remote: Forwarding listen address "127.0.0.1" overridden by server GatewayPorts',
        "exposed",
        BEFORE_START,
        ["127.0.0.1"],
    ),
    # The session.
    ('debug1: Sending command: "/opt/14.1/math" -wstp', "command", (LOGGED_IN,), ['"/opt/14.1/math" -wstp']),
    ("PTY allocation request failed on channel 0", "no terminal", ALWAYS, ["0"]),
    ("debug1: client_input_channel_req: channel 2 rtype exit-status reply 0", "ended", (STARTED,), ["2", "0"]),
    ("debug1: client_input_channel_req: channel 0 rtype exit-signal reply 0", "signal", (STARTED,), None),
    ("debug1: Exit status 0", "status", (STARTED,), ["0"]),
    ("debug1: Exit status -1", "status", (STARTED,), ["-1"]),
    ("channel 0: open failed: administratively prohibited: open failed", "no session", (LOGGED_IN,), None),
    ("channel 0: open failed: connect failed: open failed", "no session", (LOGGED_IN,), ["0"]),
    ("channel 0: open failed: connect failed: open failed", "no session", (LOGGED_IN,), None),
    ("channel 6: open failed: administratively prohibited: open failed", "no opening", (STARTED,), None),
    ("john@host: Permission denied (publickey,password).", "refused", BEFORE_LOGIN, None),
    ("Permission denied (publickey).", "refused", BEFORE_LOGIN, ["publickey"]),
    ("stdio forwarding failed", "jump failed", BEFORE_LOGIN, []),
    ("Host key verification failed.", "jump failed", BEFORE_LOGIN, []),
]
PLINK_LINES = [
    ("Connecting to 192.0.2.7 port 22", "name", (SILENT,), None),
    ("Connecting to 2001:db8::1 port 22", "name", (SILENT,), None),
    ("Starting local proxy command: nc proxy 22", "proxy", (SILENT,), ["nc proxy 22"]),
    ("ssh-ed25519 255 SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU", "host key", (SILENT,), None),
    ("ssh-rsa 2048 aa:bb:cc:dd:ee:ff:00:11:22:33:44:55:66:77:88:99", "host key", (SILENT,), None),  # up to 0.75
    ("ecdsa-sha2-nistp256 256 SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU", "host key", (SILENT,), None),
    ("Access granted", "login", BEFORE_LOGIN, []),
    ("Further authentication required", "first step", BEFORE_LOGIN, []),
    ("Started a shell/command", "command", (LOGGED_IN,), []),
    ("Server refused to allocate pty", "told no terminal", (LOGGED_IN,), []),
    ("Session sent command exit status 7", "status", (STARTED,), ["7"]),
    ("Server sent command exit status 7", "status", (STARTED,), ["7"]),
    ("Session exited on signal SIGTERM", "signal", (STARTED,), None),
    ('Session exited on unrecognised signal "KILL" (core dumped)', "signal", (STARTED,), None),
    ('Server exited on signal "TERM"', "signal", (STARTED,), None),
    ("Main session channel closed", "ended", (STARTED,), []),
    ("Remote port forwarding from 127.0.0.1:53994 refused", "port", BEFORE_START, ["127.0.0.1", "53994", ""]),
    (
        "Local port 127.0.0.1:53995 forwarding to 127.0.0.1:53995 failed: Address already in use",
        "port",
        BEFORE_START,
        ["127.0.0.1", "53995", "127.0.0.1:53995", "Address already in use"],
    ),
    (
        "Local IPv4 port 127.0.0.1:53995 forwarding to 127.0.0.1:53995 failed: Network error: Permission denied",
        "port",
        BEFORE_START,
        None,
    ),
    (
        "Forwarded connection refused by remote: Administratively prohibited [open failed]",
        "no opening",
        (STARTED,),
        None,
    ),
    ("Remote debug message: Server has disabled port forwarding.", "no forwarding", BEFORE_START, []),
    (
        'Remote debug message: Forwarding listen address "127.0.0.1" overridden by server GatewayPorts',
        "exposed",
        BEFORE_START,
        ["127.0.0.1"],
    ),
    ('plink: unknown option "-pwfile"', "old plink", (SILENT,), []),
    ("FATAL ERROR: Cannot answer interactive prompts in batch mode", "refused", BEFORE_LOGIN, []),
    ("FATAL ERROR: Configured password was not accepted", "refused", BEFORE_LOGIN, []),
    (
        "FATAL ERROR: No supported authentication methods available (server sent: publickey)",
        "refused",
        BEFORE_LOGIN,
        ["server sent: publickey"],
    ),
    ("Remote side unexpectedly closed network connection", "dropped", (SILENT,), []),
    ("FATAL ERROR: Remote side unexpectedly closed network connection", "dropped", (SILENT,), []),
    ("FATAL ERROR: Server unexpectedly closed network connection", "dropped", (SILENT,), []),  # up to 0.70
    ("FATAL ERROR: Network error: Connection reset by peer", "dropped", (SILENT,), []),  # Windows
    ("FATAL ERROR: Connection reset by peer", "dropped", (SILENT,), []),
]
READ = [(OpenSSH, line) for line in SSH_LINES] + [(Plink, line) for line in PLINK_LINES]


# -- facts


def classic_plan():
    return Plan(request("--links", "classic", "john@host", KERNEL, LINK), settings(), (1, 2))


def facts_of(*lines, dialect=OpenSSH, given=None, of=None):
    """What is known after a client has said ``lines``."""
    facts = Facts()
    given = given or settings()
    of = of or Plan(request(), given if given.ports else settings(), (1, 2, 3, 4, 5, 6))
    for line in lines:
        event = dialect.read(line, facts.stage)
        if event:
            product.note(facts, given, of, event[0], event[1], line)
    return facts


LOGIN = [
    "OpenSSH_9.2p1 Debian-2, OpenSSL 3.0.19",
    "debug1: Connecting to host [192.0.2.7] port 22.",
    "debug1: Server host key: ssh-ed25519 SHA256:47DEQpj8HBSa",
    'Authenticated to host ([192.0.2.7]:22) using "publickey".',
]
SESSION = LOGIN + ["debug1: Sending command: x"]
PLINK_LOGIN = ["Connecting to 192.0.2.7 port 22", "ssh-ed25519 255 SHA256:47DEQpj8HBSa", "Access granted"]
PLINK_SESSION = PLINK_LOGIN + ["Started a shell/command"]
MUX = [
    "OpenSSH_9.2p1, OpenSSL",
    "debug1: Requesting forwarding of remote forward 127.0.0.1:53994 -> 127.0.0.1:1001",
]


# -- settings


def met(obstacle, **others):
    facts = Facts()
    facts.meet(obstacle, "line")
    for name, value in others.items():
        setattr(facts, name, value)
    return facts


def changes(before, after):
    return {
        name: getattr(after, name) for name in Settings.__slots__ if getattr(after, name) != getattr(before, name)
    }
