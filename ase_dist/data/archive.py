"""Unpacking a tar archive that nobody vouches for: regular files only, inside their folder, all of them or none."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ase_dist.errors import UserError
from ase_dist.files import fsync

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
LARGEST_FILE = 1 << 28  # bytes; the largest that the data sets have is a few MB
LARGEST_TOTAL = 1 << 36
NEWEST = 1 << 32  # seconds since 1970
BLOCK = 1 << 20

# What Python raises on truncated, damaged and foreign archives, beside OSError.
_BROKEN = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, ValueError)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack ``archive`` into the new folder ``folder``, which appears when everything is in it.

    Only the bytes and the times of regular files are taken: no owner, no permission, no link. Raises UserError for
    an archive that is damaged, or that has a member which leaves the folder, is no file or folder, comes twice or is
    too large; OSError where the folder cannot be written. Then nothing is left behind.
    """
    making = folder.with_name(f"{folder.name}.making-{os.getpid()}")
    try:
        making.mkdir(parents=True)
        with _reading(archive), tarfile.open(archive, mode="r:*") as members:
            for path, member in _checked(archive, members):
                if member.isreg():
                    _write(making / path, members, member)
            _check_end(members)
        making.replace(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except UnsafeArchiveError:
        raise
    except _BROKEN as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"{archive}: got an unreadable archive ({reason}), wanted a whole {', '.join(SUFFIXES)}; fetch it again"
        ) from None


def _checked(archive: Path, members: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """The members of an archive that may be unpacked, and their plain paths (no ``./``); raises at the first other."""
    seen: dict[PurePosixPath, bool] = {}  # and whether it is a folder
    total = 0
    for member in members:
        total += member.size
        path = _safe_path(archive, member)
        _check_new(archive, path, member, seen)
        _check_size(archive, member, total)
        yield path, member
    if False in seen.values():
        return
    raise tarfile.ReadError("there is no file in it")


class UnsafeArchiveError(UserError):
    """An archive with a member that is not unpacked."""

    def __init__(self, archive: Path, member: tarfile.TarInfo, what: str) -> None:
        super().__init__(
            f"{archive}: the member {member.name!r} {what}, wanted plain files inside one folder; "
            "nothing was unpacked, fetch the archive from where it was published"
        )


def _safe_path(archive: Path, member: tarfile.TarInfo) -> PurePosixPath:
    path = PurePosixPath(member.name)
    if path.is_absolute() or "\\" in member.name or "\0" in member.name:
        raise UnsafeArchiveError(archive, member, "is no relative path")
    if ".." in path.parts:
        raise UnsafeArchiveError(archive, member, "leads out of the folder")
    if member.islnk() or member.issym():
        raise UnsafeArchiveError(archive, member, f"is a link to {member.linkname!r}")
    if not (member.isreg() or member.isdir()):
        raise UnsafeArchiveError(archive, member, "is neither a file nor a folder")
    return path


def _check_new(archive: Path, path: PurePosixPath, member: tarfile.TarInfo, seen: dict[PurePosixPath, bool]) -> None:
    """A file comes once, and a folder is never a file too; folders may come again."""
    for parent in path.parents:
        if not seen.setdefault(parent, True):
            raise UnsafeArchiveError(archive, member, "lies in what was a file before")
    if path in seen and not (seen[path] and member.isdir()):
        raise UnsafeArchiveError(archive, member, "comes twice")
    seen[path] = member.isdir()


def _check_size(archive: Path, member: tarfile.TarInfo, total: int) -> None:
    if member.size > LARGEST_FILE:
        raise UnsafeArchiveError(archive, member, f"has {member.size} bytes, more than the {LARGEST_FILE} of any file")
    if total > LARGEST_TOTAL:
        raise UnsafeArchiveError(archive, member, f"makes it {total} bytes unpacked, more than {LARGEST_TOTAL}")


def _check_end(members: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end: after the real one there are zeros only. Also checks gzip's sum."""
    assert members.fileobj is not None
    while block := members.fileobj.read(BLOCK):
        if block.strip(b"\0"):
            raise tarfile.ReadError("a member's header is damaged")


def _write(path: Path, members: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    content = members.extractfile(member)
    assert content is not None  # regular files have one
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        shutil.copyfileobj(content, file, BLOCK)
    time = min(max(member.mtime, 0), NEWEST)
    os.utime(path, (time, time))
