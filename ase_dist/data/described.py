"""A folder that a ``dataset.yaml`` describes, as a data set: which images there are, where their labels lie.

How a stored label becomes a compact one is in ``described_labels.py``.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from PIL import ExifTags

from ase_dist.data.decode import Decoder
from ase_dist.data.described_labels import label_decoder
from ase_dist.data.file_check import Patterns, expand
from ase_dist.data.files import TURN_LABEL, TURN_PIXELS, Array, advising, read_image
from ase_dist.data.folder import FolderDataset, list_lines, refuse_doubles
from ase_dist.description import FILE_NAME, DataSetDescription
from ase_dist.errors import UserError, did_you_mean
from ase_dist.picture_files import open_picture
from ase_dist.tasks import Task

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")  # endings that .* stands for in images
LABELS = ("png", "npy", "tif", "tiff", "bmp")  # and in labels
ANY = ".*"
GLOB = "*?["


class DescribedFolder(FolderDataset):
    """The images of one split of a described folder; ``described_reader`` makes the class for a description.

    A name is what ``{}`` stands for in the pattern of the images, folders included; where the pattern has ``{split}``
    the name begins with that folder.
    """

    description: ClassVar[DataSetDescription]

    @classmethod
    def list_of(cls, root: Path, split: str) -> Path:
        """As FolderDataset's: the list of the split, or the description where it has none."""
        splits = cls.description.splits
        places = splits.val if split == "val" and splits.val else splits.train
        return root / next((place for place in places if _is_list(place)), FILE_NAME)

    @classmethod
    def find_roots(cls, folder: Path) -> list[Path]:
        """As FolderDataset's: ``folder`` itself."""
        return [folder]

    @classmethod
    def files_of(cls, task: Task) -> tuple[Patterns, ...]:
        """As FolderDataset's."""
        return cls.label_files[task.name]

    @classmethod
    def read_names(cls, root: Path, split: str) -> list[str]:
        """The names of a split in the order of its lists, those of folders and patterns sorted.

        Raises UserError where a list, folder or pattern leads to no image, and where an image stands there twice.
        """
        splits = cls.description.splits
        if split == "val" and splits.val is not None:
            return cls._names(root, "val", splits.val)
        names = cls._names(root, "train", splits.train)
        if splits.val_every is None:
            return names
        is_val = [i % splits.val_every == splits.val_every - 1 for i in range(len(names))]
        chosen = [name for name, of_val in zip(names, is_val, strict=True) if of_val == (split == "val")]
        if not chosen:
            raise UserError(
                f"{root / FILE_NAME}: splits.val_every is {splits.val_every} for {len(names)} images, which leaves "
                "none for validation; wanted a smaller number"
            )
        return chosen

    def read_picture(self, name: str) -> Array:
        """As FolderDataset's, turned upright where labels are; a tag matters only where it is not said how they lie."""
        orientation = self.description.orientation
        if orientation is None:
            return super().read_picture(name)
        path = self.find(name, self.image_files)
        with advising(self.remedies()):
            image = read_image(path)
        if orientation == "stored":
            return image
        with open_picture(path) as picture, contextlib.suppress(Exception):  # a damaged tag is none
            image = np.ascontiguousarray(_TURNS[picture.getexif()[ExifTags.Base.Orientation]](image))
        return image

    @classmethod
    def remedies(cls) -> dict[str, str]:
        """As FolderDataset's."""
        how = f"set orientation: upright (or stored) in {FILE_NAME}"
        return {**super().remedies(), TURN_PIXELS: how, TURN_LABEL: f"{how}, or turn the label"}

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.description, self.__dict__)

    @classmethod
    def _names(cls, root: Path, split: str, places: Sequence[str]) -> list[str]:
        names: list[str] = []
        for place in places:
            names += (cls._listed_names if _is_list(place) else cls._found_names)(root, split, place)
        refuse_doubles(names, cls.list_of(root, split))
        return names

    @classmethod
    def _listed_names(cls, root: Path, split: str, place: str) -> list[str]:
        """The names in a list, whose lines may be names, files' names with their ending, or paths of pictures."""
        path = root / place
        try:
            lines = list_lines(path, remedy=f"fill it, or correct splits in {FILE_NAME}")
        except FileNotFoundError:
            raise cls._no_place(root, split, place, "a list") from None
        names = []
        for line in lines:
            bare = line.removeprefix("./").lstrip("/")
            stem, _, ending = bare.rpartition(".")
            candidates = [bare, cls.name_of(bare), stem if ending.lower() in PICTURES else None]
            if cls.description.uses_split:
                candidates += [f"{split}/{candidate}" for candidate in candidates if candidate]
            proper = [name for name in candidates if name and _is_proper(name)]
            if not proper:
                raise UserError(f"{path}: got the line {line!r}, wanted the name of an image below {root}")
            there = (name for name in proper if cls._has_image(root, name))
            names.append(next(there, line))
        return names

    @classmethod
    def _found_names(cls, root: Path, split: str, place: str) -> list[str]:
        """The names of the pictures in a folder, with all below, or of a pattern."""
        folder = root / place
        if set(GLOB) & set(place):
            files = [path for path in root.glob(place) if path.is_file()]
        elif folder.is_dir():
            files = [path for path in folder.rglob("*") if path.is_file()]
        else:
            raise cls._no_place(root, split, place, "a list (.txt), a folder or a pattern")
        paths = [path.relative_to(root).as_posix() for path in files]
        found: dict[str, str] = {}
        for path in sorted(path for path in paths if "/." not in f"/{path}"):  # hidden ones are left out
            name = cls.name_of(path)
            if name in found:
                raise UserError(
                    f"{root}: got the pictures {found[name]!r} and {path!r} of one name, wanted one of them"
                )
            if name is not None:
                found[name] = path
        names = sorted(found)
        if not names:
            raise UserError(
                f"{root / FILE_NAME}: splits.{split}: got no picture in {place!r}, wanted files like "
                f"{' or '.join(cls.description.images)}"
            )
        return names

    @classmethod
    def _no_place(cls, root: Path, split: str, place: str, wanted: str) -> UserError:
        above = (root / place).parent
        there = [path.name for path in above.iterdir()] if above.is_dir() else []
        return UserError(
            f"{root / FILE_NAME}: splits.{split}: got {place!r}, which is not there, wanted {wanted}"
            f"{did_you_mean(PurePosixPath(place).name, there)}"
        )

    @classmethod
    def name_of(cls, path: str) -> str | None:
        """The name of the picture at ``path``, relative to the folder; None where no pattern of the images fits it."""
        for pattern in cls.description.images:
            found = _regex(pattern).fullmatch(path)
            if found is not None:
                parts = found.groupdict()
                name = parts.get("name") or parts["stem"]
                return f"{parts['split']}/{name}" if "split" in parts else name
        return None

    @classmethod
    def _has_image(cls, root: Path, name: str) -> bool:
        return any((root / expand(pattern, name)).is_file() for pattern in cls.image_files)


def described_reader(description: DataSetDescription) -> type[DescribedFolder]:
    """The class that reads the folder of ``description``; the same class for equal descriptions."""
    return _reader(description.model_dump_json())


@functools.lru_cache(maxsize=64)
def _reader(text: str) -> type[DescribedFolder]:
    description = DataSetDescription.model_validate_json(text)
    decoders: Mapping[str, Decoder] = {name: label_decoder(task) for name, task in description.tasks.items()}
    facts = {
        "description": description,
        "title": description.name,
        "image_files": _with_endings(description.images, PICTURES),
        "label_files": {name: (_with_endings(task.files, LABELS),) for name, task in description.tasks.items()},
        "decoders": decoders,
        "origin": f"correct them or {FILE_NAME}, or take them out of the lists",
        "remedy": f"correct the files or {FILE_NAME}",
        "__doc__": DescribedFolder.__doc__,
    }
    return type("DescribedFolder", (DescribedFolder,), facts)


def _restore(description: DataSetDescription, state: dict[str, Any]) -> DescribedFolder:
    """What pickle calls: the class of a description has no name that could be imported."""
    reader = described_reader(description)
    found = reader.__new__(reader)
    found.__dict__.update(state)
    return found


def _with_endings(patterns: Patterns, endings: Sequence[str]) -> Patterns:
    """``patterns`` with each of ``endings``, in small and capital letters, for ``.*``."""
    found: list[str] = []
    for pattern in patterns:
        if pattern.endswith(ANY):
            start = pattern.removesuffix("*")
            found += [start + spelled for ending in endings for spelled in (ending, ending.upper())]
        else:
            found.append(pattern)
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _regex(pattern: str) -> re.Pattern[str]:
    """What fits the paths of a pattern of images, with the parts ``split``, ``name`` and ``stem``."""
    words = {"{}": r"(?P<name>.+)", "{split}": r"(?P<split>[^/]+)", "{stem}": r"(?P<stem>[^/]+)"}
    start = pattern.removesuffix(ANY)
    parts = re.split(r"(\{\}|\{split\}|\{stem\})", start)
    ending = rf"\.(?i:{'|'.join(PICTURES)})" if pattern.endswith(ANY) else ""
    seen: set[str] = set()
    text = ""
    for part in parts:
        if part in words:
            text += rf"(?P={part.strip('{}') or 'name'})" if part in seen else words[part]
            seen.add(part)
        else:
            text += re.escape(part)
    return re.compile(text + ending)


def _is_list(place: str) -> bool:
    return PurePosixPath(place).suffix.lower() in (".txt", ".lst")


def _is_proper(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and str(path) == name


# The pixels as viewers show them, by the value of the orientation tag (EXIF 2.3, tag 274).
_TURNS: dict[int, Callable[[Array], Array]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
