"""Whether somebody listens already where a kernel up to 11.0 is going to listen."""

from tunnel import LOOPBACK, dial


class Probe:
    """Looks whether somebody listens already where the kernel is going to: ports that the client forwards.

    Who connects to such a port is cut off at once where nobody listens behind it. A port at which this does
    not happen, though it has at another, is held by somebody.

    :param held: called with such a port
    """

    PATIENCE = 1.0  # seconds that one port may take longer than the first

    def __init__(self, loop, ports, held):
        self.loop, self.held, self.timer = loop, held, None
        self.open = {}
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
        elif self.timer is None:
            self.timer = self.loop.after(self.PATIENCE, self._compare)

    def _compare(self):
        for port in sorted(self.open or ())[:1]:
            self._found(port)

    def _found(self, port):
        self.cancel()
        self.held(port)

    def cancel(self):
        """Stop looking; harmless when that is over."""
        self.loop.cancel(self.timer)
        for connection in (self.open or {}).values():
            del self.loop.readers[connection]
            connection.close()
        self.open = None
