"""How often the host waits for the device: in a training step for norm and vote, in an evaluation at its end."""

import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ase_dist.data.batch import EvalBatch
from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.evaluation.decode import decode
from ase_dist.evaluation.metrics import build_metric
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS
from ase_dist.training.loop import engine
from ase_dist.training.loop import evaluate as evaluation
from ase_dist.training.loop.trainer import Trainer
from tests.training.conftest import start_world
from tests.training.tiny_runs import tiny_run
from tests.waits import HostWaits

pytestmark = pytest.mark.single_gpu
EVERY_KIND = [PASCAL_TASKS[name] for name in ("semseg", "saliency", "edge", "normals")] + [NYUD_TASKS["depth"]]
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA")
# ZeRO-3 last: DeepSpeed replaces torch's linear by its own for the rest of the process
CASES = {
    "z0": ("z0", "train.bf16=false"),
    "z0 in bf16": ("z0", "train.bf16=true"),
    "z1": ("z1", "train.bf16=false"),
    "z2 in bf16": ("z2", "train.bf16=true"),
    "z2, two micro-steps, unclipped": ("z2", "train.gradient_accumulation_steps=2", "train.gradient_clipping=0"),
    "z3": ("z3", "train.bf16=false"),
    "z3 in bf16": ("z3", "train.bf16=true"),
}


def test_the_counter_counts():
    mask, x = torch.tensor([True, False]), torch.tensor([1.0, 2.0])
    once = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(mask.any()),
        "tolist": x.tolist,
        "cpu": x.cpu,
        "mask": lambda: x[mask],
        "bincount": lambda: torch.bincount(mask.long()),
        "where": lambda: torch.where(mask, x, 0.0),
        "tensor": lambda: torch.tensor([1.0], device=x.device),
    }
    never = {
        "arithmetic": lambda: (x * 2 + 1).clamp(min=0).masked_fill(mask, 7.0),
        "slices": lambda: x[:1] + x[torch.arange(1)],
        "where": lambda: torch.where(mask, x, x.new_zeros(())),
    }
    for expected, actions in ((1, once), (0, never)):
        for name, act in actions.items():
            with HostWaits() as waits:
                act()
            assert waits.total == expected, (name, waits.lines)


def count(rank, folder):
    """The waits of a run's last step by line and its norm, for each case; AdamW as on a GPU: no counter on the host."""
    scenes, step, found = Path((folder / "scenes").read_text()), Trainer._step, {}
    for name, (config, *overrides) in CASES.items():

        def counted(trainer, name=name):
            with HostWaits() as waits:
                step(trainer)
            found[name] = [waits.lines, float(trainer.engine.get_global_grad_norm())]

        with mock.patch.object(engine, "FUSED", ("cpu",)), mock.patch.object(Trainer, "_step", counted):
            short = ("train.max_steps=3", "train.log_every=9", "checkpoint.every=0")
            tiny_run(scenes, folder / name, *short, *overrides, config=config)
    return found


@pytest.fixture(scope="module")
def waits(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("waits")
    (folder / "scenes").write_text(str(scenes))
    codes, results = start_world(count, folder, seconds=240)()
    assert codes == [0]
    return results[0]


@pytest.mark.skipif(
    tuple(map(int, version("deepspeed").split("+")[0].split(".")[:3])) < (0, 19, 8),
    reason="older DeepSpeed decides otherwise, with more waits",
)
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_twice(waits, case):
    lines, _ = waits[case]
    assert sum(lines.values()) == 2, lines
    assert any("finite.py" in line for line in lines), "the vote"


def test_every_stage_has_the_same_norm(waits):
    """DeepSpeed's own at ZeRO 0 in bf16 leaves the experts out."""
    norms = {case: norm for case, (_, norm) in waits.items()}
    assert norms["z1"] == pytest.approx(norms["z0"], rel=1e-4) and norms["z3"] == pytest.approx(norms["z0"], rel=1e-4)
    for case in ("z0 in bf16", "z2 in bf16", "z3 in bf16"):
        assert norms[case] == pytest.approx(norms["z0"], rel=2e-2)


def on_cuda(rank, folder):
    """What CUDA itself reports of the last step; the vote's event, which has arrived by then, is no part of that."""
    scenes, step, found = Path((folder / "scenes").read_text()), Trainer._step, {}
    for name, (config, *overrides) in CASES.items():

        def counted(trainer, name=name):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                step(trainer)
                torch.cuda.set_sync_debug_mode("default")
            found[name] = [str(each.message) for each in caught if "synchroniz" in str(each.message)]

        with mock.patch.object(Trainer, "_step", counted):
            short = ("train.max_steps=3", "train.log_every=9", "checkpoint.every=0")
            tiny_run(scenes, folder / name, *short, *overrides, config=config)
    return found


@with_cuda
def test_cuda_itself_counts_no_more(scenes, tmp_path):
    (tmp_path / "scenes").write_text(str(scenes))
    codes, results = start_world(on_cuda, tmp_path, seconds=240)()
    assert codes == [0] and results[0].keys() == CASES.keys()
    assert {name: found for name, found in results[0].items() if len(found) > 2} == {}


@with_cuda
@pytest.mark.parametrize("task", EVERY_KIND, ids=lambda task: task.kind)
def test_cuda_itself_does_not_wait_for_a_metric(task):
    shape = {"normals": (3,), "depth": (1,)}.get(task.kind, ())
    label = torch.ones(*shape, 20, 30, device="cuda", dtype=torch.float32 if shape else torch.uint8)
    logits, metric = torch.randn(1, task.channels, 8, 8, device="cuda"), build_metric(task)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            metric.update(decode(task, logits, size=(20, 30))[0], label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metric.result()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, on the FakeTensors of a GPU: what wants a value fails, and a copy to or from the host shows


def fake_images(*sizes):
    """A batch of images with labels of their own sizes in page-locked memory, and a model's logits on the GPU."""
    labels = {}
    for task in EVERY_KIND:
        channels = {"normals": (3,), "depth": (1,)}.get(task.kind, ())
        kind = torch.float32 if channels else torch.uint8
        labels[task.name] = [torch.empty(*channels, *size, dtype=kind) for size in sizes]
    logits = {task.name: torch.empty(len(sizes), task.channels, 8, 8, device="cuda") for task in EVERY_KIND}
    indices = torch.empty(len(sizes), dtype=torch.int64)
    return EvalBatch(torch.empty(len(sizes), 3, 16, 16), labels, indices, ["a"] * len(sizes)), logits


def constant_on_the_host(constant, height, width):
    channels = {"normals": (3,), "depth": (1,)}.get(constant.task.kind, ())
    return torch.empty(*channels, height, width, dtype=torch.float32 if channels else torch.uint8)


def test_an_evaluation_waits_for_nothing_until_its_end():
    constants = {task.name: ConstantPredictor(task) for task in EVERY_KIND}
    on_the_host = {"predict": constant_on_the_host, "is_fitted": True}
    with FakeTensorMode(), mock.patch.multiple(ConstantPredictor, **on_the_host):
        batch, logits = fake_images((20, 30), (12, 10))
        waits, seen = HostWaits(), []

        def finished(metrics, device, *, warns):
            seen.append({name: metric.totals.device.type for name, metric in metrics.items()})
            waits.__exit__(None, None, None)
            raise StopIteration

        def forward(images):
            if not seen:  # the constants are on the GPU now
                seen.append(waits.__enter__())
            return SimpleNamespace(predictions=logits)

        with mock.patch.object(evaluation, "_merged", finished), pytest.raises(StopIteration):
            evaluation.evaluate(
                forward,
                [(batch, None), (batch, None)],
                EVERY_KIND,
                device=torch.device("cuda"),
                gallery=evaluation.Gallery(limit=0),
                constants=constants,
                go_on=lambda error: True,
            )
    assert not waits.lines, waits.lines
    assert set(seen[-1].values()) == {"cuda"}


@pytest.mark.parametrize("task", EVERY_KIND, ids=lambda task: task.kind)
def test_a_metric_waits_for_nothing(task):
    with FakeTensorMode():
        batch, logits = fake_images((20, 30))
        label = batch.labels[task.name][0].to("cuda")
        metric = build_metric(task)
        with HostWaits() as waits:
            for _ in range(2):
                metric.update(decode(task, logits[task.name], size=(20, 30))[0], label)
    assert not waits.lines, waits.lines


def test_a_copy_from_the_host_shows_on_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        with HostWaits() as waits:
            torch.where(x > 0, x, 1.0)
            x.cpu()
            torch.empty(3).to("cuda")
        assert waits.total == 3, waits.lines
