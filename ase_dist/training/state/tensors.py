"""Compares the tensors of a checkpoint with those of a model, and reads one in the task order of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ase_dist import collectives
from ase_dist.models.names import Entry
from ase_dist.moe import deepspeed_compat
from ase_dist.training.state.checkpoint import Checkpoint


def saved_kinds(engine: Any) -> tuple[str, ...]:
    """What a checkpoint holds of each trained parameter: its weight and the moments of the engine's optimiser."""
    return ("weight", *deepspeed_compat.moments(engine))


def load_entry(checkpoint: Checkpoint, entry: Entry, kind: str, *, order: Sequence[int]) -> Tensor:
    """The full tensor of ``entry``, its weight or one of its moments, in the task order of the model.

    ``order`` gives for each task of the model its number in the checkpoint (``names.task_order``).
    """
    parts = [checkpoint.tensor(f"{kind}/{name}") for name in entry.names_of(order)]
    return entry.reordered(entry.join(parts), order)


def difference(checkpoint: Checkpoint, entries: Sequence[Entry], *, order: Sequence[int], kinds: Sequence[str]) -> str:
    """A clause that says how the checkpoint's tensors differ from the model's, "" where they agree. Collective.

    Compared are the tensors of ``kinds``, in float32. A rank knows the names of all ranks' experts and compares the
    whole model, so that the ranks exchange only the clause.
    """
    wanted = {
        f"{kind}/{name}": ("F32", entry.part_shape)
        for entry in entries
        for kind in kinds
        for name in (entry.all_names if entry.is_stacked else entry.names_of(order))
    }
    found = {
        name: (checkpoint.dtype(name), checkpoint.shape(name))
        for name in checkpoint.names()
        if name.partition("/")[0] in kinds
    }
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    problem = ""
    if odd:
        problem = (
            f"{len(odd)} tensors differ, the first, {odd[0]!r}, is {_shown(found.get(odd[0]))} there and "
            f"{_shown(wanted.get(odd[0]))} here"
        )
    return next((str(other) for other in collectives.gather_objects(problem) if other), "")


def _shown(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    if tensor is None:
        return "missing"
    dtype, shape = tensor
    size = " x ".join(map(str, shape)) or "a number"
    return size if dtype == "F32" else f"{size} of type {dtype}"
