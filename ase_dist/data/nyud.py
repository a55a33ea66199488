"""NYUD-v2 for multi-task learning, as the public archives NYUD_MT unpack (the layouts of ASTMT, MTI-Net and ATRC)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ase_dist.data import decode
from ase_dist.data.file_check import Patterns
from ase_dist.data.files import UNPACK_AGAIN
from ase_dist.data.folder import FolderDataset


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
    decoders: ClassVar[Mapping[str, decode.Decoder]] = {"semseg": decode.nyud_classes}
    counts: ClassVar[Mapping[str, int]] = {"train": 795, "val": 654}
    origin = "the code of ASTMT, MTI-Net, ATRC and InvPT says where NYUD_MT.tgz is to be had"
    remedy = UNPACK_AGAIN
