"""A real Slurm of two nodes on one machine: munge, a controller on n1, a node daemon on n1 and on n2."""

import os
import re
import shutil
import subprocess
import time

from tests.cluster import namespaces
from tests.cluster.namespaces import HOSTS, Hosts

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")
CONFIG = """\
ClusterName=ase
SlurmctldHost=n1
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=5,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MpiDefault=none
GresTypes=gpu
NodeName=n1,n2 CPUs={cores} RealMemory=1000 Gres=gpu:1 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""


def why_not():
    """Why this machine cannot have a Slurm, or nothing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
    return namespaces.why_not()


class Slurm:
    """The cluster in ``folder``; closing ends every process of it."""

    def __init__(self, folder):
        self.folder, self.hosts = folder, Hosts(folder)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._munge = None

    def __enter__(self):
        folder = self.folder
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, cores=os.cpu_count()))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # unused, and /sys/fs/cgroup is not mounted
        for name in ("state", "munge", *(f"spool-{host}" for host in HOSTS)):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}={folder}/munge/{name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
        self._munge = subprocess.Popen(["munged", "--foreground", "--force", f"--key-file={key}", *files])
        _wait((folder / "munge" / "socket").exists)
        self.hosts.__enter__()
        self._start("n1", "slurmctld", "-D")
        for host in HOSTS:
            self._start(host, "slurmd", "-D", "-N", host)
        try:
            _wait(lambda: "idle 2" in self.run("sinfo", "--noheader", "--partition=low", "--format=%T %D", check=False))
        except TimeoutError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.hosts.__exit__()
        self._munge.terminate()
        self._munge.wait()

    def _start(self, host, *command):
        with (self.folder / f"{command[0]}-{host}.said").open("w") as said:
            self.hosts.run(host, command, env=self.environment, stdout=said, stderr=said)

    def run(self, *command, cwd=None, check=True, **variables):
        """The output of a command on n1."""
        environment = {**self.environment, **variables}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.hosts.run("n1", command, env=environment, cwd=cwd, **pipes)
        output, complaint = process.communicate(timeout=60)
        assert process.returncode == 0 or not check, f"{command}: {complaint}"
        return output

    def job(self, number):
        """What Slurm says of a job: {name: value}."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(number), check=False)))

    def wait_for_state(self, number, *states, seconds=180):
        """Wait until a job is in one of ``states``; the state."""
        _wait(lambda: self.job(number).get("JobState") in states, seconds=seconds)
        return self.job(number)["JobState"]


def _wait(condition, *, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.2)
