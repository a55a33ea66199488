"""A data set as a list of names and a table of files: checked when opened, decoded when read, never written to.

A subclass says where the files lie (``list_folder``, ``image_files``, ``label_files``) and decodes the labels
(``decode_labels``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar

from torch.utils.data import Dataset

from ase_dist.data.batch import Record
from ase_dist.data.files import Array, read_image
from ase_dist.tasks import Task

Patterns = tuple[str, ...]  # alternatives, the first that exists is read; {} stands for the image's name


class RecordDataset(Dataset[Record]):
    """The images of one list with the labels of ``tasks``, decoded at their original size.

    Opening it checks that every file which the list and the tasks need is there. With ``cache_in_memory`` a record
    stays in memory once read (in each process that reads it); ``limit`` keeps the first images of the list only.
    Raises ValueError for a missing folder, list or file, and on reading for a file that does not hold what it should.
    """

    title: ClassVar[str]
    list_folder: ClassVar[str]
    image_files: ClassVar[Patterns]
    label_files: ClassVar[Mapping[str, tuple[Patterns, ...]]]  # by task; a label may need several files

    def __init__(
        self,
        root: Path | str | None,
        split: str,
        tasks: Sequence[Task],
        *,
        limit: int | None = None,
        cache_in_memory: bool = False,
    ) -> None:
        if root is None or not Path(root).is_dir():
            raise ValueError(
                f"data.root: got {str(root)!r}, wanted the folder of {self.title}; unpack it and give data.root=PATH"
            )
        self.root = Path(root)
        self.split = split
        self.tasks = tuple(tasks)
        self.names = _read_list(self.root / self.list_folder, split)[:limit]
        self._cache: dict[int, Record] | None = {} if cache_in_memory else None
        needs = {task.name: self.label_files[task.name] for task in self.tasks}
        _FileCheck(self.root, self.title).run(self.names, self.image_files, needs)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            self._cache[index] = self._read(index)
        return self._cache[index]

    def decode_labels(self, name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """The compact label of each of ``self.tasks`` for the image ``name`` of ``shape`` [H, W]."""
        raise NotImplementedError

    def find(self, name: str, patterns: Patterns) -> Path:
        """The first of the alternatives that exists for ``name``; the last one if none does."""
        candidates = [self.root / pattern.format(name) for pattern in patterns]
        return next((path for path in candidates[:-1] if path.is_file()), candidates[-1])

    def _read(self, index: int) -> Record:
        name = self.names[index]
        image = read_image(self.find(name, self.image_files))
        return Record(index, name, image, self.decode_labels(name, (image.shape[0], image.shape[1])))


def data_fingerprint(dataset: RecordDataset) -> str:
    """SHA-256 of what is read: kind of data set, list, tasks and every name in order; the folder's path is not in it.

    Ranks compare it at the start: two nodes with different copies of the data must not train together.
    """
    facts = {
        "title": dataset.title,
        "split": dataset.split,
        "tasks": [task.name for task in dataset.tasks],
        "names": dataset.names,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_list(folder: Path, split: str) -> list[str]:
    path = folder / f"{split}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        there = sorted(other.stem for other in folder.glob("*.txt")) or "none at all"
        raise ValueError(f"{path}: no such list, found {there}; check data.root, or unpack the archive again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got an unreadable list ({error}), wanted one image name a line") from None
    if not names:
        raise ValueError(f"{path}: got an empty list, wanted one image name a line; unpack the archive again")
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or name == "..":
            raise ValueError(f"{path}: got the name {name!r}, wanted names without folders; check the list")
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{path}: got {twice!r} twice, wanted each image once; remove the second line")
    return names


class _FileCheck:
    """Compares the files that are needed with listings of the folders: one listing a folder, not one look a file."""

    def __init__(self, root: Path, title: str) -> None:
        self.root = root
        self.title = title
        self._listings: dict[PurePosixPath, frozenset[str] | None] = {}

    def run(self, names: Sequence[str], image: Patterns, labels: Mapping[str, tuple[Patterns, ...]]) -> None:
        """Raise ValueError if a folder or file is missing: what, how many, and which tasks to leave out."""
        if self._absent(image):
            raise ValueError(
                f"{self.root}: got no folder {_folders(image)}, wanted the folder of {self.title}; "
                "check data.root, or unpack the archive again"
            )
        absent = {task: folders for task, needs in labels.items() if (folders := self._absent_folders(needs))}
        if absent:
            folder_names = ", no folder ".join(dict.fromkeys(folder for many in absent.values() for folder in many))
            raise ValueError(
                f"{self.root}: this data set has no label for {', '.join(absent)} (there is no folder {folder_names}); "
                f"{_leave_out(absent, labels)}"
            )
        lacking = {
            task: [file for need in needs for file in self._missing(names, need)] for task, needs in labels.items()
        }
        missing = list(
            dict.fromkeys([*self._missing(names, image), *(file for many in lacking.values() for file in many)])
        )
        if missing:
            raise ValueError(self._sentence(missing, [task for task, files in lacking.items() if files], labels))

    def _sentence(self, missing: list[str], lacking: Collection[str], labels: Collection[str]) -> str:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        advice = f", or {_leave_out(lacking, labels)}" if lacking else ""
        return (
            f"{self.root}: {len(missing)} of the files that the list needs are missing ({first}); "
            f"unpack the archive of {self.title} again{advice}"
        )

    def _absent_folders(self, needs: Sequence[Patterns]) -> list[str]:
        return [_folders(patterns) for patterns in needs if self._absent(patterns)]

    def _absent(self, patterns: Patterns) -> bool:
        return all(self._listing(PurePosixPath(pattern).parent) is None for pattern in patterns)

    def _missing(self, names: Sequence[str], patterns: Patterns) -> Iterator[str]:
        places = [(self._listing(PurePosixPath(pattern).parent) or frozenset(), pattern) for pattern in patterns]
        for name in names:
            if not any(PurePosixPath(pattern.format(name)).name in listing for listing, pattern in places):
                yield patterns[0].format(name)

    def _listing(self, folder: PurePosixPath) -> frozenset[str] | None:
        if folder not in self._listings:
            path = self.root / folder
            self._listings[folder] = frozenset(file.name for file in path.iterdir()) if path.is_dir() else None
        return self._listings[folder]


def _folders(patterns: Patterns) -> str:
    return " or ".join(dict.fromkeys(str(PurePosixPath(pattern).parent) for pattern in patterns))


def _leave_out(tasks: Collection[str], labels: Collection[str]) -> str:
    rest = [task for task in labels if task not in tasks]
    if not rest:
        return "name other tasks with tasks=[...]"
    return f"leave {', '.join(tasks)} out with tasks=[{','.join(rest)}]"
