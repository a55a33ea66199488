"""Predict many files into one folder: find and name them, read ahead, predict in batches, write each file whole.

For an image ``NAME`` the folder gets ``NAME_TASK.png`` for each task, ``NAME_sheet.png`` and ``NAME.npz`` with an array
per task: classes uint8 [H, W], mask and edges float16 [H, W], normals float16 [3, H, W], depth float32 [1, H, W].
``predictions.json``, written last, lists images, tasks with classes and palettes, what was skipped, and the SHA-256 of
the files: the next command replaces no others, and these are no sources.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ase_dist.cores import usable_cores
from ase_dist.deployment.images import Pixels, find_images, read_rgb
from ase_dist.deployment.predictor import Prediction, Predictor
from ase_dist.errors import UserError, did_you_mean, out_error
from ase_dist.files import read_text, replacing, sha256_of, write_atomic
from ase_dist.json_files import parse_json, read_object
from ase_dist.overwriting import refuse_foreign
from ase_dist.pictures.sheet import sheet, task_picture
from ase_dist.tasks import Task
from ase_dist.training.process.folder_lock import FolderLock

LOGGER = logging.getLogger("ase_dist")
INDEX, FORMAT = "predictions.json", "ase_dist predictions"
JOURNAL = ".predictions.partial"  # what was written before there is an index
LOCK = "predictions.lock"
LONGEST_NAME = 255  # bytes, of a file on Linux's file systems
HALF = ("mask", "edges", "normals")  # kinds that are stored in half precision
MAX_THREADS = 8


@dataclass(frozen=True)
class Source:
    """A file, and the name, perhaps with folders, that its predictions get."""

    path: Path
    name: str


@dataclass
class Outcome:
    """The written files with name, source and size, and the skipped ones with source and reason."""

    written: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def find_sources(paths: Iterable[Path], *, out: Path) -> list[Source]:
    """Every file of ``paths`` once, those of folders too, with a different name for each.

    A file of a folder keeps its place below that folder; a name that is taken gets _2, _3 and so on, also where only
    the case of letters differs. Files in ``out``, where that is below a folder of ``paths``, and files that predict
    wrote earlier are left out. Raises UserError for a path that does not exist and where there is no image at all.
    """
    found: dict[Path, Path] = {}
    written_into = functools.cache(WrittenFiles)
    num_earlier = 0
    for path in paths:
        if not path.exists():
            raise UserError(f"{str(path)!r}: no such file or folder")
        files = find_images(path, without=out) if path.is_dir() else [path]
        for file in files:
            real = Path(os.path.realpath(file))  # unlike ``resolve`` it takes a link to itself
            if any(written_into(folder).is_own(real) for folder in real.parents):
                num_earlier += 1
            else:
                found.setdefault(real, file.relative_to(path) if path.is_dir() else Path(file.name))
    if num_earlier:
        LOGGER.info("left out %d files that predict has written", num_earlier)
    if not found:
        raise UserError(f"there is no image in {', '.join(str(path) for path in paths)}")
    taken: set[str] = set()
    sources = []
    for path, relative in found.items():
        base = relative.with_suffix("").as_posix()
        names = (base if i == 1 else f"{base}_{i}" for i in range(1, len(taken) + 2))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())
        sources.append(Source(path, name))
    return sources


def choose_tasks(model: Predictor, names: Sequence[str] | None) -> tuple[Task, ...]:
    """The tasks called ``names`` (None: all); UserError for one that the model does not have, or given twice."""
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
    """Predict ``sources`` into ``out``; a file that cannot be read is logged, skipped and listed in the outcome.

    While the model computes, the next batch is read and earlier predictions are written. ``advance`` is told how many
    files are done. Raises UserError before any work where another process predicts into ``out`` and where a file would
    be replaced that predict did not write, and what ``errors.file_error`` makes of it where ``out`` cannot be written
    to.
    """
    with FolderLock(out / LOCK, folder=out, doing="predicting", other="--out") as lock:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.take()
            return _predict_files(model, sources, out, tasks=tasks, batch_size=batch_size, advance=advance)
        except OSError as error:
            raise out_error(error, out) from None


def _predict_files(
    model: Predictor,
    sources: Sequence[Source],
    out: Path,
    *,
    tasks: Sequence[Task],
    batch_size: int,
    advance: Callable[[int], None],
) -> Outcome:
    """``predict_files`` by the one process that may."""
    outcome, names = Outcome(), [task.name for task in tasks]
    longest = LONGEST_NAME - max(map(len, _endings(names)))
    long_named = [source for source in sources if len(os.fsencode(Path(source.name).name)) > longest]
    for source in long_named:
        reason = f"a name of more than {longest} bytes, with which its predictions could not be named; rename it"
        _skip(outcome, source, f"{source.path}: {reason}")
    sources = [source for source in sources if source not in long_named]
    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    threads = min(MAX_THREADS, usable_cores())
    files = WrittenFiles(out)
    targets = [out / f"{source.name}{ending}" for source in sources for ending in _endings(names)]
    refuse_foreign([*targets, out / INDEX], is_own=files.is_own, option="--out")
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        writing: deque[Future[None]] = deque()
        reading = [readers.submit(read_rgb, source.path) for source in batches[0]] if batches else []
        for i, batch in enumerate(batches):
            images = _images_read(batch, reading, outcome)
            following = batches[i + 1] if i + 1 < len(batches) else []
            reading = [readers.submit(read_rgb, source.path) for source in following]
            found = model.predict_pixels([pixels for _, pixels in images], tasks=names) if images else iter(())
            for (source, pixels), prediction in zip(images, found, strict=True):
                writing.append(writers.submit(_write, files, source.name, pixels, prediction, tasks))
                _finish(writing, leave=threads)
                height, width, _ = pixels.shape
                outcome.written.append(
                    {"name": source.name, "source": str(source.path), "height": height, "width": width}
                )
            advance(min((i + 1) * batch_size, len(sources)))
        _finish(writing, leave=0)
    files.conclude(_index(model, tasks, outcome))
    return outcome


class WrittenFiles:
    """Which files in the folder ``out`` predict has written: the index has their SHA-256, by their names below ``out``.

    Until the index is written, name and SHA-256 of each file are appended to a hidden journal before the file gets its
    name, so that an interrupted command recognises its files when it is repeated. A file that was changed since then
    does not count as written by predict. The index of an earlier version has names only.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._lock = threading.Lock()
        self._hashes: dict[str, list[str]] = {}  # by name, the newest last; the one before may still be in place
        self._named: set[str] = set()
        self._has_index = False
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # no index, or not one of ours
            index = read_object(out / INDEX)
            self._has_index = index["format"] == FORMAT
            if self._has_index and "files" in index:
                self._hashes = {name: [sha256] for name, sha256 in index["files"].items()}
            elif self._has_index:
                tasks = [task["name"] for task in index["tasks"]]
                self._named = {f"{image['name']}{end}" for image in index["images"] for end in _endings(tasks)}
        with suppress(OSError, ValueError, TypeError):  # no journal, or its last line is incomplete
            for line in read_text(out / JOURNAL).splitlines():
                name, sha256 = parse_json(line)
                self._hashes.setdefault(name, []).append(sha256)

    def is_own(self, path: Path) -> bool:
        """Whether predict wrote the file at ``path``, as it is now."""
        if not path.is_relative_to(self.out):
            return False
        name = path.relative_to(self.out).as_posix()
        if name == INDEX:
            return self._has_index
        return name in self._named or (name in self._hashes and sha256_of(path) in self._hashes[name])

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """As ``files.replacing``, for the file ``name`` below ``out``."""
        with replacing(self.out / name) as temporary:
            yield temporary
            sha256 = sha256_of(temporary)
            with self._lock, (self.out / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps([name, sha256]) + "\n")
                self._hashes.setdefault(name, []).append(sha256)

    def conclude(self, index: Mapping[str, Any]) -> None:
        """Write the index with the hashes of all files that exist, those of earlier commands too."""
        own = {name: hashes[-1] for name, hashes in sorted(self._hashes.items()) if (self.out / name).is_file()}
        write_atomic(self.out / INDEX, json.dumps({**index, "files": own}, indent=2) + "\n")
        (self.out / JOURNAL).unlink(missing_ok=True)


def _write(files: WrittenFiles, name: str, image: Pixels, prediction: Prediction, tasks: Sequence[Task]) -> None:
    """Write the pictures and the arrays of one image, as ``name`` with their endings."""
    for task in tasks:
        with files.replacing(f"{name}_{task.name}.png") as temporary:
            task_picture(task, prediction[task.name]).save(temporary, format="PNG")
    with files.replacing(f"{name}_sheet.png") as temporary:
        sheet(image, prediction, tasks).save(temporary, format="PNG")
    arrays = {
        task.name: prediction[task.name].astype(np.float16) if task.kind in HALF else prediction[task.name]
        for task in tasks
    }
    with files.replacing(f"{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _endings(tasks: Iterable[str]) -> list[str]:
    """The endings of an image's files: a picture for each task, the sheet, the arrays."""
    return [*(f"_{task}.png" for task in tasks), "_sheet.png", ".npz"]


def _images_read(
    batch: Sequence[Source], reading: Sequence[Future[Pixels]], outcome: Outcome
) -> list[tuple[Source, Pixels]]:
    """The images that could be read; the others go into the outcome."""
    images = []
    for source, future in zip(batch, reading, strict=True):
        try:
            images.append((source, future.result()))
        except UserError as error:
            _skip(outcome, source, str(error))
    return images


def _skip(outcome: Outcome, source: Source, reason: str) -> None:
    LOGGER.warning("skipped %s", reason)
    outcome.skipped.append({"source": str(source.path), "reason": reason})


def _finish(writing: deque[Future[None]], *, leave: int) -> None:
    """Wait for the oldest writes until only ``leave`` are unfinished, which bounds the predictions held in memory."""
    while len(writing) > leave:
        writing.popleft().result()


def _index(model: Predictor, tasks: Sequence[Task], outcome: Outcome) -> dict[str, Any]:
    """The index without its hashes."""
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
    about = {"format": FORMAT, "version": 1, "sha256": model.card.sha256, "step": model.card.step}
    return {**about, "tasks": facts, "images": outcome.written, "skipped": outcome.skipped}
