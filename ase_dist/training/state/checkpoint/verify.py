"""Whether a checkpoint is whole: manifest, sizes, hashes and headers; the hashing is divided among the ranks."""

from __future__ import annotations

import platform
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ase_dist.agreement import on_every_rank
from ase_dist.collectives import rank, world_size
from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of
from ase_dist.files import sha256_of
from ase_dist.training.state.checkpoint.manifest import FileEntry, Manifest, read_manifest

THREADS = 4  # per rank; hashing releases the interpreter's lock


def verify(folder: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest and no problems, or None and what all ranks together found damaged. Collective.

    Each problem is one clause that begins with the file's name. Every rank gets the same list. Raises RankError on all
    ranks, of exit code 71, where a file cannot be read at the moment: that says nothing about the checkpoint.
    """
    manifest: Manifest | None = None

    def check_share() -> tuple[str, str | None, list[str]]:
        """The host, the digest of the manifest (None if it is not readable), and the problems in this rank's files."""
        nonlocal manifest
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            return platform.node(), None, [str(error)]
        mine = share(manifest.files, rank=rank(), world_size=world_size())
        with ThreadPoolExecutor(THREADS) as pool:
            problems = [problem for problem in pool.map(lambda entry: _problem_of(folder, entry), mine) if problem]
        return platform.node(), manifest.digest, problems

    found = on_every_rank(check_share)
    host_0, digest_0, _ = found[0]
    for index, (host, digest, _) in enumerate(found):
        if digest != digest_0:
            return None, [
                f"rank {index} on {host} does not read the manifest that rank 0 on {host_0} reads; "
                "checkpoints need a folder that all nodes share"
            ]
    problems = list(dict.fromkeys(problem for *_, of_rank in found for problem in of_rank))
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


def _problem_of(folder: Path, entry: FileEntry) -> str | None:
    """How a file differs from its entry, or None. Raises RunError where it cannot be read at the moment."""
    path = folder / entry.name
    problem = None
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            problem = "missing"
        elif status.st_size != entry.bytes:
            problem = f"{status.st_size} bytes, the manifest says {entry.bytes}"
        elif sha256_of(path) != entry.sha256:
            problem = "its SHA-256 is not the manifest's"
        else:
            with safe_open(path, framework="pt"):  # parses the header alone; nothing in this format can be executed
                pass
    except FileNotFoundError:
        problem = "missing"
    except (OSError, SafetensorError) as error:
        if exit_code_of(error) is ExitCode.IO_ERROR:
            sentence = f"{path}: cannot be read at the moment ({describe(error)})"
            raise RunError(sentence, exit_code=ExitCode.IO_ERROR) from error
        if isinstance(error, OSError):
            problem = f"cannot be read ({error.strerror})"
        else:
            problem = f"not a safetensors file ({error})"
    return problem and f"{entry.name}: {problem}"
