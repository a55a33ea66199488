"""A folder of checkpoints: what is in it, in which order, which may go, and the two small files that point into it.

Layout: ``step_N/`` are checkpoints; ``latest`` and ``best`` hold the name of one. The folders are the truth: ``latest``
is for people and scripts, and a pointer is never followed to anything but a ``step_N`` beside it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from ase_dist.errors import UserError
from ase_dist.training.state.checkpoint.manifest import read_manifest
from ase_dist.training.state.checkpoint.shards import all_arrived

LOGGER = logging.getLogger(__name__)
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step_(0|[1-9][0-9]*)", re.ASCII)


class Listed(NamedTuple):
    """A checkpoint as far as a glance tells: ``sequence`` is None where the manifest cannot be read."""

    name: str
    step: int
    sequence: int | None
    is_whole: bool  # manifest and sizes; hashes are not looked at


def checkpoint_name(step: int) -> str:
    """The folder's name. Raises UserError for what is no step."""
    if step < 0:
        raise UserError(f"step: got {step}, wanted 0 or more")
    return f"step_{step}"


def list_checkpoints(folder: Path) -> list[Listed]:
    """Every ``step_N`` in ``folder``, last saved first; those without a readable manifest before all others."""
    found = [_glance(path, int(match[1])) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, key=lambda listed: (listed.sequence is None, listed.sequence or 0, listed.step), reverse=True)


def checkpoints_to_delete(
    listed: Sequence[Listed], *, keep: int, best: str | None, damaged: Collection[str]
) -> list[str]:
    """Names that retention deletes: all but the ``keep`` newest whole ones and ``best``.

    Damaged ones do not count among the ``keep``, so the newest whole one always stays. A folder whose manifest cannot
    be read stays too: it may have been written by a newer version.
    """
    whole = [found.name for found in listed if found.is_whole and found.name not in damaged]
    kept = {*whole[:keep], best}
    return [found.name for found in listed if found.sequence is not None and found.name not in kept] if whole else []


def read_pointer(folder: Path, pointer: str) -> str | None:
    """The checkpoint that ``latest`` or ``best`` names; None, with a warning, where it names none in this folder."""
    path = folder / pointer
    if not path.exists():
        return None
    text = path.read_bytes()[:200].decode(errors="replace").strip()
    if _NAME.fullmatch(text) and (folder / text).is_dir():
        return text
    LOGGER.warning("%s holds %r, which is no checkpoint beside it; it is not followed", path, text)
    return None


def _glance(path: Path, step: int) -> Listed:
    try:
        manifest = read_manifest(path)
    except ValueError:
        return Listed(path.name, step, None, False)
    return Listed(path.name, step, manifest.sequence, all_arrived(path, manifest.files))
