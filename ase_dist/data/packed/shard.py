"""Packing or checking a part of a list in one process: decodes every image and label and reports every problem."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from ase_dist.data.batch import Record
from ase_dist.data.file_check import FileCheck
from ase_dist.data.folder import FolderDataset
from ase_dist.data.packed.layout import VERSION, Pictures, ShardIndex, index_path, pack_label, read_index
from ase_dist.data.packed.sizes import other_sizes
from ase_dist.data.readers import reader_of
from ase_dist.description import DescribedDataSet
from ase_dist.errors import RunError, UserError
from ase_dist.files import fsync, write_atomic
from ase_dist.tasks import DataSet, find_data_set, select_tasks

SHARD = 256  # images in a file


@dataclass(frozen=True)
class ShardJob:
    """Images ``names`` of the list ``split`` in the folder ``root``, to be packed into ``target``.

    ``partial``: an image may lack some labels.
    """

    data: str
    root: Path
    split: str
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    pictures: Pictures
    target: Path
    data_set: DataSet | None = None  # what ``data`` names, where another process may not know it
    partial: bool = False

    def open(self) -> FolderDataset:
        """The images as a data set; nothing is checked."""
        data_set = self.data_set or find_data_set(self.data)
        tasks = select_tasks(data_set, self.tasks)
        return reader_of(data_set)(self.root, self.split, tasks, names=self.names, partial=self.partial)

    def fingerprint(self) -> str:
        """SHA-256 of everything that the packed file depends on, the files' contents by their sizes and times."""
        dataset = self.open()
        stamps: list[list[tuple[str, int, int] | None]] = []
        for name in self.names:
            stamps.append([])
            for path in needed_files(dataset, name):
                try:
                    facts = path.stat()
                    stamps[-1].append((path.name, facts.st_size, facts.st_mtime_ns))
                except OSError:
                    stamps[-1].append(None)
        content = [VERSION, self.data, self.split, self.names, self.tasks, self.pictures, stamps]
        if isinstance(self.data_set, DescribedDataSet) and self.data_set.description is not None:
            content.append(self.data_set.description.model_dump_json())
        if self.partial:
            content.append("partial")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class SourceProblem:
    """A file that cannot be used: what is wrong (``missing`` or ``unusable``), and one line about it."""

    what: str
    line: str


@dataclass
class Findings:
    """What was found in one job: files that cannot be used, and lines about labels of other sizes.

    ``labelled`` counts the images that have a label, by task.
    """

    images: int = 0
    labelled: dict[str, int] = field(default_factory=dict)
    problems: list[SourceProblem] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)


def pack(job: ShardJob, fingerprint: str) -> Findings:
    """Write ``job.target`` and its index, unless something is wrong with any of the images."""
    findings, dataset = Findings(len(job.names)), job.open()
    with _Writer(job.target) as writer:
        for record in _sound_records(dataset, findings):
            if not findings.problems:
                if job.pictures == "files":
                    picture: bytes | memoryview = dataset.find(record.name, dataset.image_files).read_bytes()
                else:
                    picture = np.ascontiguousarray(record.image).data.cast("B")
                writer.add(record, picture, job.tasks)
        if not findings.problems:
            writer.finish(fingerprint)
    return findings


def check(job: ShardJob) -> Findings:
    """Read what ``pack`` would read, and write nothing."""
    findings = Findings(len(job.names))
    for _ in _sound_records(job.open(), findings):
        pass
    return findings


def is_done(path: Path, fingerprint: str) -> bool:
    """Whether a file was packed from the same files: its index, which is written last, says so."""
    try:
        index = read_index(path)
        return index.fingerprint == fingerprint and path.stat().st_size == index.bytes
    except (UserError, RunError, OSError):
        return False


def needed_files(dataset: FolderDataset, name: str) -> list[Path]:
    """The files of one image, the picture first."""
    return [dataset.find(name, dataset.image_files), *dataset.label_paths(name)]


def _sound_records(dataset: FolderDataset, findings: Findings) -> Iterator[Record]:
    findings.labelled = dataset.labelled_images()
    for i, name in enumerate(dataset.names):
        if dataset.tasks and not any(dataset.has_label(i, task.name) for task in dataset.tasks):
            findings.problems.append(SourceProblem("missing", f"{name}: every label of this image"))
            continue
        try:
            record = dataset.read(i)
        except UserError as error:
            findings.problems += _diagnose(dataset, i, str(error))
            continue
        paths = [path for path in dataset.label_paths(name) if not dataset.absent or path.is_file()]
        findings.resized += other_sizes(dataset.root, paths, record.image.shape[:2])
        yield record


def _diagnose(dataset: FolderDataset, index: int, first: str) -> list[SourceProblem]:
    """All problems of one image, of which reading it raised only the ``first``."""
    name, tasks = dataset.names[index], [task for task in dataset.tasks if dataset.has_label(index, task.name)]
    needs = [
        dataset.image_files,
        *dict.fromkeys(patterns for task in tasks for patterns in dataset.files_of(task)),
    ]
    check = FileCheck(dataset.root, dataset.title, remedy=dataset.remedy)
    missing, problems = [], []
    for patterns in needs:
        path = dataset.find(name, patterns)
        if not path.is_file():
            missing.append(path)
            similar = check.similar(name, patterns)
            hint = f" (there is {similar!r}; rename it, or correct the list)" if similar else ""
            problems.append(SourceProblem("missing", f"{path.relative_to(dataset.root)}{hint}"))
    sentences = []
    shape = (1, 1)  # where the picture is unreadable its labels are still read
    try:
        image = dataset.read_picture(name)
        shape = (image.shape[0], image.shape[1])
    except UserError as error:
        sentences.append(str(error))
    for task in tasks:
        try:
            type(dataset)(dataset.root, dataset.split, (task,), names=(name,)).decode_labels(name, shape)
        except UserError as error:
            sentences.append(str(error))
    sentences = [sentence for sentence in sentences if not any(str(path) in sentence for path in missing)]
    if not missing and not sentences:
        sentences = [first]
    return problems + [SourceProblem("unusable", sentence) for sentence in dict.fromkeys(sentences)]


def _packed_label(record: Record, task: str) -> bytes:
    return pack_label(record.labels[task]) if task in record.labels else b""


class _Writer:
    """Writes a .bin to a temporary file; ``finish`` fsyncs it, renames it and writes its index."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        self._digest = hashlib.sha256()
        self._names: list[str] = []
        self._shapes: list[tuple[int, int]] = []
        self._offsets: list[tuple[int, ...]] = []
        self._sums: list[int] = []

    def __enter__(self) -> _Writer:
        self._file = self._temporary.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, record: Record, picture: bytes | memoryview, tasks: tuple[str, ...]) -> None:
        starts, checksum = [self._file.tell()], 0
        for content in (picture, *(_packed_label(record, task) for task in tasks)):
            self._file.write(content)
            self._digest.update(content)
            checksum = zlib.crc32(content, checksum)
            starts.append(self._file.tell())
        self._names.append(record.name)
        self._shapes.append((record.image.shape[0], record.image.shape[1]))
        self._offsets.append(tuple(starts))
        self._sums.append(checksum)

    def finish(self, fingerprint: str) -> None:
        size = self._file.tell()
        self._file.close()
        fsync(self._temporary)
        self._temporary.replace(self._target)
        index = ShardIndex(
            fingerprint=fingerprint,
            bytes=size,
            sha256=self._digest.hexdigest(),
            names=tuple(self._names),
            shapes=tuple(self._shapes),
            offsets=tuple(self._offsets),
            sums=tuple(self._sums),
        )
        write_atomic(index_path(self._target), index.model_dump_json() + "\n")
