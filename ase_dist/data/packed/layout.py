"""The files of a packed data set.

    packed.json      the manifest, written last: a folder without one is no packed data set
    train-000.bin    the first images of the list with their labels, one after another; train-001.bin, ..., val-000.bin
    train-000.json   where each lies in it

An image is its pixels, uint8 [H, W, 3], or its file as it was; a label is its compact form (``labels.py``) as a
Zstandard frame with a checksum. Offsets count bytes: ``offsets[i]`` are the starts of image i and of its labels in the
order of ``tasks``, and the end of the last.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ase_dist.data.files import Array
from ase_dist.data.labels import compact_form
from ase_dist.description import DataSetDescription
from ase_dist.errors import UserError, file_error, first_problem
from ase_dist.files import read_bytes
from ase_dist.tasks import Kind

MANIFEST = "packed.json"
VERSION = 2  # also raised when decode.py changes: what was packed before is then packed again
LEVEL = 9  # of compression; higher ones take longer and save little

Pictures = Literal["pixels", "files"]
FileName = Annotated[str, Field(pattern=r"^[a-z]+-[0-9]+\.bin$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
RecordT = TypeVar("RecordT", bound="_Record")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Record):
    """One .bin of a split and its index, in the manifest."""

    file: FileName
    bytes: Count
    sha256: Sha256
    index_sha256: Sha256


class PackedManifest(_Record):
    """The contents of packed.json; ``source``, ``description`` and ``fingerprint`` say what was packed."""

    format: Literal["ase_dist packed data"] = "ase_dist packed data"
    version: int = VERSION
    data: str
    description: DataSetDescription | None = None
    tasks: tuple[str, ...]
    pictures: Pictures
    source: str
    fingerprint: Sha256
    software: dict[str, str]
    splits: dict[str, tuple[ShardEntry, ...]]


class ShardIndex(_Record):
    """What is where in one .bin; ``fingerprint`` is that of the files it was made from."""

    fingerprint: Sha256
    bytes: Count
    sha256: Sha256
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    offsets: tuple[tuple[Count, ...], ...]


def is_packed(root: Path) -> bool:
    """Whether ``root`` has the manifest of a packed data set, readable or not."""
    return (root / MANIFEST).is_file()


def read_manifest(root: Path) -> PackedManifest:
    """The manifest of a packed data set; UserError for one that is damaged or of another version."""
    manifest = _read(PackedManifest, root / MANIFEST)
    if manifest.version != VERSION:
        raise UserError(
            f"{root}: packed by another version of the software ({manifest.version}, wanted {VERSION}); "
            "make it again with launch/prepare_data.py"
        )
    return manifest


def read_index(bin_path: Path, *, sha256: str | None = None) -> ShardIndex:
    """The index of a .bin; UserError for one that is missing, damaged, or not the one with this hash."""
    return _read(ShardIndex, index_path(bin_path), sha256=sha256)


def index_path(bin_path: Path) -> Path:
    """The index of a .bin, next to it."""
    return bin_path.with_suffix(".json")


def pack_label(label: Array) -> bytes:
    """A compact label as bytes."""
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(np.ascontiguousarray(label).data)


def unpack_label(frame: memoryview, kind: Kind, shape: tuple[int, int]) -> Array:
    """The compact label of an image of ``shape`` [H, W], read-only; UserError if the bytes are damaged."""
    full, dtype = compact_form(kind, shape)
    try:
        if zstandard.frame_content_size(frame) != math.prod(full) * np.dtype(dtype).itemsize:
            raise UserError("damaged label (of another size)")
        content = zstandard.ZstdDecompressor().decompress(frame)  # a new one: they may not be shared among threads
    except zstandard.ZstdError as error:
        raise UserError(f"damaged label ({error})") from None
    return np.frombuffer(content, dtype).reshape(full)


def _read(form: type[RecordT], path: Path, *, sha256: str | None = None) -> RecordT:
    try:
        content = read_bytes(path)
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise UserError("it is not what its manifest says")
        return form.model_validate_json(content)
    except (OSError, ValueError) as error:  # pydantic's is a ValueError too
        reason = first_problem(error).why if isinstance(error, ValidationError) else error
        raise file_error(
            error,
            f"{path}: got an unreadable part of a packed data set ({reason}), wanted it whole; "
            "make it again with launch/prepare_data.py",
        ) from None
