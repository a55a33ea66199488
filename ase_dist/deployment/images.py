"""Any picture as RGB, from a file that Pillow opens or from an array: upright, without alpha, with 8 bits a channel."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ase_dist.data.files import UNPACK_AGAIN, advising, read_array
from ase_dist.errors import UserError
from ase_dist.picture_files import formats, open_picture

Pixels = NDArray[np.uint8]  # [H, W, 3]

WHITE = (255, 255, 255, 255)  # the background of transparent pixels
ARRAY = ".npy"
SIXTEEN = 257  # 65535 / 255


def read_rgb(path: Path) -> Pixels:
    """The first picture of a file as ``to_rgb`` makes it, or that of an array [H, W, 3] in a .npy.

    Raises UserError with the reason where it cannot be read.
    """
    try:
        if path.suffix.lower() == ARRAY:
            with advising({f"; {UNPACK_AGAIN}, or take {path.stem!r} out of the list": ""}):
                array = read_array(path)
            if array.ndim != 3 or array.shape[2] not in (3, 4):
                raise UserError(f"got an array {list(array.shape)}, wanted colours, [H, W, 3] or [H, W, 4]")
            return to_rgb(array)
        with open_picture(path) as picture:
            return to_rgb(picture)
    except Exception as error:  # decoders raise errors of any type for broken files
        reason = " ".join(str(error).replace(f"{path}: ", "").split()) or type(error).__name__
        raise UserError(f"{path}: {reason:.300}") from None


def to_rgb(image: Image.Image | NDArray[Any]) -> Pixels:
    """A picture, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], as uint8 [H, W, 3] of its own.

    A picture's orientation tag is applied; transparent pixels get a white background; 16 bits are the range 0..65535;
    floating point is 0..1. Raises UserError for any other form.
    """
    if isinstance(image, Image.Image):
        return np.array(_flat(ImageOps.exif_transpose(image)))
    pixels = _eight_bits(np.asarray(image))
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise UserError(f"got an array {list(np.shape(image))}, wanted [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if pixels.shape[2] == 4:
        return np.array(_flat(Image.fromarray(pixels)))
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def find_images(folder: Path, *, without: Path | None = None) -> Iterator[Path]:
    """The picture files in ``folder`` and below, by extension and in sorted order, without hidden ones.

    Where there is none, arrays (.npy) are taken: the benchmarks of LibMTL have their pictures in such files. The folder
    ``without`` is not searched. Links are followed; each real folder is searched once, so a link to a parent folder
    does not recurse.
    """
    known = {extension for extension, name in Image.registered_extensions().items() if name in formats()}

    def search(place: Path, endings: Collection[str], seen: set[Path]) -> Iterator[Path]:
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if (real := Path(os.path.realpath(path))) not in seen:
                    seen.add(real)
                    yield from search(path, endings, seen)
            elif path.suffix.lower() in endings:
                yield path

    out = set() if without is None else {without.resolve()}
    pictures = list(search(folder, known, {folder.resolve(), *out}))
    yield from pictures or search(folder, (ARRAY,), {folder.resolve(), *out})


def _flat(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(values: NDArray[Any]) -> Pixels:
    """Booleans, bytes, 16-bit whole numbers (perhaps in a larger type) and floating point in 0..1 as bytes."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    is_float = np.issubdtype(values.dtype, np.floating)
    top = 1 if is_float else 65535
    if not (is_float or np.issubdtype(values.dtype, np.integer)) or not values.size:
        raise UserError(f"got an array of {values.dtype} {list(values.shape)}, wanted numbers")
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN fails too
        raise UserError(
            f"got {values.dtype} from {values.min()} to {values.max()}, wanted bytes, 16-bit numbers or 0..1 in "
            "floating point"
        )
    scaled: Pixels = np.rint(values * 255.0 if is_float else values / SIXTEEN).astype(np.uint8)
    return scaled
