"""All that a resumed run needs: weights, moments, random states, sampler, schedule, in a portable checkpoint.

Saved at any world size, expert-parallel size and ZeRO stage, loaded at any other: tensors stand under global names
(``named_state``), and the DeepSpeed seam reads and writes what ZeRO has divided. On the same topology a resumed run
goes on bit for bit. One group of tensors is in memory at a time.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ase_dist import collectives
from ase_dist.config import Settings, settings_hash
from ase_dist.data.loader import TrainLoader
from ase_dist.errors import UserError
from ase_dist.models.names_of_trained import Entry, trained_entries
from ase_dist.moe import deepspeed_compat
from ase_dist.tasks import Task
from ase_dist.training.loop.evaluate import Results
from ase_dist.training.process.runtime import World
from ase_dist.training.state.checkpoint import Checkpoint, CheckpointStore
from ase_dist.training.state.history import NEVER, History

LOGGER = logging.getLogger("ase_dist")
KINDS = ("weight", *deepspeed_compat.MOMENTS)


class RunState:
    """Saves and restores a run through ``store``.

    ``step`` is the number of optimiser steps done, ``history`` what they brought, ``is_saved`` whether a checkpoint
    holds both.
    """

    def __init__(
        self, settings: Settings, world: World, store: CheckpointStore, *, zero_stage: int, backbone: Mapping[str, Any]
    ) -> None:
        self.settings, self.world, self.store = settings, world, store
        self.zero_stage, self.backbone = zero_stage, dict(backbone)
        self.step, self.history, self.is_saved = 0, History(), False
        self._saved_step = NEVER  # whose weights and random states are in the store, if not its latest history

    def advance(self, *, images: int) -> None:
        """One more step is done, over ``images`` on all ranks."""
        self.step += 1
        self.history.images += images
        self.is_saved = False

    def add_results(self, results: Results, tasks: Sequence[Task]) -> None:
        """This step was evaluated."""
        self.history.add(self.step, results, tasks)
        self.is_saved = False

    def save(self, engine: Any, loader: TrainLoader) -> None:
        """Write a checkpoint of this step (collective). Raises SaveError; the checkpoints before it stay.

        Of a step that was evaluated after it was saved only the history is written again, into its manifest.
        """
        if self._saved_step == self.step:
            self.store.update_meta(self.step, {"history": self.history.to_meta()})
            self._mark_best()
            self.is_saved = True
            return
        meta = {
            "settings_hash": settings_hash(self.settings),
            "settings": self.settings.model_dump(mode="json"),
            "backbone": self.backbone,
            "topology": self._topology(),
            "sampler": loader.state_dict(),
            "optimizer_steps": engine.global_steps - engine.skipped_steps,
            "history": self.history.to_meta(),
            "engine": {name: getattr(engine, name) for name in deepspeed_compat.COUNTERS},
            "schedule": {"last_epoch": engine.lr_scheduler.last_epoch},
        }
        path = self.store.save(self.step, self._shards(engine), meta=meta)
        self._mark_best()
        self._saved_step, self.is_saved = self.step, True
        LOGGER.info("saved step %d to %s", self.step, path)

    def resume(self, engine: Any, loader: TrainLoader) -> bool:
        """Continue from what ``settings.resume`` names; whether there was a checkpoint (collective).

        Raises UserError where the checkpoint holds other tensors than the model trains.
        """
        checkpoint = self.store.find(self.settings.resume)
        if checkpoint is None:
            return False
        with checkpoint:
            self._load(checkpoint, engine, loader)
        self._mark_best()
        LOGGER.info("resumed at step %d from %s", self.step, checkpoint.path)
        return True

    def _mark_best(self) -> None:
        """Let ``best`` name what this history found best: a run that went back may have written over another's."""
        best = self.history.best_step
        self.store.mark_best(best if self.store.holds(best) else None)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def _topology(self) -> dict[str, int]:
        return {"world": self.world.size, "ep_size": self.settings.model.moe.ep_size, "zero_stage": self.zero_stage}

    def _shards(self, engine: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """This rank's files, a group of parameters each; reading them is collective, in the same order on all ranks."""
        groups = groupby(trained_entries(engine.module), key=_group_name)
        for number, (group, entries) in enumerate(groups):
            yield from self._group_files(engine, group, list(entries), number)
        yield f"random_{self.world.rank}", _random_state()

    def _group_files(
        self, engine: Any, group: str, entries: list[Entry], number: int
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """A generator of its own, so that nothing of this group is alive when the next one is read."""
        dense: dict[str, Tensor] = {}
        sharded: dict[str, Tensor] = {}
        for entry in entries:
            for kind in KINDS:
                full = deepspeed_compat.read_master(engine, entry.parameter, kind).cpu()
                if self._writes(entry, number):
                    target = sharded if entry.is_sharded else dense
                    target |= {f"{kind}/{name}": part for name, part in entry.split(full).items()}
        if dense:
            yield group, dense
        if sharded:
            yield f"{group}.{sorted(sharded)[0].rsplit('.', 1)[-1]}", sharded

    def _writes(self, entry: Entry, number: int) -> bool:
        """Replicated tensors are written by one rank, in turn by group; sharded ones by the first replica."""
        if entry.is_sharded:
            return self.world.rank < self.settings.model.moe.ep_size
        return number % self.world.size == self.world.rank

    # -----------------------------------------------------------------------------------------------------------------
    # Loading

    def _load(self, checkpoint: Checkpoint, engine: Any, loader: TrainLoader) -> None:
        meta: Mapping[str, Any] = checkpoint.meta
        entries = trained_entries(engine.module)
        self._check_tensors(checkpoint, entries)
        if meta["backbone"] != self.backbone:
            raise UserError(
                f"resume: {checkpoint.path} was trained on the backbone {meta['backbone']}, this run has "
                f"{self.backbone}; use the same model.backbone and model.pretrained"
            )
        for entry in entries:
            for kind in KINDS:
                parts = {name: checkpoint.tensor(f"{kind}/{name}") for name in entry.names}
                value = entry.join(parts).to(entry.parameter.device)
                deepspeed_compat.write_master(engine, entry.parameter, kind, value, step=meta["optimizer_steps"])
        loader.load_state_dict(meta["sampler"])
        deepspeed_compat.restore_counters(engine, meta["engine"], last_epoch=meta["schedule"]["last_epoch"])
        self.step, self.history, self.is_saved = checkpoint.step, History.from_meta(meta["history"]), True
        is_ours = checkpoint.path.resolve().parent == self.store.folder.resolve()  # else another run's: resume=PATH
        self._saved_step = self.step if is_ours else NEVER
        if meta["topology"]["world"] == self.world.size:
            _restore_random_state({n: checkpoint.tensor(n) for n in _random_names(self.world.rank)})

    def _check_tensors(self, checkpoint: Checkpoint, entries: list[Entry]) -> None:
        """Raise UserError on all ranks unless names and shapes are those of the whole model (collective)."""
        mine = {f"{kind}/{name}": entry.part_shape for entry in entries for name in entry.names for kind in KINDS}
        saved = {name: checkpoint.shape(name) for name in checkpoint.names() if not name.startswith("random/")}
        wanted: dict[str, tuple[int, ...]] = {}
        for shapes in collectives.gather_objects(mine):
            wanted |= shapes  # type: ignore[call-overload]
        odd = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        if odd:
            first = odd[0]
            raise UserError(
                f"resume: {checkpoint.path} holds another model: {len(odd)} tensors differ, the first, {first!r}, is "
                f"{_shape(saved.get(first))} there and {_shape(wanted.get(first))} here; use the run's own settings, "
                "or start afresh with another output="
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


def _group_name(entry: Entry) -> str:
    """The file that a parameter goes into: its block, or its head."""
    return ".".join(entry.path.split(".")[:2])


def _random_names(rank: int) -> list[str]:
    return [f"random/{rank}/{name}" for name in ("torch", "numpy", "numpy_position", "python", "device")]


def _random_state() -> dict[str, Tensor]:
    """The generators of Python, NumPy, torch and the accelerator as tensors."""
    rank = collectives.rank()
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    python = torch.tensor([version, *internal], dtype=torch.int64)
    values = [
        torch.get_rng_state(),
        torch.from_numpy(np.array(keys, dtype=np.int64)),
        torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        torch.cat([python.double(), torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64)]),
        deepspeed_compat.device_random_state(),
    ]
    return dict(zip(_random_names(rank), values, strict=True))


def _restore_random_state(state: Mapping[str, Tensor]) -> None:
    torch_state, keys, position, python, device = state.values()
    torch.set_rng_state(torch_state)
    where, has_gauss, cached = position.tolist()
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), int(where), int(has_gauss), cached))
    version, *internal = (int(value) for value in python[:-1].tolist())
    gauss = python[-1].item()
    random.setstate((version, tuple(internal), None if math.isnan(gauss) else gauss))
    deepspeed_compat.restore_device_random_state(device)
