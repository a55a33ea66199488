"""A data set that is a folder of files: checked when opened, decoded when read, never written to.

By default ``lists/train.txt`` and ``lists/val.txt`` name the images, one a line, ``images/NAME.jpg`` or ``.png`` is
one, and ``TASK/NAME.png`` or ``.npy`` its label (depth: ``.npy`` or ``.mat``), decoded by the task's kind. A subclass
says what is otherwise: ``list_folder``, ``image_files``, ``label_files``, ``decoders``. What a ``dataset.yaml``
describes is such a subclass too (``described.py``).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar

from ase_dist.config import DataSettings
from ase_dist.data.batch import Record
from ase_dist.data.dataset import RecordDataset
from ase_dist.data.decode import Decoder, decoder_of
from ase_dist.data.file_check import FileCheck, Patterns, expand
from ase_dist.data.files import UNPACK_AGAIN, Array, advising, read_image
from ase_dist.errors import UserError, file_error
from ase_dist.files import open_regular
from ase_dist.tasks import Task

LOGGER = logging.getLogger("ase_dist")
SPLITS = ("train", "val")
MOST_NAMED = 10  # images in a sentence
SEARCHED_LEVELS = 5  # of folders, for the one that has the lists
SEARCHED_FOLDERS = 10_000
LONGEST_LIST = 1 << 30  # bytes


class FolderDataset(RecordDataset):
    """The images of one list with the labels of ``tasks``, decoded at their original size.

    Opening it checks that every file which the list and the tasks need is there; with ``names``, these are taken
    instead of the list and nothing is checked. ``limit`` keeps the first images of the list only.

    With ``partial`` an image may lack the files of some tasks: its record is without their labels. One that has labels
    only of other tasks that the data set has (``offered``) is left out.

    Raises UserError for a missing folder, list or file, and on reading for a file that does not hold what it should.
    """

    title = "a folder of images and labels"
    list_folder: ClassVar[str] = "lists"
    image_files: ClassVar[Patterns] = ("images/{}.jpg", "images/{}.png")
    label_files: ClassVar[Mapping[str, tuple[Patterns, ...]]] = {}  # by task; a label may need several files
    decoders: ClassVar[Mapping[str, Decoder]] = {}  # by task
    counts: ClassVar[Mapping[str, int]] = {}  # images in the published lists
    origin: ClassVar[str] = "check the folder"  # where it has been published
    remedy: ClassVar[str] = "correct the files"  # what to do about those that are missing or unusable

    def __init__(
        self,
        root: Path | str | None,
        split: str,
        tasks: Sequence[Task],
        *,
        limit: int | None = None,
        cache_in_memory: bool = False,
        names: Sequence[str] | None = None,
        partial: bool = False,
        offered: Iterable[Task] = (),
    ) -> None:
        if root is None or not Path(root).is_dir():
            raise UserError(
                f"data.root: got {str(root)!r}, wanted the folder of {self.title}, unpacked or as "
                "launch/prepare_data.py makes it; give data.root=PATH"
            )
        self.root = Path(root)
        found = self.read_names(self.root, split)[:limit] if names is None else names
        super().__init__(split, tasks, found, cache_in_memory=cache_in_memory)
        needs = {task.name: self.files_of(task) for task in self.tasks}
        check = FileCheck(self.root, self.title, remedy=self.remedy)
        if names is None:
            required = {} if partial else needs
            check.folders(self.image_files, needs)
            check.spelling(self.names, self.image_files, required, self.list_of(self.root, split))
            check.files(self.names, self.image_files, required)
        if partial:
            lacking = check.lacking(self.names, needs)
            if names is None:
                self._check_partial(check, lacking, {task.name: self.files_of(task) for task in offered})
                self.keep_labelled(lacking, where=str(self.list_of(self.root, split)))
            else:
                self.absent = {
                    task: frozenset(i for i, name in enumerate(self.names) if name in without)
                    for task, without in lacking.items()
                }

    def _check_partial(
        self,
        check: FileCheck,
        lacking: Mapping[str, Collection[str]],
        offered: Mapping[str, tuple[Patterns, ...]],
    ) -> None:
        """Raise UserError for images without any label; warn of files that only their spelling keeps from being one."""
        without = [name for name in self.names if all(name in names for names in lacking.values())]
        others = check.lacking(without, {task: needs for task, needs in offered.items() if task not in lacking})
        without = [name for name in without if all(name in names for names in others.values())]
        if without and self.tasks:
            shown = ", ".join(without[:MOST_NAMED]) + (", ..." if len(without) > MOST_NAMED else "")
            raise UserError(
                f"{self.list_of(self.root, self.split)}: {len(without)} of its images have no label of any task "
                f"({shown}); take them out, or {self.remedy}"
            )
        odd = check.misspelt(lacking, self.image_files, {task.name: self.files_of(task) for task in self.tasks})
        if odd:
            LOGGER.warning(
                "%s: %d files are no labels because of how their names are written (%s); convert or rename them",
                self.root,
                len(odd),
                ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else ""),
            )

    @classmethod
    def place(cls, data: DataSettings) -> Path | None:
        """The folder that ``data`` names; a data set that can be made is made here."""
        return data.root

    @classmethod
    def list_of(cls, root: Path, split: str) -> Path:
        """The file that names the images of ``split``."""
        return root / cls.list_folder / f"{split}.txt"

    @classmethod
    def read_names(cls, root: Path, split: str) -> list[str]:
        """The names of the images of ``split``; UserError as ``read_list``."""
        return read_list(root, cls.list_folder, split, remedy=cls.remedy)

    @classmethod
    def find_roots(cls, folder: Path) -> list[Path]:
        """The folders below ``folder``, perhaps itself, that may be this data set's; see ``find_roots``."""
        return find_roots(folder, cls.list_folder)

    @classmethod
    def files_of(cls, task: Task) -> tuple[Patterns, ...]:
        """The files that a label of ``task`` is decoded from, the decoder's own first."""
        suffixes = (".npy", ".mat") if task.kind == "depth" else (".png", ".npy")
        return cls.label_files.get(task.name, (tuple(f"{task.name}/{{}}{suffix}" for suffix in suffixes),))

    def decode_labels(self, name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """The compact label of each of ``self.tasks`` for the image ``name`` of ``shape`` [H, W]."""
        return {task.name: self.decode_label(task, name, shape) for task in self.tasks}

    def decode_label(self, task: Task, name: str, shape: tuple[int, int]) -> Array:
        """One of ``decode_labels``."""
        decoder = self.decoders.get(task.name) or decoder_of(task)
        with advising(self.remedies()):
            return decoder(self.find(name, self.files_of(task)[0]), shape)

    @classmethod
    def remedies(cls) -> dict[str, str]:
        """What errors about files advise here, by what they advise for data from an archive; see ``advising``."""
        return {UNPACK_AGAIN: cls.remedy}

    def read_picture(self, name: str) -> Array:
        """The picture of the image ``name``, uint8 [H, W, 3]; see ``read_image``."""
        with advising(self.remedies()):
            return read_image(self.find(name, self.image_files), labelled=bool(self.tasks))

    def find(self, name: str, patterns: Patterns) -> Path:
        """The first of the alternatives that exists for ``name``; the last one if none does."""
        candidates = [self.root / expand(pattern, name) for pattern in patterns]
        return next((path for path in candidates[:-1] if path.is_file()), candidates[-1])

    def label_paths(self, name: str) -> list[Path]:
        """The files that the labels of ``name`` are decoded from, each once."""
        needs = [patterns for task in self.tasks for patterns in self.files_of(task)]
        return [self.find(name, patterns) for patterns in dict.fromkeys(needs)]

    def read(self, index: int) -> Record:
        """As RecordDataset's."""
        name = self.names[index]
        image = self.read_picture(name)
        reader = self
        if self.absent:
            reader = copy.copy(self)
            reader.tasks = tuple(task for task in self.tasks if self.has_label(index, task.name))
        return Record(index, name, image, reader.decode_labels(name, (image.shape[0], image.shape[1])))


def read_list(root: Path, list_folder: str, split: str, *, remedy: str = "check the folder") -> list[str]:
    """The names in ``<list_folder>/<split>.txt``, one a line, which may have blanks in it but not around it.

    ``remedy`` is what to try where the list is missing or empty. Raises UserError for a list that is missing, empty or
    damaged, and for a name that can be no file's or comes twice.
    """
    folder = root / list_folder
    path = folder / f"{split}.txt"
    try:
        names = list_lines(path, remedy=remedy)
    except FileNotFoundError:
        deeper = [] if folder.is_dir() else find_roots(root, list_folder)
        if deeper:
            raise UserError(
                f"{root}: got no folder {list_folder}, wanted the folder that has it; give data.root={deeper[0]}"
            ) from None
        there = sorted(other.stem for other in folder.glob("*.txt")) or "none at all"
        raise UserError(f"{path}: no such list, found {there}; check data.root, or {remedy}") from None
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or name == "..":
            raise UserError(f"{path}: got the name {name!r}, wanted names without folders; check the list")
    refuse_doubles(names, path)
    return names


def list_lines(path: Path, *, remedy: str) -> list[str]:
    """The lines of a list without blank ones.

    Raises UserError where it is empty, unreadable, no text or no file, and FileNotFoundError where there is none.
    """
    try:
        opened = open_regular(path, max_bytes=LONGEST_LIST)
        with io.TextIOWrapper(opened, encoding="utf-8-sig") as file:  # any line ends, no byte-order mark
            lines = file.read().split("\n")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise file_error(
            error, f"{path}: got an unreadable list ({error}), wanted one image name a line in UTF-8"
        ) from None
    names = [name for line in lines if (name := line.strip())]
    if not names:
        raise UserError(f"{path}: got an empty list, wanted one image name a line; {remedy}")
    for name in names:
        if any(ord(character) < 32 for character in name):
            raise UserError(f"{path}: got the line {name!r}, wanted one image name a line and nothing else")
    return names


def refuse_doubles(names: Sequence[str], path: Path) -> None:
    """Raise UserError where an image stands twice in the list ``path``."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{path}: got {name!r} twice, wanted each image once; remove the second line")
        seen.add(name)


def find_roots(folder: Path, list_folder: str) -> list[Path]:
    """Of ``folder``, its subfolders, theirs, and so on, those on the first level where one has ``list_folder``.

    Links are followed, each folder is looked at once, and the search ends after five levels or 10,000 folders.
    """
    level, seen = [folder], {folder.resolve()}
    for _ in range(SEARCHED_LEVELS):
        roots = [path for path in level if (path / list_folder).is_dir()]
        if roots:
            return roots
        following = []
        for path in level:
            with contextlib.suppress(OSError), os.scandir(path) as entries:  # a folder that may not be read
                folders = [
                    Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False) or entry.is_symlink()
                ]
                for candidate in filter(Path.is_dir, sorted(folders)):  # a link may lead nowhere
                    place = candidate.resolve()
                    if place not in seen and len(seen) < SEARCHED_FOLDERS:
                        seen.add(place)
                        following.append(candidate)
        level = following
    return []
