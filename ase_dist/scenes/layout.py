"""Scenes as files, in the layout of PASCAL_MT.tgz, so that the loader of PASCAL-Context reads them as they are.

| file                                  | content                                                        |
|---------------------------------------|----------------------------------------------------------------|
| ``JPEGImages/<id>.jpg``               | the picture, quality 95                                        |
| ``semseg/VOC12/<id>.png``             | palette PNG, 0..20                                             |
| ``pascal-context/trainval/<id>.mat``  | ``LabelMap``, uint16, Context ids                              |
| ``human_parts/<id>.mat``              | ``anno``, PASCAL-Part's struct (no object without a VOC class) |
| ``sal_distill/<id>.png``              | grey, 0 or 255                                                 |
| ``normals_distill/<id>.png``          | RGB, n = 2 rgb / 255 - 1                                       |
| ``ImageSets/Context/{train,val}.txt`` | one id per line                                                |
| ``depth/<id>.npy``                    | metres, float32, 0 where it is unknown; made when it is wanted |
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from ase_dist.scenes.render import Scene
from ase_dist.tasks import voc_color

FOLDERS = {
    "image": "JPEGImages",
    "semseg": "semseg/VOC12",
    "label_map": "pascal-context/trainval",
    "parts": "human_parts",
    "saliency": "sal_distill",
    "normals": "normals_distill",
    "lists": "ImageSets/Context",
}
DEPTH_FOLDER = "depth"
VAL_START = 500_000  # numbers of validation scenes start here: more training scenes never become validation scenes

MAT_TEXT = b"MATLAB 5.0 MAT-file, a generated scene".ljust(116)
PALETTE = [channel for index in range(256) for channel in voc_color(index)]


def scene_id(seed: int, index: int) -> str:
    """The name of a scene's files, such as ``0000_000001``."""
    return f"{seed:04d}_{index:06d}"


def make_folders(root: Path) -> None:
    """Create the layout's folders."""
    for folder in FOLDERS.values():
        (root / folder).mkdir(parents=True, exist_ok=True)


def write_lists(root: Path, *, seed: int, train: Iterable[int], val: Iterable[int]) -> None:
    """Write the two image lists."""
    for name, indices in (("train", train), ("val", val)):
        lines = "".join(f"{scene_id(seed, index)}\n" for index in indices)
        (root / FOLDERS["lists"] / f"{name}.txt").write_text(lines, encoding="ascii")


def write_scene(root: Path, name: str, scene: Scene) -> None:
    """Write the six files of one scene into folders that exist."""

    def path(kind: str, suffix: str) -> Path:
        return root / FOLDERS[kind] / f"{name}.{suffix}"

    Image.fromarray(scene.image).save(path("image", "jpg"), quality=95)
    semseg = Image.fromarray(scene.semseg)
    semseg.putpalette(PALETTE)
    semseg.save(path("semseg", "png"))
    Image.fromarray(scene.saliency).save(path("saliency", "png"))
    Image.fromarray(encode_normals(scene.normals)).save(path("normals", "png"), compress_level=3)
    path("label_map", "mat").write_bytes(_mat("LabelMap", scene.label_map))
    objects = []  # of the nested struct anno(imname, objects(class, class_ind, mask, parts(part_name, mask)))
    for i in scene.instances:
        parts = [(part, mask.astype(np.uint8)) for part, mask in i.parts.items()]
        objects.append((i.name, i.voc, i.mask.astype(np.uint8), _struct(("part_name", "mask"), parts)))
    anno = [(name, _struct(("class", "class_ind", "mask", "parts"), objects))]
    path("parts", "mat").write_bytes(_mat("anno", _struct(("imname", "objects"), anno)))


def _mat(variable: str, value: NDArray[Any]) -> bytes:
    """A compressed MATLAB v5 file with a constant header text, where scipy writes the time."""
    buffer = BytesIO()
    savemat(buffer, {variable: value}, do_compression=True)
    return MAT_TEXT + buffer.getvalue()[len(MAT_TEXT) :]


def encode_normals(normals: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Unit vectors [..., 3] as 8-bit RGB; zero becomes mid-grey."""
    return np.asarray(np.round((np.clip(normals, -1, 1) + 1) * np.float32(127.5)), np.uint8)


def _struct(fields: tuple[str, ...], rows: list[tuple[Any, ...]]) -> NDArray[Any]:
    """A MATLAB struct array of shape [1, len(rows)]; an empty matrix [0, 0] for no rows."""
    if not rows:
        return np.zeros((0, 0))
    result = np.empty((1, len(rows)), [(field, object) for field in fields])
    for index, row in enumerate(rows):
        for field, value in zip(fields, row, strict=True):
            result[0, index][field] = value
    return result
