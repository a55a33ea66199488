"""Open a trained model, from a run's checkpoint or an export, as a plain module on one device. No DeepSpeed."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from timm.layers import resample_abs_pos_embed

from ase_dist.agreement import on_rank_zero, raise_together
from ase_dist.collectives import gather_objects, rank
from ase_dist.config import Settings
from ase_dist.deployment.exported import ExportedModel, load
from ase_dist.errors import UserError
from ase_dist.files import is_regular
from ase_dist.hub import is_hub
from ase_dist.image_size import ImageSize
from ase_dist.models import MultiTaskModel, MultiTaskViT, build_model, fetch_from_hub
from ase_dist.models.export_file import CARD, fetch_export
from ase_dist.models.names import named_tensors, task_order, trained_entries
from ase_dist.read_config import recorded_settings
from ase_dist.tasks import Task
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint import Checkpoint, open_whole
from ase_dist.training.state.checkpoint.catalog import BEST, list_checkpoints, read_pointer
from ase_dist.training.state.compare_settings import compare_settings
from ase_dist.training.state.frozen import FrozenWeights
from ase_dist.training.state.meta import read_meta
from ase_dist.training.state.tensors import difference, load_entry

LOGGER = logging.getLogger("ase_dist")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in eval mode; ``settings`` are the run's, or those of an export's card with its data set.

    ``name`` is what the user has named, of a place on the hub with its commit.
    """

    name: str
    kind: Literal["run", "export"]
    model: MultiTaskModel | ExportedModel
    tasks: tuple[Task, ...]
    settings: Settings
    step: int


def open_trained_model(path: str | Path, *, checkpoint: str = "newest", device: torch.device) -> TrainedModel:
    """The model in the folder of a run or of an export; ``checkpoint`` as for ``choose_checkpoint``, of a run only.

    ``path`` may be an export on the hub, which rank 0 fetches first. Collective. Raises UserError where ``path`` is
    neither a run nor an export, or is damaged.
    """
    if is_hub(path):
        fetched = raise_together(lambda: str(fetch_export(path).pinned) if rank() == 0 else "")
        path = str(gather_objects(fetched)[0])
    name, path = str(path), Path(path)
    config = RunFolder(path).config
    if not is_regular(config):
        if not is_export(path):
            raise UserError(f"{str(path)!r} is neither a run nor an export: it holds no {config.name} and no {CARD}")
        if checkpoint != "newest":
            raise UserError(f"--checkpoint: {str(path)!r} is an export, which holds one model; leave the option out")
        export = load(name, device=device)
        card = export.card
        data = {"name": card.data, "size": card.image.size, "description": card.description, "sets": card.sets}
        tree = {"data": data, "tasks": [task.name for task in card.tasks]}
        chosen = Settings.model_validate(tree).model_copy(update={"model": card.model})
        return TrainedModel(name, "export", export, export.tasks, chosen, card.step)
    settings = read_run(path)
    tasks = settings.chosen_tasks()
    with choose_checkpoint(path, checkpoint) as found:
        model = rebuild(settings, tasks, found).requires_grad_(False).to(device).eval()
        return TrainedModel(name, "run", model, tasks, settings, found.step)


def at_size(trained: TrainedModel, size: ImageSize) -> TrainedModel:
    """The same weights in a model for images of ``size``; a position embedding is resampled by timm's rule.

    Raises UserError where the backbone takes no images of that size, or has other weights that depend on it.
    """
    old = trained.model.model if isinstance(trained.model, ExportedModel) else trained.model
    plain = {"pretrained": "none", "init_from": None, "checkpoint_activations": "none"}
    settings = trained.settings.model_copy(
        update={
            "model": trained.settings.model.model_copy(update=plain),
            "data": trained.settings.data.model_copy(update={"size": size}),
        }
    )
    new = build_model(settings, trained.tasks, expert_layer="plain")
    stored = named_tensors(old)
    for name, tensor in named_tensors(new).items():
        value = stored[name].to(tensor.device)
        if name == "stem.pos_embed":
            assert isinstance(new, MultiTaskViT) and isinstance(old, MultiTaskViT)
            grids = [[int(side) for side in model.stem.patch_embed.grid_size] for model in (new, old)]
            prefix = tensor.shape[1] - math.prod(grids[0])  # timm's no_embed_class leaves them out
            value = resample_abs_pos_embed(value, *grids, num_prefix_tokens=prefix)
        if value.shape != tensor.shape:
            raise UserError(
                f"data.size: got {size} for a model trained at {trained.settings.data.size}, whose {name} is of that "
                "size; leave it out"
            )
        tensor.copy_(value)
    LOGGER.info("trained at %s, evaluated at %s", trained.settings.data.size, size)
    device = next(old.parameters()).device
    return replace(trained, model=new.requires_grad_(False).to(device).eval(), settings=settings)


def is_export(path: Path) -> bool:
    """Whether ``path`` looks like the folder of an export, or is on the hub, where runs are not."""
    return is_hub(path) or is_regular(path / CARD)


def read_run(run: Path) -> Settings:
    """The settings of a run, from its folder."""
    config = RunFolder(run).config
    if not is_regular(config):
        raise UserError(f"{str(run)!r} is no run, there is no {config.name} in it; name the output= of a run")
    return recorded_settings(config)


def choose_checkpoint(run: Path, wanted: str) -> Checkpoint:
    """The checkpoint 'newest', 'best', 'step_N' of the run, or that at a path; its files are open.

    'newest' skips damaged ones with a warning. Raises UserError where there is none of that name or it is damaged.

    Collective: rank 0 says which ones there are, so that all ranks read the same one while the run goes on. Where it
    deletes them meanwhile they are looked up again.
    """
    folder = RunFolder(run).checkpoints

    def look_up() -> tuple[list[str], list[Path]]:
        """The names that there are, by step, and the paths to try."""
        listed = list_checkpoints(folder) if folder.is_dir() else []
        names = [found.name for found in sorted(listed, key=lambda found: found.step)]
        if wanted == "newest":
            paths = [folder / found.name for found in listed]
        elif wanted == "best":
            best = read_pointer(folder, BEST) if names else None
            paths = [] if best is None else [folder / best]
        elif wanted in names:
            paths = [folder / wanted]
        else:
            paths = [Path(wanted)] if Path(wanted).is_dir() else []
        return names, paths

    names, paths = on_rank_zero(look_up)
    before: list[Path] = []
    while paths and paths != before:
        for path in paths:
            checkpoint, problems = open_whole(path)
            if checkpoint is not None:
                return checkpoint
            if rank() == 0:
                LOGGER.warning("checkpoint %s is damaged or gone and is passed over: %s", path, "; ".join(problems))
        before = paths
        names, paths = on_rank_zero(look_up)
    if paths:
        raise UserError(f"{str(paths[-1])!r} is not a whole checkpoint ({problems[0]}); name another")
    there = ", ".join(names) or "none at all"
    raise UserError(
        f"--checkpoint: got {wanted!r}, no such checkpoint; {str(folder)!r} holds {there}; give one of these, newest, "
        "best or a path"
    )


def rebuild(settings: Settings, tasks: tuple[Task, ...], checkpoint: Checkpoint) -> MultiTaskModel:
    """The plain model with the checkpoint's weights, in the order of ``tasks``, which may differ from the checkpoint's.

    Raises UserError unless model settings, backbone and tensors are the checkpoint's own.
    """
    meta = read_meta(checkpoint)
    names, saved_names = [task.name for task in tasks], meta.task_names()
    differences = compare_settings(meta.settings, settings, tasks=names, saved_tasks=saved_names)
    other = ", ".join(clause for key, clause in differences.refused.items() if key.startswith(("model.", "tasks")))
    if not other:
        plain = settings.model.model_copy(update={"checkpoint_activations": "none"})
        model = build_model(fetch_from_hub(settings.model_copy(update={"model": plain})), tasks, expert_layer="plain")
        likeness = FrozenWeights.of(model, settings.model.backbone).compare(meta.frozen_weights())
        if likeness == "other":
            raise UserError(
                f"the frozen backbone {settings.model.backbone} that the settings give now is not the one of "
                f"{checkpoint.path}; see that model.pretrained={settings.model.pretrained} names the same file as then"
                f"{meta.why_not_rounded()}"
            )
        if likeness == "rounded":
            LOGGER.info("the frozen weights are rounded otherwise than in the run, by another processor or torch")
        entries, order = trained_entries(model), task_order(names, saved_names)
        other = difference(checkpoint, entries, order=order, kinds=("weight",))
    if other:
        raise UserError(f"{checkpoint.path} is not of the model in config.yaml: {other}; name another checkpoint")
    with torch.no_grad():
        for entry in entries:
            value = load_entry(checkpoint, entry, "weight", order=order)
            if not value.isfinite().all():
                raise UserError(f"{checkpoint.path}: {entry.path!r} is not finite; name another checkpoint")
            entry.tensor.copy_(value)
    return model
