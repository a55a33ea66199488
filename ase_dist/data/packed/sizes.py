"""Labels stored at another size than their image: they are resized when read, and reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ase_dist.data.files import Array, read_array, read_variables
from ase_dist.data.matlab import Struct
from ase_dist.picture_files import open_picture


def other_sizes(root: Path, paths: Iterable[Path], shape: tuple[int, ...]) -> Iterator[str]:
    """A line for each readable label file whose height and width are not ``shape``'s."""
    for path in paths:
        size = stored_size(path)
        if size is not None and size != shape[:2]:
            yield (
                f"{path.relative_to(root)}: {size[1]} x {size[0]} pixels, its image {shape[1]} x {shape[0]}; "
                "it is resized to the image"
            )


def stored_size(path: Path) -> tuple[int, int] | None:
    """[H, W] of a readable label file; None where it has none (a struct without any person's part)."""
    if path.suffix == ".npy":
        return _size(read_array(path))
    if path.suffix != ".mat":
        with open_picture(path) as picture:
            return picture.height, picture.width
    variables = read_variables(path)
    anno = variables.get("anno")
    if isinstance(anno, Struct):
        objects = anno.elements[0].get("objects") if anno.elements else None
        first = objects.elements[0].get("mask") if isinstance(objects, Struct) and objects.elements else None
        return _size(first) if isinstance(first, np.ndarray) else None  # only people need a mask
    sizes = [_size(value) for value in variables.values() if isinstance(value, np.ndarray)]
    return next((size for size in sizes if size is not None), None)


def _size(values: Array) -> tuple[int, int] | None:
    """(H, W) of an array [H, W], [H, W, 3], [H, W, 1] or [1, H, W]."""
    plain = values.squeeze()
    return (plain.shape[0], plain.shape[1]) if plain.ndim >= 2 else None
