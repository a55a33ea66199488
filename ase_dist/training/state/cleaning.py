"""Frees the disk of runs: checkpoints that need not be kept, and the optimiser's state of runs that are done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.files import is_regular, make_empty, put_in_place, remove, temporary_for, write_atomic
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint.catalog import BEST, LATEST, list_checkpoints, read_pointer
from ase_dist.training.state.checkpoint.manifest import MANIFEST, SUFFIX, make_manifest, read_manifest
from ase_dist.training.state.checkpoint.reader import Checkpoint
from ase_dist.training.state.checkpoint.shards import write_shards

Keep = Literal["best", "last"]
WEIGHTS_ONLY = "weights_only"  # in the meta of a checkpoint without the optimiser's state
WEIGHT = "weight/"  # what the names of weights begin with


class Removal(NamedTuple):
    """A checkpoint of which something goes: the ``whole``, or all but the weights. ``bytes`` are freed."""

    checkpoint: Path
    whole: bool
    bytes: int


def plan_removals(run: RunFolder, *, keep: Keep | None, weights_only: bool) -> list[Removal]:
    """What ``apply_removals`` would remove of a run; nothing is touched.

    Kept are the best checkpoint and the newest whole one, with ``keep`` the one of them (the newest, where none is
    marked as the best). What cannot be read as a checkpoint is left alone. ``weights_only`` also takes the state of the
    optimiser from those that are kept. Raises UserError where ``run`` is no run, and for ``weights_only`` where it is
    not done: it could not go on.
    """
    if not is_regular(run.config):
        raise UserError(f"{str(run.path)!r} is no run, there is no {run.config.name} in it; name the output= of a run")
    if weights_only and run.summary_if_done() is None:
        raise UserError(
            f"--weights-only: the run in {str(run.path)!r} is not done, and without the optimiser's state it could not "
            "go on; finish it, or leave the option out"
        )
    folder = run.checkpoints
    readable = [found for found in list_checkpoints(folder) if found.sequence is not None] if folder.is_dir() else []
    newest = next((found.name for found in readable if found.is_whole), None)
    best = read_pointer(folder, BEST) if readable else None
    kept = {"last": {newest}, "best": {best or newest}, None: {newest, best}}[keep]
    removals = []
    for found in readable if newest is not None else []:
        path = folder / found.name
        if found.name not in kept:
            removals.append(Removal(path, True, sum(file.stat().st_size for file in path.iterdir() if file.is_file())))
        elif weights_only and found.is_whole and not read_manifest(path).meta.get(WEIGHTS_ONLY):
            removals.append(Removal(path, False, _bytes_of_state(path)))
    return removals


def apply_removals(removals: list[Removal]) -> None:
    """Remove them, one after the other; a checkpoint is at any moment whole as before, whole as after, or gone."""
    for removal in removals:
        if removal.whole:
            if read_pointer(removal.checkpoint.parent, BEST) == removal.checkpoint.name:
                (removal.checkpoint.parent / BEST).unlink()
            remove(removal.checkpoint)
        else:
            drop_optimizer(removal.checkpoint)
    for folder in {removal.checkpoint.parent for removal in removals}:
        write_atomic(folder / LATEST, f"{list_checkpoints(folder)[0].name}\n")


def drop_optimizer(path: Path) -> None:
    """Replace a checkpoint by one of its weights alone, from which no run can go on."""
    old, temporary = read_manifest(path), temporary_for(path)
    make_empty(temporary)

    def weights() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for entry in old.files:
            with Checkpoint(path, old.model_copy(update={"files": [entry]})) as one:
                tensors = {name: one.tensor(name) for name in one.names() if name.startswith(WEIGHT)}
            if tensors:
                yield entry.name.removesuffix(SUFFIX), tensors

    written = write_shards(temporary, weights(), patience=0)
    manifest = make_manifest(
        step=old.step,
        sequence=old.sequence,
        world_size=old.world_size,
        versions=old.versions,
        files=[file.entry for file in written],
        meta={**old.meta, WEIGHTS_ONLY: True},
    )
    write_atomic(temporary / MANIFEST, manifest.to_bytes())
    put_in_place(temporary, path)


def _bytes_of_state(path: Path) -> int:
    """Bytes of what is no weight, without the headers of the files."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "BOOL": 1}
    total = 0
    with Checkpoint(path, read_manifest(path)) as checkpoint:
        for name in checkpoint.names():
            if not name.startswith(WEIGHT):
                numel = 1
                for length in checkpoint.shape(name):
                    numel *= length
                total += numel * sizes.get(checkpoint.dtype(name), 4)
    return total
