"""Files and folders that survive a crash: written whole or not at all, brought to disk, hashed; paths with ~.

A file that this process did not write is opened by ``open_regular``, or read whole by ``read_bytes`` or ``read_text``.
A file is replaced by ``write_atomic`` or ``replacing``. A folder is made under the name ``temporary_for`` gives it and
renamed by ``put_in_place``; ``recover`` and ``sweep`` tidy up after a process that was killed.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from ase_dist.errors import UserError

BLOCK = 1 << 20  # bytes hashed at a time
PROBE = 64 << 10  # bytes for which a folder must have room
SMALL = 64 << 20  # bytes that a file of settings, names or notes may have
LONG_NAME = 220  # bytes of a file's name; with what a temporary name adds, longer ones may pass the 255 allowed
TEMPORARY = ".tmp-"  # a folder that is being written
ASIDE = ".old-"  # a whole folder, set aside until the one that replaces it is in place
TRASH = ".trash-"  # a folder that is being deleted


def expand_user(path: str) -> str:
    """``path`` with the home folder in place of a leading ~ or ~user; as it is where there is no such user.

    Raises UserError for empty text, which pathlib takes for the current folder.
    """
    if not path:
        raise UserError("got an empty text, wanted a path; write . for the current folder")
    return os.path.expanduser(path)  # noqa: PTH111  (pathlib raises where there is no such user)


def home_folder() -> Path:
    """The user's home folder; UserError where there is none, as for a user id that the host does not know."""
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            f"the user id {os.getuid()} has no home folder (HOME is not set, and the host does not know the user); set "
            "HOME (or XDG_CACHE_HOME for the cache), or name the folder"
        ) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes as hexadecimal digits; reads 1 MiB at a time and lets other threads run.

    Raises as ``open_regular``.
    """
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    view = memoryview(block)
    with open_regular(path) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
    return digest.hexdigest()


def refuse_irregular(path: str | Path) -> None:
    """Raise UserError where ``path`` is a pipe, a device or a socket: opening it may wait, reading it may never end.

    Follows links. Nothing is raised for a regular file, a folder, or where there is nothing; OSError as ``os.stat``.
    """
    try:
        _refuse_kind(path, os.stat(path))  # noqa: PTH116  (a text is as good as a Path)
    except FileNotFoundError:
        return


def is_regular(path: Path) -> bool:
    """Whether a file is at ``path``, for a name that decides what its folder is.

    False where there is nothing of that name, or the text can be none. Raises UserError where something else has the
    name: a folder, a pipe, a device, a link to nothing or to itself. Nothing is opened.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and os.path.islink(path):  # noqa: PTH114  (never raises)
            raise UserError(
                f"{path}: got a link that leads nowhere ({error.strerror}), wanted a regular file; remove it"
            ) from None
        return False
    _refuse_kind(path, status)
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: got a folder, wanted a regular file; remove it, or name another file")
    return True


def open_regular(path: str | Path, *, max_bytes: int | None = None) -> BufferedReader:
    """Open a file that somebody else may have written for reading bytes; returns at once, whatever it is.

    Raises UserError for a pipe, a device or a socket, and for a file of more than ``max_bytes``; OSError as ``open``,
    IsADirectoryError for a folder.
    """
    refuse_irregular(path)  # before it is opened: opening a device can have effects
    # O_NONBLOCK for a pipe that has taken the file's place meanwhile; a regular file does not know it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _refuse_kind(path, status)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if max_bytes is not None:
            _refuse_size(path, status.st_size, max_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, *, max_bytes: int = SMALL) -> bytes:
    """The bytes of a file that somebody else may have written. Raises as ``open_regular``."""
    with open_regular(path, max_bytes=max_bytes) as file:
        data = file.read(max_bytes + 1)  # its size may be wrong (/proc), or it may grow
    _refuse_size(path, len(data), max_bytes)
    return data


def read_text(path: str | Path, *, max_bytes: int = SMALL) -> str:
    """The UTF-8 text of a file that somebody else may have written, without a byte-order mark.

    Raises as ``open_regular``, and UserError where it is not UTF-8.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 text ({error.reason}); save the file as UTF-8, or put back a "
            "whole copy of it"
        ) from None


def _refuse_kind(path: str | Path, status: os.stat_result) -> None:
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if kind := kinds.get(stat.S_IFMT(status.st_mode)):
        raise UserError(f"{path}: got {kind}, wanted a regular file; remove it, or name another file")


def _refuse_size(path: str | Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise UserError(
            f"{path}: got a file of more than {max_bytes:,} bytes, the most that such a file may have; "
            "is it another file, or damaged?"
        )


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
    is_long = len(os.fsencode(path.name)) > LONG_NAME
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest() if is_long else path.name
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk's error names no file
        raise
    if durable:
        fsync(path.parent)  # a rename is on disk only when its folder is


def require_room(folder: Path) -> None:
    """Make ``folder`` and write and delete a small file in it: better now than after hours of work. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{platform.node()}.{os.getpid()}.tmp"
    try:
        probe.write_bytes(bytes(PROBE))
        fsync(probe)  # some file systems find room for it only now
    finally:
        probe.unlink(missing_ok=True)


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


# ---------------------------------------------------------------------------------------------------------------------
# Folders: they appear, are exchanged and go in one rename each


def temporary_for(target: Path) -> Path:
    """Where the folder ``target`` is written until it is whole: in the same parent folder, hidden."""
    return target.with_name(f"{TEMPORARY}{target.name}")


def make_empty(folder: Path) -> None:
    """Make ``folder`` anew, without what an earlier attempt may have left in it."""
    _delete(folder)
    folder.mkdir()


def put_in_place(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``, in place of what was there, and bring the names to disk.

    No file system renames onto a full folder, so the old one is set aside first. It comes back if the second rename
    fails; ``recover`` brings it back if the process dies between the two. It is deleted after both.
    """
    aside = target.with_name(f"{ASIDE}{target.name}")
    if target.exists():
        _delete(aside)  # of a process that died after both renames
        os.replace(target, aside)  # noqa: PTH105
    try:
        os.replace(new, target)  # noqa: PTH105
    except OSError:
        if aside.exists():
            os.replace(aside, target)  # noqa: PTH105
        raise
    fsync(target.parent)
    discard(aside)


def remove(folder: Path) -> None:
    """Delete a folder, renamed first: a crash half-way leaves nothing that could be taken for whole."""
    trash = folder.with_name(f"{TRASH}{folder.name}")
    _delete(trash)
    os.replace(folder, trash)  # noqa: PTH105
    _delete(trash)


def discard(folder: Path) -> None:
    """Delete a temporary folder as far as that is possible; ``sweep`` takes the rest the next time."""
    shutil.rmtree(folder, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo what a process that was killed in ``put_in_place`` has left: bring back or delete what it set aside."""
    aside = target.with_name(f"{ASIDE}{target.name}")
    if aside.exists() and target.exists():
        remove(aside)
    elif aside.exists():
        os.replace(aside, target)  # noqa: PTH105


def sweep(parent: Path) -> None:
    """``recover`` every folder in ``parent``, and delete what killed processes were writing or deleting there."""
    for aside in sorted(parent.glob(f"{ASIDE}*")):
        recover(aside.with_name(aside.name.removeprefix(ASIDE)))
    half_written = ".*.tmp"  # what write_atomic leaves
    for stale in sorted(path for form in (f"{TEMPORARY}*", f"{TRASH}*", half_written) for path in parent.glob(form)):
        _delete(stale)


def flush(folder: Path) -> None:
    """Bring every file of a folder to disk before its name is; many at a time, which file systems like better."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fsync, [folder, *folder.rglob("*")]))


def wait_until(condition: Callable[[], bool], *, patience: float, pause: float = 0.05) -> bool:
    """Whether ``condition`` holds within ``patience`` seconds: a network file system shows new names with a delay."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _delete(path: Path) -> None:
    """Whatever is there: what a person put in a folder's place may be a file, or a link to elsewhere."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
