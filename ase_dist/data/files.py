"""Files of a data folder, read into arrays.

A file that does not hold what it should is a UserError that names it; where the file system fails for a moment, it is a
RunError that names the file too.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import ExifTags

from ase_dist.data import matlab
from ase_dist.errors import UserError, file_error
from ase_dist.files import open_regular, read_bytes
from ase_dist.picture_files import open_picture

Array = npt.NDArray[Any]

UNPACK_AGAIN = "unpack the archive again"
TURN_PIXELS = "turn the pixels to match the labels and remove the tag"
TURN_LABEL = "turn the label, or turn the image's pixels and remove the tag"
MOST_BYTES = 1 << 30  # of an array or a MATLAB file; a label of 16,000 x 16,000 pixels in float32
OVERSHOOT = 1e-3  # of a picture's fractions below 0 or above 1, which a resizing kernel may leave
NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_COLOUR_MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "YCbCr", "1")


def read_image(path: Path, *, content: bytes | None = None, labelled: bool = False) -> Array:
    """The picture of ``path`` as uint8 [H, W, 3]; grey, palette and CMYK files are converted to RGB.

    A .npy is one too: [H, W, 3] of bytes, or of fractions from 0 to 1.

    Orientation tags are not applied: labels follow the pixels as stored. With ``labelled``, a picture is refused whose
    tag leaves open which way up its labels were drawn: their sizes show it unless the picture is about square or the
    tag keeps its sides. With ``content``, these are the file's bytes and ``path`` is its name only.

    Raises UserError for these, for a missing, corrupt or truncated file and for more than 8 bits a channel.
    """
    if path.suffix.lower() == ".npy" if content is None else content.startswith(npy.MAGIC_PREFIX):
        return _picture_of(path, read_array(path, content=content))
    wanted = "a picture of 8 bits a channel"
    with _reading(path, wanted), open_picture(path, content=content) as picture:
        if picture.mode not in _COLOUR_MODES:
            raise reject(path, f"Pillow's mode {picture.mode!r}", wanted)
        turned = 1
        if labelled:
            with contextlib.suppress(Exception):  # a damaged tag is none
                turned = picture.getexif().get(ExifTags.Base.Orientation, 1)
        sides = sorted(picture.size)
        if turned in (2, 3, 4) or (turned in (5, 6, 7, 8) and sides[0] > 0.95 * sides[1]):
            raise reject(
                path,
                f"a picture with the orientation tag {turned}",
                "one without: the sizes do not tell whether its labels were drawn on the pixels as stored or as shown",
                advice=TURN_PIXELS,
            )
        return np.asarray(picture.convert("RGB"))


def _picture_of(path: Path, values: Array) -> Array:
    """The colours of an array as bytes; UserError for one of another form."""
    wanted = "a picture: [H, W, 3] of bytes, or of fractions from 0 to 1"
    is_number = values.dtype == np.uint8 or values.dtype.kind == "f"
    if values.ndim != 3 or values.shape[2] != 3 or not values.size or not is_number:
        raise reject(path, f"an array of shape {values.shape} and type {values.dtype}", wanted)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    low, high = values.min(), values.max()
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # false where one is NaN
        raise reject(path, f"values from {low:g} to {high:g}", wanted)
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def read_codes(path: Path, *, modes: tuple[str, ...], wanted: str) -> Array:
    """The stored 8-bit values of ``path`` (palette indices stay indices): uint8 [H, W], or [H, W, 3] for mode RGB.

    One-bit pictures (mode ``1``) are read as 0 and 255.
    ``modes`` are Pillow's names of the allowed forms. Raises UserError for any other form (a 16-bit label is
    ``I;16``), for a JPEG under any name unless its colours are wanted, and for an unreadable file.
    """
    with _reading(path, wanted), open_picture(path) as picture:
        if picture.mode not in modes:
            depth = "a 16-bit picture" if picture.mode.startswith("I") else f"Pillow's mode {picture.mode!r}"
            raise reject(path, depth, wanted)
        if picture.format == "JPEG" and "RGB" not in modes:
            raise reject(path, "a JPEG, which does not keep values exactly", wanted)
        return np.asarray(picture.convert("L") if picture.mode == "1" else picture)


def read_variable(path: Path, name: str) -> matlab.Value:
    """The variable ``name`` of a MATLAB file of version 5 to 7; UserError where it is not there or damaged."""
    wanted = f"a MATLAB v5 file with the variable {name!r}"
    value = read_variables(path, name=name, wanted=wanted).get(name)
    if value is None:
        raise reject(path, "a MATLAB file without that variable", wanted)
    return value


def read_variables(path: Path, *, name: str | None = None, wanted: str = "a MATLAB v5 file") -> dict[str, matlab.Value]:
    """All variables of a MATLAB file by name, or ``name`` alone; UserError, of a file that has no such form."""
    with _reading(path, wanted):
        return matlab.read_variables(read_bytes(path, max_bytes=MOST_BYTES), name=name)


def read_matrix(path: Path, name: str, wanted: str) -> Array:
    """The numbers of the variable ``name`` of a MATLAB file; UserError where it is anything else."""
    value = read_variable(path, name)
    if not isinstance(value, np.ndarray):
        what = value.what if isinstance(value, matlab.Unread) else "text" if isinstance(value, str) else "a struct"
        raise reject(path, f"{what} in {name}", wanted)
    return value


def read_array(path: Path, *, content: bytes | None = None) -> Array:
    """The array of a .npy file; UserError if it is unreadable or holds Python objects (never unpickled).

    With ``content``, these are the file's bytes and ``path`` is its name only.
    """
    with _reading(path, "a NumPy .npy file of plain numbers"):
        opened = open_regular(path, max_bytes=MOST_BYTES) if content is None else io.BytesIO(content)
        with opened as file:
            version = npy.read_magic(file)  # type: ignore[no-untyped-call]
            if version not in NPY_HEADERS:
                raise UserError(f"version {version[0]}.{version[1]} of the format")
            shape, fortran_order, dtype = NPY_HEADERS[version](file)  # type: ignore[no-untyped-call]
            if dtype.hasobject or any(side < 0 for side in shape):
                raise UserError(f"the shape {shape} of {dtype}")
            size = math.prod(shape) * dtype.itemsize  # compared before as much is allocated
            numbers = bytearray(file.read(size)) if size <= MOST_BYTES else b""
            if len(numbers) < size:
                raise UserError(f"the shape {shape} of {dtype}, {size:,} bytes, of which {len(numbers):,} are there")
        value = np.frombuffer(numbers, dtype, count=math.prod(shape))
        return value.reshape(shape, order="F" if fortran_order else "C")


def reject(path: Path, got: str, wanted: str, *, advice: str = UNPACK_AGAIN) -> UserError:
    """The error for a file that could be read but holds something else; the caller raises it."""
    return UserError(f"{path}: got {got}, wanted {wanted}; {advice}, or take {path.stem!r} out of the list")


@contextlib.contextmanager
def advising(remedies: Mapping[str, str]) -> Iterator[None]:
    """While open, errors say what ``remedies`` have in place of ``UNPACK_AGAIN`` and other advice of this module."""
    try:
        yield
    except UserError as error:
        sentence = str(error)
        for usual, remedy in remedies.items():
            sentence = sentence.replace(usual, remedy)
        error.args = (sentence,)
        raise


@contextlib.contextmanager
def _reading(path: Path, wanted: str) -> Iterator[None]:
    """Turns whatever a decoder raises, which may be of any type for a damaged file, into the refusal of ``path``."""
    try:
        yield
    except FileNotFoundError:
        raise reject(path, "no such file", wanted) from None
    except UserError as error:
        if str(path) in str(error):
            raise
        raise reject(path, f"an unreadable file ({error})", wanted) from None
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        size = path.stat().st_size if path.is_file() else 0
        sentence = str(reject(path, f"an unreadable file of {size} bytes ({reason:.200})", wanted))
        raise file_error(error, sentence) from None
