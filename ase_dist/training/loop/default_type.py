"""What ``train.bf16: auto`` means for a run: bf16 where the device computes in it itself; on a CPU where it is faster.

A CPU with AVX512-BF16 or AMX is measured once, on rank 0, by a product in both types. With AVX512-BF16 alone it takes
half the time in bf16, with AMX an eighth; the rest of a step gains nothing, so the default run's steps are 1.1 times
faster with the former. Where products gain less than ``ENOUGH``, a step would gain nothing. The product is large and
the same for every model, so that the load of the machine does not decide; narrow models, which gain nothing, stay in
fp32. A run that goes on keeps the type that its checkpoint has.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ase_dist.agreement import on_rank_zero
from ase_dist.config import Settings
from ase_dist.errors import RunError, UserError
from ase_dist.models import build_model
from ase_dist.ops import products
from ase_dist.training.process.runtime import World
from ase_dist.training.state.checkpoint.catalog import list_checkpoints
from ase_dist.training.state.checkpoint.manifest import read_manifest

ENOUGH = 1.5  # times faster, of a product alone
SIDE, REPETITIONS = 1024, 5  # some tens of milliseconds in all
NARROW = 256  # a model whose widest linear has no side that long


class DefaultType(NamedTuple):
    """Whether ``auto`` is bf16, and why, for the start-up table; "" where there is nothing to say."""

    bf16: bool
    why: str


def default_type(settings: Settings, world: World, checkpoints: Path) -> DefaultType:
    """The meaning of ``auto`` on all ranks, as rank 0 finds it (collective where it is asked for).

    ``checkpoints`` is the folder that the run would go on from.
    """
    if settings.train.bf16 != "auto":
        return DefaultType(world.native_bf16, "")
    return on_rank_zero(lambda: _find(settings, world, checkpoints))


def _find(settings: Settings, world: World, checkpoints: Path) -> DefaultType:
    is_cpu = world.device.type == "cpu"
    if not (cpu_has_bf16() if is_cpu else world.native_bf16):
        return DefaultType(False, "")
    before = _recorded(settings.resume, checkpoints)
    if before is not None:
        return DefaultType(before, "as the checkpoint")
    if not is_cpu:
        return DefaultType(True, "")
    widths = _widest_linear(settings)
    if widths is None:
        return DefaultType(False, "")
    if max(widths) < NARROW:
        return DefaultType(False, "the model is narrow")
    times = bf16_times_faster()
    relation = "enough" if times >= ENOUGH else "too little"
    return DefaultType(times >= ENOUGH, f"bf16 products are {times:.1f} times as fast, {relation}")


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def bf16_times_faster() -> float:
    """How many times as fast a product of two square matrices is in bf16, the best of several of each."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    operands = {dtype: torch.ones(SIDE, SIDE, dtype=dtype) for dtype in best}
    for _ in range(REPETITIONS):
        for dtype, square in operands.items():
            began = time.perf_counter()
            products.linear(square, square)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]


def _widest_linear(settings: Settings) -> tuple[int, int] | None:
    """The widths of the largest linear of the model's blocks, from shapes alone; None where it cannot be built."""
    model = settings.model.model_copy(update={"pretrained": "none", "init_from": None})
    settings = settings.model_copy(update={"model": model})
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = build_model(settings, settings.chosen_tasks(), expert_layer="plain")
    except Exception:  # raised again, on all ranks alike, where the model itself is built
        return None
    shapes = [
        (m.in_features, m.out_features) for m in getattr(built, "blocks", built).modules() if isinstance(m, nn.Linear)
    ]
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=None)


def _recorded(resume: str | Path, checkpoints: Path) -> bool | None:
    """The type of the checkpoint that the run goes on from; None without one. What is wrong with it is told later."""
    if resume == "never":
        return None
    try:
        listed = list_checkpoints(checkpoints) if resume == "auto" else None
        if listed is not None and not listed:
            return None
        folder = checkpoints / listed[0].name if listed else Path(resume)
        saved: Any = read_manifest(folder).meta
        found = saved["settings"]["train"]["bf16"]
    except (UserError, RunError, OSError, KeyError, TypeError):
        return None
    return found if isinstance(found, bool) else None
