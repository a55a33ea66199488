"""Files to which a run appends whole lines, and the error of a record that cannot be written.

A run whose records (numbers, logs, pictures) cannot be written saves a checkpoint and ends: see ``Trainer``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ase_dist.errors import ExitCode, RunError, exit_code_of
from ase_dist.files import refuse_irregular


class RecordError(RunError):
    """A file that a run writes for its readers could not be written, as on a full disk."""


@contextmanager
def recording(path: Path) -> Iterator[None]:
    """Raise RecordError, which names ``path``, for an OSError of writing there.

    Its exit code is NOT_SAVED, or IO_ERROR where the file system failed for a moment.
    """
    try:
        yield
    except OSError as error:
        is_temporary = exit_code_of(error) is ExitCode.IO_ERROR
        raise RecordError(
            f"{path} cannot be written ({error.strerror or error})",
            exit_code=ExitCode.IO_ERROR if is_temporary else ExitCode.NOT_SAVED,
        ) from None


class LineFile:
    """The file ``path``, open for appending text: what is appended is there at once and whole, or not at all.

    Raises UserError where it is no regular file: opening a pipe would wait for its reader.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with recording(path):
            refuse_irregular(path)
            self._file = path.open("ab", buffering=0)

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, text: str) -> None:
        """Append ``text`` as UTF-8. Raises RecordError; the file is then as it was."""
        with recording(self.path):
            size = os.fstat(self._file.fileno()).st_size
            data = memoryview(text.encode(errors="replace"))
            try:
                while data:
                    data = data[self._file.write(data) :]  # a disk that is nearly full takes a part of it
            except OSError:
                with suppress(OSError):  # a pipe or a device has no size
                    os.ftruncate(self._file.fileno(), size)
                raise

    def sync(self) -> None:
        """Return when all is on disk; raises RecordError."""
        with recording(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing is left to be written."""
        with suppress(OSError):  # NFS may tell of a full disk here: ``sync`` says it
            self._file.close()
