"""The door of a kernel machine: what a login runs first. A login that comes back to its session runs nothing else.

It reads the launcher's hello from standard input. Where the session that the hello names has a keeper already, the
door hands its standard input and output over to that keeper, and waits. Where there is none yet, the hello is
followed by the other files of this folder; the door makes modules of them and starts a keeper with those.

This file is sent by itself, and runs without the others: it imports the standard library only.
"""

import json
import os
import socket
import struct
import sys
import time

PROTOCOL = 2
HELLO_LIMIT = 16384
NOISE_LIMIT = 1 << 20  # what a login may print
PARCEL_LIMIT = 1 << 20  # what may follow a hello
ALL_BYTES = bytes(range(256))
MARKS = {"near": b"--tunnel-relay-near--", "far": b"--tunnel-relay-far--"}
END = b"--tunnel-relay-end--"
# Why a session cannot go on:
GONE, ELSEWHERE, VERSIONS, ALTERED, REFUSED = "gone", "elsewhere", "versions", "altered", "refused"
NOISY = "noisy"  # which only the first login's noise does


class WireError(Exception):
    """A connection cannot go on.

    :param text: one line that says why
    :param error: why the session cannot either, where another connection would not help
    """

    def __init__(self, text, error=None):
        super().__init__(text)
        self.text, self.error = text, error


def hello(side, facts):
    """What a side says first on each connection: a mark, a line of facts, and every byte there is.

    :param side: whose hello it is, ``near`` or ``far``
    """
    line = json.dumps(dict(facts, version=PROTOCOL)).encode("ascii")
    return b"\n" + MARKS[side] + line + b"\n" + ALL_BYTES + END + b"\n"


def altered(got):
    """One line that says how bytes have been changed on the way; None where they have not.

    :param got: what has become of all 256 byte values
    """
    for value in range(256):
        if got[value : value + 1] == ALL_BYTES[value : value + 1]:
            continue
        if got[value + 1 : value + 2] == ALL_BYTES[value : value + 1]:
            what = "a byte 0x{:02x} is put before 0x{:02x}".format(got[value], value)
        elif got[value : value + 2] == ALL_BYTES[value + 1 : value + 3]:
            what = "byte 0x{:02x} does not come through".format(value)
        else:
            what = "byte 0x{:02x} comes out as 0x{}".format(value, got[value : value + 1].hex() or "(nothing)")
        return "a program between the two machines changes what passes: {}; no terminal may be in between".format(
            what
        )
    return None if len(got) == 256 else "a program between the two machines adds bytes to what passes"


class HelloReader:
    """Finds the other side's hello in what arrives, after whatever a login prints."""

    def __init__(self, side):
        self.mark = MARKS[side]
        self.data, self.found, self.skipped = bytearray(), False, 0

    def feed(self, data):
        """Take the next bytes.

        :returns: what stood before the hello, the facts (None while there are none), what stands after it
        :raises WireError: no hello, an altered one, or one of another version
        """
        self.data += data
        noise = b""
        if not self.found:
            at = self.data.find(self.mark)
            self.found = at >= 0
            end = at if self.found else len(self.data) - self._held()
            noise = bytes(self.data[:end])
            del self.data[: end + len(self.mark) if self.found else end]
            self.skipped += len(noise)
            if self.skipped > NOISE_LIMIT:
                raise WireError("the login prints without end: more than {} bytes".format(NOISE_LIMIT), NOISY)
        end = self.data.find(END) if self.found else -1
        if end < 0:
            if self.found and len(self.data) > HELLO_LIMIT:
                raise WireError("the relay's first words arrive altered: they do not end", ALTERED)
            return noise, None, b""
        return noise, self._facts(bytes(self.data[:end])), bytes(self.data[end + len(END) :])

    def _held(self):
        """How many bytes at the end may be the beginning of the mark."""
        for count in range(min(len(self.mark) - 1, len(self.data)), 0, -1):
            if self.data.endswith(self.mark[:count]):
                return count
        return 0

    @staticmethod
    def _facts(text):
        line, _, rest = text.partition(b"\n")
        try:
            facts = json.loads(line.decode("ascii"))
            version, received = facts["version"], facts.get("received", 0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise WireError("the relay's first words arrive altered: {!r}".format(line[:80]), ALTERED) from None
        if version != PROTOCOL:
            text = "the relay over there speaks version {!r:.20} of its protocol, this one {}; start a new session"
            raise WireError(text.format(version, PROTOCOL), VERSIONS)
        if type(received) is not int or received < 0:
            raise WireError("the relay's first words make no sense: received {!r:.40}".format(received), ALTERED)
        problem = altered(rest)
        if problem:
            raise WireError(problem, ALTERED)
        return facts


FIRST_SECONDS = 60.0  # a session that nobody has ever used is given up then
PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - local to a machine, and there without a login
# Exit codes of the bootstrap; 101 and 102 are the shell's.
NO_PYTHON, OLD_PYTHON, CUT_SHORT, BAD_HELLO, NO_SESSION, ENDED, TERMINAL = range(101, 108)
UNHEARD, OTHER_SHELL, TAKEN = range(108, 111)


def session_name(secret):
    """The name of a session's socket, which does not tell the secret."""
    import hashlib

    return hashlib.sha256(b"name" + secret.encode("ascii")).hexdigest()[:16]


def farewell(secret):
    """The line that a watchdog writes when its launcher has died: nobody will come back, end at once."""
    import hashlib

    return (
        b"goodbye-" + hashlib.sha256(b"goodbye" + secret.encode("ascii")).hexdigest()[:32].encode("ascii") + b"\n"
    )


def private(folder):
    """Whether a folder is this user's, and nobody else may look into it."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return found.st_uid == os.getuid() and found.st_mode & 0o170077 == 0o040000


def folders():
    return [os.path.join(place, "tunnel-relay-{}".format(os.getuid())) for place in PLACES]


def abstract_name(name):
    """The name of a socket outside of all file systems (Linux), for a machine whose disks are full."""
    return "\0tunnel-relay-{}-{}".format(os.getuid(), name)


def owned(connection):
    """Whether the process at the other end of a Unix socket is this user's, where the system tells (Linux)."""
    number = getattr(socket, "SO_PEERCRED", None)
    if number is None:
        return True
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, number, 12))[1] == os.getuid()


def connect_to(name):
    """A connection to the keeper of that name; None where there is none."""
    addresses = [os.path.join(folder, "relay-" + name) for folder in folders() if private(folder)]
    if sys.platform.startswith("linux"):
        addresses.append(abstract_name(name))
    for address in addresses:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            if owned(connection):
                return connection
        except OSError:
            pass  # nobody listens there
        connection.close()
    return None


def refuse(descriptor, error, text):
    """Say that a session cannot go on, in place of a hello."""
    data = hello("far", {"error": error, "text": text, "host": socket.gethostname()})
    os.set_blocking(descriptor, True)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError:
            return  # nobody hears it


def read_hello(descriptor, seconds):
    """The near side's hello, and not a byte more, for what follows is the keeper's.

    :raises WireError: it does not come, or altered
    """
    import select

    reader, facts = HelloReader("near"), None
    end = time.monotonic() + seconds
    while facts is None:
        ready = select.select([descriptor], [], [], max(0, end - time.monotonic()))[0]
        data = os.read(descriptor, 1) if ready else b""
        if not data:
            raise WireError("the connection ended before it began" if ready else "the near side says nothing")
        facts = reader.feed(data)[1]
    return facts


def start_keeper(secret, parcel):
    """Start a keeper, in a session of its own and out of this one's sight.

    :param parcel: the bytes with which the relay was sent: those of the door, and those that follow a hello
    :returns: a socket to it
    """
    here, there = socket.socketpair(socket.AF_UNIX)
    child = os.fork()
    if child:
        there.close()
        os.waitpid(child, 0)
        return here
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        here.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        load(parcel[1])["keeper"].run_keeper(there, secret, parcel)
    except Exception:
        import traceback

        try:
            there.send(traceback.format_exc()[-8192:].encode("utf-8", "replace"))
        except OSError:
            pass  # nobody hears it
    finally:
        os._exit(0)


def hand_streams_over(control, facts):
    """Hand standard input and output over to a keeper, and wait until it has done with them.

    :returns: an exit code, and what the keeper had to say if a defect has ended it
    """
    line = json.dumps(facts).encode("ascii") + b"\n"
    descriptors = struct.pack("2i", 0, 1)
    try:
        control.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        told = b""
        while True:
            data = control.recv(16384)
            if not data:
                break
            told = (told + data)[-16384:]
    except OSError as error:
        return ENDED, "the keeper is gone: {}".format(error)
    if len(told) == 1:
        return told[0], ""
    return ENDED, told.decode("utf-8", "replace")


def end_others(names):
    """End sessions whose launchers are known to be dead."""
    for secret in names if isinstance(names, list) else ():
        control = connect_to(session_name(secret)) if isinstance(secret, str) and secret.isalnum() else None
        if control:
            control.sendall(json.dumps({"session": secret, "end": True}).encode("ascii") + b"\n")
            control.settimeout(5)
            try:
                control.recv(1)
            except OSError:
                pass  # it has not answered in time
            control.close()


def leads_back(descriptor):
    """Whether what is written there may reach somebody: it does not in a file, nor where nothing is open."""
    try:
        kind = os.fstat(descriptor).st_mode & 0o170000
    except OSError:
        return False
    return kind != 0o100000 and (kind != 0o020000 or os.isatty(descriptor))  # a file, a device


def read_exactly(descriptor, count, seconds):
    """The next ``count`` bytes, and not one more.

    :raises WireError: they do not come within ``seconds``
    """
    import select

    data, end = bytearray(), time.monotonic() + seconds
    while len(data) < count:
        ready = select.select([descriptor], [], [], max(0, end - time.monotonic()))[0]
        more = os.read(descriptor, count - len(data)) if ready else b""
        if not more:
            raise WireError("the relay does not arrive whole")
        data += more
    return bytes(data)


def load(rest):
    """Make modules of the files that follow a hello, in their order.

    :param rest: pairs of a name and a text, as JSON, compressed
    :returns: the modules by their names
    """
    import zlib

    sys.modules["sent.door"] = sys.modules["__main__"]
    package = sys.modules["sent"] = type(sys)("sent")
    package.__path__ = []
    modules = {}
    for name, text in json.loads(zlib.decompress(rest).decode("ascii")):
        module = modules[name] = sys.modules["sent." + name] = type(sys)("sent." + name)
        module.__package__ = "sent"
        exec(compile(text, name + ".py", "exec"), module.__dict__)  # noqa: S102 - it comes from the launcher
    return modules


def main(first):
    """What a login runs: attach its standard input and output to the session that the near side names.

    :param first: the bytes with which this file came
    :returns: an exit code
    """
    host = socket.gethostname()
    if not leads_back(1):
        return UNHEARD
    try:
        facts = read_hello(0, FIRST_SECONDS)
        count = facts.get("rest")
        if count is not None and not (type(count) is int and 0 < count <= PARCEL_LIMIT):
            raise WireError("the relay is to have {!r:.40} bytes".format(count))
        rest = read_exactly(0, count + 1, FIRST_SECONDS)[1:] if count else b""  # after the hello's line break
        if facts.get("beyond"):
            return load(rest)["far"].serve_beyond(facts)
        secret = facts["session"]
        name = session_name(secret)
    except (WireError, KeyError, ValueError, TypeError, AttributeError) as error:
        text = getattr(error, "text", "the near side names no session")
        refuse(1, getattr(error, "error", None) or REFUSED, text)
        return BAD_HELLO
    control = connect_to(name)
    if control is None and not facts.get("new"):
        before = facts.get("host")
        if before and before != host:
            text = "the session is on {}, but this login has come to {}: name {} as the host to come back to it"
            refuse(1, ELSEWHERE, text.format(before, host, before))
        else:
            text = (
                "the relay on {} is gone: killed, or the machine was restarted, or nobody came back to it for {} "
                "min; where systemd has KillUserProcesses=yes it ends what outlives a login, unless its "
                "administrator sets KillUserProcesses=no, or your name in KillExcludeUsers, in logind.conf"
            )
            refuse(1, GONE, text.format(host, facts.get("minutes")))
        return NO_SESSION
    end_others(facts.get("end"))
    facts["end"] = None
    code, text = hand_streams_over(control or start_keeper(secret, (first, rest)), facts)
    if text:
        sys.stderr.write("tunnel: a defect of the relay ended it: {}\n".format(text))
    return code
