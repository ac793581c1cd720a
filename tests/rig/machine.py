"""A throwaway kernel machine: a real sshd on a loopback of its own.

The forwarded ports of a tunnel are bound on the kernel machine's 127.0.0.1, often with the numbers that
the front end already uses, so the two must not share a loopback. As root that is a network namespace with
a veth pair; accounts and ``/run`` are replaced inside a mount namespace, so that nothing on the real
machine changes. Without root it is a user namespace, reached through a ``ProxyCommand`` that starts
``sshd -i`` inside it.

Any number of test processes may do so at once: whatever two of them could both pick (a block of addresses, a
block of ports) is claimed first, see ``claim``.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
LAUNCHERS = os.path.dirname(TESTS)
PASSWORD = "op3n-sesame!"
LOOPBACK = "0100007F"  # 127.0.0.1, as /proc/net/tcp has it
NETWORKS = 1 << 15  # blocks of four addresses in 198.18.0.0/15, set aside for tests of this kind (RFC 2544)
PORTS = range(2000, 10000, 10)  # first ports of blocks of ten: below those that the launchers draw, 10000 and up


class Unavailable(Exception):
    """This machine cannot hold a kernel machine; the text says why and what to do."""


def wait_until(condition, seconds=10.0, what="the condition", unless=None):
    """Return the first true value of ``condition()``, or fail after ``seconds``.

    :param unless: a function; as soon as it returns a text, there is no hope left, and the text says why
    """
    end = time.monotonic() + seconds
    while True:
        begin = time.monotonic()
        value = condition()
        if value:
            return value
        hopeless = unless and unless()
        if hopeless:
            raise AssertionError("no hope for {}: {}".format(what, hopeless))
        now = time.monotonic()
        if now > end:
            raise AssertionError("waited {} s in vain for {}".format(seconds, what))
        time.sleep(max(0.01, 8 * (now - begin)))  # a look that costs much is taken less often


# -- what test processes share


def claim(name):
    """Hold ``name`` against all other test processes, until the result is closed; None where one holds it.

    It is the name of an abstract Unix socket: that leaves no file, and goes with its process however that
    ends. So whatever is found under a name that could be claimed is left over, and can be cleared away.
    """
    holder = socket.socket(socket.AF_UNIX)
    if not sys.platform.startswith("linux"):
        return holder  # no such sockets there, and no kernel machines
    try:
        holder.bind("\0tunnel-tests/" + name)
    except OSError:
        holder.close()
        return None
    return holder


def from_anywhere(numbers):
    """The ``numbers`` in their order, but from a random one on, so that many processes try different ones."""
    start = random.randrange(len(numbers))
    for position in range(len(numbers)):
        yield numbers[(start + position) % len(numbers)]


class Ports:
    """Neighbouring ports of this machine's loopback, free now, that no other test uses until they are closed.

    They come in blocks of ten, so that the ports which follow a main link's do not run into another's.
    """

    def __init__(self, count=10):
        for self.first in from_anywhere(PORTS):
            blocks = range(self.first, self.first + count, 10)
            self._claims = [claim("ports-{}".format(port)) for port in blocks]
            if all(self._claims) and all(bindable(port) for port in range(self.first, blocks[-1] + 10)):
                return
            self.close()
        raise Unavailable("no {} neighbouring ports are free below 10000".format(count))

    def close(self):
        for holder in self._claims:
            if holder:
                holder.close()


def bindable(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


_taken_for_good = []


def free_port():
    """A port of this machine's loopback that nothing else gets as long as this process runs."""
    _taken_for_good.append(Ports(1))
    return _taken_for_good[-1].first


def sweep():
    """Take away the kernel machines of test processes that were killed before they could."""
    try:
        names = os.listdir("/run/netns")
    except OSError:
        return
    for name in names:
        number = name[len(network_name("")) :]
        holder = name == network_name(number) and claim("network-" + number)
        if holder:
            remove_network(number)
            holder.close()


def network_name(number):
    """What ``ip netns`` calls the network of a kernel machine; claims hold in the network they are made in only,
    so that is in its name."""
    return "tunnel-{}-{}".format(os.stat("/proc/self/ns/net").st_ino, number)


def veth_name(number, end):
    return "tunnel-{}{}".format(number, end)


def remove_network(number):
    """End whatever runs in a kernel machine's network, and the network."""
    name = network_name(number)
    for pid in processes_in(name):
        end_process(pid)
    run("ip", "link", "del", veth_name(number, "f"))  # lingers otherwise while a socket still holds it
    run("ip", "netns", "del", name)


def processes_in(namespace):
    """Process ids in a network namespace that ``ip netns`` knows by this name."""

    def identity(path):
        found = os.stat(path)
        return found.st_dev, found.st_ino

    try:
        wanted = identity("/run/netns/" + namespace)
    except OSError:
        return []
    pids = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and identity("/proc/{}/ns/net".format(name)) == wanted:
                pids.append(int(name))
        except OSError:
            pass  # it has ended meanwhile
    return sorted(pids)


# -- commands


def run(*argv, **options):
    """Run a command to its end, within a minute; return its completed process, output as text."""
    options.setdefault("timeout", 60)
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **options)


def must(*argv, **options):
    done = run(*argv, **options)
    if done.returncode:
        raise Unavailable("{} failed: {}".format(" ".join(argv), done.stderr.strip() or done.stdout.strip()))
    return done.stdout


def sshd_path():
    path = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not path:
        raise Unavailable("no sshd here: install it, as Debian does with `apt-get install openssh-server`")
    return path


def kernel_python():
    """An interpreter that the login on the kernel machine may execute: not one below /root."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable):
        if os.access(path, os.X_OK):
            return path
    return sys.executable


class KernelMachine:
    """A kernel machine that runs while the ``with`` block does, its server with the defaults of OpenSSH.

    :param sshd_options: lines for sshd_config, before (so over) those that the rig needs
    :param behind: another kernel machine; this one is then reachable only from there
    :param password: whether the login ``john`` has one
    :param shell: john's login shell, which has to exist (as root only)
    :param hostname: what it calls itself (as root only); otherwise it has this machine's name
    :param quick: whether clients exchange keys in a way that costs little: the default one takes two thirds of the
        processor time of a launch

    ``address`` and ``port`` say where it listens; ``client_config`` is an ssh configuration file that logs
    in with a key; ``ssh`` is a wrapper for ``TUNNEL_SSH`` that makes ssh read it. ``home``, ``run`` and ``tmp``
    in its folder are what it has as john's home, ``/run`` and ``/tmp``.
    """

    user = "john"

    def __init__(
        self, sshd_options=(), behind=None, password=False, port=22, shell="/bin/bash", hostname=None, quick=False
    ):
        self.quick, self.hostname, self.pam = quick, hostname, None
        self.sshd_options = list(sshd_options)
        self.behind = behind
        self.password = password
        self.port = port
        self.login_shell = shell
        self.folder = self.server = self.number = self.namespace = None
        self.as_root = os.getuid() == 0
        self.rate = None
        self._helpers, self._starts = [], []

    # -- set-up and end

    def __enter__(self):
        sshd_path()
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="tunnel-rig-"))
        try:
            os.chmod(self.folder, 0o755)
            self._make_keys()
            self._make_network()
            self._make_accounts()
            self.start_server()
            self._make_client()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_):
        self.stop_server()
        for helper in list(self._helpers):
            self._end_helper(helper)
        if self.number is not None:
            remove_network(self.number)
            self._claim.close()
        elif getattr(self, "holder", None):
            self.holder.kill()
            self.holder.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def write(self, name, text, mode=0o644):
        path = self.path(name)
        with open(path, "w") as stream:
            stream.write(text)
        os.chmod(path, mode)
        return path

    def _make_keys(self):
        for name in ("host_key", "id"):
            must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.path(name))

    def _make_network(self):
        if not self.as_root:
            self._make_user_namespace()
            return
        for number in from_anywhere(range(NETWORKS)):
            self._claim = claim("network-{}".format(number))
            if self._claim:
                break
        else:
            raise Unavailable("no block of addresses is free")
        self.namespace = network_name(number)
        if os.path.exists("/run/netns/" + self.namespace):
            remove_network(number)  # of a test process that was killed
        self.number = number
        net = "198.{}.{}.".format(18 + (number >> 14), number >> 6 & 255)
        low = 4 * number & 255
        self.gateway, self.address = net + str(low + 1), net + str(low + 2)
        here, there = veth_name(number, "f"), veth_name(number, "k")
        must("ip", "netns", "add", self.namespace)
        must("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", self.namespace)
        if self.behind:
            must("ip", "link", "set", here, "netns", self.behind.namespace)
        # Each end of the cable: what makes ip and tc see it, and its device.
        self._ends = [
            (("-n", self.behind.namespace) if self.behind else (), here),
            (("-n", self.namespace), there),
        ]
        for (where, device), address in zip(self._ends, (self.gateway, self.address)):
            must("ip", *(where + ("addr", "add", address + "/30", "dev", device)))
            must("ip", *(where + ("link", "set", device, "up")))
        self._introduce()
        # Whatever connects there has other ports than those that are forwarded, so no launch needs a second try
        # by chance; occupy() is there for those that should.
        ports = 'echo "61100 64999" > /proc/sys/net/ipv4/ip_local_port_range'
        must("ip", "netns", "exec", self.namespace, "sh", "-c", "ip link set lo up && " + ports)

    def _introduce(self, wrong=None):
        """Tell each end the other's hardware address, so that nobody notices that nobody answers for it.

        :param wrong: an address to tell in its place
        """
        for (where, device), (other_where, other), address in zip(
            self._ends, reversed(self._ends), (self.address, self.gateway)
        ):
            hardware = must("ip", *(other_where + ("-o", "link", "show", other))).partition("link/ether ")[2]
            hardware = wrong or hardware.split()[0]
            words = ("neigh", "replace", address, "lladdr", hardware, "dev", device, "nud", "permanent")
            must("ip", *(where + words))

    def _make_user_namespace(self):
        """A network of its own without root; the holder keeps it while the machine exists."""
        self.user = run("id", "-un").stdout.strip()
        self.address = "127.0.0.1"
        if not shutil.which("nsenter") or not shutil.which("ip"):
            raise Unavailable("a kernel machine without root needs nsenter and ip (util-linux, iproute2)")
        self.holder = subprocess.Popen(
            ["unshare", "-Urn", "sh", "-c", "ip link set lo up && echo up && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self.holder.stdout.readline() != b"up\n":
            raise Unavailable("this machine allows neither root nor user namespaces")

    def _make_accounts(self):
        self.home = self.path("home")
        os.makedirs(self.path("home", ".ssh"), 0o755)
        shutil.copy(self.path("id.pub"), self.path("home", ".ssh", "authorized_keys"))
        if not os.access(self.login_shell, os.X_OK):
            raise Unavailable("no {} here for a login shell".format(self.login_shell))
        if not self.as_root:
            return
        self.uid = 64321
        with open("/etc/passwd") as stream:
            lines = [line for line in stream if not line.startswith(self.user + ":")]
        lines.append("{0}:x:{1}:{1}::{2}:{3}\n".format(self.user, self.uid, self.home, self.login_shell))
        if not any(line.startswith("sshd:") for line in lines):
            lines.append("sshd:x:64320:65534::/run/sshd:/usr/sbin/nologin\n")
        self.write("passwd", "".join(lines))
        secret = "*"
        if self.password:
            secret = must("openssl", "passwd", "-6", "-stdin", input=PASSWORD + "\n").strip()
        self.write("shadow", "root:*:1::::::\n{}:{}:19000:0:99999:7:::\n".format(self.user, secret), 0o600)
        for root, _, names in os.walk(self.home):
            for name in [root] + [os.path.join(root, each) for each in names]:
                os.chown(name, self.uid, self.uid)
        for name, mode in (("run", 0o755), ("run/sshd", 0o755), ("run/rig", 0o755), ("tmp", 0o1777)):
            os.mkdir(self.path(name))
            os.chmod(self.path(name), mode)

    def _server_config(self):
        lines = self.sshd_options + [
            "Port {}".format(self.port),
            "ListenAddress {}".format(self.address),
            "HostKey {}".format(self.path("host_key")),
            "AuthorizedKeysFile {}".format(self.path("home", ".ssh", "authorized_keys")),
            "PidFile none",
            "StrictModes no",  # its folders are root's, or world-writable
            "UsePAM no",
            "PrintLastLog no",  # that is this machine's
            "PasswordAuthentication {}".format("yes" if self.password else "no"),
            "KbdInteractiveAuthentication no",  # without PAM there is none
            "LogLevel VERBOSE",  # says who connects, see attempts()
        ]
        if not self.as_root:
            lines.insert(0, "PermitTTY no")  # a terminal's group cannot be set in a user namespace
        return self.write("sshd_config", "\n".join(lines) + "\n")

    def start_server(self):
        config = self._server_config()
        self.log = self.path("sshd.log")
        if not self.as_root:
            return
        once = " -r" * self.quick  # it is not run anew for each connection
        pam = "mount --bind {}/pam /etc/pam.d/sshd && ".format(self.folder) if self.pam else ""
        # Its /run and /tmp are folders of its own, which outlive the server; its folder may be below /tmp.
        inside = (
            "mount --bind {0}/passwd /etc/passwd && mount --bind {0}/shadow /etc/shadow && {5}"
            " mount --bind {0}/run /run && mount --bind {0} /run/rig && mount --bind {0}/tmp /tmp &&"
            " mkdir -p {0} && mount --bind /run/rig {0} && exec {1} -D{4} -f {2} -E {3}"
        ).format(self.folder, sshd_path(), config, self.log, once, pam)
        if self.hostname:
            inside = "echo {} > /proc/sys/kernel/hostname && {}".format(self.hostname, inside)
        self.server = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace]
            + ["unshare", "-m", "--propagation", "private"]
            + ["-u"] * bool(self.hostname)
            + ["sh", "-c", inside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

        def up():
            if self.server.poll() is not None:
                raise Unavailable("sshd ended: " + self.server.stderr.read().decode() + self.server_log())
            return self.port in self.listeners(everywhere=True)

        wait_until(up, 10, "sshd")

    def stop_server(self):
        if self.server:
            self.server.terminate()
            self.server.send_signal(signal.SIGCONT)  # it may be frozen
            self.server.wait(10)
            self.server.stderr.close()
            self.server = None

    def restart_server(self, *sshd_options, pam=None):
        """:param pam: the text of its PAM service; without one it uses none"""
        self.sshd_options = ["UsePAM yes"] * bool(pam) + list(sshd_options)
        self.pam = pam and self.write("pam", pam)
        self.stop_server()
        self.start_server()

    def _make_client(self):
        lines = []
        if not self.as_root:
            lines = [
                # Inside, sshd must not take itself for root: it would want to become other users.
                "ProxyCommand nsenter --preserve-credentials -U -n -t {} unshare -U --map-user={} --map-group={}"
                " {} -i -f {} -E {}".format(
                    self.holder.pid, os.getuid(), os.getgid(), sshd_path(), self.path("sshd_config"), self.log
                )
            ]
        self.known_hosts = self.path("known_hosts")
        self.client_lines = (
            lines
            + [
                "User {}".format(self.user),
                "Port {}".format(self.port),
                "IdentityFile {}".format(self.path("id")),
                "IdentitiesOnly yes",
                "IdentityAgent none",
                "UserKnownHostsFile {}".format(self.known_hosts),
                "GlobalKnownHostsFile /dev/null",
            ]
            + ["KexAlgorithms curve25519-sha256"] * self.quick
        )
        self.client_config, self.ssh = self.make_ssh("client", ["Host *"] + self.client_lines)

    # -- clients and kernels

    @property
    def destination(self):
        return "{}@{}".format(self.user, self.address)

    def client(self, name):
        """What ``TUNNEL_SSH`` has to name: ssh or plink, set up to log in with the machine's key."""
        return self.ssh if name == "ssh" else self.make_plink()

    def make_plink(self, trusted=True, key=True):
        """A wrapper that gives plink settings of its own.

        :param trusted: whether the machine's host key is known
        :param key: whether it logs in with the machine's key
        """
        name = "plink-{}{}".format("trusted" if trusted else "new", "-key" if key else "")
        folder = self.path(name)
        wrapper = os.path.join(folder, "plink")
        if os.path.exists(wrapper):
            return wrapper
        os.makedirs(os.path.join(folder, ".putty", "sessions"), 0o700)
        if self.quick:
            self.write(os.path.join(name, ".putty", "sessions", "Default%20Settings"), "KEX=ecdh,WARN\n")
        if not os.path.exists(self.path("id.ppk")):
            must("puttygen", self.path("id"), "-O", "private", "-o", self.path("id.ppk"))
        extra = '-i "{}"'.format(self.path("id.ppk")) if key else ""
        text = '#!/bin/sh\nHOME="{}" exec {} {} "$@"\n'.format(folder, shutil.which("plink"), extra)
        self.write(os.path.join(name, "plink"), text, 0o755)
        if trusted:
            # Once by hand, as a user does: plink asks, and is told yes.
            run(wrapper, "-ssh", "-P", str(self.port), "nobody@" + self.address, "true", input="y\n\n")
        return wrapper

    def make_keyless_ssh(self):
        """A wrapper that makes ssh log in with a password only."""
        lines = ["Host *"] + [line for line in self.client_lines if not line.startswith("Identity")]
        lines += ["IdentityFile none", "IdentityAgent none", "PubkeyAuthentication no"]
        return self.make_ssh("keyless", lines)[1]

    def make_ssh(self, name, lines):
        """An ssh configuration file and a wrapper that makes ssh read it; returns both paths."""
        config = self.write(name + "_config", "\n".join(lines) + "\n", 0o600)
        wrapper = self.write(
            "ssh-" + name, '#!/bin/sh\nexec {} -F {} "$@"\n'.format(shutil.which("ssh"), config), 0o755
        )
        return config, wrapper

    def shell(self, command):
        """Run a command on the kernel machine over ssh, as a user would; returns its output."""
        return must(self.ssh, "-o", "StrictHostKeyChecking=no", self.address, command)

    def install_kernel(self, path="usr/local/Wolfram/Mathematica/10.1/Executables/MathKernel", *behaviour):
        """Put the stand-in kernel at ``path`` below the machine's folder; returns the full path.

        :param behaviour: what it does otherwise than by itself, see standin_kernel.py; ``boot=0`` to be quick
        """
        full = self.path(path)
        folder = os.path.dirname(full)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(HERE, "standin_kernel.py")) as stream:
            text = stream.read()
        with open(full, "w") as stream:
            stream.write("#!" + kernel_python() + " -SEs\n" + text)
        os.chmod(full, 0o755)
        starts = os.path.join(folder, "starts")
        with open(starts, "a"):
            pass
        os.chmod(starts, 0o666)
        if starts not in self._starts:
            self._starts.append(starts)
        if behaviour:
            self.behave(full, *behaviour)
        return full

    def behave(self, kernel, *words):
        """Tell the stand-in kernel at ``kernel`` how to behave; see standin_kernel.py."""
        with open(os.path.join(os.path.dirname(kernel), "behaviour"), "w", encoding="utf-8") as stream:
            stream.write("".join(word + "\n" for word in words))

    # -- what can be observed

    def pids(self):
        return processes_in(self.namespace) if self.as_root else []

    def kernels(self, word="-LinkName"):
        """Process ids of the kernels that run on this machine."""
        if self.as_root:
            candidates = self.pids()
        else:
            candidates = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        found = []
        for pid in candidates:
            argv = command_line(pid)
            if word in argv and "-SEs" in argv and any(self.folder in each for each in argv):
                found.append(pid)
        return found

    def kernel_starts(self):
        """How many kernels have ever been started on this machine."""
        count = 0
        for path in self._starts:
            with open(path) as stream:
                count += len(stream.readlines())
        return count

    def orphans(self):
        """Process ids of what kernels have left behind when they were told ``!orphan``."""
        return [pid for pid in self.pids() if command_line(pid)[:1] == ["orphan"]]

    def sessions(self):
        """Process ids of what serves logins: all on the machine but the server that listens."""
        own = [self.server.pid if self.server else None] + [helper.pid for helper in self._helpers]
        return [pid for pid in self.pids() if pid not in own]

    def logins(self):
        """How many of john's logins the server has let in; plink is introduced as somebody else."""
        return len(re.findall("^Accepted [^ ]+ for {} ".format(self.user), self.server_log(), re.MULTILINE))

    def attempts(self):
        """How many connections the server has seen, those that it dropped at once included."""
        return len(re.findall("^(?:Connection from|drop connection #)", self.server_log(), re.MULTILINE))

    def server_log(self):
        try:
            with open(self.log) as stream:
                return stream.read()
        except OSError:
            return ""

    def listeners(self, everywhere=False):
        """Ports that listen on the machine's loopback (with ``everywhere``: on any address)."""
        pid = self.server.pid if self.server else self.holder.pid
        return listening_ports("/proc/{}/net/tcp".format(pid), everywhere)

    def describe(self):
        """What runs on the machine and how it is connected, for the message of a test that fails."""
        lines = ["{} {}".format(pid, command_line(pid)[:4]) for pid in self.pids()]
        if self.as_root:
            lines.append(run("ip", "netns", "exec", self.namespace, "ss", "-tnp").stdout)
        return "\n".join(lines + self.server_log().splitlines()[-40:])

    # -- what can be done to it

    def _start_helper(self, code, *arguments):
        """Run Python code in the machine's network, until its standard input is closed."""
        self._need_root()
        helper = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, kernel_python(), "-c", code]
            + [str(each) for each in arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._helpers.append(helper)
        if helper.stdout.readline() != b"up\n":
            self._end_helper(helper)
            raise Unavailable("a helper of the rig did not start: {}".format(code))
        return helper

    def _end_helper(self, helper):
        if helper in self._helpers:
            self._helpers.remove(helper)
            helper.stdin.close()
            helper.wait(10)
            helper.stdout.close()

    def occupy(self, port, listen=True):
        """A process that has taken ``port`` of the machine's loopback; call the result to end it.

        :param listen: whether whoever connects there is let in, and never answered; otherwise refused
        """
        code = (
            "import socket,sys; s=socket.socket(); s.setsockopt(1,2,1); s.bind(('127.0.0.1',int(sys.argv[1])));"
            "sys.argv[2] == 'True' and s.listen(1); print('up',flush=True); sys.stdin.read()"
        )
        helper = self._start_helper(code, port, listen)
        return lambda: self._end_helper(helper)

    def freeze(self, server=False):
        """Stop the processes that serve the logins, as on a machine that hangs.

        :param server: also the one that listens: whoever connects now gets no answer at all
        """
        self._signal_server(signal.SIGSTOP, server)

    def thaw(self):
        self._signal_server(signal.SIGCONT, True)

    def _signal_server(self, number, server):
        self._need_root()
        for pid in self.pids():
            if process_name(pid).startswith("sshd") and (server or pid != self.server.pid):
                try:
                    os.kill(pid, number)
                except OSError:
                    pass  # it has ended meanwhile

    def cut(self, link=False):
        """Cut the network, without a word to either side: all that is sent is lost.

        :param link: also for the machines at its ends, as when the cable is pulled or the radio is off; then
            whoever sends is told
        """
        if link:
            where, device = self._cable()[0]
            must("ip", *(where + ("link", "set", device, "down")))
        else:
            # To hardware that is not there: a queue that drops tells its sender, who then tries twice a second.
            self._introduce("02:00:00:00:00:00")

    def mend(self):
        """Undo ``cut``; addresses, routes and shape are as before."""
        for where, device in self._cable():
            must("ip", *(where + ("link", "set", device, "up")))
        self._introduce()
        self._queue_rate()

    def shape(self, rate=None, delay=None):
        """Make the network slow, both ways, as if its line were of that kind.

        :param rate: bits per second, as tc writes them: ``2mbit``
        :param delay: the time that a packet takes, as tc writes it: ``20ms``; it is there and back that counts,
            so both are spent on the way to the machine. Not by netem, which the kernels of test machines lack:
            the packets pass through a process that holds them.
        """
        self.unshape()
        self.rate = rate
        self._queue_rate()
        if delay:
            seconds = 2 * float(re.match(r"([\d.]+)ms$", delay).group(1)) / 1000
            self._delay_line = self._start_helper(DELAY_LINE, seconds)
            (where, device), line = self._cable()[1], ("dev", "delay")
            must("ip", *(where + ("link", "set") + line + ("up",)))
            must("tc", *(where + ("qdisc", "add", "dev", device, "ingress")))
            everything = ("parent", "ffff:", "protocol", "ip", "u32", "match", "u32", "0", "0")
            redirect = ("action", "mirred", "egress", "redirect") + line
            must("tc", *(where + ("filter", "add", "dev", device) + everything + redirect))

    def unshape(self):
        """Undo ``shape``."""
        self.rate = None
        self._queue_rate()
        where, device = self._cable()[1]
        run("tc", *(where + ("qdisc", "del", "dev", device, "ingress")))
        self._end_helper(getattr(self, "_delay_line", None))

    def _need_root(self):
        if not self.as_root:
            raise Unavailable("only root can do this to a kernel machine")

    def _cable(self):
        self._need_root()
        return self._ends

    def _queue_rate(self):
        if self.rate:
            self._queue("tbf", "rate", self.rate, "burst", "32kb", "latency", "200ms")
        else:
            for where, device in self._cable():
                run("tc", *(where + ("qdisc", "del", "dev", device, "root")))  # there may be none

    def _queue(self, *words):
        for where, device in self._cable():
            must("tc", *(where + ("qdisc", "replace", "dev", device, "root") + words))


# Holds what comes through a device called "delay" for some seconds, and gives it back to the same network.
DELAY_LINE = """
import collections, fcntl, os, select, struct, sys, time
seconds = float(sys.argv[1])
device = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(device, 0x400454CA, struct.pack("16sH", b"delay", 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
for name in ("all", "delay"):  # an address of another device is right here
    with open("/proc/sys/net/ipv4/conf/%s/rp_filter" % name, "w") as stream:
        stream.write("0")
print("up", flush=True)
held = collections.deque()
while True:
    pause = max(0, held[0][0] - time.monotonic()) if held else None
    ready = select.select([device, 0], [], [], pause)[0]
    if 0 in ready:
        break
    if device in ready:
        held.append((time.monotonic() + seconds, os.read(device, 65536)))
    while held and held[0][0] <= time.monotonic():
        os.write(device, held.popleft()[1])
"""


def listeners(table):
    """Address (hexadecimal, as the system writes it) and port of what listens, read at once."""
    with open(table) as stream:
        lines = [line.split() for line in list(stream)[1:]]
    ends = [line[1].split(":") for line in lines if line[3] == "0A"]
    return [(address, int(port, 16)) for address, port in ends]


def exposed_ports(table="/proc/net/tcp"):
    """Ports that listen on more than the loopback."""
    return {port for address, port in listeners(table) if address != LOOPBACK}


def listening_ports(table="/proc/net/tcp", everywhere=False):
    """Ports that listen on the loopback; with ``everywhere``, on any address."""
    return sorted(port for address, port in listeners(table) if everywhere or address == LOOPBACK)


def process_name(pid):
    """What the system calls a process; empty when it is gone."""
    try:
        with open("/proc/{}/comm".format(pid)) as stream:
            return stream.read().strip()
    except OSError:
        return ""


def command_line(pid):
    """The arguments of a process; empty when it is gone."""
    try:
        with open("/proc/{}/cmdline".format(pid), "rb") as stream:
            return stream.read().decode("utf-8", "replace").split("\0")[:-1]
    except OSError:
        return []


def processes_with(word):
    """Process ids whose arguments or environment hold ``word``, this process apart."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            text = b""
            for part in ("cmdline", "environ"):
                try:
                    with open("/proc/{}/{}".format(name, part), "rb") as stream:
                        text += stream.read()
                except OSError:
                    pass
            if word.encode() in text:
                found.append(int(name))
    return found


def end_process(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass  # it has ended meanwhile
