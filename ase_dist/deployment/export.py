"""Export the model of a run, and check that it has the scores of the run's own evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors.torch import save_file

from ase_dist import imagenet
from ase_dist.config import Settings
from ase_dist.cores import share_of_cores
from ase_dist.data.loader import build_eval_loader
from ase_dist.deployment.exported import load
from ase_dist.deployment.trained_model import choose_checkpoint, read_run, rebuild
from ase_dist.errors import RunError, UserError, describe, did_you_mean, file_error
from ase_dist.evaluation.metrics import EdgeOds
from ase_dist.evaluation.scores import headline, score_of
from ase_dist.files import (
    discard,
    fsync,
    make_empty,
    put_in_place,
    require_room,
    sha256_of,
    temporary_for,
    write_atomic,
)
from ase_dist.models import MultiTaskModel
from ase_dist.models.export_file import CARD, DTYPES, WEIGHTS, Card, ImageFacts, format_version
from ase_dist.models.names import named_tensors
from ase_dist.tasks import Task
from ase_dist.training.loop.evaluate import Gallery, Results, evaluate, raise_unread
from ase_dist.training.process.device import find_device
from ase_dist.training.process.folder_lock import FolderLock, lock_beside
from ase_dist.training.state.meta import read_meta
from ase_dist.versions import versions_of

LOGGER = logging.getLogger("ase_dist")


class Tolerance(NamedTuple):
    """How far a headline metric may be off: ``points`` of percent or degrees, or the share ``relative`` of the value.

    Percent and degrees are within the larger of the two, for scores near 0; others have ``relative`` alone.
    """

    points: float
    relative: float


# All in float32: what another device or batch size changes by rounding. Half precision somewhere: what it costs.
EXACT, ROUNDED = Tolerance(points=0.1, relative=1e-3), Tolerance(points=0.5, relative=2e-2)


def export_run(run: str | Path, out: str | Path, *, checkpoint: str = "newest", dtype: str = "fp32") -> Path:
    """Write the model of a run's checkpoint into the new folder ``out``; returns that folder.

    ``checkpoint`` is 'newest' (the last undamaged one), 'best' or the path of one. The run's folder is only read, and
    the run may go on. Raises UserError where run, checkpoint or backbone are missing or changed, where ``out`` exists,
    and where another process exports there.
    """
    run, out = Path(run), Path(out)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: got {dtype!r}, wanted one of {list(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    settings = read_run(run)
    try:
        require_room(out.parent)
    except OSError as error:
        raise _not_written(out, error) from None
    with FolderLock(lock_beside(out), folder=out, doing="exporting", other="another name") as lock:
        lock.take()
        if out.exists() or out.is_symlink():
            raise UserError(f"export: {str(out)!r} exists already; name a new folder")
        return _export(run, out, settings, checkpoint=checkpoint, dtype=dtype)


def _export(run: Path, out: Path, settings: Settings, *, checkpoint: str, dtype: str) -> Path:
    """``export_run`` by the one process that may."""
    tasks = settings.chosen_tasks()
    with choose_checkpoint(run, checkpoint) as found:
        model = rebuild(settings, tasks, found)
        meta = read_meta(found)
        is_evaluated = meta.history.evaluated_at == found.step  # summary.json has the same at the run's end
        metrics = meta.history.latest if is_evaluated else None
        facts = {
            "step": found.step,
            "metrics": metrics,
            "backbone": meta.backbone,
            "labelled_images": meta.labelled_images,
        }
    write_export(out, model, settings, tasks, dtype=dtype, facts=facts)
    LOGGER.info("exported step %d of %s to %s", facts["step"], run, out)
    return out


def write_export(
    out: Path,
    model: MultiTaskModel,
    settings: Settings,
    tasks: tuple[Task, ...],
    *,
    dtype: str,
    facts: Mapping[str, Any],
) -> None:
    """Write a model with plain layers; ``facts`` are the card's step, metrics, backbone and labelled images.

    Both files go into a temporary folder next to ``out``, which is then renamed: all or nothing. Raises UserError for a
    number that is not finite in ``dtype`` and where ``out`` cannot be written.
    """
    tensors = {}
    for name, tensor in named_tensors(model).items():
        kind = DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.to(kind, copy=True).contiguous()
        if not tensors[name].isfinite().all():
            raise UserError(
                f"export: {name!r} is not finite in {DTYPES[dtype]}; use --dtype fp32, or an earlier checkpoint"
            )
    # settings with a meaning only in training, on several ranks or with other files
    unused = {"pretrained": "none", "init_from": None, "checkpoint_activations": "none", "drop_path": 0.0}
    moe = settings.model.moe.model_copy(update={"ep_size": 1, "dispatch": "auto"})
    temporary = temporary_for(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        make_empty(temporary)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        fsync(temporary / WEIGHTS)
        card = Card(
            tasks=tasks,
            version=format_version(settings.data.size),
            image=ImageFacts(size=settings.data.size, mean=imagenet.MEAN, std=imagenet.STD),
            model=settings.model.model_copy(update={**unused, "moe": moe}),
            dtype=dtype,
            sha256=sha256_of(temporary / WEIGHTS),
            data=settings.data.name,
            description=settings.data.description,
            sets=tuple(each.model_copy(update={"root": None}) for each in settings.data.sets),
            versions=versions_of("ase_dist", "torch", "timm", "safetensors"),
            **facts,
        )
        write_atomic(temporary / CARD, card.to_json())
        put_in_place(temporary, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise _not_written(out, error) from None
    finally:
        discard(temporary)


def _not_written(out: Path, error: Exception) -> UserError | RunError:
    return file_error(
        error, f"export: cannot write {str(out)!r} ({describe(error)}); name a folder that can be written to"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The check


def check_export(run: str | Path, out: str | Path, *, device: str | None = None) -> list[str]:
    """Evaluate the export on the run's validation data; a clause for each headline metric that differs from the run's.

    ``EXACT`` is the tolerance, or ``ROUNDED`` where run or export are in half precision. The other metrics are not
    compared: the IoU of a rare class moves far by a few pixels, and a best threshold moves in steps. ``device`` None: a
    GPU where there is one. Raises UserError where the run has not evaluated the exported step.
    """
    settings = read_run(Path(run))
    where = find_device(device)
    model = load(out, device=where)
    if not model.metrics:
        raise UserError(
            f"--check: the run was not evaluated at step {model.card.step}, so there is nothing to compare with; "
            "export the checkpoint of an evaluated step"
        )
    loader = build_eval_loader(settings, model.tasks, rank=0, world_size=1, device=where)
    has_ods = any("ods_f" in scores for scores in model.metrics.values())
    ods = EdgeOds(workers=share_of_cores(1)) if has_ods else None
    try:
        evaluation = evaluate(
            model,
            loader.until_error(),
            model.tasks,
            device=where,
            gallery=Gallery(limit=0),
            constants={},
            go_on=raise_unread,
            edge_ods=ods,
            dataset=loader.dataset,
        )
    finally:
        loader.close()
    assert evaluation is not None
    is_exact = model.card.dtype == "fp32" and settings.train.bf16 is not True
    return differences(evaluation.results, model.metrics, model.tasks, tolerance=EXACT if is_exact else ROUNDED)


def differences(got: Results, wanted: Results, tasks: Sequence[Task], *, tolerance: Tolerance) -> list[str]:
    """The tasks' headline metrics in ``got`` that are off from ``wanted`` by more than ``tolerance``."""
    found = []
    for task in tasks:
        for name in dict.fromkeys((task.metric, headline(task, wanted[task.name]))):
            now, value = got[task.name][name], wanted[task.name][name]
            points = tolerance.points if score_of(task, name).unit in ("%", "deg") else 0.0
            same = math.isclose(now, value, rel_tol=tolerance.relative, abs_tol=points)
            if not same and (math.isfinite(now) or math.isfinite(value)):
                found.append(f"{task.name} {name} is {now:.6g}, the run found {value:.6g}")
    return found
