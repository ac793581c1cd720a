"""Servers on this machine's loopback that are no SSH servers: one says nothing, one passes all on."""

import socket
import threading


def silent_server(hello=b""):
    """A server that accepts, says ``hello`` and then nothing; returns its port and what ends it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(20)
    taken = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.sendall(hello)
            taken.append(connection)

    threading.Thread(target=serve, daemon=True).start()

    def end():
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in taken:
            connection.close()

    return listener.getsockname()[1], end


class Relay:
    """A server on this machine's loopback that passes all connections on to ``machine``'s.

    :param first: what it says before that
    """

    def __init__(self, machine, first=b""):
        self.there, self.first, self.sockets = (machine.address, machine.port), first, []
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(20)
        self.port = self.listener.getsockname()[1]
        self._start(self._serve)

    @staticmethod
    def _start(work, *arguments):
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _serve(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            near.sendall(self.first)
            far = socket.create_connection(self.there)
            self.sockets += [near, far]
            self._start(self._copy, near, far)
            self._start(self._copy, far, near)

    @staticmethod
    def _copy(source, target):
        try:
            data = source.recv(1 << 16)
            while data:
                target.sendall(data)
                data = source.recv(1 << 16)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side has gone: the other will see that

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for each in self.sockets:
            each.close()
