"""Two containers of the image on a network of their own train as one: over ssh, without it, with one of them gone.

The default job, shortened; see ``engine`` for the variables that name the image.
"""

import json
import time

import pytest

from ase_dist.errors import ExitCode
from tests.cluster import engine
from tests.cluster.engine import Containers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

SHORT = ("data.root=/shared/data", "data.scenes.train_images=48", "data.scenes.val_images=8", "data.scenes.size=128",
         "train.max_steps=12", "train.warmup_steps=4", "train.log_every=1", "train.threads=1", "eval.at_start=false",
         "monitor.tensorboard=false")  # fmt: skip
JOB = ("launch/train.py", "--deepspeed_config", "ds_configs/z2.json", *SHORT, "model.moe.ep_size=2")
LIMIT = 30  # seconds without progress


@pytest.fixture(scope="module")
def cluster():
    if reason := engine.why_not():
        pytest.skip(reason)
    found = engine.find_engine()
    with Containers(found, engine.find_image(found)) as containers:
        yield containers


@pytest.fixture(scope="module")
def workers(cluster):
    for name in ("n1", "n2"):
        cluster.start(name, "worker", "--slots", "1", "--grace", "60")
    return cluster


def losses(cluster, run):
    lines = cluster.look("cat", f"/shared/runs/{run}/metrics.jsonl").splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: (r["loss"], r["losses"]) for r in records if r["kind"] == "train"}


def launch(cluster, run, *settings):
    cluster.start("launcher", "launch", "--nodes", "2", *JOB, f"output=/shared/runs/{run}", *settings)
    return cluster.wait("launcher")


@pytest.fixture(scope="module")
def one_host(cluster):
    """The losses of the same job as two processes of one container, by dispatch."""
    found = {}
    for dispatch in ("all_to_all", "gather"):
        words = ["torchrun", "--nproc_per_node", "2", *JOB, f"model.moe.dispatch={dispatch}"]
        cluster.start("alone", *words, f"output=/shared/runs/one_{dispatch}")
        code, said = cluster.wait("alone")
        assert code == 0, said[-3000:]
        found[dispatch] = losses(cluster, f"one_{dispatch}")
    return found


@pytest.mark.parametrize("dispatch", ["all_to_all", "gather"])
def test_two_containers_over_ssh_learn_what_one_does(one_host, workers, dispatch):
    code, said = launch(workers, f"two_{dispatch}", f"model.moe.dispatch={dispatch}")
    assert code == 0, said[-3000:]
    assert all(f"{workers.host(name)}: slots=1, no accelerator" in said for name in ("n1", "n2"))
    found = losses(workers, f"two_{dispatch}")
    assert found == one_host[dispatch] and len(found) == 12


def test_nothing_runs_as_root_and_no_key_is_in_the_image(workers):
    assert workers.look("id", "-u").strip() != "0"
    private = "grep -rlE 'BEGIN .*PRIVATE KEY' /etc /var/lib/ase /ase-dist 2>/dev/null || true"
    assert workers.call("run", "--rm", workers.image, "sh", "-c", private) == ""


def test_a_job_that_is_not_possible_is_one_sentence(workers):
    code, said = launch(workers, "x", "data.name=nyud", "data.root=/shared/none")
    assert code == 2
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "has no data folder '/shared/none'" in errors[0]


def test_a_stopped_worker_lets_its_ranks_save(workers):
    """What `docker stop` and an eviction do: SIGTERM to one worker's container."""
    workers.start("launcher", "launch", "--nodes", "2", *JOB, "output=/shared/runs/stopped", "train.max_steps=5000")
    until(workers, "launcher", "train 3/5000")
    workers.call("stop", "--time", "90", workers.host("n2"))
    code, said = workers.wait("launcher")
    assert code != 0 and "stopped by a signal at step" in said, said[-3000:]
    step = int(said.split("stopped by a signal at step ")[1].split(",")[0])
    assert f"step_{step}" in workers.look("ls", "/shared/runs/stopped/checkpoints")
    workers.start("n2", "worker", "--slots", "1")
    code, said = launch(workers, "stopped", f"train.max_steps={step + 2}")
    assert code == 0 and sorted(losses(workers, "stopped")) == [*range(1, step + 3)], said[-3000:]


def until(cluster, name, words):
    deadline = time.monotonic() + engine.START
    while words not in cluster.said(name):
        assert cluster.state(name) == "running" and time.monotonic() < deadline, cluster.said(name)[-3000:]
        time.sleep(2)


def test_without_ssh_one_container_dies_and_the_other_says_so_then_goes_on_alone(cluster):
    hosts = "".join(f"{cluster.host(name)} slots=1\\n" for name in ("m0", "m1"))
    cluster.look("sh", "-c", f"printf '{hosts}' > /shared/hosts")
    first = cluster.host("m0")
    for number in (0, 1):
        start = ["wait", "--for", first, "deepspeed", "--hostfile", "/shared/hosts", "--no_ssh", "--node_rank",
                 str(number), "--master_addr", first]  # fmt: skip
        long = ["train.max_steps=5000", "checkpoint.every=4", f"guard.timeout={LIMIT}"]
        cluster.start(f"m{number}", *start, *JOB, "output=/shared/runs/killed", *long)
    until(cluster, "m0", "saved step 4")
    cluster.call("kill", "--signal", "KILL", cluster.host("m1"))
    began = time.monotonic()
    code, said = cluster.wait("m0")
    assert code in (ExitCode.FAILED, ExitCode.SILENT)
    assert time.monotonic() - began < 2 * LIMIT + 15
    assert f"rank 1 on {cluster.host('m1')}" in said, said[-3000:]
    step = max(int(n[5:]) for n in cluster.look("ls", "/shared/runs/killed/checkpoints").split() if n[:5] == "step_")
    alone = ["model.moe.ep_size=1", "train.batch_size=8", f"train.max_steps={step + 2}"]
    cluster.start("m0", "python", *JOB, "output=/shared/runs/killed", *alone)
    code, said = cluster.wait("m0")
    assert code == 0, said[-3000:]
    assert sorted(losses(cluster, "killed")) == [*range(1, step + 3)]
