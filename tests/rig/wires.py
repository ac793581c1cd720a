"""Two wires of a relay and what is between them, without processes or sockets."""

import os

from rig import product
from rig.product import HEADER, Wire

SAMPLE = os.environ.get("TUNNEL_SAMPLE", "1") != "1"  # see conftest.py
SEEDS = int(os.environ.get("RELAY_SEEDS") or (300 if SAMPLE else 1500))


def frame(kind, channel=0, number=0, acknowledged=0, body=b""):
    """A frame as a side writes it, whatever it says."""
    start = product.head(kind, channel, number, acknowledged, len(body))
    return start + body + (start[HEADER.size :] if body else b"")


class Clock:
    """Two clocks that tests turn."""

    def __init__(self):
        self.monotonic, self.wall = 1000.0, 5e8

    def pass_by(self, seconds):
        self.monotonic += seconds
        self.wall += seconds


class Pair:
    """Two wires, and connections between them that tests cut."""

    def __init__(self, clock=None):
        self.clock = clock or Clock()
        times = {"clock": lambda: self.clock.monotonic, "wall": lambda: self.clock.wall}
        self.near, self.far = Wire("near", pace=2.0, **times), Wire("far", **times)
        self.got = {self.near: [], self.far: []}
        for wire in (self.near, self.far):
            wire.on_frame = lambda kind, channel, body, wire=wire: self.got[wire].append(
                (kind, channel, bytes(body))
            )
        self.connected = False
        self.moved = 0
        self.connections = 0

    def connect(self, before=b""):
        """Begin on a new connection, as a launcher and a keeper do."""
        self.under_way = {self.near: bytearray(), self.far: bytearray()}  # to each
        self.near.attach({"session": "s"}, before=before, fresh=not self.connections)
        self.far.attach({"host": "h"})
        self.connections += 1
        self.connected = True

    def cut(self):
        self.near.detach()
        self.far.detach()
        self.connected = False

    def other(self, wire):
        return self.far if wire is self.near else self.near

    def write(self, wire, most=1 << 30):
        """Let ``wire`` write up to ``most`` bytes; returns how many it did."""
        count = 0
        while count < most:
            data = b"".join(wire.pull())[: most - count]
            if not data:
                break
            wire.wrote(len(data))
            self.under_way[self.other(wire)] += data
            count += len(data)
        return count

    def read(self, wire, most=1 << 30):
        data = bytes(self.under_way[wire][:most])
        del self.under_way[wire][:most]
        self.moved += len(data)
        if data:
            wire.feed(data)
        return len(data)

    def settle(self):
        """Let everything arrive."""
        quiet = 0
        while quiet < 2:
            moved = 0
            for wire in (self.near, self.far):
                moved += self.write(wire) + self.read(self.other(wire))
            quiet = 0 if moved else quiet + 1
            for wire in (self.near, self.far):
                wire.acknowledge()


class Sink:
    """What has come out of an end."""

    def __init__(self, end, reading=True):
        self.data, self.finished, self.closed, self.end = bytearray(), 0, 0, end
        end.on_data, end.on_finish, end.on_close = self._data, self._finish, self._close
        if reading:
            end.resume()

    def _data(self, data):
        assert not self.finished and not self.closed
        self.data += data

    def _finish(self):
        self.finished += 1

    def _close(self):
        self.closed += 1


def connected():
    pair = Pair()
    pair.connect()
    pair.settle()
    return pair
