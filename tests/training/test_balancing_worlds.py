"""The weights of balancing are those of one process: on 2 and 4 ranks, experts shared or not, in micro-steps, bf16.

Every method takes its steps in turn with one engine, so that a world costs one start; two methods are in whole runs.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ase_dist.read_config import override_settings
from ase_dist.registries import BALANCINGS
from ase_dist.training.balancing.balancer import Balancer
from ase_dist.training.ds_config import resolve
from ase_dist.training.loop.components import build
from ase_dist.training.loop.trainer import mean_label_counts, training_loss
from ase_dist.training.process import runtime
from tests.training.conftest import start_world
from tests.training.tiny_runs import ds_config, metric_lines, saved_meta, tiny_run, tiny_settings

pytestmark = pytest.mark.multi_gpu

SHORT = ("train.max_steps=3", "checkpoint.every=2", "data.limit_val=1", "train.deterministic=true")
SHORT += ("model.moe.aux_losses={}",)  # which are of a micro-step each
EP = "model.moe.ep_size=2"
BF16 = "train.bf16=true"
STEPS = 2  # dwa looks back at two
METHODS = [name for name in BALANCINGS if name != "fixed" and all(map(find_spec, BALANCINGS[name].modules))]
SIDES = [(name, "parameters") for name in METHODS] + [("aligned_mtl", "representation")]
# ranks, DeepSpeed's JSON, changes
CASES = {
    "one": (1, "z0", ("train.batch_size=4",)),
    "micro-steps": (1, "z0", ("train.batch_size=1", "train.gradient_accumulation_steps=4")),
    "two": (2, "z1", ("train.batch_size=2",)),
    "two in micro-steps": (2, "z1", ("train.batch_size=1", "train.gradient_accumulation_steps=2")),
    "two, experts shared": (2, "z2", (EP, "model.moe.dispatch=all_to_all", "train.batch_size=2")),
    "four": (4, "z0", ("train.batch_size=1",)),
    "four, experts shared": (4, "z2", (EP, "train.batch_size=1")),
    "one in bf16": (1, "z1", ("train.batch_size=4", BF16)),
    "two in bf16": (2, "z1", ("train.batch_size=2", BF16)),
}


def weights_of_all(scenes, output, config, changes):
    """The weights [steps][t] of each of ``SIDES``, which take their steps one after another with one engine."""
    # plain SGD: Adam's first steps are signs of gradients, so rounding errors would become whole steps
    options = (*SHORT, "train.optimizer=sgd", "train.sgd.momentum=0", "train.lr=0.02", "train.warmup_steps=0", *changes)
    settings = tiny_settings(scenes, output, *options)
    place = runtime.start(timeout=60, threads=1)
    parts = build(resolve(settings, ds_config(config), world=place.size, native_bf16=False), place, beat=lambda _: None)
    found = {}
    for name, on in SIDES:
        tried = {"train.balancing.method": name, "train.balancing.on": on}
        if name == "dwa":
            tried["train.balancing.args"] = {"window": 1}
        balancer = Balancer(override_settings(settings, tried), parts.tasks, parts.engine.module, place.device)
        rows = []
        for step in range(1, STEPS + 1 + (name == "dwa")):
            batches = [next(parts.train_loader) for _ in range(settings.train.gradient_accumulation_steps)]
            counts = mean_label_counts(batches, parts.tasks, place)
            balancer.begin_step(step, batches, counts, beat=lambda doing: None)
            losses = []
            for batch in batches:
                by_task, total = training_loss(parts.engine(batch.images), batch, parts.tasks, counts, balancer)
                parts.engine.backward(total)
                parts.engine.step()
                losses.append({task: loss.detach() for task, loss in by_task.items()})
            rows.append(balancer.weights_t.tolist())
            balancer.end_step(step, losses, epoch_ends=False)
        found[f"{name} on {on}"] = rows
    parts.close()
    return found


def balanced(scenes, output, method, *overrides, config="z0"):
    tiny_run(scenes, output, *SHORT, f"train.balancing.method={method}", *overrides, config=config)


def world(rank, folder):
    """All cases of this many ranks, and the whole runs."""
    size, scenes = torch.distributed.get_world_size(), Path((folder / "scenes").read_text())
    found = {
        name: weights_of_all(scenes, folder / "unused", config, changes)
        for name, (ranks, config, changes) in CASES.items()
        if ranks == size
    }
    if size == 2:
        balanced(scenes, folder / "gradnorm", "gradnorm", EP, "train.batch_size=2", config="z2")
        balanced(scenes, folder / "two_z3", "aligned_mtl", "train.batch_size=2", config="z3")
    else:
        source = folder / "gradnorm" / "checkpoints" / "step_2"
        balanced(scenes, folder / "resumed", "gradnorm", EP, "train.batch_size=1", f"resume={source}")
    return found


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("balancing")
    (folder / "scenes").write_text(str(scenes))
    return folder


@pytest.fixture(scope="module")
def found(scenes, folder):
    """The weights of each case by side, and the runs in ``folder``."""
    together = {}
    for size in (2, 4):
        (folder / "rendezvous").unlink(missing_ok=True)
        ended = start_world(world, folder, size=size, seconds=240)()
        assert ended.codes == [0] * size
        assert all(result == ended.results[0] for result in ended.results), "all ranks have the same weights"
        together |= ended.results[0]
    for name, (ranks, config, changes) in CASES.items():
        if ranks == 1:
            together[name] = weights_of_all(scenes, folder / "unused", config, changes)
    for method, name in (("gradnorm", "one_gradnorm"), ("aligned_mtl", "one")):
        balanced(scenes, folder / name, method)
    return together


@pytest.mark.parametrize("name", CASES)
def test_any_world_has_the_weights_of_one_process(found, name):
    """Sums of float32 in another order differ in the seventh digit, and the steps of all methods carry that on."""
    is_bf16 = BF16 in CASES[name][2]
    off = {}
    for side, rows in found["one in bf16" if is_bf16 else "one"].items():
        wanted, got = torch.tensor(rows), torch.tensor(found[name][side])
        assert wanted[0].sub(wanted[-1]).abs().max() > 1e-4, f"{side}: could not fail"
        off[side] = float((got - wanted).abs().max() / wanted.abs().max())
    limit = 5e-2 if is_bf16 else 2e-4
    assert {side: value for side, value in off.items() if not value < limit} == {}, off


def weights(path):
    return {step: list(line["task_weights"].values()) for step, line in metric_lines(path).items()}


def test_a_run_at_zero_3_and_one_resumed_at_another_world_have_the_weights_of_one_process(found, folder):
    for name, one, steps in (("two_z3", "one", [1, 2, 3]), ("resumed", "one_gradnorm", [3])):
        got, wanted = weights(folder / name), weights(folder / one)
        assert list(got) == steps
        for step in steps:
            torch.testing.assert_close(torch.tensor(got[step]), torch.tensor(wanted[step]), rtol=2e-4, atol=1e-5)
    state = saved_meta(folder / "resumed", 3)["balancing"]["state"]
    assert set(state["weight.steps"].values()) == {3.0}
