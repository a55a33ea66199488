"""NYUD-v2 for multi-task learning, as the public archives NYUD_MT unpack (the layouts of ASTMT, MTI-Net and ATRC)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from ase_dist.data import decode
from ase_dist.data.file_check import Patterns
from ase_dist.data.files import Array
from ase_dist.data.folder import FolderDataset

_DECODERS: Mapping[str, Callable[[Path, tuple[int, int]], Array]] = {
    "semseg": decode.nyud_classes,
    "depth": decode.depth,
    "normals": decode.normals,
    "edge": decode.edge_picture,
}


class NYUD(FolderDataset):
    """The images of ``gt_sets/<split>.txt`` (795 train, 654 val, 640 x 480) with up to four labels.

    The archives differ in file types, and each is read: pictures .jpg or .png, segmentation .png or .mat (0 unlabelled
    and ignored, 1..40 classes), depth .npy or .mat in metres, normals .npy (vectors), .png or .jpg, edges .npy or .png.
    """

    title = "NYUD-v2 (NYUD_MT)"
    list_folder: ClassVar[str] = "gt_sets"
    image_files: ClassVar[Patterns] = ("images/{}.jpg", "images/{}.png")
    label_files: ClassVar[Mapping[str, tuple[Patterns, ...]]] = {
        "semseg": (("segmentation/{}.png", "segmentation/{}.mat"),),
        "depth": (("depth/{}.npy", "depth/{}.mat"),),
        "normals": (("normals/{}.npy", "normals/{}.png", "normals/{}.jpg"),),
        "edge": (("edge/{}.npy", "edge/{}.png"),),
    }
    counts: ClassVar[Mapping[str, int]] = {"train": 795, "val": 654}
    origin = "the code of ASTMT, MTI-Net, ATRC and InvPT says where NYUD_MT.tgz is to be had"

    def decode_labels(self, name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """As FolderDataset's."""
        paths = {task.name: self.find(name, self.label_files[task.name][0]) for task in self.tasks}
        return {task: _DECODERS[task](path, shape) for task, path in paths.items()}
