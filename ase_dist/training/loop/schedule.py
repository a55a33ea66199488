"""The learning rate over a run, as a share of the peak: linear warm-up, then cosine, poly or constant.

``step`` is the number of optimiser steps already taken, as torch's LambdaLR counts it: 0 for the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from ase_dist.config import TrainSettings

Schedule = Literal["cosine", "poly", "constant"]


def learning_rate_factor(
    step: int, *, total: int, warmup: int, schedule: Schedule, min_ratio: float, power: float
) -> float:
    """The share of the peak rate at ``step`` of ``total``; its last value holds for all later steps.

    Warm-up is (step + 1) / warmup, so that the first step already moves and the last of the warm-up is at the peak.
    With p the share of the steps after it that are done, cosine is min_ratio + (1 - min_ratio) (1 + cos(pi p)) / 2
    and poly (1 - p)^power; ``min_ratio`` is the cosine's alone.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "poly":
        return float((1.0 - progress) ** power)
    return 1.0


def schedule_lambda(train: TrainSettings, *, total: int) -> Callable[[int], float]:
    """The function of the step that ``torch.optim.lr_scheduler.LambdaLR`` takes, for a run of ``total`` steps.

    A warm-up longer than the run, as in a short trial of a long run's config, is cut to the run.
    """

    def factor(step: int) -> float:
        return learning_rate_factor(
            step,
            total=total,
            warmup=min(train.warmup_steps, total),
            schedule=train.schedule,
            min_ratio=train.min_lr_ratio,
            power=train.poly.power,
        )

    return factor
