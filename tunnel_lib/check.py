"""``--check`` and ``--dry-run``: what a user asks for before a front end is involved."""

import os
import sys

from tunnel import (
    FAREWELLS,
    LOOPBACK,
    LinkName,
    OpenSSH,
    Plan,
    Plink,
    Settings,
    accept,
    first_ports,
    listen,
    printable_command,
    room,
    show,
)
from tunnel_lib.share import quietly

OUR_MARKS = "--tunnel-"  # how lines begin that our own far ends tell each other through a command
SHOWN_LENGTH = 400  # of a line that somebody else has said


class Check:
    """``--check``: plays the front end, reports each step, and stops the kernel when it has called back."""

    def __init__(self, launch):
        self.launch = launch
        self.listeners = data, message = listen(), listen()
        self.link = LinkName(data.getsockname()[1], LOOPBACK, message.getsockname()[1], LOOPBACK)
        launch.loop.readers[data] = lambda: self._accept(data, "data channel")
        launch.loop.readers[message] = lambda: self._accept(message, "message channel")
        self.seen = {}
        self.colours = bool(sys.stdout) and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def begin(self):
        """Have the launch use the link of this front end, and report the client."""
        launch = self.launch
        launch.request.link = self.link
        launch.log.on_quote = self._quoted
        version = quietly(launch, [launch.program, "-V"])[1].splitlines()
        launch.step("client", "{}, {}".format(launch.program, (version or ["version unknown"])[0].strip()))

    def report(self, name, text):
        line = "{:6.2f} s  ok  {}: {}\n".format(self.launch.seconds, name, text)
        show(line, lambda text: text.replace("ok", "\033[32mok\033[0m", 1) if self.colours else text)

    def _quoted(self, who, line):
        """Show what the kernel, or the command through which it runs, says: that is no step that has worked."""
        if who in ("kernel", "via") and not line.startswith(FAREWELLS + (OUR_MARKS,)):
            show("{:6.2f} s      {}: {}\n".format(self.launch.seconds, who, line[:SHOWN_LENGTH]))

    def _accept(self, listener, name):
        connection = accept(listener, self.launch.log)
        if connection is None:
            return
        del self.launch.loop.readers[listener]
        self.seen[name] = connection
        self.launch.step(name, "the kernel has connected")
        if name == "data channel":
            self.launch.loop.readers[connection] = lambda: self._answer(connection)
        if len(self.seen) == 2:
            self.launch.current.checked()

    def _answer(self, connection):
        """A connecting link asks which message port it may use, and opens that after this answer."""
        del self.launch.loop.readers[connection]
        try:
            if connection.recv(64):
                connection.sendall(b"OKY")
        except OSError:
            pass  # it has gone again: its end will be told


def dry_run(request, program, dialect):
    """Print what would be run, and the ports."""
    request.link = request.link or LinkName(49152, LOOPBACK, 49153, LOOPBACK)
    settings = Settings(first_ports(request))
    if request.relay is None:
        plan = Plan(request, settings, ())
    else:
        relay = room("relay", "--relay needs")
        plan = relay.NoForwards()
    if dialect is Plink:
        password = ("-pwfile", "***") if request.destination.password else ()
        argv = Plink.arguments(request, plan, program, password)
    else:
        argv = OpenSSH.arguments(request, plan, settings)
    show(printable_command([program] + argv) + "\n")
    for forward in plan.forwards:
        arrow = "to the front end" if forward.flag == "-R" else "to the kernel"
        target = forward.to or "a port of the launcher, chosen at launch"
        show("{} {}:{} -> {}:{}  {}\n".format(forward.flag, LOOPBACK, forward.port, forward.host, target, arrow))
    if request.relay is not None:
        return show(relay.preview(request))
    return show("link name for the kernel: {}\n".format(plan.link))
