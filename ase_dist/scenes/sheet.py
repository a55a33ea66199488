"""The contact sheet: one row per scene, with its picture and its five labels in colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ase_dist.errors import UserError
from ase_dist.files import replacing
from ase_dist.image_size import ImageSize
from ase_dist.overwriting import is_own_png, png_mark, refuse_foreign
from ase_dist.scenes.layout import encode_normals
from ase_dist.scenes.render import Scene, render_scene
from ase_dist.tasks import PASCAL_TASKS, voc_color

Bytes = NDArray[np.uint8]
GAP, HEADER = 4, 18
SHOWN = (7, 100, 53, 57, 74, 12)  # of data set 0: two people, a street, a room, traffic, a lake, a table
PAPER = (255, 255, 255)


def contact_sheet(path: Path, *, indices: Sequence[int] = SHOWN, seed: int = 0, size: ImageSize | int = 224) -> None:
    """Render the scenes ``indices`` of data set ``seed`` and write the sheet to ``path`` as a PNG.

    Raises UserError where ``path`` is a file that is no such sheet.
    """
    refuse_foreign([Path(path)], is_own=is_own_png, option="--contact-sheet")
    if not indices:
        raise UserError("contact sheet: no scenes named, wanted at least one index")
    rows = [panels(render_scene(seed=seed, index=index, size=size)) for index in indices]
    titles = [
        "Picture",
        *(PASCAL_TASKS[name].title for name in ("semseg", "human_parts", "saliency", "edge", "normals")),
    ]
    height, width = (side + GAP for side in ImageSize.read(size))  # of a panel with the gap after it
    sheet = Image.new("RGB", (len(titles) * width - GAP, HEADER + len(rows) * height - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * width + 2, 3), title, fill=(0, 0, 0))
        for row, row_panels in enumerate(rows):
            sheet.paste(Image.fromarray(row_panels[column]), (column * width, HEADER + row * height))
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, "PNG", optimize=True, pnginfo=png_mark())


def panels(scene: Scene) -> list[Bytes]:
    """The picture and its labels as RGB pictures [H, W, 3]: classes, parts, saliency, edges, normals."""
    colors = np.array([voc_color(index) for index in range(256)], np.uint8)
    edges = np.where(boundaries(scene.label_map), np.uint8(0), np.uint8(255))
    normals = np.where((scene.normals != 0).any(axis=-1, keepdims=True), encode_normals(scene.normals), np.uint8(0))
    return [scene.image, colors[scene.semseg], colors[scene.parts], _grey(scene.saliency), _grey(edges), normals]


def boundaries(label_map: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Pixels whose right or lower neighbour has another label."""
    edges = np.zeros(label_map.shape, np.bool_)
    edges[:, :-1] |= label_map[:, :-1] != label_map[:, 1:]
    edges[:-1] |= label_map[:-1] != label_map[1:]
    return edges


def _grey(values: Bytes) -> Bytes:
    return np.repeat(values[..., None], 3, axis=-1)
