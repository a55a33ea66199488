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
from typing import TYPE_CHECKING

from ase_dist.errors import UserError
from ase_dist.files import discard, open_regular, put_in_place

if TYPE_CHECKING:
    from typing_extensions import Self

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
LARGEST_FILE = 1 << 28  # bytes; the largest that the data sets have is a few MB
LARGEST_TOTAL = 1 << 36
NEWEST = 1 << 32  # seconds since 1970
MOST_MEMBERS = 1 << 20  # the largest data set has 60,000
LONGEST_HEADER = 1 << 16  # bytes of a name or of other facts in a header of its own, read into memory at once
DEEPEST = 32  # folders in each other
LONGEST_PART = 255  # bytes of a name, the most that file systems take
BLOCK = 1 << 20

# types of headers about the member that follows
EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

# What Python raises on truncated, damaged and foreign archives.
_BROKEN = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, ValueError)


class UnsafeArchiveError(UserError):
    """An archive with a member that is not unpacked."""

    def __init__(self, archive: Path, member: tarfile.TarInfo, what: str) -> None:
        name = repr(member.name)
        shown = name if len(name) <= 200 else f"{name[:200]}..."
        super().__init__(
            f"{archive}: the member {shown} {what}, wanted plain files inside one folder; "
            "nothing was unpacked, fetch the archive from where it was published"
        )


class _Header(tarfile.TarInfo):
    """A header that is refused before tarfile reads what it asks for, or goes back by a negative size for ever."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"a header says {header.size} bytes")
        if header.type in EXTENSIONS and header.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {header.size} bytes, more than the {LONGEST_HEADER} of any name")
        return header


def unpack(archive: Path, folder: Path) -> None:
    """Unpack ``archive`` into the new folder ``folder``, which appears when everything is in it.

    Only the bytes and the times of regular files are taken: no owner, no permission, no link. Raises UserError for
    an archive that is damaged, or that has a member which leaves the folder, is no file or folder, comes twice or is
    too large, and OSError where the folder cannot be written. Nothing is left on disk after an error.
    """
    making = folder.with_name(f"{folder.name}.making-{os.getpid()}")
    try:
        making.mkdir(parents=True)
        with open_regular(archive) as opened, tarfile.open(fileobj=opened, mode="r:*", tarinfo=_Header) as members:
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
    except (*_BROKEN, RecursionError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of a decompressor
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "headers of headers without end"
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
    for count, member in enumerate(members, start=1):
        path = PurePosixPath(member.name)
        total += member.size
        wrong = _wrong_name(member)
        if wrong:
            pass
        elif member.islnk() or member.issym():
            wrong = f"is a link to {member.linkname!r:.200}"
        elif not (member.isreg() or member.isdir()):
            wrong = "is neither a file nor a folder"
        elif member.issparse():
            wrong = "is a file with holes, of which a few bytes can stand for many"
        elif not all(is_folder.setdefault(parent, True) for parent in path.parents):
            wrong = "lies in what was a file before"
        elif path in is_folder and not (is_folder[path] and member.isdir()):
            wrong = "comes twice"
        elif not 0 <= member.size <= LARGEST_FILE:
            wrong = f"has {member.size} bytes, more than the {LARGEST_FILE} of any file"
        elif total > LARGEST_TOTAL:
            wrong = f"makes it {total} bytes unpacked, more than {LARGEST_TOTAL}"
        elif count > MOST_MEMBERS:
            wrong = f"is one of more than {MOST_MEMBERS}"
        if wrong:
            raise UnsafeArchiveError(archive, member, wrong)
        is_folder[path] = member.isdir()
        yield path, member
    if all(is_folder.values()):
        raise tarfile.ReadError("there is no file in it")


def _wrong_name(member: tarfile.TarInfo) -> str | None:
    """What is wrong with a member's name."""
    path = PurePosixPath(member.name)
    wrong = None
    if path.is_absolute() or "\\" in member.name or "\0" in member.name:
        wrong = "is no relative path"
    elif ".." in path.parts:
        wrong = "leads out of the folder"
    elif not path.parts and not member.isdir():
        wrong = "has no name"
    elif len(path.parts) > DEEPEST:
        wrong = f"lies in {len(path.parts) - 1} folders, more than {DEEPEST}"
    elif any(len(os.fsencode(part)) > LONGEST_PART for part in path.parts):
        wrong = f"has a part of more than {LONGEST_PART} bytes in its name"
    return wrong
