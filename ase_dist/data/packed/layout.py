"""The files of a packed data set.

    packed.json      the manifest, written last: a folder without one is no packed data set
    train-000.bin    the first images of the list with their labels, one after another; train-001.bin, ..., val-000.bin
    train-000.json   where each lies in it

An image is its pixels, uint8 [H, W, 3], or its file as it was; a label is its compact form (``labels.py``) as a
Zstandard frame with a checksum, or nothing where the image has none. Offsets count bytes: ``offsets[i]`` are the starts
of image i and of its labels in the order of ``tasks``, and the end of the last. ``sums[i]`` is the CRC-32 of image i
with its labels, compared when a process reads it first. An index has its SHA-256 in the manifest, and the manifest its
own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ase_dist.data.files import Array
from ase_dist.data.labels import compact_form
from ase_dist.description import DataSetDescription
from ase_dist.errors import UserError, file_error, first_problem
from ase_dist.files import is_regular, read_bytes
from ase_dist.json_files import json_digest, kind_of, parse_json
from ase_dist.tasks import Kind

MANIFEST = "packed.json"
VERSION = 3  # also raised when decode.py changes: what was packed before is then packed again
LEVEL = 9  # of compression; higher ones take longer and save little

Pictures = Literal["pixels", "files"]
FileName = Annotated[str, Field(pattern=r"^[a-z]+-[0-9]+\.bin$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1)]
OWN_HASH = "sha256"  # of everything else in the manifest


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Record):
    """One .bin of a split and its index, in the manifest."""

    file: FileName
    bytes: Count
    sha256: Sha256
    index_sha256: Sha256


class PackedManifest(_Record):
    """The contents of packed.json; ``source``, ``description`` and ``fingerprint`` say what was packed.

    ``partial``: images may lack some labels.
    """

    format: Literal["ase_dist packed data"] = "ase_dist packed data"
    version: int = VERSION
    data: str
    description: DataSetDescription | None = None
    tasks: tuple[str, ...]
    pictures: Pictures
    partial: bool = False
    source: str
    fingerprint: Sha256
    software: dict[str, str]
    splits: dict[str, tuple[ShardEntry, ...]]

    def to_json(self) -> str:
        """The text of the file, with the hash of all of it."""
        tree = self.model_dump(mode="json")
        return json.dumps({**tree, OWN_HASH: json_digest(tree)}, indent=1) + "\n"


class ShardIndex(_Record):
    """What is where in one .bin; ``fingerprint`` is that of the files it was made from."""

    fingerprint: Sha256
    bytes: Count
    sha256: Sha256
    names: tuple[str, ...]
    shapes: tuple[tuple[Side, Side], ...]
    offsets: tuple[tuple[Count, ...], ...]
    sums: tuple[Count, ...]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ShardIndex:
        if not len(self.names) == len(self.shapes) == len(self.offsets) == len(self.sums):
            raise ValueError("names, shapes, offsets and sums of different numbers of images")
        if any(list(starts) != sorted(starts) or starts[-1] > self.bytes for starts in self.offsets):
            raise ValueError("offsets that go back, or beyond the end of the file")
        return self


def is_packed(root: Path) -> bool:
    """Whether ``root`` has the manifest of a packed data set, readable or not."""
    return is_regular(root / MANIFEST)


def read_manifest(root: Path) -> PackedManifest:
    """The manifest of a packed data set; UserError for one that is damaged or of another version."""
    path = root / MANIFEST
    with _reading(path):
        tree = parse_json(read_bytes(path))
        if not isinstance(tree, dict):
            raise UserError(f"{kind_of(tree)} in it")
        own_hash = tree.pop(OWN_HASH, None)
        if tree.get("version") == VERSION and own_hash != json_digest(tree):
            raise UserError("its own SHA-256 does not fit")
        manifest = PackedManifest.model_validate(tree)
    if manifest.version != VERSION:
        raise UserError(
            f"{root}: packed by another version of the software ({manifest.version}, wanted {VERSION}); "
            "make it again with launch/prepare_data.py"
        )
    return manifest


def read_index(bin_path: Path, *, sha256: str | None = None) -> ShardIndex:
    """The index of a .bin; UserError for one that is missing, damaged, or not the one with this hash."""
    path = index_path(bin_path)
    with _reading(path):
        content = read_bytes(path)
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise UserError("it is not what its manifest says")
        return ShardIndex.model_validate(parse_json(content))


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


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # pydantic's is a ValueError too
        reason = first_problem(error).why if isinstance(error, ValidationError) else error
        raise file_error(
            error,
            f"{path}: got an unreadable part of a packed data set ({reason}), wanted it whole; "
            "make it again with launch/prepare_data.py",
        ) from None
