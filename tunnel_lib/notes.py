"""What launches to one destination tell later ones: notes in a private file."""

import os
import time

from tunnel import WINDOWS, private_folder, remove_if_there


def memory_path(request, program, log):
    """Where this destination is remembered; None where there is no private folder, and on Windows."""
    if WINDOWS:
        return None
    there = request.destination
    words = [program, str(there.user), there.host, str(there.port)]
    words += ["{}={}".format(*option) for option in request.options]
    name = "{:08x}".format(number_of("\0".join(words).encode("utf-8", "surrogateescape")))
    try:
        return os.path.join(private_folder(os.environ), name)
    except OSError as error:
        log.write("nothing is remembered from launch to launch: {}".format(error))
        return None


def number_of(data):
    """A number of 32 bits that stands for some bytes (FNV-1a)."""
    number = 0x811C9DC5
    for byte in data:
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    return number


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

    def remember(self, key, value):
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
    for _ in range(20):
        try:
            os.lockf(descriptor, os.F_TLOCK, 0)  # the module fcntl would be loaded before the client is started
            return
        except OSError:
            time.sleep(0.05)
    os.lockf(descriptor, os.F_TLOCK, 0)


def is_running(pid):
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid or 1 << 30, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def sweep(folder):
    """Remove the named pipes that launchers have left which were killed before their ssh had opened them."""
    for name in os.listdir(folder):
        pid = name.split("-")[1] if name.startswith("log-") else ""
        if pid.isdecimal() and not is_running(int(pid)):
            remove_if_there(os.path.join(folder, name))
