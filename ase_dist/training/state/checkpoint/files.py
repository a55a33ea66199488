"""Folders that survive a crash: they appear, are exchanged and go in one rename each."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ase_dist.files import fsync

TEMPORARY = ".tmp-"  # being written
ASIDE = ".old-"  # a whole folder, set aside until the one that replaces it is in place
TRASH = ".trash-"  # being deleted


def make_empty(folder: Path) -> None:
    """Make ``folder``, without what an earlier attempt may have left in it."""
    _delete(folder)
    folder.mkdir()


def put_in_place(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``, in place of what stood there, and bring the names to disk.

    No file system renames onto a full folder, so the old one is set aside first. It comes back if the second rename
    fails; ``sweep`` brings it back if the process dies between the two, and deletes it after both.
    """
    aside = target.with_name(f"{ASIDE}{target.name}")
    if target.exists():
        os.replace(target, aside)  # noqa: PTH105
    try:
        os.replace(new, target)  # noqa: PTH105
    except OSError:
        if aside.exists():
            os.replace(aside, target)  # noqa: PTH105
        raise
    fsync(target.parent)


def remove(folder: Path) -> None:
    """Delete a folder: a crash half-way leaves something that nobody takes for whole."""
    trash = folder.with_name(f"{TRASH}{folder.name}")
    _delete(trash)
    os.replace(folder, trash)  # noqa: PTH105
    _delete(trash)


def discard(folder: Path) -> None:
    """Delete a temporary folder as far as that is possible; ``sweep`` takes the rest the next time."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Tidy up after killed processes: bring back what was set aside, delete what was being written or deleted."""
    for aside in sorted(parent.glob(f"{ASIDE}*")):
        target = aside.with_name(aside.name.removeprefix(ASIDE))
        if target.exists():
            remove(aside)
        else:
            os.replace(aside, target)  # noqa: PTH105
    half_written = ".*.tmp"  # what write_atomic leaves
    for stale in sorted(path for form in (f"{TEMPORARY}*", f"{TRASH}*", half_written) for path in parent.glob(form)):
        _delete(stale)


def wait_until(condition: Callable[[], bool], *, patience: float) -> bool:
    """Whether ``condition`` holds within ``patience`` seconds: a network file system shows new names with a delay."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _delete(path: Path) -> None:
    """Whatever stands there: what a person put in a folder's place may be a file, or a link to elsewhere."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
