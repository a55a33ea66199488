"""Check a data set and pack it: one process at a time, and an interrupted one is continued by the next.

Everything is written into a hidden folder next to that of the packed data set, which is renamed at the end. A file
that was packed there before, or in the packed data set that is being replaced, is kept if none of the files that it was
made from has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ase_dist.data.archive import unpack
from ase_dist.data.cache import locked
from ase_dist.data.dataset import labelled_text
from ase_dist.data.packed.findings import conclude
from ase_dist.data.packed.jobs import run_jobs
from ase_dist.data.packed.layout import (
    MANIFEST,
    PackedManifest,
    Pictures,
    ShardEntry,
    index_path,
    is_packed,
    read_index,
    read_manifest,
)
from ase_dist.data.packed.shard import ShardJob, is_done
from ase_dist.data.packed.source import (
    archive_fingerprint,
    check_place,
    default_place,
    find_root,
    is_archive,
    plan,
    read_lists,
)
from ase_dist.data.packed.verify import wrong_sizes
from ase_dist.data.readers import reader_of
from ase_dist.description import FILE_NAME, DataSetDescription, described, to_yaml
from ase_dist.errors import UserError, file_error
from ase_dist.files import discard, flush, put_in_place, recover, sha256_of, write_atomic
from ase_dist.tasks import DataSet, find_data_set, packable, select_tasks
from ase_dist.versions import versions_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be packed, and how.

    ``tasks`` None: all of the data set's. ``pictures`` says whether images are kept as pixels, which are read faster,
    or as the files that they are, which take a sixth of the space. ``subset`` allows other lists than the published.
    ``workers`` None: a process for each core that this one may use. ``description`` is that of a data set of one's
    own, whose name is ``data``. ``partial`` accepts images that lack some labels.
    """

    data: str
    source: Path
    tasks: tuple[str, ...] | None = None
    pictures: Pictures = "pixels"
    subset: bool = False
    workers: int | None = None
    description: DataSetDescription | None = None
    partial: bool = False

    @property
    def data_set(self) -> DataSet:
        """The data set that ``source`` holds; UserError where ``data`` is none, or is generated and not packed."""
        if self.description is not None:
            return described(self.description)
        found = find_data_set(self.data)
        if found.layout is not None:
            raise UserError(f"got the data set {self.data!r}, wanted one of {', '.join(packable())}")
        return found

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks to pack; UserError for one that the data set does not have."""
        return tuple(task.name for task in select_tasks(self.data_set, self.tasks, data_name=self.data))


def prepare(request: Request, out: Path | None = None) -> Path:
    """The folder of the packed data set, made now unless it is there and its source has not changed since.

    ``out`` None: in the user's cache folder. Nothing is written into the source.
    Raises UserError, one sentence, where the source, its lists or any of its files cannot be used, and OSError where
    the folder cannot be written; what was packed until then is kept for the next time.
    """
    archive, tasks = is_archive(request.source), request.task_names
    if request.pictures == "files" and request.description is not None and request.description.orientation == "upright":
        raise UserError("--pictures files: pictures that are turned upright are packed as pixels; leave the option out")
    place = (out or default_place(request.source, request.data)).absolute()
    check_place(request.source, place)
    try:
        with locked(place):
            if archive and _is_current(place, request, tasks, archive_fingerprint(request.source)):
                return place
            recover(place)
            folder = request.source
            if archive:
                folder = place.with_name(f".{place.name}.unpacked-{archive_fingerprint(request.source)[:8]}")
                for stale in place.parent.glob(f".{place.name}.unpacked-*"):
                    if stale != folder:
                        log.info("removing %s, which an interrupted process left", stale)
                        discard(stale)
                if not folder.is_dir():  # else unpacked by a process that was interrupted later on
                    log.info("unpacking %s", request.source)
                    unpack(request.source, folder)
            _pack(request, find_root(folder, reader_of(request.data_set), named=request.source), place, tasks)
            if archive:
                discard(folder)
    except OSError as error:
        raise file_error(
            error,
            f"cannot pack {request.source} into {place}: {error.strerror or error}; free some space there, or name "
            "another folder with --out; the same command goes on",
        ) from error
    return place


def check_only(request: Request, out: Path | None = None) -> int:
    """Read every file of the source as packing would, and return the number of images; UserError as ``prepare``.

    Nothing is written except a report next to ``out`` where there are many problems. An archive is unpacked there for
    the time being.
    """
    archive, tasks = is_archive(request.source), request.task_names
    place = (out or default_place(request.source, request.data)).absolute()
    with contextlib.ExitStack() as stack:
        folder = request.source
        if archive:
            folder = place.with_name(f".{place.name}.checked-{os.getpid()}")
            stack.callback(discard, folder)
            unpack(request.source, folder)
        root = find_root(folder, reader_of(request.data_set), named=request.source)
        lists = read_lists(root, reader_of(request.data_set), subset=request.subset)
        jobs = plan(
            root,
            request.data,
            request.data_set,
            lists,
            tasks=tasks,
            pictures=request.pictures,
            target=place,
            spelling=request.description is None,  # of one's own data every problem is named below
            partial=request.partial,
        )
        findings = run_jobs(
            [(job, None) for job in jobs], request.workers, doing="checking", did="checked", where=f"of {root}"
        )
        conclude(findings, root, place, kind=reader_of(request.data_set), partial=request.partial)
        if request.partial:
            _say_labelled(
                (job.split, len(job.names), found.labelled) for job, found in zip(jobs, findings, strict=True)
            )
    return sum(len(names) for names in lists.values())


def _is_current(place: Path, request: Request, tasks: tuple[str, ...], fingerprint: str) -> bool:
    """Whether ``place`` is what would be made now; UserError where it was made from something else."""
    if not is_packed(place):
        return False
    try:
        there = read_manifest(place)
    except UserError as error:
        log.info("%s; packing again", error)
        return False
    asked = (request.data, request.description, tasks, request.pictures, request.partial)
    as_asked = (there.data, there.description, there.tasks, there.pictures, there.partial) == asked
    if as_asked and there.fingerprint == fingerprint and not wrong_sizes(place, there):
        log.info("%s is there already, and its source has not changed", place)
        return True
    if there.source != str(request.source.resolve()):
        raise UserError(
            f"--out: {place} was packed from {there.source}, wanted a new folder or one packed from {request.source}; "
            "name another, or remove it"
        )
    if not as_asked:
        log.info("%s was packed with other options or dataset.yaml; packing again", place)
    elif there.fingerprint == fingerprint:
        log.info("%s lacks files; packing again", place)
    else:
        log.info("%s has changed since it was packed into %s; packing again", request.source, place)
    return False


def _pack(request: Request, root: Path, place: Path, tasks: tuple[str, ...]) -> None:
    making = place.with_name(f".{place.name}.packing")
    lists = read_lists(root, reader_of(request.data_set), subset=request.subset)
    jobs = plan(
        root,
        request.data,
        request.data_set,
        lists,
        tasks=tasks,
        pictures=request.pictures,
        target=making,
        partial=request.partial,
    )
    stamped = [(job, job.fingerprint()) for job in jobs]
    whole = hashlib.sha256("".join(stamp for _, stamp in stamped).encode()).hexdigest()
    archive = request.source.is_file()
    if not archive and _is_current(place, request, tasks, whole):
        return
    making.mkdir(exist_ok=True)
    wanted = {path for job in jobs for path in (job.target, index_path(job.target))}
    for path in making.iterdir():  # half-written files, and those of another plan
        if path not in wanted:
            path.unlink()
    todo = [(job, stamp) for job, stamp in stamped if not _is_packed_before(job, stamp, place)]
    if len(todo) < len(jobs):
        log.info("%d of %d files are packed already", len(jobs) - len(todo), len(jobs))
    findings = run_jobs(todo, request.workers, doing="packing", did="packed", where=f"into {place}")
    conclude(findings, root, place, kind=reader_of(request.data_set), partial=request.partial)
    labelled = []
    splits: dict[str, list[ShardEntry]] = {}
    for job in jobs:
        index = read_index(job.target)
        entry = ShardEntry(
            file=job.target.name,
            bytes=index.bytes,
            sha256=index.sha256,
            index_sha256=sha256_of(index_path(job.target)),
        )
        splits.setdefault(job.split, []).append(entry)
        counts = {
            task: sum(starts[i + 1] < starts[i + 2] for starts in index.offsets) for i, task in enumerate(job.tasks)
        }
        labelled.append((job.split, len(job.names), counts))
    if request.partial:
        _say_labelled(labelled)
    manifest = PackedManifest(
        data=request.data,
        description=request.description,
        tasks=tasks,
        pictures=request.pictures,
        partial=request.partial,
        source=str(request.source.resolve()),
        fingerprint=archive_fingerprint(request.source) if archive else whole,
        software=versions_of("ase-dist", "pillow", "scikit-image"),
        splits={split: tuple(entries) for split, entries in splits.items()},
    )
    if request.description is not None:
        write_atomic(making / FILE_NAME, to_yaml(request.description))
    write_atomic(making / MANIFEST, manifest.to_json())
    flush(making)
    put_in_place(making, place)  # runs that read the data set that was there keep their mapped files


def _say_labelled(parts: Iterable[tuple[str, int, Mapping[str, int]]]) -> None:
    """Log how many images of each split have a label of each task; ``parts`` are (split, images, labelled by task)."""
    images: Counter[str] = Counter()
    labelled: dict[str, Counter[str]] = {}
    for split, count, by_task in parts:
        images[split] += count
        labelled.setdefault(split, Counter()).update(by_task)
    for split, by_task in labelled.items():
        log.info("%s: of %d images have a label: %s", split, images[split], labelled_text(by_task))


def _is_packed_before(job: ShardJob, fingerprint: str, place: Path) -> bool:
    """Whether the job's file is there, or in the data set that is to be replaced: then it is linked."""
    if is_done(job.target, fingerprint):
        return True
    old = place / job.target.name
    if not is_done(old, fingerprint):
        return False
    try:
        for source, target in ((old, job.target), (index_path(old), index_path(job.target))):
            target.unlink(missing_ok=True)
            os.link(source, target)
    except OSError:  # a file system without links
        return False
    return True
