"""Pictures that this process did not write, opened by Pillow: a limit on pixels, and no format that runs something."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ase_dist.errors import UserError
from ase_dist.files import open_regular

MOST_PIXELS = 1 << 27  # 134 million, 400 MB as RGB; a few kB of PNG can stand for billions
# Formats that Pillow only names, or hands to another program (EPS to Ghostscript, which runs what is in the file).
UNWANTED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@contextlib.contextmanager
def open_picture(path: Path, *, content: bytes | None = None, most_pixels: int = MOST_PIXELS) -> Iterator[Image.Image]:
    """The picture in a file, or in ``content``; its pixels are decoded when they are asked for, inside the block.

    Raises UserError for a pipe or a device and above ``most_pixels``, OSError as ``open``; on a damaged file Pillow
    raises errors of any type, here and when it decodes.
    """
    with contextlib.ExitStack() as opened:
        file: io.BytesIO | io.BufferedReader = io.BytesIO(content) if content is not None else open_regular(path)
        opened.enter_context(file)
        try:
            picture = opened.enter_context(Image.open(file, formats=formats()))
        except UnidentifiedImageError:  # its own text has the file's representation in Python
            raise UnidentifiedImageError("cannot identify its format") from None
        if picture.width * picture.height > most_pixels:
            raise UserError(f"{picture.width} x {picture.height} pixels, more than {most_pixels:,}")
        yield picture


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which they are tried."""
    Image.init()
    usual = ("JPEG", "PNG")
    return (*usual, *sorted(set(Image.OPEN) - UNWANTED - set(usual)))
