"""The folders of LibMTL's and MTAN's benchmarks, arrays of NumPy: NYUv2 with 13 classes, and Cityscapes with 7.

| file                | array                                                                            |
|---------------------|----------------------------------------------------------------------------------|
| SPLIT/image/N.npy   | [H, W, 3] from 0 to 1                                                            |
| SPLIT/label/N.npy   | [H, W] class ids from 0 on, -1 where there is none                               |
| SPLIT/depth/N.npy   | [H, W, 1] metres, of Cityscapes disparities; 0 where there is none               |
| SPLIT/normal/N.npy  | [H, W, 3] unit vectors, x right and y down; 0 where there is none (NYUv2 alone)  |

SPLIT is ``train`` or ``val``, N a number from 0 on. The name of an image is ``SPLIT/N``, which is in no other split.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ase_dist.data import decode
from ase_dist.data.file_check import Patterns
from ase_dist.data.files import UNPACK_AGAIN
from ase_dist.data.folder import FolderDataset, find_roots
from ase_dist.errors import UserError, file_error

UNLABELLED = -1


class LibMTLFolder(FolderDataset):
    """The images of one split, by number: every array in ``SPLIT/image``, with the labels of the same number.

    Labels are resized to their image where they are of another size. Pictures become 8 bits a channel, which they were
    before they were resized for the benchmark; normals become codes of 8 bits too, at most 0.3 degrees off.
    """

    list_folder: ClassVar[str] = "train/image"
    image_files: ClassVar[Patterns] = ("{split}/image/{}.npy",)
    label_files: ClassVar[Mapping[str, tuple[Patterns, ...]]] = {
        "semseg": (("{split}/label/{}.npy",),),
        "depth": (("{split}/depth/{}.npy",),),
        "normals": (("{split}/normal/{}.npy",),),
    }
    origin = "the READMEs of LibMTL (examples/nyu, examples/cityscapes) and of MTAN say where the archive is to be had"
    remedy = UNPACK_AGAIN

    @classmethod
    def list_of(cls, root: Path, split: str) -> Path:
        """As FolderDataset's: the folder of the pictures, which is the list."""
        return root / split / "image"

    @classmethod
    def read_names(cls, root: Path, split: str) -> list[str]:
        """``SPLIT/N`` for every array in the folder of the pictures, by number; UserError where there is none."""
        folder = cls.list_of(root, split)
        try:
            stems = [path.stem for path in folder.iterdir() if path.suffix == ".npy" and not path.name.startswith(".")]
        except FileNotFoundError:
            deeper = find_roots(root, cls.list_folder)
            advice = (
                f"give data.root={deeper[0]}" if deeper and deeper != [root] else f"check data.root, or {cls.remedy}"
            )
            raise UserError(f"{root}: got no folder {split}/image, wanted that of {cls.title}; {advice}") from None
        except OSError as error:
            raise file_error(error, f"{folder}: cannot be read ({error.strerror or error}), wanted a folder") from None
        odd = sorted(stem for stem in stems if not (stem.isascii() and stem.isdecimal() and str(int(stem)) == stem))
        if odd:
            raise UserError(
                f"{folder}: got the file {odd[0] + '.npy'!r}, wanted numbers as in 0.npy; remove or rename it"
            )
        if not stems:
            raise UserError(f"{folder}: got no array in it, wanted pictures as in 0.npy; {cls.remedy}")
        return [f"{split}/{number}" for number in sorted(map(int, stems))]


class NYUv2(LibMTLFolder):
    """NYUv2 as MTAN prepared it: 795 training and 654 validation images of 288 x 384, 13 classes, depth, normals."""

    title = "NYUv2 with 13 classes (LibMTL, MTAN)"
    decoders: ClassVar[Mapping[str, decode.Decoder]] = {
        "semseg": functools.partial(decode.class_ids, classes=13, unlabelled=UNLABELLED)
    }
    counts: ClassVar[Mapping[str, int]] = {"train": 795, "val": 654}


class Cityscapes(LibMTLFolder):
    """Cityscapes as MTAN prepared it: 2975 training and 500 validation images of 128 x 256, 7 classes, disparities."""

    title = "Cityscapes with 7 classes (LibMTL, MTAN)"
    decoders: ClassVar[Mapping[str, decode.Decoder]] = {
        "semseg": functools.partial(decode.class_ids, classes=7, unlabelled=UNLABELLED),
        "depth": decode.disparity,
    }
    counts: ClassVar[Mapping[str, int]] = {"train": 2975, "val": 500}
