"""A folder of checkpoints: what it holds, in which order, what retention deletes, and the pointers latest and best.

Layout: ``step_N/`` are checkpoints; ``latest`` and ``best`` are files that hold the name of one. Resuming goes by the
folders: ``latest`` is for people and scripts, and a pointer that names anything but a ``step_N`` here is ignored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from ase_dist.errors import UserError
from ase_dist.files import read_bytes
from ase_dist.training.state.checkpoint.manifest import read_manifest
from ase_dist.training.state.checkpoint.shards import file_size

LOGGER = logging.getLogger(__name__)
LATEST, BEST = "latest", "best"
LONGEST_POINTER = 10_000  # bytes
_NAME = re.compile(r"step_(0|[1-9][0-9]*)", re.ASCII)


class Listed(NamedTuple):
    """A checkpoint by its manifest and file sizes; ``sequence`` is None where the manifest is missing or damaged."""

    name: str
    step: int
    sequence: int | None
    is_whole: bool  # hashes are not compared


def checkpoint_name(step: int) -> str:
    """The name of its folder. Raises UserError for a negative step."""
    if step < 0:
        raise UserError(f"step: got {step}, wanted 0 or more")
    return f"step_{step}"


def list_checkpoints(folder: Path) -> list[Listed]:
    """Every ``step_N`` in ``folder``, last saved first; those without a readable manifest at the end.

    Raises RunError or OSError, of exit code 71, where a file cannot be read at the moment: what is only unreachable
    must not be taken for damaged, or retention would delete it.
    """
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            manifest = read_manifest(path)
        except UserError:
            found.append(Listed(path.name, int(match[1]), None, False))
            continue
        is_whole = all(file_size(path / entry.name) == entry.bytes for entry in manifest.files)
        found.append(Listed(path.name, int(match[1]), manifest.sequence, is_whole))
    return sorted(found, key=lambda listed: (listed.sequence is None, listed.sequence or 0, listed.step), reverse=True)


def checkpoints_to_delete(
    listed: Sequence[Listed], *, keep: int, best: str | None, damaged: Collection[str]
) -> list[str]:
    """Names that retention deletes: all but the ``keep`` newest whole ones and ``best``.

    Damaged ones do not count towards ``keep``, so the newest whole one is always kept. A folder whose manifest cannot
    be read is kept too: it may have been written by a newer version.
    """
    whole = [found.name for found in listed if found.is_whole and found.name not in damaged]
    kept = {*whole[:keep], best}
    return [found.name for found in listed if found.sequence is not None and found.name not in kept] if whole else []


def read_pointer(folder: Path, pointer: str) -> str | None:
    """The checkpoint that ``latest`` or ``best`` names; None, with a warning, where it names none in this folder."""
    path = folder / pointer
    try:
        text = read_bytes(path, max_bytes=LONGEST_POINTER).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except UserError as error:
        LOGGER.warning("%s; it is not followed", error)
        return None
    if _NAME.fullmatch(text) and (folder / text).is_dir():
        return text
    LOGGER.warning("%s holds %r, which is no checkpoint in this folder; it is not followed", path, text)
    return None
