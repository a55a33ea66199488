"""How often the host waits for the device in a training step: for the gradient norm and for the vote."""

from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch

from ase_dist.training.loop import engine
from ase_dist.training.loop.trainer import Trainer
from tests.training.conftest import start_world
from tests.training.tiny_runs import tiny_run
from tests.waits import HostWaits

pytestmark = pytest.mark.single_gpu
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
    """The waits of a run's last step by line, for each case; AdamW as on a GPU, whose counters are not the host's."""
    scenes, step, found = Path((folder / "scenes").read_text()), Trainer._step, {}
    for name, (config, *overrides) in CASES.items():

        def counted(trainer, name=name):
            with HostWaits() as waits:
                step(trainer)
            found[name] = waits.lines

        with mock.patch.object(engine, "FUSED", ("cpu",)), mock.patch.object(Trainer, "_step", counted):
            short = ("train.max_steps=3", "train.log_every=9", "checkpoint.every=0", "eval.pictures=0")
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
    assert sum(waits[case].values()) == 2, waits[case]
    assert any("finite.py" in line for line in waits[case]), "the vote"
