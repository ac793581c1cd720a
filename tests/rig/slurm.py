"""A throwaway cluster: a kernel machine as login node, with a real Slurm, and a compute node behind it.

Each has a network of its own. The login node's is that of the kernel machine, and the compute nodes' is joined to
it alone, so that nothing but the login node reaches them, and neither has the other's loopback. Homes, accounts
and programs are shared, as on clusters.
"""

import contextlib
import os
import shutil
import subprocess

import rig

NODES = ("node1", "node2")  # of the partitions main and small; both in one network
FIRST = "198.19.255."  # addresses between the two nodes; nobody else sees them
CONFIG = """
ClusterName=throwaway
SlurmctldHost={host}({login})
MailProg=/bin/true
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort=6817
SrunPortRange=60001-60900
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=1,defer_batch
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
InactiveLimit=0
KillWait=2
MinJobAge=2
WaitTime=0
UnkillableStepTimeout=5
SlurmdParameters=config_overrides
PropagateResourceLimitsExcept=ALL
NodeName=node1 NodeHostname=node1 NodeAddr={compute} Port=6818 CPUs={processors} State=UNKNOWN
NodeName=node2 NodeHostname=node2 NodeAddr={compute} Port=6819 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=node1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=small Nodes=node2 MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class Cluster:
    """A Slurm that runs while the ``with`` block does.

    :param machine: the kernel machine that becomes its login node
    :param processors: how many the larger node says that it has; the other one has 2
    """

    def __init__(self, machine, processors=128):
        self.machine, self.processors = machine, processors
        self.namespace = machine.namespace + "-node"
        # Another test process takes away what nobody claims, see rig.sweep.
        self._claim = rig.claim("network-{}-node".format(machine.number))
        self.daemons = {}

    def path(self, *parts):
        return self.machine.path("slurm", *parts)

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        for program in ("munged", "slurmctld", "slurmd", "srun"):
            if not find(program):
                raise rig.Unavailable("no {} here; `python3 tests/run.py` installs it".format(program))
        for name in ("", "state", "none"):
            os.mkdir(self.path(name))
        self._join_networks()
        facts = {"login": FIRST + "1", "compute": FIRST + "2", "host": os.uname().nodename}
        facts.update(folder=self.path().rstrip("/"), processors=self.processors)
        self.config = self._write("slurm.conf", CONFIG.format(**facts))
        self._write("cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupMountpoint={}\n".format(self.path("none")))
        with open(self.path("munge.key"), "wb") as stream:
            stream.write(os.urandom(128))
        os.chmod(self.path("munge.key"), 0o600)
        words = ["--key-file=" + self.path("munge.key"), "--socket=" + self.path("munge.socket"), "--force"]
        words += ["--{}-file={}".format(each, self.path("munge." + each)) for each in ("pid", "log", "seed")]
        self._run_daemon("munged", self.machine.namespace, "--foreground", *words)
        rig.wait_until(lambda: os.path.exists(self.path("munge.socket")), 10, "munged")
        self._run_daemon("slurmctld", self.machine.namespace, "-D", "-f", self.config)
        rig.wait_until(lambda: 6817 in self.machine.listeners(everywhere=True), 20, "slurmctld")
        for node in NODES:
            self.start_node(node)
        rig.wait_until(lambda: self.states() == {"idle"}, 20, "the compute nodes")
        self.machine.sshd_options.append("SetEnv SLURM_CONF=" + self.config)
        self.machine.restart_server(*self.machine.sshd_options)

    def _write(self, name, text):
        with open(self.path(name), "w") as stream:
            stream.write(text)
        return self.path(name)

    def _join_networks(self):
        here, there = "slurm-l", "slurm-c"
        rig.must("ip", "netns", "add", self.namespace)
        inside = ["ip", "-n", self.machine.namespace]
        rig.must(*(inside + ["link", "add", here, "type", "veth", "peer", "name", there]))
        rig.must(*(inside + ["link", "set", there, "netns", self.namespace]))
        for namespace, device, number in ((self.machine.namespace, here, "1"), (self.namespace, there, "2")):
            words = ["ip", "-n", namespace]
            rig.must(*(words + ["addr", "add", FIRST + number + "/30", "dev", device]))
            rig.must(*(words + ["link", "set", device, "up"]))
        rig.must("ip", "-n", self.namespace, "link", "set", "lo", "up")

    def inside(self, namespace, *argv):
        """A command line with the files and accounts of the machine, in a network."""
        first = self.daemons.get("munged") or self.machine.server  # which may be restarted
        enter = ["nsenter", "--net=/run/netns/" + namespace, "-m", "-t", str(first.pid)]
        return enter + ["env", "SLURM_CONF=" + self.path("slurm.conf")] + list(argv)

    def _run_daemon(self, name, namespace, *arguments, key=None):
        with open(self.path(name + ".out"), "ab") as out:
            argv = self.inside(namespace, find(name), *arguments)
            null = subprocess.DEVNULL
            self.daemons[key or name] = subprocess.Popen(argv, stdin=null, stdout=out, stderr=out)

    def start_node(self, node):
        words = ["-u", "sh", "-c", 'hostname {} && exec "$@"'.format(node), "sh", find("slurmd")]
        self._run_daemon("unshare", self.namespace, *(words + ["-D", "-N", node, "-f", self.config]), key=node)

    def states(self, *words):
        return set(self.ask("sinfo", "-h", "-o", "%t", *words).split())

    def kill_node(self, node):
        """A node that loses its power, as the controller sees it in the end."""
        daemon = self.daemons.pop(node)
        name = namespace_of(daemon.pid)
        for pid in rig.processes_in(self.namespace):
            if namespace_of(pid) == name:
                rig.end_process(pid)
        daemon.wait()
        self.ask("scontrol", "update", "NodeName=" + node, "State=DOWN", "Reason=dead")

    def revive_node(self, node):
        self.start_node(node)
        self.ask("scontrol", "update", "NodeName=" + node, "State=RESUME")
        rig.wait_until(lambda: "idle" in self.states("-n", node), 20, "the compute node")

    @contextlib.contextmanager
    def full(self, partition="main"):
        """All jobs that are submitted meanwhile wait in their queue."""
        self.ask("scontrol", "update", "PartitionName=" + partition, "State=DOWN")
        try:
            yield
        finally:
            self.ask("scontrol", "update", "PartitionName=" + partition, "State=UP")

    def ask(self, *argv):
        """What a program of Slurm's says on the login node; nothing when it fails."""
        return rig.run(*self.inside(self.machine.namespace, *argv)).stdout

    def jobs(self):
        """Number and state of all jobs that have not ended."""
        lines = self.ask("squeue", "-h", "-o", "%i %T").splitlines()
        return [tuple(line.split()) for line in lines]

    def kernels(self):
        """Process ids of the kernels on the compute node."""
        pids = rig.processes_in(self.namespace)
        return [pid for pid in pids if "-LinkName" in rig.command_line(pid)]

    def left(self):
        """Process ids of what runs on either node besides the daemons."""
        own = [process.pid for process in self.daemons.values()]
        found = self.machine.sessions() + rig.processes_in(self.namespace)
        return [pid for pid in found if pid not in own and not is_daemon(pid)]

    def stop(self, name):
        process = self.daemons.pop(name, None)
        if process:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __exit__(self, *_):
        for name in NODES + ("slurmctld", "munged"):
            self.stop(name)
        for pid in rig.processes_in(self.namespace):
            rig.end_process(pid)
        rig.run("ip", "netns", "del", self.namespace)


def is_daemon(pid):
    return os.path.basename((rig.command_line(pid) + [""])[0]).startswith(("slurmctld", "slurmd", "munged"))


def namespace_of(pid):
    """What tells the processes of the nodes apart: each node has a host name of its own."""
    try:
        return os.readlink("/proc/{}/ns/uts".format(pid))
    except OSError:
        return None


def find(program):
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")
