"""Labels stored at another size than their image: they are resized when read, and reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from ase_dist.data.files import Array, read_array


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
        with Image.open(path) as picture:
            return picture.height, picture.width
    variables = loadmat(path)
    if "anno" in variables:
        try:
            return _size(np.ravel(variables["anno"][0][0][1])[0][2])  # of the first object's mask
        except (IndexError, TypeError):  # no object, or none with a mask, which only people need
            return None
    sizes = [_size(value) for name, value in variables.items() if not name.startswith("__")]
    return next((size for size in sizes if size is not None), None)


def _size(values: Array) -> tuple[int, int] | None:
    """(H, W) of an array [H, W], [H, W, 3], [H, W, 1] or [1, H, W]."""
    plain = values.squeeze()
    return (plain.shape[0], plain.shape[1]) if plain.ndim >= 2 else None
