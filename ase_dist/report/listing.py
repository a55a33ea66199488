"""The files of a run and their meaning, its checkpoints, and the commands that repeat it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ase_dist.report.text import plural, size
from ase_dist.training.record.run_folder import RunFolder, meaning

STUDY_MEANINGS = {
    "settings": "the settings that each run was started with",
    "runs": "a folder per variant and seed",
    "study.json": "what was asked",
    "results.json": "every result by variant and seed",
    "results.md": "the table as Markdown",
    "results.csv": "the values by seed",
}
MOST = 60  # entries that are listed
LINE = 100  # characters per line of a command
LAUNCHER_OPTION = re.compile(r"--local[_-]rank(=.*)?$")


class ListedFile(NamedTuple):
    """A file, or a folder with all that is in it."""

    name: str
    size: str
    meaning: str


class ListedCheckpoint(NamedTuple):
    """One of the run's checkpoints; ``role`` says whether it is the newest or the best."""

    name: str
    size: str
    role: str
    is_whole: bool


def list_files(folder: Path) -> tuple[list[ListedFile], int]:
    """The entries of ``folder`` without hidden ones, and how many more there are than are listed."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    entries = []
    for path in paths[:MOST]:
        what_for = STUDY_MEANINGS.get(path.name) or meaning(path.name)
        entries.append(ListedFile(f"{path.name}/" if path.is_dir() else path.name, _describe(path), what_for))
    return entries, max(0, len(paths) - MOST)


def list_checkpoints(folder: Path) -> list[ListedCheckpoint]:
    """The checkpoints in ``folder``, last saved first; manifest and sizes tell which are complete."""
    if not folder.is_dir():
        return []
    from ase_dist.training.state.checkpoint import catalog  # imports torch, which runs without checkpoints do not need

    pointers = {pointer: catalog.read_pointer(folder, pointer) for pointer in (catalog.LATEST, catalog.BEST)}
    return [
        ListedCheckpoint(
            found.name,
            _describe(folder / found.name),
            ", ".join(pointer for pointer, name in pointers.items() if name == found.name),
            found.is_whole,
        )
        for found in catalog.list_checkpoints(folder)
    ]


def commands(run: RunFolder, environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Commands that repeat the run, each with a label: the one that started it, and one with its merged settings."""
    given = environment.get("command")
    world = environment.get("world_size")
    ranks = world if isinstance(world, int) else 1
    found = []
    if isinstance(given, list) and given:
        found.append(("as it was started", _launched([str(word) for word in given], ranks)))
    if run.config.is_file():
        again = ["-m", "ase_dist", "train", "--config", str(run.config)]
        if run.ds_config.is_file():
            again += ["--deepspeed_config", str(run.ds_config)]
        found.append(
            ("from its own settings, into another folder", _launched([*again, f"output={run.path}_again"], ranks))
        )
    return found


def _launched(words: Sequence[str], ranks: int) -> str:
    """A shell command in lines of about ``LINE`` characters, with torchrun where there were several ranks.

    The nodes of the ranks are not recorded.
    """
    lines = ["python"] if ranks == 1 else [f"torchrun --nproc_per_node {ranks}"]
    for word in [shlex.quote(word) for word in words if not LAUNCHER_OPTION.match(word)]:
        if len(lines[-1]) + len(word) < LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def _describe(path: Path) -> str:
    """The size of a file, the number and size of the files in a folder."""
    if not path.is_dir():
        return size(_bytes(path))
    sizes = [_bytes(Path(root) / name) for root, _, names in os.walk(path) for name in names]
    return f"{plural(len(sizes), 'file')}, {size(sum(sizes))}"


def _bytes(path: Path) -> int:
    """A file's size; 0 where it is gone, because a running run replaces its files."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0
