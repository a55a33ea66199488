"""Make a generated data set once: in a temporary folder next to its final one, under a lock, renamed when complete.

Several processes may ask for the same data set at the same time. One makes it, the others wait for its lock, which the
system frees if that process dies; the next one removes what it left. A data set without a manifest of the wanted
settings is made again.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ase_dist.cores import usable_cores
from ase_dist.data.cache import cache_folder, locked, track_progress
from ase_dist.errors import ExitCode, RunError, UserError, file_error
from ase_dist.files import discard, flush, is_regular, make_empty, put_in_place, temporary_for
from ase_dist.image_size import ImageSize
from ase_dist.json_files import read_object
from ase_dist.scenes.layout import DEPTH_FOLDER, VAL_START, make_folders, scene_id, write_lists, write_scene
from ase_dist.scenes.render import RENDERER_VERSION, render_depth, render_scene
from ase_dist.workers import WorkerDiedError, run_calls

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STARTUP = 8  # scenes that are rendered in the time that a process takes to start
MOST_WORKERS = 16  # by default; enough for hundreds of scenes per second


@dataclass(frozen=True)
class SceneSet:
    """The settings that a generated data set is named after."""

    train: int
    val: int
    size: ImageSize
    seed: int
    renderer: int = RENDERER_VERSION

    @property
    def folder(self) -> str:
        """The data set's folder name."""
        return f"scenes-v{self.renderer}-seed{self.seed}-{self.size}px-{self.train}+{self.val}"

    @property
    def manifest(self) -> dict[str, object]:
        """The settings as the manifest holds them."""
        return {**asdict(self), "size": self.size.written}

    @property
    def numbers(self) -> list[int]:
        """The numbers of all scenes, validation after training."""
        return [*range(self.train), *range(VAL_START, VAL_START + self.val)]


def ensure_scenes(
    root: Path | None, *, train: int, val: int, size: ImageSize | int, seed: int, workers: int | None = None
) -> Path:
    """The folder of a generated data set in the layout of PASCAL_MT, made now if it is not there yet.

    It is a folder in ``root`` (None: the user's cache folder), named after the settings. ``workers`` processes render,
    by default one for each core that this process may use, at most 16.

    Raises UserError for settings out of range and where the folder cannot be written, RunError where the disk is full
    or a process is killed or stuck; then nothing is left behind.
    """
    try:
        wanted = SceneSet(train, val, ImageSize.read(size).within(32, 4096), seed)
    except UserError as error:
        raise UserError(f"scenes: size: {error}") from None
    for name, low, high in (("train", 1, VAL_START), ("val", 1, VAL_START), ("seed", 0, 2**31 - 1)):
        value = getattr(wanted, name)
        if not isinstance(value, int) or not low <= value <= high:
            raise UserError(f"scenes: {name} is {value!r}, wanted a whole number from {low} to {high}")
    if workers is not None and workers < 1:
        raise UserError(f"scenes: workers is {workers}, wanted at least 1, or None for one for each core")
    parent = Path(root) if root is not None else cache_folder()
    place = parent / wanted.folder
    if is_complete(place, wanted):
        return place
    with _made_in(parent), locked(place):
        if not is_complete(place, wanted):
            for old in parent.glob(f".{place.name}.making-*"):  # of versions up to 0.1.0
                discard(old)
            _make(place, wanted, workers if workers is not None else min(usable_cores(), MOST_WORKERS))
    return place


def ensure_depth(place: Path, *, workers: int | None = None) -> None:
    """Add the depth of every scene to a data set of ``ensure_scenes`` that has none yet. Raises as that does."""
    folder = place / DEPTH_FOLDER
    if folder.is_dir() or not (place / MANIFEST).is_file():
        return
    with _made_in(place), locked(place):
        if folder.is_dir():
            return
        found = read_object(place / MANIFEST)
        scenes = SceneSet(**{**found, "size": ImageSize.read(found["size"])})
        making = temporary_for(folder)
        try:
            make_empty(making)
            workers = workers if workers is not None else min(usable_cores(), MOST_WORKERS)
            workers = min(workers, -(-len(scenes.numbers) // STARTUP)) if sys.executable else 1
            calls = ((making, scenes.seed, number, scenes.size) for number in scenes.numbers)
            done = run_calls(make_depth, calls, workers=workers, in_order=False)
            total = len(scenes.numbers)
            track_progress(done, total, doing="rendering", did="rendered", things="depths", where=f"into {folder}")
            flush(making)
            put_in_place(making, folder)
        finally:
            discard(making)


@contextmanager
def _made_in(parent: Path) -> Iterator[None]:
    """What may go wrong with processes and files as the sentence of a RunError or UserError."""
    try:
        yield
    except WorkerDiedError as error:
        raise RunError(
            f"cannot make the generated scenes in {parent}: {error}; try again, or on fewer cores",
            exit_code=ExitCode.IO_ERROR,
        ) from None
    except OSError as error:
        raise file_error(
            error,
            f"cannot make the generated scenes in {parent}: {error.strerror or error}; "
            "free some space there or name a folder that can be written",
        ) from error


def is_complete(place: Path, wanted: SceneSet) -> bool:
    """Whether ``place`` holds a complete data set of these settings, by its manifest, which is written last.

    Raises UserError where something else than a file has the manifest's name.
    """
    manifest = place / MANIFEST
    if not is_regular(manifest):
        return False
    try:
        return bool(json.loads(manifest.read_text(encoding="utf-8")) == wanted.manifest)
    except (OSError, ValueError):
        return False


def make_scene(folder: Path, seed: int, number: int, size: ImageSize) -> int:
    """Render scene ``number`` of data set ``seed``, write its files into ``folder`` and return 1, for counting."""
    write_scene(folder, scene_id(seed, number), render_scene(seed=seed, index=number, size=size))
    return 1


def make_depth(folder: Path, seed: int, number: int, size: ImageSize) -> int:
    """Write the depth of scene ``number`` of data set ``seed`` into ``folder`` and return 1, for counting."""
    np.save(folder / f"{scene_id(seed, number)}.npy", render_depth(seed=seed, index=number, size=size))
    return 1


def _make(place: Path, wanted: SceneSet, workers: int) -> None:
    """Render everything into a temporary folder and rename it; the lock of ``place`` is held."""
    making = temporary_for(place)
    try:
        make_empty(making)
        make_folders(making)
        numbers = wanted.numbers
        write_lists(making, seed=wanted.seed, train=numbers[: wanted.train], val=numbers[wanted.train :])
        workers = min(workers, -(-len(numbers) // STARTUP)) if sys.executable else 1
        calls = ((making, wanted.seed, number, wanted.size) for number in numbers)
        done = run_calls(make_scene, calls, workers=workers, in_order=False)
        track_progress(done, len(numbers), doing="rendering", did="rendered", things="scenes", where=f"into {place}")
        (making / MANIFEST).write_text(json.dumps(wanted.manifest, indent=1) + "\n", encoding="utf-8")
        flush(making)
        put_in_place(making, place)
    finally:
        discard(making)
