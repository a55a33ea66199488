"""Which levels of a backbone the heads read (blocks of a ViT, stages of a Swin), and the heads built on them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ase_dist.config import ModelSettings, Settings
from ase_dist.errors import UserError, did_you_mean
from ase_dist.models.heads import Head, Level
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.registries import HEADS
from ase_dist.tasks import Task

FIXED = ("dim", "levels", "channels", "grid", "patch", "width", "args", "kwargs")  # what a head is given by us


def reads_levels(name: str) -> int:
    """How many levels the head ``name`` of the registry asks for; 0 for one that gets the last level alone."""
    factory = HEADS[name]
    factory = getattr(factory, "func", factory)  # of a functools.partial
    return int(getattr(factory, "num_levels", 0))


def chosen_levels(chosen: ModelSettings, count: int, *, unit: str) -> tuple[int, ...]:
    """The numbers of the levels that the heads of ``chosen`` read, from 1 to ``count``, ascending and with the last.

    ``model.levels``; where that is null as many as the head asks for, at equal distances: of 12 blocks 3, 6, 9 and 12
    (DPT, arXiv 2103.13413). A backbone with fewer levels gives some of them twice. ``unit`` is what the backbone calls
    its levels, in the plural. Raises UserError for levels that there are not, or that the head does not read.
    """
    wanted, given = reads_levels(chosen.head), chosen.levels
    if given is None:
        return spread(count, wanted or 1)
    if not wanted:
        several = [name for name in HEADS if reads_levels(name)]
        raise UserError(
            f"model.levels: got {list(given)}, but the head {chosen.head!r} reads the last level alone; leave it out, "
            f"or take one of {several}"
        )
    if list(given) != sorted(given) or given[0] < 1 or given[-1] != count:
        raise UserError(
            f"model.levels: got {list(given)}, wanted ascending numbers of {unit} of {chosen.backbone}, counted from "
            f"1, the last one, {count}, among them, such as {list(spread(count, len(given)))}"
        )
    return given


def spread(count: int, wanted: int) -> tuple[int, ...]:
    """``wanted`` numbers up to ``count`` at equal distances, rounded up."""
    return tuple(-(-count * i // wanted) for i in range(1, wanted + 1))


def build_heads(settings: Settings, tasks: Sequence[Task], levels: Sequence[Level]) -> dict[str, Head]:
    """A head per task on ``levels``, those of ``chosen_levels``; a head that reads the last alone gets that.

    Raises UserError for a task whose name a module cannot have, and for a key of ``model.head_args`` that it does not
    take.
    """
    chosen, last = settings.model, levels[-1]
    factory = HEADS[chosen.head]
    _check_args(chosen.head, factory, chosen.head_args)
    heads = {}
    for task in tasks:
        if hasattr(nn.ModuleDict, task.name):  # torch takes no module of such a name
            raise UserError(f"tasks: got the name {task.name!r}, a word of torch's; give the task another name")
        with seeded_initialisation(settings.seed, "heads", task.name):
            if reads_levels(chosen.head):
                head = factory(levels, task.channels, width=chosen.head_width, **chosen.head_args)
            else:
                place = {"grid": last.grid, "patch": last.stride, "width": chosen.head_width}
                head = factory(last.width, task.channels, **place, **chosen.head_args)
        heads[task.name] = head
    return heads


def _check_args(name: str, factory: Any, args: Mapping[str, Any]) -> None:
    """UserError for a key that the head does not take."""
    parameters = inspect.signature(factory).parameters.values()
    known = [p.name for p in parameters if p.name not in FIXED]
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for key in args:
        if key in FIXED or (key not in known and not free):
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise UserError(f"model.head_args: got {key!r}, but the head {name!r} {takes}{did_you_mean(key, known)}")
