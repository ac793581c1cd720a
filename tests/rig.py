"""A throwaway kernel machine: a real sshd on a loopback of its own.

The forwarded ports of a tunnel are bound on the kernel machine's 127.0.0.1, often with the numbers that
the front end already uses, so the two must not share a loopback. As root that is a network namespace with
a veth pair; accounts and ``/run`` are replaced inside a mount namespace, so that nothing on the real
machine changes. Without root it is a user namespace, reached through a ``ProxyCommand`` that starts
``sshd -i`` inside it.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LAUNCHERS = os.path.dirname(HERE)
PASSWORD = "op3n-sesame!"
LOOPBACK = "0100007F"  # 127.0.0.1, as /proc/net/tcp has it
_numbers = itertools.count(1)


class Unavailable(Exception):
    """This machine cannot hold a kernel machine; the text says why and what to do."""


def wait_until(condition, seconds=10.0, what="the condition"):
    """Return the first true value of ``condition()``, or fail after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("waited {} s in vain for {}".format(seconds, what))
        time.sleep(0.01)


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
    """A kernel machine that runs while the ``with`` block does.

    :param sshd_options: lines for sshd_config, before (so over) the defaults
    :param behind: another kernel machine; this one is then reachable only from there
    :param password: whether the login ``john`` has one

    ``address`` and ``port`` say where it listens; ``client_config`` is an ssh configuration file that logs
    in with a key; ``ssh`` is a wrapper for ``TUNNEL_SSH`` that makes ssh read it.
    """

    user = "john"

    def __init__(self, sshd_options=(), behind=None, password=False, port=22):
        self.sshd_options = list(sshd_options)
        self.behind = behind
        self.password = password
        self.port = port
        self.number = next(_numbers)
        self.folder = None
        self.server = None
        self.as_root = os.getuid() == 0
        self.namespace = "tunnel-{}-{}".format(os.getpid(), self.number)

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
        if self.as_root:
            for pid in self.pids():
                end_process(pid)
            run("ip", "link", "del", self._veth("f"))  # lingers otherwise while a socket still holds it
            run("ip", "netns", "del", self.namespace)
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

    def _veth(self, end):
        return "tk{}{}{}".format(os.getpid() % 1000000, end, self.number)

    def _make_network(self):
        if not self.as_root:
            self._make_user_namespace()
            return
        # 198.18.0.0/15 is set aside for tests of this kind (RFC 2544); a block per process and machine.
        net = "198.18.{}.".format(os.getpid() % 250)
        low = 4 * self.number % 252
        self.gateway, self.address = net + str(low + 1), net + str(low + 2)
        must("ip", "netns", "add", self.namespace)
        must("ip", "link", "add", self._veth("f"), "type", "veth", "peer", "name", self._veth("k"))
        must("ip", "link", "set", self._veth("k"), "netns", self.namespace)
        if self.behind:
            must("ip", "link", "set", self._veth("f"), "netns", self.behind.namespace)
        outer = ("ip", "-n", self.behind.namespace) if self.behind else ("ip",)
        for ip, device, address in (
            (outer, self._veth("f"), self.gateway),
            (("ip", "-n", self.namespace), self._veth("k"), self.address),
        ):
            must(*ip, "addr", "add", address + "/30", "dev", device)
            must(*ip, "link", "set", device, "up")
        must("ip", "-n", self.namespace, "link", "set", "lo", "up")

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
        if not self.as_root:
            return
        self.uid = 64321
        with open("/etc/passwd") as stream:
            lines = [line for line in stream if not line.startswith(self.user + ":")]
        lines.append("{}:x:{}:{}::{}:/bin/bash\n".format(self.user, self.uid, self.uid, self.home))
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

    def _server_config(self):
        lines = self.sshd_options + [
            "Port {}".format(self.port),
            "ListenAddress {}".format(self.address),
            "HostKey {}".format(self.path("host_key")),
            "AuthorizedKeysFile {}".format(self.path("home", ".ssh", "authorized_keys")),
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "UseDNS no",
            "PrintMotd no",
            "PrintLastLog no",
            "MaxStartups 500",
            "PasswordAuthentication {}".format("yes" if self.password else "no"),
            "KbdInteractiveAuthentication no",
            "LogLevel VERBOSE",
        ]
        if not self.as_root:
            lines.insert(0, "PermitTTY no")  # a terminal's group cannot be set in a user namespace
        return self.write("sshd_config", "\n".join(lines) + "\n")

    def start_server(self):
        config = self._server_config()
        self.log = self.path("sshd.log")
        if not self.as_root:
            return
        inside = (
            "mount --bind {0}/passwd /etc/passwd && mount --bind {0}/shadow /etc/shadow &&"
            " mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec {1} -D -f {2} -E {3}"
        ).format(self.folder, sshd_path(), config, self.log)
        self.server = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace]
            + ["unshare", "-m", "--propagation", "private", "sh", "-c", inside],
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
            self.server.wait(10)
            self.server.stderr.close()
            self.server = None

    def restart_server(self, *sshd_options):
        self.sshd_options = list(sshd_options)
        self.stop_server()
        self.start_server()

    def _make_client(self):
        lines = []
        if not self.as_root:
            lines = [
                # Inside, sshd must not take itself for root: it would want to become other users.
                "ProxyCommand nsenter --preserve-credentials -U -n -t {} unshare -U --map-user={} --map-group={}"
                " {} -i -f {}".format(
                    self.holder.pid, os.getuid(), os.getgid(), sshd_path(), self.path("sshd_config")
                )
            ]
        self.known_hosts = self.path("known_hosts")
        self.client_lines = lines + [
            "User {}".format(self.user),
            "Port {}".format(self.port),
            "IdentityFile {}".format(self.path("id")),
            "IdentitiesOnly yes",
            "IdentityAgent none",
            "UserKnownHostsFile {}".format(self.known_hosts),
            "GlobalKnownHostsFile /dev/null",
        ]
        self.client_config, self.ssh = self.make_ssh("client", ["Host *"] + self.client_lines)

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
        os.makedirs(os.path.join(folder, ".putty"), 0o700)
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

    def behave(self, kernel, *words):
        """Tell the stand-in kernel at ``kernel`` how to behave; see standin_kernel.py."""
        with open(os.path.join(os.path.dirname(kernel), "behaviour"), "w") as stream:
            stream.write(" ".join(words))

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

    # -- what can be observed

    def install_kernel(self, path="usr/local/Wolfram/Mathematica/10.1/Executables/MathKernel"):
        """Put the stand-in kernel at ``path`` below the machine's folder; returns the full path."""
        full = self.path(path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(os.path.join(HERE, "standin_kernel.py")) as stream:
            text = stream.read()
        with open(full, "w") as stream:
            stream.write("#!" + kernel_python() + " -SEs\n" + text)
        os.chmod(full, 0o755)
        return full

    def pids(self):
        if self.as_root:
            return [int(pid) for pid in run("ip", "netns", "pids", self.namespace).stdout.split()]
        return []

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

    def sessions(self):
        """Process ids of what serves logins: all on the machine but the server that listens."""
        own = self.server.pid if self.server else None
        return [pid for pid in self.pids() if pid != own]

    def listeners(self, everywhere=False):
        """Ports that listen on the machine's loopback (with ``everywhere``: on any address)."""
        pid = self.server.pid if self.server else self.holder.pid
        return listening_ports("/proc/{}/net/tcp".format(pid), everywhere)

    def describe(self):
        """What runs on the machine and how it is connected, for the message of a test that fails."""
        lines = ["{} {}".format(pid, command_line(pid)[:4]) for pid in self.pids()]
        return "\n".join(lines + [run("ip", "netns", "exec", self.namespace, "ss", "-tnp").stdout])

    def occupy(self, port):
        """A process that listens on ``port`` of the machine's loopback; call the result to end it."""
        code = (
            "import socket,sys; s=socket.socket(); s.setsockopt(1,2,1); s.bind(('127.0.0.1',{}));"
            "s.listen(1); print('up',flush=True); sys.stdin.read()"
        ).format(port)
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, kernel_python(), "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"up\n"

        def end():
            process.stdin.close()
            process.wait(10)
            process.stdout.close()

        return end

    def cut(self):
        """Cut the network, without a word to either side."""
        must("ip", "link", "set", self._veth("f"), "down")

    def server_log(self):
        try:
            with open(self.log) as stream:
                return stream.read()
        except OSError:
            return ""


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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
