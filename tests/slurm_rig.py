"""A throwaway cluster: a kernel machine as login node, with a real Slurm, and a compute node behind it.

Each node has a network of its own. The login node's is that of the kernel machine, and the compute node's is joined
to it alone, so that nothing but the login node reaches the compute node, and neither has the other's loopback. Homes,
accounts and programs are shared, as on clusters.
"""

import os
import subprocess
import sys
import time

import rig

NODE = "node1"
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
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort=6817
SlurmdPort=6818
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
SlurmdTimeout={patience}
InactiveLimit=0
KillWait=2
MinJobAge=2
WaitTime=0
UnkillableStepTimeout=5
SlurmdParameters=config_overrides
PropagateResourceLimitsExcept=ALL
NodeName={node} NodeHostname={node} NodeAddr={compute} CPUs={processors} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class Cluster:
    """A Slurm that runs while the ``with`` block does.

    :param machine: the kernel machine that becomes its login node
    :param processors: how many the compute node says that it has
    """

    def __init__(self, machine, processors=64, patience=5):
        self.machine, self.processors, self.patience = machine, processors, patience
        self.namespace = machine.namespace + "-node"
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
        for name in ("", "state", "spool", "none"):
            os.mkdir(self.path(name))
        self._join_networks()
        facts = {"login": FIRST + "1", "compute": FIRST + "2", "node": NODE, "host": os.uname().nodename}
        facts.update(folder=self.path(), processors=self.processors, patience=self.patience)
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
        self.start_node()
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
        enter = ["nsenter", "--net=/run/netns/" + namespace, "-m", "-t", str(self.machine.server.pid)]
        return enter + ["env", "SLURM_CONF=" + self.path("slurm.conf")] + list(argv)

    def _run_daemon(self, name, namespace, *arguments):
        with open(self.path(name + ".out"), "ab") as out:
            argv = self.inside(namespace, find(name), *arguments)
            null = subprocess.DEVNULL
            self.daemons[name] = subprocess.Popen(argv, stdin=null, stdout=out, stderr=out)

    def start_node(self):
        """Have the compute node serve jobs, and wait until it does."""
        words = ["-u", "sh", "-c", 'hostname {} && exec "$@"'.format(NODE), "sh", find("slurmd")]
        words += ["-D", "-N", NODE, "-f", self.config]
        self._run_daemon("unshare", self.namespace, *words)
        rig.wait_until(lambda: self.state() == "idle", 20, "the compute node")

    def state(self):
        return self.ask("sinfo", "-h", "-o", "%t").strip()

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
        for name in ("unshare", "slurmctld", "munged"):
            self.stop(name)
        for pid in rig.processes_in(self.namespace):
            rig.end_process(pid)
        rig.run("ip", "netns", "del", self.namespace)


def is_daemon(pid):
    return os.path.basename((rig.command_line(pid) + [""])[0]).startswith(("slurmctld", "slurmd", "munged"))


def find(program):
    import shutil

    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")


if __name__ == "__main__":  # try it by hand
    begin = time.monotonic()
    with rig.KernelMachine() as machine, Cluster(machine) as cluster:
        print("up", time.monotonic() - begin, flush=True)
        print(cluster.ask("sinfo"), cluster.jobs())
        print(machine.shell("time srun hostname; time srun -n1 -u -c 8 sh -c 'ip addr; env | grep SLURM_JOB_ID'"))
        sys.exit(0)
