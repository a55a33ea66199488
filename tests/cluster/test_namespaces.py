"""Two hosts in network namespaces train as one: over ssh, without it, and with one of them gone."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ase_dist.errors import ExitCode
from tests.cluster import namespaces
from tests.cluster.namespaces import HOSTS, Hosts
from tests.training.tiny_runs import ROOT, TINY, losses, same_bits, trained

pytestmark = pytest.mark.cluster

TOOLS = Path(sys.executable).parent
HALF = "train.batch_size=2"
SHARDED = ("model.moe.ep_size=2", "model.moe.dispatch=all_to_all")
README = """\
sudo apt-get install --yes g++ openssh-server pdsh python3-venv  # on both machines; all the rest on the first one,
cd /shared/ase_dist                                               # in a checkout that both see under this path
python3 -m venv .venv && . .venv/bin/activate && pip install -e .
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
ssh-copy-id n1 && ssh-copy-id n2
printf '%s slots=1\\n' n1 n2 > hosts                               # slots: its GPUs, or ranks to run on its CPU
python launch/cluster/check.py hosts
launch/cluster/ssh.sh hosts model.moe.ep_size=2 output=runs/cluster
"""
LIMIT = 15  # seconds without progress, of the run that is cut in two
STARTING = 120  # seconds that a start may take on a busy machine


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := namespaces.why_not():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts")) as both:
        (both.folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
        (both.folder / "alone").write_text("n1 slots=1\n")
        yield both


class Job:
    """A command that runs, with its output in a file."""

    def __init__(self, hosts, host, name, *command, **variables):
        self.log = hosts.folder / f"{name}.log"
        kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "TMPDIR", "USER")}
        tools = f"{TOOLS}:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {**kept, "PATH": tools, "OMP_NUM_THREADS": "1", "MASTER_PORT": "29511", **variables}
        with self.log.open("w") as file:
            options = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": file}
            words = [str(word) for word in command]
            self.process = hosts.run(host, words, **options) if host else subprocess.Popen(words, **options)

    def wait(self, seconds=STARTING):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"still running after {seconds} s: {self.said()[-3000:]}")

    def said(self):
        return self.log.read_text()


def settings(scenes, output, *others):
    return ["--deepspeed_config", "ds_configs/z1.json", *TINY, HALF, f"data.root={scenes}", f"output={output}", *others]


@pytest.fixture(scope="module")
def over_ssh(hosts, scenes):
    """The README's lines on two hosts, and the same job as two processes of one, at the same time."""
    if reason := namespaces.why_no_ssh():
        pytest.skip(reason)
    hosts.serve_ssh()
    one, two = hosts.folder / "one", hosts.folder / "two"
    port = {"MASTER_PORT": "29512"}
    torchrun = [TOOLS / "torchrun", "--nproc_per_node=2", "--master_port=29512", "launch/train.py"]
    reference = Job(hosts, None, "one", *torchrun, *settings(scenes, one, *SHARDED), **port)
    variables = {"DS_ENV_FILE": str(hosts.folder / "variables")}
    *_, key, _, listing, checking, starting = README.splitlines()
    lines = [key.replace("~/.ssh", str(hosts.folder)), listing, checking + ' --env "$DS_ENV_FILE"', starting]
    lines = [line.split("  #")[0].replace(" hosts", f" {hosts.folder / 'hosts'}") for line in lines]
    job = Job(hosts, "n1", "ssh", "bash", "-euc", "\n".join(lines) + ' "$@"', "-",
              *settings(scenes, two, *SHARDED), **variables)  # fmt: skip
    assert reference.wait() == 0, reference.said()[-3000:]
    assert job.wait() == 0, job.said()[-3000:]
    return one, two, job.said()


def test_two_hosts_over_ssh_learn_what_one_does(over_ssh):
    one, two, _ = over_ssh
    assert losses(one) == losses(two)
    assert same_bits(trained(one, 6), trained(two, 6)) == []


def test_the_ranks_talk_over_the_interface_between_the_hosts(over_ssh, hosts):
    *_, said = over_ssh
    variables = (hosts.folder / "variables").read_text().splitlines()
    assert "GLOO_SOCKET_IFNAME=eth0" in variables and "OMP_NUM_THREADS=1" in variables
    assert re.search(rf"n1: slots=1, no accelerator, \d+ cores, {HOSTS['n1']} on eth0", said)
    assert f"--master_addr={HOSTS['n1']}" in said


# ---------------------------------------------------------------------------------------------------------------------
# A host is gone


def newest(output):
    """The step of the newest checkpoint, 0 before the first."""
    return max((int(path.name[5:]) for path in (output / "checkpoints").glob("step_*")), default=0)


def until(condition, *jobs):
    deadline = time.monotonic() + STARTING
    while not condition():
        ended = [job for job in jobs if job.process.poll() is not None]
        assert not ended and time.monotonic() < deadline, "\n\n".join(job.said()[-2000:] for job in jobs)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cut(hosts, scenes):
    """A run without ssh, whose second host loses its cable and its power; then the first one's code, words, seconds."""
    output = hosts.folder / "cut"
    long = ("train.max_steps=100000", "checkpoint.every=2", f"guard.timeout={LIMIT}")
    script, hostfile = "launch/cluster/no_ssh.sh", hosts.folder / "hosts"
    command = settings(scenes, output, *SHARDED, *long)
    jobs = [Job(hosts, host, f"cut_{host}", script, hostfile, rank, *command) for rank, host in enumerate(HOSTS)]
    until(lambda: newest(output) >= 4, *jobs)
    hosts.connect(False)
    hosts.kill("n2")
    began = time.monotonic()
    code = jobs[0].wait()
    seconds = time.monotonic() - began
    hosts.connect(True)
    return output, code, jobs[0].said(), seconds


def test_the_host_that_is_left_ends_in_time_and_says_why(cut):
    _, code, said, seconds = cut
    assert code in (ExitCode.FAILED, ExitCode.SILENT), said[-3000:]  # gloo's limit or the watchdog's, who is first
    assert seconds < 2 * LIMIT + 15  # torch waits once more for the other one when it leaves
    ends = r"rank 0 (?:ends at step \d+|on n1 has made no progress)"
    assert re.search(rf"{ends}.*rank 1 on n2 gave no sign of life", said), said[-3000:]


def test_the_job_goes_on_where_it_was_on_one_host(cut, hosts, scenes):
    output, *_ = cut
    step = newest(output)
    alone = (f"train.max_steps={step + 2}", "train.batch_size=4", "model.moe.ep_size=1")
    words = ["launch/cluster/torchrun.sh", hosts.folder / "alone", 0, *settings(scenes, output, *alone)]
    job = Job(hosts, "n1", "alone", *words)
    assert job.wait() == 0, job.said()[-3000:]
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["step"], summary["world_size"]) == (step + 2, 1)
    assert sorted(losses(output)) == [*range(1, step + 3)]
