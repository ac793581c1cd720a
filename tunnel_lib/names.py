"""Link names in the data channel of a main link: found, and replaced at equal length.

A front end of 11.1 or later, and a kernel up to 11.0, tell the other side over the main link where they listen for
further links. This file serves them; a launch whose links cannot be named later does without it.
"""

from tunnel import Channel, Fatal, LinkName, Switchboard

NAMES_SECONDS = 300  # how long the switchboard holds back what only might become a link name
HOLD_SECONDS = 0.2  # how long the beginning of what may become a link name is held
CERTAIN_SECONDS = 2.0  # how long such a beginning is held where the length before it says that more is to come
TOO_SHORT = "link name {} is too short to be replaced: left alone; create links with -LinkHost 127.0.0.1"


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


def fits(link):
    """Whether a link's name is long enough to be replaced by any other on the loopback."""
    return rewritten(str(link), (65535, 65535)) is not None


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
        replacement = rewritten(text, self.pairs[len(self.given)])
        if replacement is None:
            self.short += [] if text in self.short else [text]
            return None
        self.given[text] = replacement
        return replacement

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
    :param hosts: those that names are likely to have, beside IPv4 addresses

    Strings travel in the data channel as ``~``, their length, their bytes: below 64 the length is one byte
    0x40 + n, from there on decimal digits and a blank (measured, WSTP revision 48). A string whose length is told
    is a name as a whole or not at all. The beginning of what may become a name is held back: where a length
    stands before it, if that fits; where none does, as with a library that writes strings in another way, unless
    it follows a blank, a colon or a letter, which leaves the numbers of the greeting alone.

    A link may carry gigabytes, and each of its bytes is looked at, so most of that is left to functions written in
    C. Each ``@`` is looked at by itself as long as there are few. Where there are many, as in random bytes, in
    arrays of numbers from 2 to 65536 and among addresses of e-mail, every seventh byte is: of a name with IPv4
    addresses three in a row are digits or signs. Names with other hosts are then found by ``hosts``.
    """

    LONGEST = 2 * (5 + 1 + 255) + 1  # bytes of a name
    HISTORY = 1024  # how far back is looked for the string in which a text stands
    LOOKS, MORE_LOOKS = 4096, 16  # how many @ are looked at by themselves: at first, and with each chunk again
    STRIDE = 7  # a third of the shortest name with IPv4 addresses that can be replaced
    NUMERIC = 2 * (5 + 1 + 15) + 1  # bytes of the longest one
    FIGURES = bytes(value in b"0123456789.,@" for value in range(256))  # 1 for a byte that stands in such names
    LETTERS = bytes(value for value in range(128) if chr(value).isalnum()) + b".:_%@,-"  # what stands in all names

    start = None  # the first of the patterns

    def __init__(self, replace, hosts=()):
        self.replace = replace
        self.hosts = [b"@" + host.encode() for host in hosts if host.strip("0123456789.")]
        self.held = b""
        self.before = b""  # the bytes that went on last
        self.looks = self.LOOKS
        self.guesses = True  # whether a beginning is held back that has no length before it
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
        data = b"".join((self.before, self.held, data))
        done, position = [], first
        for start in self._starts(data, first):
            text = self._name_at(data, start) if start >= position else None
            if text:
                done += [data[position:start], self._told(text)]
                position = start + len(text)
        end = self._end(data, position)
        self.held = data[end:]
        return self._passed(b"".join(done + [data[position:end]]) if done else data[position:end])

    def _starts(self, data, first):
        """Where names may begin in ``data``, from ``first`` on."""
        self.looks = min(self.LOOKS, self.looks + self.MORE_LOOKS)
        at = data.find(b"@", first)
        while at >= 0:
            if not self.looks:
                yield from self._dense_starts(data, max(first, at - 5))
                return
            self.looks -= 1
            yield from self._start_before(data, first, at)
            at = data.find(b"@", at + 1)

    def _start_before(self, data, first, at):
        """Where the name begins whose first ``@`` may be that at ``at``: one place or none."""
        if data[at - 1 : at].isdigit():
            found = self.start.search(data, max(first, at - 5), at + 1)
            if found:
                yield found.start()

    def _dense_starts(self, data, first):
        """Where names may begin in ``data`` that is full of ``@``."""
        found = set()
        for host in self.hosts:
            at = data.find(host, first)
            while at >= 0:
                found.update(self._start_before(data, first, at))
                at = data.find(host, at + 1)
        figures = data[first :: self.STRIDE].translate(self.FIGURES)
        place = figures.find(b"\1\1\1")
        while place >= 0:
            middle = first + place * self.STRIDE
            end = middle + self.NUMERIC
            at = data.find(b"@", max(first, middle - self.NUMERIC), end)
            while at >= 0:
                found.update(self._start_before(data, first, at))
                at = data.find(b"@", at + 1, end)
            place = figures.find(b"\1\1\1", place + self.NUMERIC // self.STRIDE)
        return sorted(found)

    def _end(self, data, position):
        """Where the beginning of a name starts that ``data`` ends with; its length for none."""
        position = max(position, len(data) - self.LONGEST)  # no beginning lies further back than a name is long
        position += len(data[position:].rstrip(self.LETTERS))
        tail = self.beginning.search(data, position) if position < len(data) else None
        return tail.start() if tail and self._may_go_on(data, tail.start()) else len(data)

    def flush(self):
        """Return the bytes that were held."""
        data, self.held = self.held, b""
        return self._passed(data)

    def _passed(self, data):
        self.before = (self.before + data[-self.HISTORY :])[-self.HISTORY :]
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
        if not self.guesses:
            return False
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


class NameFilter:
    """What the bytes of one direction of a main link's data channel go through while link names may be in them.

    :param names: the :class:`Names` of that direction
    :param replace: as for :class:`NameReplacer`

    ``on_release(data)``, set by the owner, gets bytes that were held and have turned out to be no name. The loop
    calls it, or :meth:`stop` does.
    """

    def __init__(self, loop, names, replace):
        self.loop, self.names = loop, names
        hosts = {host for text in names.main for host, _ in LinkName.parse(text).ends}
        self.replacer = NameReplacer(replace, hosts)
        self.is_over, self.timer = False, None  # whether no name is looked for any more
        self.on_release = lambda data: None
        self.deadline = loop.after(NAMES_SECONDS, self._guess_no_more)

    def feed(self, data):
        """Take the next bytes; returns those that can go on."""
        if self.is_over:
            return data
        self.loop.cancel(self.timer)
        data = self.replacer.feed(data)
        if self.names.finished:
            data += self.replacer.flush()
            self._end()
        elif self.replacer.held:
            seconds = CERTAIN_SECONDS if self.replacer.is_certain else HOLD_SECONDS
            self.timer = self.loop.after(seconds, self._release)
        return data

    def _release(self):
        """What looked like a name's beginning has not gone on: the other side may be waiting for it."""
        held = self.replacer.flush()
        if held:
            self.on_release(held)

    def _guess_no_more(self):
        """By now what ends like the beginning of a name is nearly always something else, and would be late."""
        self.replacer.guesses = False

    def _end(self):
        self.is_over = True
        self.loop.cancel(self.timer)
        self.loop.cancel(self.deadline)

    def stop(self):
        """Look for no name any more."""
        if not self.is_over:
            self._end()
            self._release()


class NamingSwitchboard(Switchboard):
    """A switchboard for links that are named after the launch.

    A front end of 11.1 or later tells its kernel after the launch where it listens for two further links. When
    a name goes by on the main link's data channel, the next pair of the kernel's ports takes its place, and
    who comes in there is connected to where the front end waits. What a kernel up to 11.0 tells its front
    end is treated in the same way, where ``way`` has ports for that.

    :param kernels_name: the main link, as the kernel sees it
    :param pairs: the kernel's ports for links that the front end creates
    """

    def __init__(self, loop, log, link, way, kernels_name, pairs):
        super().__init__(loop, log, link, way)
        main = (str(link), str(kernels_name))
        self.outward = Names(main, pairs)  # what the kernel is told
        self.inward = Names(main, way.inward_pairs)  # what the front end is told

    def target(self, position):
        return super().target(position) if position < 2 else self.outward.target(position - 2)

    def filters(self, position):
        if position:
            return None, None
        return (
            self._filter(self.outward, "link {} of the front end is {} for the kernel"),
            self._filter(self.inward, "link {} of the kernel is {} for the front end"),
        )

    def _filter(self, names, text):
        if names.finished:
            return None

        def replace(name):
            is_new = name not in names.given and name not in names.short
            replacement = names.replace(name)
            if replacement and is_new:
                self.log.write(text.format(name, replacement))
            elif is_new and name in names.short:
                self.log.write(TOO_SHORT.format(name))
            return replacement

        return NameFilter(self.loop, names, replace)

    def called(self, position, end):
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
