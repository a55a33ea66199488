"""Predictions of many files into one folder: found, named, read ahead, predicted in batches, written whole.

For an image ``NAME`` the folder gets ``NAME_TASK.png`` for each task, ``NAME_sheet.png`` and ``NAME.npz`` with an array
per task: classes uint8 [H, W], mask and edges float16 [H, W], normals float16 [3, H, W], depth float32 [1, H, W].
``predictions.json``, written last, lists images, tasks with classes and palettes, and what was skipped.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ase_dist.cores import usable_cores
from ase_dist.deployment.images import Pixels, find_images, read_rgb
from ase_dist.deployment.predictor import Prediction, Predictor
from ase_dist.errors import UserError, did_you_mean
from ase_dist.files import replacing, write_atomic
from ase_dist.pictures.sheet import sheet, task_picture
from ase_dist.tasks import Task

LOGGER = logging.getLogger("ase_dist")
INDEX = "predictions.json"
HALF = ("mask", "edges", "normals")  # kinds that are stored in half precision
MOST_THREADS = 8


@dataclass(frozen=True)
class Source:
    """A file, and the name, perhaps with folders, that its predictions get."""

    path: Path
    name: str


@dataclass
class Outcome:
    """What became of the files: those written with name, source and size, those skipped with source and reason."""

    written: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def find_sources(paths: Iterable[Path], *, out: Path) -> list[Source]:
    """Every file of ``paths`` once, those of folders too, by names that are all different.

    A file of a folder keeps its place below that folder; a name that is taken gets _2, _3 and so on, also where only
    the case of letters differs. What lies in ``out`` is left out. Raises UserError for a path that does not exist and
    where there is no image at all.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{str(path)!r}: no such file or folder")
        files = find_images(path, without=out) if path.is_dir() else [path]
        for file in files:
            found.setdefault(file.resolve(), file.relative_to(path) if path.is_dir() else Path(file.name))
    if not found:
        raise UserError(f"there is no image in {', '.join(str(path) for path in paths)}")
    taken: set[str] = set()
    return [Source(path, _free_name(relative, taken)) for path, relative in found.items()]


def choose_tasks(model: Predictor, names: Sequence[str] | None) -> tuple[Task, ...]:
    """The rows of ``names`` (None: all); UserError for one that the model does not have and one that comes twice."""
    own = {task.name: task for task in model.tasks}
    for name in names or ():
        if name not in own:
            raise UserError(
                f"--tasks: the model has no {name!r}, wanted some of {', '.join(own)}{did_you_mean(name, own)}"
            )
    if names is not None and (not names or max(Counter(names).values()) > 1):
        raise UserError(f"--tasks: got {','.join(names)!r}, wanted at least one task and each at most once")
    return tuple(own[name] for name in names or own)


def predict_files(
    model: Predictor,
    sources: Sequence[Source],
    out: Path,
    *,
    tasks: Sequence[Task],
    batch_size: int,
    advance: Callable[[int], None],
) -> Outcome:
    """Predict ``sources`` into ``out``; a file that cannot be read is logged, skipped and told in the outcome.

    While the model computes, the next batch is read and images before are written. ``advance`` is told how many files
    are done. Raises UserError where ``out`` cannot be written to.
    """
    outcome, names = Outcome(), [task.name for task in tasks]
    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    threads = min(MOST_THREADS, usable_cores())
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
            writing: deque[Future[None]] = deque()
            reading = _read_ahead(readers, batches[0])
            for i, batch in enumerate(batches):
                images = _take(batch, reading, outcome)
                reading = _read_ahead(readers, batches[i + 1]) if i + 1 < len(batches) else []
                found = model.predict_pixels([pixels for _, pixels in images], tasks=names) if images else iter(())
                for (source, pixels), prediction in zip(images, found, strict=True):
                    writing.append(writers.submit(write_prediction, out / source.name, pixels, prediction, tasks))
                    _finish(writing, leave=threads)
                    outcome.written.append(_entry(source, pixels))
                advance(min((i + 1) * batch_size, len(sources)))
            _finish(writing, leave=0)
        write_atomic(out / INDEX, json.dumps(_index(model, tasks, outcome), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out: cannot write to {str(out)!r} ({error.strerror or error}); name another") from None
    return outcome


def write_prediction(stem: Path, image: Pixels, prediction: Prediction, tasks: Sequence[Task]) -> None:
    """The pictures and the arrays of one image, as ``stem`` with their endings."""
    for task in tasks:
        with replacing(_ending(stem, f"_{task.name}.png")) as temporary:
            task_picture(task, prediction[task.name]).save(temporary, format="PNG")
    with replacing(_ending(stem, "_sheet.png")) as temporary:
        sheet(image, prediction, tasks).save(temporary, format="PNG")
    arrays = {task.name: _stored(task, prediction[task.name]) for task in tasks}
    with replacing(_ending(stem, ".npz")) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _free_name(relative: Path, taken: set[str]) -> str:
    base = relative.with_suffix("").as_posix()
    names = (base if i == 1 else f"{base}_{i}" for i in range(1, len(taken) + 2))
    name = next(name for name in names if name.casefold() not in taken)
    taken.add(name.casefold())
    return name


def _read_ahead(pool: ThreadPoolExecutor, batch: Sequence[Source]) -> list[Future[Pixels]]:
    return [pool.submit(read_rgb, source.path) for source in batch]


def _take(batch: Sequence[Source], reading: Sequence[Future[Pixels]], outcome: Outcome) -> list[tuple[Source, Pixels]]:
    """The images that could be read; the others go into the outcome."""
    images = []
    for source, future in zip(batch, reading, strict=True):
        try:
            images.append((source, future.result()))
        except ValueError as error:
            LOGGER.warning("skipped %s", error)
            outcome.skipped.append({"source": str(source.path), "reason": str(error)})
    return images


def _finish(writing: deque[Future[None]], *, leave: int) -> None:
    """Wait for the oldest until only ``leave`` are under way, so that large predictions do not pile up."""
    while len(writing) > leave:
        writing.popleft().result()


def _stored(task: Task, value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float16) if task.kind in HALF else value


def _ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _entry(source: Source, pixels: Pixels) -> dict[str, Any]:
    return {"name": source.name, "source": str(source.path), "height": pixels.shape[0], "width": pixels.shape[1]}


def _index(model: Predictor, tasks: Sequence[Task], outcome: Outcome) -> dict[str, Any]:
    facts = [
        {
            "name": task.name,
            "title": task.title,
            "kind": task.kind,
            "class_names": task.class_names,
            "palette": task.palette if task.kind == "classes" else None,
        }
        for task in tasks
    ]
    about = {"format": "ase_dist predictions", "version": 1, "sha256": model.card.sha256, "step": model.card.step}
    return {**about, "tasks": facts, "images": outcome.written, "skipped": outcome.skipped}
