"""Ids that scenes use: VOC's 21 classes, PASCAL-Context's 459, where its normals are valid, names of human parts."""

from __future__ import annotations

import numpy as np

from ase_dist.tasks import VOC_CLASSES

VOC = {name: index for index, name in enumerate(VOC_CLASSES)}

# PASCAL-Context's ids of what scenes hold, from its list of 459 names.
CONTEXT = {
    "aeroplane": 2, "ball": 10, "bicycle": 23, "bird": 25, "boat": 31, "book": 33, "bottle": 34, "building": 44,
    "bus": 45, "car": 59, "cat": 65, "ceiling": 68, "chair": 72, "cow": 98, "cup": 104, "curtain": 105, "dog": 113,
    "door": 115, "fence": 144, "floor": 158, "grass": 187, "ground": 189, "horse": 207, "light": 232,
    "motorbike": 258, "mountain": 259, "person": 284, "picture": 287, "plate": 295, "pottedplant": 308, "road": 324,
    "rug": 330, "sheep": 347, "shelves": 349, "sidewalk": 354, "sky": 360, "sofa": 368, "diningtable": 397,
    "train": 416, "tree": 420, "tvmonitor": 427, "wall": 440, "water": 445, "window": 454,
}  # fmt: skip

# Those of them whose normals PASCAL-Context has: its 170 classes that NYUD-v2 names too, people among them.
NORMALS_VALID = frozenset(
    CONTEXT[name]
    for name in (
        "ball", "bicycle", "book", "bottle", "car", "cat", "ceiling", "chair", "cup", "curtain", "dog", "door",
        "floor", "light", "person", "picture", "plate", "rug", "shelves", "sofa", "diningtable", "tvmonitor", "wall",
        "window",
    )
)  # fmt: skip

# PASCAL-Part's names of the parts that scenes write, and their ids among the six human parts.
PARTS = {
    "head": 1, "hair": 1, "neck": 2, "torso": 2, "luarm": 3, "ruarm": 3, "llarm": 4, "rlarm": 4, "lhand": 4,
    "rhand": 4, "luleg": 5, "ruleg": 5, "llleg": 6, "rlleg": 6, "lfoot": 6, "rfoot": 6,
}  # fmt: skip


def normals_table() -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether the normals are valid, by Context id."""
    table = np.zeros(460, np.bool_)
    table[list(NORMALS_VALID)] = True
    return table
