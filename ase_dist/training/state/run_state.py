"""Everything that a resumed run needs, in a checkpoint: weights, moments, random states, sampler, schedule.

A checkpoint of any world size, expert-parallel size and ZeRO stage is loaded at any other: tensors have global names
(``models/names.py``), and ``moe/deepspeed_compat.py`` reads and writes what ZeRO has divided. On the same topology a
resumed run goes on bit for bit, on a CPU as it is, on accelerators with ``train.deterministic`` (there some sums are
added up in another order in every run otherwise). One group of tensors is in memory at a time.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ase_dist import collectives
from ase_dist.agreement import raise_together
from ase_dist.config import Settings
from ase_dist.data.loader import TrainLoader
from ase_dist.errors import UserError, describe
from ase_dist.evaluation.scores import tolerances
from ase_dist.models.names import Entry, task_order, trained_entries
from ase_dist.moe import deepspeed_compat
from ase_dist.tasks import Task
from ase_dist.training.balancing.balancer import Balancer
from ase_dist.training.loop.evaluate import Results
from ase_dist.training.process.runtime import World
from ase_dist.training.state.checkpoint import Checkpoint, CheckpointStore
from ase_dist.training.state.compare_settings import compare_settings
from ase_dist.training.state.frozen import FrozenWeights
from ase_dist.training.state.history import NEVER, History
from ase_dist.training.state.meta import RunMeta, frozen_to_meta, read_meta
from ase_dist.training.state.tensors import difference, load_entry, saved_kinds

LOGGER = logging.getLogger("ase_dist")
WEIGHT_FILES = ("model.pretrained", "model.init_from")  # settings that say where the frozen weights are from


class RunState:
    """Saves and restores a run through ``store``.

    ``step`` is the number of optimiser steps done, ``history`` their results, ``is_saved`` whether a checkpoint
    holds both. ``changes`` says what differs from the checkpoint that the run goes on from, as "train.lr 0.1 -> 0.2".
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        store: CheckpointStore,
        *,
        zero_stage: int,
        frozen: FrozenWeights,
        balancer: Balancer,
    ) -> None:
        self.settings, self.world, self.store = settings, world, store
        self.zero_stage, self.frozen, self.balancer = zero_stage, frozen, balancer
        self.step, self.history, self.is_saved = 0, History(), False
        self.changes: list[str] = []
        self._saved_step = NEVER  # whose weights and random states are in the store, if not its latest history

    def advance(self, *, images: int) -> None:
        """Count one more step, over ``images`` on all ranks."""
        self.step += 1
        self.history.images += images
        self.is_saved = False

    def add_results(self, results: Results, tasks: Sequence[Task]) -> None:
        """Add the results of an evaluation at this step."""
        self.history.add(self.step, results, tasks)
        self.is_saved = False

    def save(self, engine: Any, loader: TrainLoader) -> None:
        """Write a checkpoint of this step (collective). Raises SaveError; the checkpoints before it stay.

        Where this step was saved before its evaluation, only the history in that checkpoint's manifest is rewritten.
        """
        if self._saved_step == self.step:
            self.store.update_meta(self.step, {"history": self.history.to_meta()})
            self._mark_best()
            self.is_saved = True
            return
        meta = {
            "settings": self.settings.model_dump(mode="json"),
            "tasks": list(engine.module.task_names),
            **frozen_to_meta(self.frozen),
            "labelled_images": loader.dataset.labelled_images(),
            "topology": {
                "world": self.world.size,
                "ep_size": self.settings.model.moe.ep_size,
                "zero_stage": self.zero_stage,
            },
            "sampler": loader.state_dict(),
            "optimizer_steps": engine.global_steps - engine.skipped_steps,
            "history": self.history.to_meta(),
            "engine": {name: getattr(engine, name) for name in deepspeed_compat.COUNTERS},
            "schedule": {"last_epoch": engine.lr_scheduler.last_epoch},
            "device": deepspeed_compat.device_kind(),
            "tolerances": tolerances(self.settings.chosen_tasks()),
            "balancing": self.balancer.to_meta(),
        }
        path = self.store.save(self.step, self._shards(engine), meta=meta)
        self._mark_best()
        self._saved_step, self.is_saved = self.step, True
        LOGGER.info("saved step %d to %s", self.step, path)

    def resume(self, engine: Any, loader: TrainLoader, *, total_steps: int) -> bool:
        """Continue from the checkpoint that ``settings.resume`` names; False where there is none (collective).

        Settings that differ from the checkpoint's are refused or listed in the log (``config.ON_RESUME``). Raises
        UserError where they are refused, where the checkpoint holds other tensors than the model trains, and where it
        is of a step beyond ``total_steps``.
        """
        checkpoint = self.store.find(self.settings.resume)
        if checkpoint is None:
            return False
        with checkpoint:
            meta = read_meta(checkpoint)
            self._check(checkpoint, meta, engine, total_steps=total_steps)
            self._load(checkpoint, meta, engine, loader)
        self._mark_best()
        LOGGER.info("resumed at step %d from %s", self.step, checkpoint.path)
        return True

    def _mark_best(self) -> None:
        """Let ``best`` name the best step of this history: a run resumed from an earlier step may have changed it."""
        best = self.history.best_step
        self.store.mark_best(best if self.store.holds(best) else None)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def _shards(self, engine: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """This rank's files, a group of parameters each; reading them is collective, in the same order on all ranks."""
        groups = groupby(trained_entries(engine.module), key=_group_name)
        for number, (group, entries) in enumerate(groups):
            yield from self._group_files(engine, group, list(entries), number)
        yield f"random_{self.world.rank}", _random_state()

    def _group_files(
        self, engine: Any, group: str, entries: list[Entry], number: int
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """A separate generator, so that the tensors of this group are freed before the next one is read."""
        dense: dict[str, Tensor] = {}
        sharded: dict[str, Tensor] = {}
        for entry in entries:
            for kind in saved_kinds(engine):
                full = deepspeed_compat.read_master(engine, entry.tensor, kind).cpu()
                # the first replica of an expert writes it; the ranks write all other groups in turn
                is_first_replica = self.world.rank < self.settings.model.moe.ep_size
                is_next = number % self.world.size == self.world.rank
                if is_first_replica if entry.is_sharded else is_next:
                    target = sharded if entry.is_sharded else dense
                    target |= {f"{kind}/{name}": part for name, part in entry.split(full).items()}
        if dense:
            yield group, dense
        if sharded:
            yield f"{group}.{sorted(sharded)[0].rsplit('.', 1)[-1]}", sharded

    # -----------------------------------------------------------------------------------------------------------------
    # Loading

    def _check(self, checkpoint: Checkpoint, meta: RunMeta, engine: Any, *, total_steps: int) -> None:
        """Raise UserError unless this run can go on from the checkpoint; log which settings differ."""
        path = checkpoint.path
        if meta.weights_only:
            raise UserError(
                f"resume: {path} holds weights alone, the optimiser's state was removed; export it and start another "
                "run with model.init_from=EXPORT and output=FOLDER"
            )
        differences = compare_settings(
            meta.settings, self.settings, tasks=engine.module.task_names, saved_tasks=meta.task_names()
        )
        if differences.refused:
            plural = "s" if len(differences.refused) > 1 else ""
            raise UserError(
                f"resume: {path} is of another run: {differences.why_refused}; use the run's own "
                f"value{plural}, or start afresh with another output="
            )
        if checkpoint.step > total_steps:
            raise UserError(
                f"resume: {path} is of step {checkpoint.step}, beyond the end of this run at step {total_steps}; give "
                "more train.max_steps or train.epochs, or name an earlier checkpoint with resume=PATH"
            )
        other = difference(
            checkpoint,
            trained_entries(engine.module),
            order=self._task_order(meta, engine),
            kinds=saved_kinds(engine),
        )
        if other:
            raise UserError(
                f"resume: {path} holds another model: {other}; no setting of the model differs, so the classes of the "
                "data set, an extension's head or another version of timm or ase_dist make the difference: use those "
                "of the run, or start afresh with another output="
            )
        likeness = self.frozen.compare(meta.frozen_weights())
        if likeness == "other":
            weights = {key: clause for key, clause in differences.listed.items() if key in WEIGHT_FILES}
            model = self.settings.model
            source = "model.init_from" if model.init_from else "model.pretrained"
            why = ", ".join(weights.values()) or f"{source} {(model.init_from or model.pretrained)!r} gives others now"
            raise UserError(
                f"resume: {path} was trained on other frozen weights: {why}; use those of the run, or start afresh "
                f"with another output={meta.why_not_rounded()}"
            )
        self.changes = list(differences.listed.values())
        if likeness == "rounded":
            self.changes.append("the rounding of the frozen weights (by another processor or torch)")
        if meta.topology.world != self.world.size:
            self.changes.append(f"ranks {meta.topology.world} -> {self.world.size}")
        if meta.topology.zero_stage != self.zero_stage:
            self.changes.append(f"ZeRO stage {meta.topology.zero_stage} -> {self.zero_stage}")
        if self.changes:
            LOGGER.info("changed since step %d: %s", checkpoint.step, ", ".join(self.changes))

    @staticmethod
    def _task_order(meta: RunMeta, engine: Any) -> list[int]:
        return task_order(engine.module.task_names, meta.task_names())

    def _load(self, checkpoint: Checkpoint, meta: RunMeta, engine: Any, loader: TrainLoader) -> None:
        order = self._task_order(meta, engine)
        damaged = ""
        for entry in trained_entries(engine.module):
            for kind in saved_kinds(engine):
                value = load_entry(checkpoint, entry, kind, order=order)
                if not damaged and not value.isfinite().all():
                    damaged = f"{kind}/{entry.path}"
                value = value.to(entry.tensor.device)
                deepspeed_compat.write_master(engine, entry.tensor, kind, value, step=meta.optimizer_steps)

        def refuse_damaged() -> None:
            if damaged:
                raise UserError(f"resume: {checkpoint.path}: {damaged!r} is not finite; name an earlier checkpoint")

        raise_together(refuse_damaged)  # after the loop, which is collective: of experts each rank reads its own
        loader.load_state_dict(meta.sampler)
        self.balancer.load_meta(meta.balancing)
        deepspeed_compat.restore_counters(engine, meta.engine, last_epoch=meta.schedule.last_epoch)
        self.step, self.history, self.is_saved = checkpoint.step, History.from_meta(meta.history), True
        is_ours = checkpoint.path.resolve().parent == self.store.folder.resolve()  # else another run's: resume=PATH
        self._saved_step = self.step if is_ours else NEVER
        if meta.topology.world == self.world.size:
            raise_together(lambda: _restore_random_state(checkpoint, device=meta.device))


def _group_name(entry: Entry) -> str:
    """The file that a parameter is saved in: that of its block or head."""
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


def _restore_random_state(checkpoint: Checkpoint, *, device: str | None) -> None:
    """Set the generators of this rank; that of an accelerator only from the same kind of ``device``."""
    try:
        _set_random_state(checkpoint, device=device)
    except UserError:
        raise
    except Exception as error:  # what torch, NumPy and Python raise for states of another form
        raise UserError(
            f"resume: {checkpoint.path}: the random states in it are none ({describe(error)}); use another"
        ) from None


def _set_random_state(checkpoint: Checkpoint, *, device: str | None) -> None:
    names = _random_names(collectives.rank())
    torch_state, keys, position, python, device_state = (checkpoint.tensor(name) for name in names)
    torch.set_rng_state(torch_state)
    where, has_gauss, cached = position.tolist()
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), int(where), int(has_gauss), cached))
    version, *internal = (int(value) for value in python[:-1].tolist())
    gauss = python[-1].item()
    random.setstate((version, tuple(internal), None if math.isnan(gauss) else gauss))
    if device is None:  # older checkpoints do not name it, but the state of a CPU's device is empty
        device = "cuda" if len(device_state) else "cpu"
    if device == deepspeed_compat.device_kind():
        deepspeed_compat.restore_device_random_state(device_state)
    else:
        LOGGER.info("the random state of the device is not restored: saved on %s", device)
