"""Whether somebody listens already where a kernel up to 11.0 is going to listen."""

from tunnel import LOOPBACK, dial


class Probe:
    """Looks whether somebody listens already where the kernel is going to: ports that the client forwards.

    Who connects to such a port is cut off at once where nobody listens behind it. A port at which this does
    not happen, though it has at another, is held by somebody.

    :param held: called with such a port
    """

    PATIENCE = 1.0  # seconds that ports may take longer than the first
    LAST_PATIENCE = 0.2  # seconds that the last port may take longer than all others

    def __init__(self, loop, ports, held):
        self.loop, self.held, self.timer, self.count = loop, held, None, len(ports)
        self.open, self.free = {}, 0  # connections by port, and how many ports nobody holds
        for port in ports:
            dial(loop, LOOPBACK, port, lambda found, _, port=port: self._dialled(port, found))

    def _dialled(self, port, connection):
        if connection is None or self.open is None:
            if connection:
                connection.close()
            return
        self.open[port] = connection
        self.loop.readers[connection] = lambda: self._read(port)

    def _read(self, port):
        connection = self.open.pop(port)
        del self.loop.readers[connection]
        try:
            answered = bool(connection.recv(1))
        except OSError:
            answered = False
        connection.close()
        if answered:
            self._found(port)
            return
        self.free += 1
        if self.timer is None or self.free == self.count - 1:
            self.loop.cancel(self.timer)
            patience = self.LAST_PATIENCE if self.free == self.count - 1 else self.PATIENCE
            self.timer = self.loop.after(patience, self._compare)

    def _compare(self):
        for port in sorted(self.open or ())[:1]:
            self._found(port)

    def kernel_is_there(self):
        """The kernel has connected, and is about to listen itself: tell now if all ports but one were refused."""
        if self.open and self.free == self.count - 1:
            self._compare()
        self.stop()

    def _found(self, port):
        self.stop()
        self.held(port)

    def stop(self):
        """Stop looking; harmless when that is over."""
        self.loop.cancel(self.timer)
        for connection in (self.open or {}).values():
            del self.loop.readers[connection]
            connection.close()
        self.open = None
