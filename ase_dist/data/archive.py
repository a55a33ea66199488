"""Unpacking a tar archive from an unknown source: only regular files, only into one folder, all of them or none."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ase_dist.errors import UserError
from ase_dist.files import discard, put_in_place

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
LARGEST_FILE = 1 << 28  # bytes; the largest that the data sets have is a few MB
LARGEST_TOTAL = 1 << 36
NEWEST = 1 << 32  # seconds since 1970
BLOCK = 1 << 20

# What Python raises on truncated, damaged and foreign archives.
_BROKEN = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, ValueError)


class UnsafeArchiveError(UserError):
    """An archive with a member that is not unpacked."""

    def __init__(self, archive: Path, member: tarfile.TarInfo, what: str) -> None:
        super().__init__(
            f"{archive}: the member {member.name!r} {what}, wanted plain files inside one folder; "
            "nothing was unpacked, fetch the archive from where it was published"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack ``archive`` into the new folder ``folder``, which appears when everything is in it.

    Only the bytes and the times of regular files are taken: no owner, no permission, no link. Raises UserError for
    an archive that is damaged, or that has a member which leaves the folder, is no file or folder, comes twice or is
    too large, and OSError where the folder cannot be written. Nothing is left on disk after an error.
    """
    making = folder.with_name(f"{folder.name}.making-{os.getpid()}")
    try:
        making.mkdir(parents=True)
        with tarfile.open(archive, mode="r:*") as members:
            for path, member in _checked(archive, members):
                content = members.extractfile(member) if member.isreg() else None
                if content is None:  # a folder
                    continue
                target = making / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    shutil.copyfileobj(content, file, BLOCK)
                time = min(max(member.mtime, 0), NEWEST)
                os.utime(target, (time, time))
            # tarfile takes a damaged header for the end; only zeros follow the real one. This also checks gzip's sum.
            assert members.fileobj is not None
            while block := members.fileobj.read(BLOCK):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("a member's header is damaged")
        put_in_place(making, folder)
    except UnsafeArchiveError:
        raise
    except _BROKEN as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"{archive}: got an unreadable archive ({reason}), wanted a whole {', '.join(SUFFIXES)}; fetch it again"
        ) from None
    finally:
        discard(making)


def _checked(archive: Path, members: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """The members of an archive and their plain paths (no ``./``); raises at the first that may not be unpacked.

    A path is either a file, once, or a folder, which may be listed again.
    """
    is_folder: dict[PurePosixPath, bool] = {}  # for every path so far
    total = 0
    for member in members:
        path = PurePosixPath(member.name)
        total += member.size
        wrong = None
        if path.is_absolute() or "\\" in member.name or "\0" in member.name:
            wrong = "is no relative path"
        elif ".." in path.parts:
            wrong = "leads out of the folder"
        elif member.islnk() or member.issym():
            wrong = f"is a link to {member.linkname!r}"
        elif not (member.isreg() or member.isdir()):
            wrong = "is neither a file nor a folder"
        elif not all(is_folder.setdefault(parent, True) for parent in path.parents):
            wrong = "lies in what was a file before"
        elif path in is_folder and not (is_folder[path] and member.isdir()):
            wrong = "comes twice"
        elif member.size > LARGEST_FILE:
            wrong = f"has {member.size} bytes, more than the {LARGEST_FILE} of any file"
        elif total > LARGEST_TOTAL:
            wrong = f"makes it {total} bytes unpacked, more than {LARGEST_TOTAL}"
        if wrong:
            raise UnsafeArchiveError(archive, member, wrong)
        is_folder[path] = member.isdir()
        yield path, member
    if all(is_folder.values()):
        raise tarfile.ReadError("there is no file in it")
