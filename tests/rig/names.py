"""Link names, and strings as they travel in the data channel."""

import itertools

from rig import product

PAIRS = [(53999, 54000), (54001, 54002)]


def marked(text, length=None):
    """A string in the data channel, as measured (WSTP revision 48): ``~``, its length, its bytes, a line's end."""
    length = len(text) if length is None else length
    return b'"bD~' + (bytes([0x40 + length]) if length < 64 else b"%d " % length) + text + b"\n"


def name_of_length(length, ports=(32817, 35625)):
    """A link name of ``length`` bytes; labels of a host have up to 63."""
    letters = itertools.cycle("abcdefghijklmnopqrstuvwxyz-0123456789abcdefghijklmnopqrst.")
    room = length - sum(len(str(port)) for port in ports) - 3
    hosts = ["".join(next(letters) for _ in range(size)) for size in (room // 2, room - room // 2)]
    hosts = ["a" + host[1:-1] + "z" if len(host) > 1 else "a" for host in hosts]
    return "{}@{},{}@{}".format(ports[0], hosts[0], ports[1], hosts[1]).encode()


def told_for(name, pair=PAIRS[0]):
    told = product.rewritten(name.decode(), pair)
    return name if told is None else told.encode()
