"""Files that survive a crash: written whole or not at all, brought to disk, hashed; and the home folder in paths."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ase_dist.errors import UserError

BLOCK = 1 << 20  # bytes hashed at a time


def expand_user(path: str) -> str:
    """``path`` with the home folder in place of a leading ~ or ~user; as it is where there is no such user.

    Raises UserError for empty text, which pathlib takes for the current folder.
    """
    if not path:
        raise UserError("got an empty text, wanted a path; write . for the current folder")
    return os.path.expanduser(path)  # noqa: PTH111  (pathlib raises where there is no such user)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes as hexadecimal digits; reads 1 MiB at a time and lets other threads run."""
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
    return digest.hexdigest()


def write_atomic(path: str | Path, data: bytes | str, *, durable: bool = True) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8), or leave it as it was: a reader never sees half a file.

    Makes the parent folder where it is missing. ``durable`` False does not wait for the disk, for what is replaced
    every few seconds and need not survive a power failure. Raises OSError, and takes its temporary file away again.
    """
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder to write to, as with ``save_file``; at the end its file replaces ``path``.

    Makes the parent folder where it is missing. After an error ``path`` is as it was and the temporary file is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)  # a rename is on disk only when its folder is


def json_safe(value: Any) -> Any:
    """Plain data with null for the floats that JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: json_safe(item) for name, item in value.items()}
    if isinstance(value, list):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fsync(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
