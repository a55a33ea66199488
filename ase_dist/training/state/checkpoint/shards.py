"""Writing: each rank writes its groups of tensors to safetensors files, with one group in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of
from ase_dist.files import fsync, sha256_of, wait_until
from ase_dist.training.state.checkpoint.manifest import SUFFIX, FileEntry, file_entry

THREADS = 4  # per rank; writing to disk and hashing release the interpreter's lock
Shard = tuple[str, Mapping[str, Tensor]]


class Written(NamedTuple):
    """The entry of a file that is on disk, and the names of its tensors."""

    entry: FileEntry
    tensors: tuple[str, ...]


def write_shards(folder: Path, shards: Iterable[Shard], *, patience: float) -> list[Written]:
    """Write each ``(name, tensors)`` to ``folder``/name.safetensors, fsync it and hash what is on disk.

    Threads fsync and hash a file while the next group is read and written. After a failure the iterable is still
    consumed, without writing: the next group may need a collective in which the other ranks wait. Raises RunError with
    the file and the reason; an error inside the iterable passes through.
    """
    finishing: list[tuple[str, Future[Written]]] = []
    problem: Exception | None = None
    if not wait_until(folder.is_dir, patience=patience):
        problem = UserError(
            f"{folder} is not there, though rank 0 made it; checkpoints need a folder that all nodes share"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        for name, tensors in shards:
            if problem is None:
                try:
                    file_name = f"{name}{SUFFIX}"
                    file_entry(file_name, size=0, sha256="0" * 64)  # refuses a path to another folder
                    path = folder / file_name
                    save_file({key: _host_copy(tensor) for key, tensor in tensors.items()}, path)
                    finishing.append((name, pool.submit(_finish, path, tuple(tensors))))
                except Exception as error:  # raised once the iterable is consumed
                    problem = _could_not(name, error)
            del tensors  # before the iterable makes the next group
    reasons = ((name, future.exception()) for name, future in finishing)  # the pool has finished
    problems = [_could_not(name, reason) for name, reason in reasons if isinstance(reason, Exception)]
    if problem is not None or problems:
        first = [*problems, problem][0]
        assert first is not None
        raise first
    return [future.result() for _, future in finishing]


def merge(reports: Sequence[Sequence[Written]]) -> list[FileEntry]:
    """The files of all ranks, sorted by name; each file and each tensor must have been written by one rank."""
    owners: dict[str, int] = {}
    for rank, report in enumerate(reports):
        for written in report:
            for name in [f"file {written.entry.name!r}", *(f"tensor {tensor!r}" for tensor in written.tensors)]:
                assert name not in owners, f"the {name} was written twice, by rank {owners[name]} and rank {rank}"
                owners[name] = rank
    return sorted((written.entry for report in reports for written in report), key=lambda entry: entry.name)


def all_arrived(folder: Path, files: Sequence[FileEntry]) -> bool:
    """Whether this node sees every file with its full size; False too while it cannot look."""
    try:
        return all(file_size(folder / entry.name) == entry.bytes for entry in files)
    except OSError:
        return False


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where it cannot be had. Raises OSError where it cannot be looked at at the moment."""
    try:
        return path.stat().st_size
    except OSError as error:
        if exit_code_of(error) is ExitCode.IO_ERROR:
            raise
        return None


def _finish(path: Path, tensors: tuple[str, ...]) -> Written:
    fsync(path)
    return Written(file_entry(path.name, size=path.stat().st_size, sha256=sha256_of(path)), tensors)


def _could_not(name: str, error: Exception) -> RunError:
    found = RunError(f"could not write {name}{SUFFIX} ({describe(error)})", exit_code=exit_code_of(error))
    found.__cause__ = error
    return found


def _host_copy(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, alone in its storage: a view into a flat buffer would be refused, or written whole."""
    host = tensor.detach().cpu().contiguous()
    return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()
