"""The learning-rate schedule: its ends, its monotony, and that torch's scheduler follows it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ase_dist.config import TrainSettings
from ase_dist.training.loop.schedule import learning_rate_factor, schedule_lambda

pytestmark = pytest.mark.single_gpu


def factors(schedule: str, *, total: int = 100, warmup: int = 10) -> list[float]:
    return [
        learning_rate_factor(step, total=total, warmup=warmup, schedule=schedule, min_ratio=0.05, power=0.9)  # type: ignore[arg-type]
        for step in range(total + 5)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant"])
def test_warm_up_rises_linearly_from_a_first_step_that_moves(schedule: str) -> None:
    got = factors(schedule)
    assert got[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert got[10] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(got[10:]))


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("cosine", (1 + 0.05) / 2, 0.05), ("poly", 0.5**0.9, 0.0), ("constant", 1.0, 1.0)],
)
def test_decay_passes_its_middle_and_holds_its_end(schedule: str, middle: float, end: float) -> None:
    got = factors(schedule)
    assert got[55] == pytest.approx(middle)
    assert got[100:] == pytest.approx([end] * 5)


def test_no_warm_up_and_a_run_that_is_all_warm_up() -> None:
    assert factors("cosine", warmup=0)[0] == 1.0
    assert factors("cosine", total=4, warmup=4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_equals_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for step in range(20):
        ours = learning_rate_factor(step, total=20, warmup=0, schedule="cosine", min_ratio=0.1, power=1.0)
        assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_torch_scheduler_follows_and_resumes_every_group() -> None:
    settings = TrainSettings(lr=2.0, warmup_steps=3, schedule="poly", poly={"power": 2.0})

    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (2.0, 0.2)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_lambda(settings, total=11))

    optimizer, scheduler = build()
    for step in range(6):
        share = (step + 1) / 3 if step < 3 else (1 - (step - 3) / 8) ** 2
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.0 * share, 0.2 * share])
        optimizer.step()
        scheduler.step()
    _, resumed = build()
    resumed.load_state_dict(scheduler.state_dict())
    resumed.optimizer.step()
    resumed.step()
    assert resumed.get_last_lr()[0] == pytest.approx(2.0 * (1 - 4 / 8) ** 2)


def test_a_warm_up_longer_than_the_run_is_cut_to_the_run() -> None:
    factor = schedule_lambda(TrainSettings(warmup_steps=50), total=5)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
