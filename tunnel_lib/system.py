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


ESTABLISHED, FIN_WAIT_1 = 1, 4  # states of a TCP socket, as Linux counts them
CLOSED_SOCKET = (0, 0, 0)  # in place of state, user and inode: no such socket


def has_closed(connection):
    """Whether a peer on this machine has closed its end, though its farewell waits behind unread data."""
    found = peer_socket(connection)
    return found is not None and (found[0] == FIN_WAIT_1 or not found[2])  # a closed socket has no inode


def stranger_at(connection):
    """Who else than this user, or root, holds the other end of a connection; None for nobody else."""
    user = peer_user(connection)
    if user is None or user in (os.getuid(), 0):
        return None
    return "another user (number {})".format(user) if user >= 0 else "a process that has gone already"


def peer_user(connection):
    """The user whose process holds the other end of a connection within this machine.

    :returns: the user's number; -1 where that process has closed its end already; None where the system does not
        tell (Windows, macOS, WSL 1)
    """
    found = peer_socket(connection)
    if found is None:
        return None
    state, user, inode = found
    return user if state == ESTABLISHED or inode else -1  # Linux shows a closed socket as root's, without an inode


def peer_socket(connection):
    """What Linux tells of the socket at the other end of a connection within this machine.

    :returns: its state, its user and its inode; :data:`CLOSED_SOCKET` where there is none any more; None where the
        peer is on another machine, or the system does not tell
    """
    try:
        theirs, ours = connection.getpeername(), connection.getsockname()
    except OSError:
        return None
    if WINDOWS or not theirs[0].startswith("127."):
        return None
    try:
        return ask_linux(theirs, ours)
    except (OSError, AttributeError):
        return search_tables(theirs, ours)


def ask_linux(theirs, ours):
    """Have Linux look one socket up (sock_diag(7)), which takes no longer where there are many.

    :param theirs: address and port of the socket; ``ours`` those that it is connected to
    :returns: as :func:`peer_socket`
    :raises OSError: Linux does not answer, or this is another system
    """
    import _socket

    addresses = b"".join(_socket.inet_aton(host).ljust(16, b"\0") for host, _ in (theirs, ours))
    ports = theirs[1].to_bytes(2, "big") + ours[1].to_bytes(2, "big")
    # struct inet_diag_req_v2: AF_INET, TCP, all states; the socket, on any device, with any cookie.
    asked = b"\2\6\0\0\xff\xff\xff\xff" + ports + addresses + bytes(4) + b"\xff" * 8
    numbers = (16 + len(asked)).to_bytes(4, sys.byteorder) + (20).to_bytes(2, sys.byteorder)  # SOCK_DIAG_BY_FAMILY
    kernel = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
    try:
        kernel.settimeout(1)
        kernel.send(numbers + (1).to_bytes(2, sys.byteorder) + bytes(8) + asked)  # NLM_F_REQUEST
        answer = kernel.recv(8192)
    finally:
        kernel.close()
    if int.from_bytes(answer[4:6], sys.byteorder) == 2:  # NLMSG_ERROR
        number = -int.from_bytes(answer[16:20], sys.byteorder, signed=True)
        if number == 2:  # ENOENT
            return CLOSED_SOCKET
        raise OSError(number, os.strerror(number))
    found = answer[16:]  # struct inet_diag_msg
    if found[4:8] != ports:  # nobody but a listener has that port
        return CLOSED_SOCKET
    user, inode = (int.from_bytes(found[at : at + 4], sys.byteorder) for at in (64, 68))
    return found[1], user, inode


def search_tables(theirs, ours):
    """:func:`ask_linux` where Linux does not answer: look through its tables (proc(5), ``/proc/net/tcp``)."""
    rows = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):  # a socket of both families stands in the second
        try:
            with open(table, "rb") as stream:
                rows += [line.split()[1:] for line in stream.read().splitlines()[1:]]
        except OSError:
            pass  # no Linux, or one without that family
    ends = [
        b"%08X:%04X" % (int.from_bytes(bytes(map(int, host.split("."))), sys.byteorder), port)
        for host, port in (theirs, ours)
    ]

    def row(one, other):
        return next((each for each in rows if each[0].endswith(one) and each[1].endswith(other)), None)

    if row(ends[1], ends[0]) is None:
        return None  # not even this process's own socket is in there
    found = row(*ends)
    return CLOSED_SOCKET if found is None else (int(found[2], 16), int(found[6]), int(found[8]))


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
    """Look whether the front end still listens, until its kernel has connected: from then on the link tells.

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


def hide_password(password):
    """Overwrite the password in this process's arguments, which every user of the machine can read (ps(1)).

    The arguments lie in the memory that the process was started with; Python has copied them long ago. Windows
    shows the arguments of a process to its own user only.

    :param password: None where there is none
    """
    if password is None:
        return
    secret = b":" + os.fsencode(password) + b"@"
    hidden = b":" + b"*" * (len(secret) - 2) + b"@"
    try:
        if sys.platform == "darwin":
            hide_in_argv(secret, hidden)
        elif not WINDOWS:
            hide_in_memory(secret, hidden)
    except (OSError, ValueError, IndexError, AttributeError, ImportError):
        pass  # the system does not let this process do so: the launch goes on


def hide_in_memory(secret, hidden):
    """Put ``hidden`` for ``secret`` where Linux keeps the arguments (proc(5): ``arg_start``, ``arg_end``)."""
    with open("/proc/self/stat", "rb") as stream:
        fields = stream.read().rpartition(b")")[2].split()  # from the third on
    start, end = int(fields[48 - 3]), int(fields[49 - 3])
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        found = os.pread(memory, end - start, start)
        os.pwrite(memory, found.replace(secret, hidden), start)
    finally:
        os.close(memory)


def hide_in_argv(secret, hidden):
    """Put ``hidden`` for ``secret`` in the strings that macOS has started this process with (crt_externs.h)."""
    import ctypes

    library = ctypes.CDLL(None)
    library._NSGetArgc.restype = ctypes.POINTER(ctypes.c_int)
    library._NSGetArgv.restype = ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))
    argv = library._NSGetArgv().contents
    for number in range(library._NSGetArgc().contents.value):
        text = ctypes.string_at(argv[number])
        ctypes.memmove(argv[number], text.replace(secret, hidden), len(text))


def parse_seconds(text, otherwise):
    """Seconds from a time as ssh takes it (``90``, ``1h30m``; sshd_config(5), TIME FORMATS); 0 for no limit.

    :param otherwise: what is right for None, and for what ssh itself is going to refuse
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
