"""Reading a verified checkpoint: one tensor, or a part of one, at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import JsonValue
from safetensors import safe_open
from torch import Tensor

from ase_dist.agreement import RankError, on_every_rank
from ase_dist.errors import UserError, did_you_mean
from ase_dist.training.state.checkpoint.manifest import Manifest
from ase_dist.training.state.checkpoint.verify import verify

Part = slice | tuple[slice, ...]


class Checkpoint:
    """The tensors of one saved step and what its manifest says; a context manager.

    ``open`` opens the files, or else their first use; they are closed with the object. From then on the folder may be
    deleted. Every tensor that is returned is a copy.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._open = ExitStack()
        self._index: dict[str, Any] | None = None  # tensor name -> the open file that has it

    @property
    def step(self) -> int:
        """Optimiser steps done when it was saved."""
        return self.manifest.step

    @property
    def world_size(self) -> int:
        """Ranks that saved it."""
        return self.manifest.world_size

    @property
    def meta(self) -> Mapping[str, JsonValue]:
        """What the caller of ``save`` gave."""
        return self.manifest.meta

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its safetensors files, sorted."""
        return tuple(entry.name for entry in self.manifest.files)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files_by_tensor())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header alone."""
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The type of a tensor as safetensors names it, such as "F32", from the file's header alone."""
        return str(self._file_of(name).get_slice(name).get_dtype())

    def tensor(self, name: str, *, part: Part | None = None) -> Tensor:
        """A tensor on the CPU, or the ``part`` of it: a slice of the first dimension, or a tuple of slices.

        Only the bytes of the part are read. Raises UserError for an unknown name, with the nearest known one.
        """
        file = self._file_of(name)
        found: Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        return found.clone()  # what safetensors returns may be the mapped file itself

    def open(self) -> None:
        """Open the files, where they are not open yet. Raises FileNotFoundError where one was deleted."""
        self._files_by_tensor()

    def close(self) -> None:
        """Close the files; they are opened again at the next use."""
        self._index = None
        self._open.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file_of(self, name: str) -> Any:
        index = self._files_by_tensor()
        if name not in index:
            raise UserError(f"{self.path}: holds no tensor {name!r}{did_you_mean(name, index)}")
        return index[name]

    def _files_by_tensor(self) -> dict[str, Any]:
        if self._index is None:
            self._open.close()  # what an attempt that failed has opened
            opened = [self._open.enter_context(safe_open(self.path / name, framework="pt")) for name in self.files]
            self._index = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        return self._index


def open_whole(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint in the folder ``path``, verified and with open files, or None and its problems. Collective.

    The files are open on every rank when this returns, so that a run which deletes the checkpoint disturbs nobody.
    Raises as ``verify``.
    """
    manifest, problems = verify(path)
    if manifest is None:
        return None, problems
    checkpoint = Checkpoint(path, manifest)

    def open_here() -> str | None:
        try:
            checkpoint.open()
        except FileNotFoundError:
            return "it has just been deleted"
        return None

    try:
        gone = [problem for problem in on_every_rank(open_here) if problem]
    except RankError:
        checkpoint.close()
        raise
    if gone:
        checkpoint.close()
    return (None if gone else checkpoint), gone[:1]


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify the checkpoint in the folder ``path`` and open it; changes nothing on disk. Collective.

    Raises on all ranks UserError where it is no checkpoint or damaged, with each file and what is wrong with it, and
    RankError of exit code 71 where a file cannot be read at the moment.
    """
    checkpoint, problems = open_whole(path)
    if checkpoint is None:
        inside = sorted(folder.name for folder in path.glob("step_*"))  # the folder of all checkpoints was named
        hint = f"; name one of the checkpoints in it, such as {inside[-1]!r}" if inside else ""
        raise UserError(f"resume: {str(path)!r} is not a whole checkpoint: {'; '.join(problems)}{hint}")
    return checkpoint
