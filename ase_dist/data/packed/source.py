"""The source of a packed data set: an archive or a folder, its root, its lists and the files that are needed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ase_dist.data.archive import SUFFIXES
from ase_dist.data.cache import cache_folder
from ase_dist.data.file_check import FileCheck
from ase_dist.data.folder import SPLITS, FolderDataset
from ase_dist.data.packed.layout import Pictures, is_packed
from ase_dist.data.packed.shard import SHARD, ShardJob
from ase_dist.data.readers import reader_of
from ase_dist.errors import UserError
from ase_dist.tasks import DataSet, select_tasks

log = logging.getLogger(__name__)

TASKS_OPTION = "--tasks {}"


def default_place(source: Path, data: str) -> Path:
    """The folder in the user's cache where ``source`` is packed to; another source has another."""
    digest = hashlib.sha256(str(source.resolve()).encode()).hexdigest()
    return cache_folder() / f"{data}-{digest[:8]}"


def check_place(source: Path, place: Path) -> None:
    """UserError where packing ``source`` to ``place`` would write into the source, or replace something else."""
    here, there = source.resolve(), place.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise UserError(
            f"--out: got {place}, wanted a folder outside {source}, into which nothing is written; name another"
        )
    if place.exists() and not is_packed(place) and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--out: {place} is there already and no packed data set, wanted a new folder; name another")


def is_archive(source: Path) -> bool:
    """Whether ``source`` is a file to unpack; UserError if it is neither that nor a folder."""
    if source.is_dir():
        return False
    if source.is_file() and source.name.endswith(SUFFIXES):
        return True
    got = "a file of another kind" if source.is_file() else "no such file or folder"
    raise UserError(f"{source}: got {got}, wanted an unpacked folder or an archive ({', '.join(SUFFIXES)})")


def archive_fingerprint(archive: Path) -> str:
    """SHA-256 of the archive's size and time; hashing the contents would take minutes."""
    facts = archive.stat()
    return hashlib.sha256(json.dumps([facts.st_size, facts.st_mtime_ns]).encode()).hexdigest()


def find_root(folder: Path, kind: type[FolderDataset], *, named: Path) -> Path:
    """The data set in ``folder``: itself, or the one folder in it, a few levels down at most, that has the lists.

    Raises UserError if there is none or several on the same level.
    """
    roots = kind.find_roots(folder)
    if len(roots) == 1:
        return roots[0]
    names = ", ".join(str(path.relative_to(folder)) for path in roots)
    got = f"{len(roots)} data sets ({names})" if roots else "no folder"
    raise UserError(f"{named}: got {got} with {kind.list_folder}, wanted that of {kind.title}; {kind.origin}")


def read_lists(root: Path, kind: type[FolderDataset], *, subset: bool) -> dict[str, list[str]]:
    """The names of each split; UserError unless there are as many as published, or ``subset`` allows any number."""
    lists = {split: kind.read_names(root, split) for split in SPLITS}
    got = {split: len(names) for split, names in lists.items()}
    if kind.counts and not subset and got != dict(kind.counts):
        raise UserError(
            f"{root}: got lists of {_counts(got)} images, wanted the {_counts(kind.counts)} of {kind.title}; "
            f"{kind.origin}, or add --subset if these data are meant to be others"
        )
    both = set.intersection(*(set(names) for names in lists.values()))
    if both:
        log.warning(
            "%s: %d images are in both lists, such as %s; scores on them say little", root, len(both), min(both)
        )
    return lists


def plan(
    root: Path,
    data: str,
    data_set: DataSet,
    lists: Mapping[str, list[str]],
    *,
    tasks: Sequence[str],
    pictures: Pictures,
    target: Path,
    spelling: bool = True,
    partial: bool = False,
) -> list[ShardJob]:
    """The jobs that pack a data set into the folder ``target``.

    Raises UserError where a task has no folder at all, and with ``spelling`` for the first file that is only missing
    because of how its name is written.
    """
    kind = reader_of(data_set)
    check = FileCheck(root, kind.title, remedy=kind.remedy, how=TASKS_OPTION)
    needs = {task.name: kind.files_of(task) for task in select_tasks(data_set, tasks)}
    check.folders(kind.image_files, needs)
    for split, names in lists.items() if spelling else ():
        check.spelling(names, kind.image_files, {} if partial else needs, kind.list_of(root, split))
    return [
        ShardJob(
            data,
            root,
            split,
            tuple(names[start : start + SHARD]),
            tuple(tasks),
            pictures,
            target / f"{split}-{i:03d}.bin",
            data_set,
            partial,
        )
        for split, names in lists.items()
        for i, start in enumerate(range(0, len(names), SHARD))
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{n} {split}" for split, n in counts.items())
