#!/usr/bin/env python3
"""Measure what the README states: start-up, launches, bulk transfer, memory. Prints ratios of one run.

usage: python3 benchmarks/run.py [startup|channels|launches|bulk|latency|memory|relay ...]

Everything that is compared is measured alternately in the same run, and medians are compared. As root, since
the kernel machine is a network namespace here.
"""

import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(sys.path[0], "tests"))

import rig
import run as setup
from rig import frontend, logins

import install

MEGABYTE = 1 << 20
PARTS = ("startup", "channels", "launches", "bulk", "latency", "memory", "relay")  # methods of Bench


def line(name, value, unit, note=""):
    print("{:<58} {:>8.2f} {:<4} {}".format(name, value, unit, note), flush=True)


def compare(works, rounds):
    """Run each of ``works`` (name: function) alternately; returns the median seconds of each."""
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            seconds = work()
            times[name].append(time.perf_counter() - begin if seconds is None else seconds)
    return {name: statistics.median(values) for name, values in times.items()}


class Bench:
    def __init__(self, machine, folder):
        self.machine, self.folder = machine, folder
        self.kernel = machine.install_kernel("usr/local/Wolfram/Mathematica/10.1/Executables/MathKernel", "boot=0")
        self.modern = machine.install_kernel("usr/local/Wolfram/Wolfram/14.1/Executables/WolframKernel", "boot=0")
        self.slow = machine.install_kernel("slow/10.1/MathKernel", "boot=3")
        self.environment = {"TUNNEL_SSH": machine.ssh, "XDG_RUNTIME_DIR": folder}
        home = os.path.join(folder, "home")
        os.mkdir(home)
        environ = {"WOLFRAM_BASE": home + "/none", "MATHEMATICA_BASE": home + "/none"}
        install.Installer(["--front-end"], "linux", environ, home, lambda text: None).run()
        self.front_end = os.path.join(home, ".Wolfram", "FrontEnd")
        machine.shell("true")

    def drop_in(self, script):
        return [os.path.join(self.front_end, script + ".sh")]

    # -- what is measured

    def startup(self):
        """From the launcher's start to that of its ssh, which here is a program that notes the time."""
        stamp = os.path.join(self.folder, "stamp")
        source = os.path.join(self.folder, "stamp.c")
        with open(source, "w") as stream:
            stream.write(
                "#include <stdio.h>\n#include <time.h>\nint main(void)\n{\n    struct timespec now;\n"
                '    FILE *file = fopen("STAMP", "w");\n    clock_gettime(CLOCK_MONOTONIC, &now);\n'
                '    fprintf(file, "%ld.%09ld", (long)now.tv_sec, now.tv_nsec);\n    return 1;\n}\n'.replace(
                    "STAMP", stamp
                )
            )
        program = os.path.join(self.folder, "ssh-stamp")
        subprocess.check_call(["cc", "-O1", "-o", program, source])
        environment = dict(os.environ, TUNNEL_SSH=program)
        link = "53994@127.0.0.1,39359@127.0.0.1"

        def to_ssh(command, kernel):
            def once():
                begin = time.monotonic()
                subprocess.call(command + ["host", kernel, link], env=environment, stderr=subprocess.DEVNULL)
                with open(stamp) as stream:
                    return float(stream.read()) - begin

            return once

        def plain(*command):
            def once():
                begin = time.monotonic()
                subprocess.check_call(command)
                return time.monotonic() - begin

            return once

        python = sys.executable
        script = [python, os.path.join(rig.LAUNCHERS, "tunnel.py")]
        works = {
            "bash -c true": plain("bash", "-c", "true"),
            "python3 -SEs -c pass": plain(python, "-SEs", "-c", "pass"),
            "shell script, compute kernel": to_ssh(self.yardstick("tunnel_sub"), self.kernel),
            "shell script, controller kernel": to_ssh(self.yardstick("tunnel"), self.kernel),
            "drop-in tunnel_sub.sh": to_ssh(self.drop_in("tunnel_sub"), self.kernel),
            "drop-in tunnel.sh, up to 11.0": to_ssh(self.drop_in("tunnel"), self.kernel),
            "drop-in tunnel.sh, 11.1 and later": to_ssh(self.drop_in("tunnel"), self.modern),
            "python3 tunnel.py, up to 11.0": to_ssh(script, self.kernel),
        }
        rounds = [{name: work() for name, work in works.items()} for _ in range(31)]
        for name in works:
            line("start-up to ssh: " + name, 1000 * statistics.median(times[name] for times in rounds), "ms")
        for name in list(works)[4:7]:
            role = "compute" if "sub" in name else "controller"
            other = "shell script, {} kernel".format(role)
            # Pair by pair: what else the machine does slows both of a round.
            line("  {} over {}".format(name, other), statistics.median(t[name] / t[other] for t in rounds), "x")

    def yardstick(self, script):
        """The command of a shell script of the kind that Tunnel replaces, under the name of one of them."""
        folder = os.path.join(self.folder, "yardstick")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, script + ".sh")
        shutil.copy(os.path.join(os.path.dirname(os.path.abspath(__file__)), "yardstick.sh"), path)
        return [path]

    def channels(self):
        """Until all channels stand, against the login alone."""

        def stand(role, kernel, *options):
            def once():
                end = frontend.FrontEnd(role)
                begin = time.perf_counter()
                name = "tunnel_sub" if role == "compute" else "tunnel"
                words = list(options) + [self.machine.destination, kernel]
                end.launch(*words, environment=self.environment, command=self.drop_in(name))
                end.accept()
                seconds = time.perf_counter() - begin
                end.__exit__()
                return seconds

            return once

        def bare():
            subprocess.check_call([self.machine.ssh, self.machine.address, "true"], stderr=subprocess.DEVNULL)

        found = compare(
            {
                "ssh host true": bare,
                "compute kernel, 2 channels": stand("compute", self.kernel),
                "controller kernel, 6 channels": stand("callback", self.modern),
                "controller kernel, 6 channels, --relay": stand("callback", self.modern, "--relay"),
            },
            21,
        )
        for name, seconds in found.items():
            line("until it stands: " + name, 1000 * seconds, "ms")
        for name in list(found)[1:]:
            line("  " + name + " over ssh host true", found[name] / found["ssh host true"], "x")

    def bare_login(self, end, kernel, folder):
        """``ssh -f`` with the two forwards of a compute kernel, as the shell scripts had it."""
        forwards = []
        for part in end.link.split(","):
            port = part.partition("@")[0]
            forwards += ["-R", "127.0.0.1:{0}:127.0.0.1:{0}".format(port)]
        command = '"{}" -wstp -LinkMode Connect -LinkProtocol TCPIP -LinkName {} -subkernel'.format(
            kernel, end.link
        )
        argv = [self.machine.ssh, "-f", "-o", "ExitOnForwardFailure=yes"] + forwards
        argv += [self.machine.address, command]
        null = subprocess.DEVNULL
        subprocess.check_call(argv, stdin=null, stdout=null, stderr=null, env=dict(os.environ, ROUND=folder))

    def launcher(self, *options):
        """A function that launches as :meth:`bare_login` does, through the drop-in."""

        def one(end, kernel, folder):
            environment = dict(self.environment, XDG_RUNTIME_DIR=folder)
            words = list(options) + [self.machine.destination, kernel]
            end.launch(*words, environment=environment, command=self.drop_in("tunnel_sub"))
            if end.wait(60)[0]:
                raise SystemExit("a launch failed")

        return one

    def several(self, count, kernel, one):
        """Launch ``count`` kernels, one after the other; nothing is remembered from an earlier round.

        :returns: seconds until all have been launched, seconds until all have connected, logins
        """
        folder = tempfile.mkdtemp(prefix="tunnel-run-")
        ends = [frontend.FrontEnd("compute") for _ in range(count)]
        before = self.machine.logins()
        begin = time.perf_counter()
        for end in ends:
            one(end, kernel, folder)
        launched = time.perf_counter() - begin
        for end in ends:
            end.accept()
        connected = time.perf_counter() - begin
        logins = self.machine.logins() - before
        for end in ends:
            end.__exit__()
        for pid in rig.processes_with(folder):
            try:
                os.kill(pid, signal.SIGTERM)
            except OSError:
                pass  # it has ended meanwhile
        rig.wait_until(lambda: not rig.processes_with(folder), 20, "the end of what was launched")
        rig.wait_until(lambda: not self.machine.kernels() and not self.machine.listeners(), 20)
        shutil.rmtree(folder)
        return launched, connected, logins

    def against_bare(self, name, count, kernel, one, what, aim=""):
        """Print the medians of three rounds, and the median ratio of ``one`` to bare logins.

        :param what: 0 for launched, 1 for connected
        """
        found = [[self.several(count, kernel, each) for each in (self.bare_login, one)] for _ in range(3)]
        for position, label in enumerate(("{} x ssh -f".format(count), name)):
            seconds = statistics.median(each[position][what] for each in found)
            line("  " + label, seconds, "s", "{} logins".format(found[-1][position][2]))
        line("  {} over ssh -f".format(name), statistics.median(e[1][what] / e[0][what] for e in found), "x", aim)

    def launches(self):
        """Compute kernels, one launch after the other as the parallel tools do it, against bare logins; the server
        has its default settings (10 sessions for a connection)."""
        share, relay = self.launcher("--share"), self.launcher("--relay", "--share")
        print("until all launches have returned")
        self.against_bare("8 launches", 8, self.kernel, self.launcher(), 0, "aim: 1.15")
        self.against_bare("16 launches, --share", 16, self.kernel, share, 0, "aim: 0.45")
        self.against_bare("64 launches, --share", 64, self.kernel, share, 0, "aim: 0.35")
        self.against_bare("64 launches, --relay --share", 64, self.kernel, relay, 0, "aim: 0.2")
        print("until kernels that boot for 3 s have all connected")
        self.against_bare("16 launches", 16, self.slow, self.launcher(), 1, "aim: 1.15")
        self.against_bare("16 launches, --share", 16, self.slow, share, 1, "aim: below 1")
        self.against_bare("16 launches, --relay --share", 16, self.slow, relay, 1, "aim: below 1")

    def bulk(self):
        """Bulk data there and back through each kind of link, against a bare ``ssh -R``."""
        size = 192 * MEGABYTE

        def receive(connection):
            begin, got = time.perf_counter(), 0
            buffer = bytearray(MEGABYTE)
            while got < size:
                count = connection.recv_into(buffer)
                if not count:
                    raise SystemExit("the sender gave up")
                got += count
            return time.perf_counter() - begin

        def there_and_back(connection):
            connection.settimeout(None)
            threading.Thread(target=self.pour, args=(connection, size), daemon=True).start()
            return receive(connection)

        def bare():
            """An echo through ``ssh -R`` alone: what the links are to be compared with."""
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            port = listener.getsockname()[1]
            forward = "127.0.0.1:{0}:127.0.0.1:{0}".format(port)
            argv = [self.machine.ssh, "-o", "ExitOnForwardFailure=yes", "-R", forward, "-N", self.machine.address]
            client = subprocess.Popen(argv)
            rig.wait_until(lambda: port in self.machine.listeners(), 10)
            echo = (
                "import socket,sys; s=socket.create_connection(('127.0.0.1',int(sys.argv[1])))\n"
                "while True:\n d=s.recv(1<<18)\n if not d: break\n s.sendall(d)\n"
            )
            argv = ["ip", "netns", "exec", self.machine.namespace, rig.kernel_python(), "-c", echo, str(port)]
            other = subprocess.Popen(argv)
            connection, _ = listener.accept()
            seconds = there_and_back(connection)
            connection.close()
            other.wait(10)
            client.terminate()
            client.wait(10)
            listener.close()
            return seconds

        def link(role, kernel, channel, *options):
            def once():
                end = frontend.FrontEnd(role)
                words = ["-o", "Compression=no"] + list(options) + [self.machine.destination, kernel]
                end.launch(*words, environment=self.environment, command=self.drop_in("tunnel"))
                end.accept()
                seconds = there_and_back(end.channels[channel])
                end.__exit__()
                return seconds

            return once

        found = compare(
            {
                "bare ssh -R": bare,
                "main link": link("callback", self.modern, 0),
                "preemptive link, up to 11.0": link("classic", self.classic(), 2),
                "preemptive link, 11.1 and later": link("callback", self.modern, 2),
                "main link, --relay": link("callback", self.modern, 0, "--relay"),
            },
            5,
        )
        for name, seconds in found.items():
            line("bulk, there and back: " + name, size / MEGABYTE / seconds, "MB/s")
        for name in list(found)[1:-1]:
            line("  {} over bare ssh -R".format(name), found["bare ssh -R"] / found[name], "x", "aim: 0.9")
        ratio = found["main link"] / found["main link, --relay"]
        line("  main link, --relay over main link", ratio, "x", "aim: 0.6")

    def classic(self):
        return self.machine.install_kernel("opt/Mathematica/9.0/MathKernel", "classic", "boot=0")

    @staticmethod
    def pour(connection, size):
        block, sent = os.urandom(MEGABYTE), 0
        while sent < size:
            connection.sendall(block)
            sent += len(block)

    def latency(self):
        """A byte there and back on the main link, with forwards and through a relay."""

        def prepare(role, kernel, *options):
            end = frontend.FrontEnd(role)
            words = ["-o", "Compression=no"] + list(options) + [self.machine.destination, kernel]
            end.launch(*words, environment=self.environment, command=self.drop_in("tunnel"))
            end.accept()
            return end

        def round_trips(connection):
            def once():
                begin = time.perf_counter()
                for _ in range(300):
                    connection.sendall(b"x")
                    connection.recv(1)
                return (time.perf_counter() - begin) / 300

            return once

        ends = [prepare("callback", self.modern), prepare("callback", self.modern, "--relay")]
        for end in ends:
            end.channels[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = compare(
            {"forwards": round_trips(ends[0].channels[0]), "relay": round_trips(ends[1].channels[0])}, 21
        )
        for end in ends:
            end.__exit__()
        for name, seconds in found.items():
            line("1 byte there and back, main link: " + name, 1000 * seconds, "ms")
        line("  relay over forwards", found["relay"] / found["forwards"], "x", "aim: 3")

    def memory(self):
        """Resident memory, and processor time over five seconds, of launchers that wait."""
        for role, script, kernel in (
            ("compute", "tunnel_sub", self.kernel),
            ("classic", "tunnel", self.classic()),
            ("callback", "tunnel", self.modern),
        ):
            end = frontend.FrontEnd(role)
            end.launch(
                self.machine.destination, kernel, environment=self.environment, command=self.drop_in(script)
            )
            end.accept()
            if role == "compute":
                end.wait()
            words = "import " + script
            pids = [pid for pid in rig.processes_with(self.folder) if words in " ".join(rig.command_line(pid))]
            with open("/proc/{}/status".format(pids[-1])) as stream:
                status = dict(each.split(":", 1) for each in stream)
            before = self.ticks(pids[-1])
            time.sleep(5)
            used = (self.ticks(pids[-1]) - before) / os.sysconf("SC_CLK_TCK")
            line("waiting launcher, memory: " + role, int(status["VmRSS"].split()[0]) / 1024, "MB", "aim: 14")
            line("waiting launcher, processor: " + role, 100 * used / 5, "%")
            end.__exit__()

    def relay(self):
        """What a relay takes: to come back, while nothing happens, with all buffers full, with many kernels."""
        self.comes_back()
        self.idles()
        self.holds()
        self.carries_many()

    def relayed(self):
        """A front end with all channels of a controller kernel, its launcher's process id, and its keeper's."""
        rig.wait_until(lambda: not self.machine.sessions(), 20, "the end of the session before")
        end = frontend.FrontEnd("callback")
        words = ["--relay", self.machine.destination, self.modern]
        end.launch(*words, environment=self.environment, command=self.drop_in("tunnel"))
        end.accept()
        (keeper,) = [pid for pid in self.machine.pids() if logins.is_keeper(pid)]
        return end, end.launcher.pid, keeper

    def comes_back(self):
        """A network that is gone for 5 s, with the connection lost at that moment, or not."""

        def login():
            subprocess.check_call([self.machine.ssh, self.machine.address, "true"], stderr=subprocess.DEVNULL)

        bare = compare({"login": login}, 5)["login"]
        kinds = (("connection lost", True, False), ("lost, cable pulled", True, True), ("not lost", False, False))
        for name, lost, link in kinds:
            times = []
            for _ in range(3 if lost else 1):
                end = self.relayed()[0]
                self.machine.cut(link)
                end.channels[2].sendall(b"x")
                for pid in rig.processes_with("XDG_RUNTIME_DIR=" + self.folder) if lost else ():
                    if rig.process_name(pid) == "ssh":
                        rig.end_process(pid)
                time.sleep(5)
                self.machine.mend()
                begin = time.perf_counter()
                end.channels[2].recv(1)
                times.append(time.perf_counter() - begin)
                end.__exit__()
            aim = "aim: a login ({:.2f}) + 1".format(bare) if lost else "TCP's own time"
            line("data flows after 5 s without network, " + name, statistics.median(times), "s", aim)

    def idles(self):
        """How often an idle session wakes up."""
        end, *pids = self.relayed()
        before = [self.status(pid, "voluntary_ctxt_switches") for pid in pids]
        time.sleep(8)
        for name, pid, count in zip(("launcher", "relay"), pids, before):
            line(
                "idle session, wake-ups per second: " + name,
                (self.status(pid, "voluntary_ctxt_switches") - count) / 8,
                "",
                "aim: 2",
            )
        end.__exit__()

    def holds(self):
        """The most memory of either end: nobody reads on either side, then the network goes in the middle of a
        transfer both ways, then it is back."""
        end, *pids = self.relayed()
        end.tell(b"!flood-all 20000000\n")
        for channel in end.channels:
            channel.setblocking(False)
        block = bytearray(MEGABYTE)

        def move(act, most=None, quiet=1.0):
            """``act`` on all channels, until ``most`` bytes have moved or none for a while."""
            moved, last = 0, time.monotonic()
            while time.monotonic() - last < quiet and (most is None or moved < most):
                before = moved
                for channel in end.channels:
                    try:
                        moved += act(channel)
                    except BlockingIOError:
                        pass
                if moved == before:
                    time.sleep(0.01)
                else:
                    last = time.monotonic()

        def fill():
            move(lambda channel: channel.send(block))

        fill()
        move(lambda channel: channel.recv_into(block), most=50 * MEGABYTE)
        self.machine.cut()
        fill()
        self.machine.mend()
        fill()
        for name, pid in zip(("launcher", "relay"), pids):
            line("every buffer full, memory: " + name, self.status(pid, "VmHWM") / 1024, "MB", "aim: 40")
        end.__exit__()

    def carries_many(self):
        """64 compute kernels of one shared relay."""
        folder = tempfile.mkdtemp(prefix="tunnel-run-")
        ends = [frontend.FrontEnd("compute") for _ in range(64)]
        one = self.launcher("--relay", "--share")
        for end in ends:
            one(end, self.kernel, folder)
        for end in ends:
            end.accept()
        for end in ends:
            end.echo(100000)
        pids = rig.processes_with("XDG_RUNTIME_DIR=" + folder)
        line(
            "64 kernels, --relay --share, memory here",
            sum(self.status(pid, "VmRSS") for pid in pids) / 1024,
            "MB",
            "{} processes, aim: 80".format(len(pids)),
        )
        for end in ends:
            end.__exit__()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except OSError:
                pass  # it has ended meanwhile
        rig.wait_until(lambda: not rig.processes_with(folder), 20, "the end of what was launched")
        shutil.rmtree(folder)

    @staticmethod
    def status(pid, name):
        """A number in what the system tells of a process."""
        with open("/proc/{}/status".format(pid)) as stream:
            return int(dict(each.split(":", 1) for each in stream)[name].split()[0])

    @staticmethod
    def ticks(pid):
        with open("/proc/{}/stat".format(pid)) as stream:
            fields = stream.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


def main(names):
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return 0
    wrong = [name for name in names if name not in PARTS]
    if wrong:
        print("run.py: {}: not known; the parts are {}".format(wrong[0], ", ".join(PARTS)), file=sys.stderr)
        return 2
    setup.install_packages({name: setup.PACKAGES[name] for name in ("sshd", "ssh", "ip", "openssl")})
    with open("/proc/cpuinfo") as stream:
        models = [each.partition(":")[2].strip() for each in stream if each.startswith("model name")]
    version = subprocess.run(["ssh", "-V"], stderr=subprocess.PIPE).stderr.decode().strip()
    print(
        "{} x {}, Python {}, {}".format(os.cpu_count(), (models or ["?"])[0], platform.python_version(), version)
    )
    folder = tempfile.mkdtemp(prefix="tunnel-run-")
    try:
        with rig.KernelMachine() as machine:
            bench = Bench(machine, folder)
            for name in names or PARTS:
                getattr(bench, name)()
            for pid in rig.processes_with(folder):
                rig.end_process(pid)
    except rig.Unavailable as reason:
        return "run.py: {}".format(reason)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
