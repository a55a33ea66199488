"""PASCAL-Context for multi-task learning, as the archive PASCAL_MT unpacks (the layout of ASTMT, MTI-Net, M3ViT)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

from ase_dist.data import decode
from ase_dist.data.file_check import Patterns
from ase_dist.data.files import UNPACK_AGAIN, Array
from ase_dist.data.folder import FolderDataset

_LABEL_MAP: Patterns = ("pascal-context/trainval/{}.mat",)


class PascalContext(FolderDataset):
    """The images of ``ImageSets/Context/<split>.txt`` with up to five labels; generated scenes have the same layout."""

    title = "PASCAL-Context (PASCAL_MT)"
    list_folder: ClassVar[str] = "ImageSets/Context"
    image_files: ClassVar[Patterns] = ("JPEGImages/{}.jpg",)
    label_files: ClassVar[Mapping[str, tuple[Patterns, ...]]] = {
        "semseg": (("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"),),
        "human_parts": (("human_parts/{}.mat",),),
        "saliency": (("sal_distill/{}.png",),),
        "edge": (_LABEL_MAP,),
        "normals": (("normals_distill/{}.png",), _LABEL_MAP),
    }
    decoders: ClassVar[Mapping[str, decode.Decoder]] = {"human_parts": decode.human_parts}
    counts: ClassVar[Mapping[str, int]] = {"train": 4998, "val": 5105}
    origin = "the code of ASTMT, MTI-Net, ATRC and InvPT says where PASCAL_MT.tgz is to be had"
    remedy = UNPACK_AGAIN

    def decode_labels(self, name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """As FolderDataset's; ``LabelMap`` is read once for edges and normals."""
        ids = functools.cache(lambda: decode.label_map(self.find(name, _LABEL_MAP), shape))
        labels = {}
        for task in self.tasks:
            if task.name == "edge":
                labels[task.name] = decode.boundaries(ids())
            elif task.name == "normals":
                path = self.find(name, self.files_of(task)[0])
                labels[task.name] = decode.distilled_normals(path, ids())
            else:
                labels[task.name] = self.decode_label(task, name, shape)
        return labels
