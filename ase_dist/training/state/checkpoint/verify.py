"""Is a checkpoint whole? Manifest, sizes, hashes and headers; hashing is spread over the ranks, all learn the same."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

from safetensors import SafetensorError, safe_open

from ase_dist.collectives import gather_objects, rank, world_size
from ase_dist.files import sha256_of
from ase_dist.training.state.checkpoint.manifest import FileEntry, Manifest, read_manifest

THREADS = 4  # per rank; hashing releases the interpreter's lock


class _Verdict(NamedTuple):
    host: str
    digest: str | None  # of the manifest; None where it cannot be read
    problems: list[str]


def verify(folder: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, and the damage found by all ranks together: empty where the checkpoint is whole. Collective.

    Each problem is one clause that begins with the file's name. Every rank gets the same list.
    """
    manifest, verdict = _check_share(folder)
    verdicts = [cast("_Verdict", found) for found in gather_objects(verdict)]
    strangers = [(i, found.host) for i, found in enumerate(verdicts) if found.digest != verdicts[0].digest]
    if strangers:
        index, host = strangers[0]
        return None, [
            f"rank {index} on {host} does not read the manifest that rank 0 on {verdicts[0].host} reads; "
            "checkpoints need a folder that all nodes share"
        ]
    problems = list(dict.fromkeys(problem for found in verdicts for problem in found.problems))
    return (None if problems else manifest), problems


def share(files: Sequence[FileEntry], *, rank: int, world_size: int) -> list[FileEntry]:
    """The files that ``rank`` hashes: largest first, each to the rank that has the fewest bytes so far."""
    loads = [0] * world_size
    mine = []
    for entry in sorted(files, key=lambda entry: (-entry.bytes, entry.name)):
        owner = loads.index(min(loads))
        loads[owner] += entry.bytes
        if owner == rank:
            mine.append(entry)
    return mine


def _check_share(folder: Path) -> tuple[Manifest | None, _Verdict]:
    """This rank's part of the work; never raises, for the others wait to hear of it."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return None, _Verdict(platform.node(), None, [str(error)])
    mine = share(manifest.files, rank=rank(), world_size=world_size())
    with ThreadPoolExecutor(THREADS) as pool:
        problems = [problem for problem in pool.map(lambda entry: _damage(folder, entry), mine) if problem is not None]
    return manifest, _Verdict(platform.node(), manifest.digest, problems)


def _damage(folder: Path, entry: FileEntry) -> str | None:
    """What is wrong with one file, or None."""
    path = folder / entry.name
    try:
        if not path.is_file():
            return f"{entry.name}: missing"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{entry.name}: {size} bytes, the manifest says {entry.bytes}"
        if sha256_of(path) != entry.sha256:
            return f"{entry.name}: its SHA-256 is not the manifest's"
        with safe_open(path, framework="pt"):  # parses the header alone; nothing in this format can be executed
            return None
    except SafetensorError as error:
        return f"{entry.name}: not a safetensors file ({error})"
    except OSError as error:
        return f"{entry.name}: cannot be read ({error.strerror})"
