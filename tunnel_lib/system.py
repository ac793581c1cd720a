"""What the system tells of a connection: who is behind it, whether the peer is there, what it has not taken."""

import os
import sys

from tunnel import FRONT_END_SECONDS, PATH_LENGTH, WINDOWS

# What makes ssh ask without a terminal.
ASKING = ("DISPLAY", "WAYLAND_DISPLAY", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE")


def in_thread(work):
    """A socket whose other end is handed to ``work``, in a thread."""
    import socket
    import threading

    near, far = socket.socketpair()
    threading.Thread(target=work, args=(far,), daemon=True).start()
    return near


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
    """Whether a peer on this machine has closed its end, though its farewell waits behind data that nobody reads.
    Linux tells of the peer's socket (proc(5), ``/proc/net/tcp``), which is gone or on its way out."""
    theirs, ours = peer_rows(connection)
    return ours is not None and (theirs is None or theirs[2] == b"04")  # FIN-WAIT-1


def stranger_at(connection):
    """Who else than this user, or root, holds the other end of a connection; None for nobody else."""
    user = peer_user(connection)
    if user is None or user in (os.getuid(), 0):
        return None
    return "another user (number {})".format(user) if user >= 0 else "a process that has gone already"


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
    if WINDOWS or not ends[0][0].startswith("127."):
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


def look_up_in_thread(loop, look_up, done):
    """Look a name up without waiting for a name server.

    :param look_up: gives the addresses; it runs in a thread
    :param done: called by the loop with the addresses, and the reason why there are none
    """
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


def look_for_front_end(timers, link, gone, first):
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
