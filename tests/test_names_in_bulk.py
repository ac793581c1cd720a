"""Link names in gigabytes: found wherever they stand, at a cost that does not matter."""

import array
import os
import random
import time

import pytest
from rig import product
from rig.names import marked, name_of_length, told_for

SIZE = 1 << 18  # bytes that are read at once


def random_bytes():
    return os.urandom(SIZE)


def numbers():
    draw = random.Random(5)
    texts = [repr(draw.random() * 10 ** draw.randint(-5, 5)).encode() for _ in range(SIZE // 15)]
    return b"".join(b"~" + bytes([0x40 + len(text)]) + text for text in texts)[:SIZE]


def doubles():
    draw = random.Random(6)  # each has an @ in its first two bytes
    return array.array("d", [2 + draw.random() * 9 for _ in range(SIZE // 8)]).tobytes()


def mail():
    draw = random.Random(7)
    words = [
        b"john99@example.com,",
        b"<mary.major@node1.example.org>",
        b"and",
        b"a lot of prose",
        b"lorem",
        b"ipsum",
    ]
    return b" ".join(draw.choice(words) for _ in range(SIZE // 4))[:SIZE]


KINDS = pytest.mark.parametrize("kind", [random_bytes, numbers, doubles, mail])


def replacer(hosts=()):
    names = product.Names((), [(53999, 54000)])
    one = product.NameReplacer(names.replace, hosts)
    one.looks = 0  # as after many @
    return one


@KINDS
def test_what_is_looked_for_costs_little(kind):
    """Where each @ is looked at by itself, arrays of numbers and mail take thirty times as long."""
    data, one = kind(), replacer()

    def seconds():
        begin = time.process_time()
        for _ in range(64):
            one.feed(data)
        return time.process_time() - begin

    def pace():
        """What this machine takes for as many bytes in C, whatever else it has to do."""
        begin = time.process_time()
        for _ in range(64):
            data.translate(one.FIGURES)
        return time.process_time() - begin

    assert min(seconds() / pace() for _ in range(5)) < 2.5


@KINDS
@pytest.mark.parametrize(
    "name, hosts",
    [
        (b"53994@127.0.0.1,39359@127.0.0.1", ()),
        (b"8000@127.1,8001@127.1", ()),
        (b"44487@192.168.100.200,41967@192.168.100.200", ()),
        (b"37027@localhost,34245@localhost", ("localhost",)),
        (b"37027@my-laptop.example.org,34245@my-laptop.example.org", ("my-laptop.example.org",)),
        (b"40000@fe80::aa%eth0,40001@fe80::aa%eth0", ("fe80::aa%eth0",)),
    ],
    ids=str,
)
def test_a_name_is_found_wherever_it_stands(kind, name, hosts):
    data, text, draw = kind(), marked(name), random.Random(8)
    told = marked(told_for(name, (53999, 54000)))
    for offset in range(16):
        place = draw.randint(2000, SIZE - 2000) // 8 * 8 + offset
        one = replacer(hosts)
        out = one.feed(data[:place] + text + data[place:]) + one.flush()
        assert out == data[:place] + told + data[place:]


@KINDS
def test_a_name_is_found_however_it_is_split(kind):
    data = kind()
    for name in (b"53994@127.0.0.1,39359@127.0.0.1", name_of_length(90)):
        text, told = marked(name), marked(told_for(name, (53999, 54000)))
        for cut in range(len(text) + 1):
            one = replacer((name.decode().partition("@")[2].partition(",")[0],))
            out = one.feed(data + text[:cut])
            out += one.feed(text[cut:] + data[:200]) + one.flush()
            assert out.replace(told, text) == data + text + data[:200]
            assert told in out


def test_few_at_signs_are_each_looked_at_for_ever():
    one = replacer()
    name = name_of_length(60)
    for _ in range(1000):
        one.feed(b"x@y 12@z " * 8)
    text = marked(name)
    assert one.feed(text) + one.flush() == marked(told_for(name, (53999, 54000)))
