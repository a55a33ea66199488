"""The folder of a run's checkpoints: saving, such that a crash harms no earlier one, and finding the newest whole one.

It handles tensors, names and files, and does not know the model or DeepSpeed. All of it but ``best`` is collective.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue

from ase_dist.agreement import RankError, on_every_rank, on_rank_zero
from ase_dist.collectives import rank, world_size
from ase_dist.errors import ExitCode, RunError, UserError, describe, file_error
from ase_dist.files import (
    discard,
    make_empty,
    put_in_place,
    remove,
    sweep,
    temporary_for,
    wait_until,
    write_atomic,
)
from ase_dist.json_files import json_digest
from ase_dist.training.state.checkpoint.catalog import (
    BEST,
    LATEST,
    checkpoint_name,
    checkpoints_to_delete,
    list_checkpoints,
    read_pointer,
)
from ase_dist.training.state.checkpoint.manifest import MANIFEST, make_manifest, read_manifest
from ase_dist.training.state.checkpoint.reader import Checkpoint, open_checkpoint, open_whole
from ase_dist.training.state.checkpoint.shards import Shard, Written, all_arrived, merge, write_shards
from ase_dist.versions import versions_of

LOGGER = logging.getLogger(__name__)
_PROBE = ".probe"


class SaveError(RunError):
    """A checkpoint was not saved; the sentence is the same on all ranks, and earlier checkpoints are untouched.

    Its exit code is NOT_SAVED, or IO_ERROR where the file system failed for a moment, or FAILED after a bug.
    """

    def __init__(self, sentence: str, *, cause: RunError | None = None) -> None:
        passes = cause is not None and cause.exit_code in (ExitCode.IO_ERROR, ExitCode.FAILED)
        super().__init__(sentence, exit_code=cause.exit_code if cause and passes else ExitCode.NOT_SAVED)


class CheckpointStore:
    """The checkpoints in ``folder``: the ``keep`` newest, and the best in addition.

    The constructor is collective: rank 0 makes the folder and removes what killed runs left unfinished, and every rank
    checks that it sees the same folder. Only one run at a time may have a store on a folder; to read a checkpoint use
    ``open_checkpoint``. ``patience`` is how many seconds a rank waits for the file of another rank to appear on a
    network file system. Raises UserError on all ranks where the folder cannot be written to or is not shared.
    """

    def __init__(self, folder: Path, *, keep: int, patience: float = 15.0) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep: got {keep}, wanted at least 1")
        self.folder, self.keep, self.patience = Path(folder).absolute(), keep, patience
        self._damaged: set[str] = set()
        _check_shared(self.folder, patience=patience)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def save(self, step: int, shards: Iterable[Shard], *, meta: Mapping[str, JsonValue]) -> Path:
        """Write ``step_N`` and return its path; one of the same step is replaced.

        1. Each rank writes its own ``shards`` (file name without suffix, {tensor name: tensor}) into ``.tmp-step_N``,
           one group at a time, with fsync, and hashes what it wrote. The iterable may call collectives, if all ranks
           call the same ones and nothing raises between them; a rank that cannot write still consumes it.
        2. The ranks exchange the list of files. File and tensor names are global: each has one owner.
        3. Rank 0 writes the manifest, renames the folder, replaces ``latest``, deletes what is older than ``keep``.

        ``meta`` is plain JSON and the same on all ranks; what differs by rank (random states) belongs into ``shards``.
        Raises SaveError on all ranks if anything fails on one of them; the files of the attempt are then removed.
        """
        temporary = temporary_for(self.folder / checkpoint_name(step))
        agreed = on_rank_zero(lambda: step)  # the sentence is the same on all ranks, even where their steps differ
        try:
            _check_same(step, meta)
            on_rank_zero(lambda: make_empty(temporary))
            reports = on_every_rank(lambda: write_shards(temporary, shards, patience=self.patience))
            on_rank_zero(lambda: self._commit(temporary, step=step, reports=reports, meta=meta))
        except RankError as error:
            on_rank_zero(lambda: discard(temporary))
            raise SaveError(
                f"the checkpoint of step {agreed} was not saved: {error}; what was saved before is untouched",
                cause=error,
            ) from error.__cause__
        self._damaged.discard(checkpoint_name(step))
        return self.folder / checkpoint_name(step)

    def update_meta(self, step: int, changes: Mapping[str, JsonValue]) -> None:
        """Replace these values in the meta of ``step_N`` by rewriting its manifest; its tensors are not touched.

        Raises SaveError on all ranks if that fails; the checkpoint is then unchanged.
        """
        path = self.folder / checkpoint_name(step)

        def rewrite_manifest() -> None:
            old = read_manifest(path)
            new = make_manifest(
                step=step,
                sequence=old.sequence,
                world_size=old.world_size,
                versions=old.versions,
                files=old.files,
                meta={**old.meta, **changes},
            )
            write_atomic(path / MANIFEST, new.to_bytes())

        try:
            _check_same(step, changes)
            on_rank_zero(rewrite_manifest)
        except RankError as error:
            sentence = f"the checkpoint of step {step} was not updated: {error}; it is as it was"
            raise SaveError(sentence, cause=error) from error.__cause__

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of this step; it may be damaged."""
        return on_rank_zero((self.folder / f"step_{step}" / MANIFEST).is_file)

    def mark_best(self, step: int | None) -> None:
        """Keep the checkpoint of this step until another is marked; None removes the mark.

        Raises on all ranks UserError if there is no such checkpoint, and SaveError if the mark cannot be written.
        """
        if step is not None and not self.holds(step):
            raise UserError(f"mark_best: {self.folder} holds no {checkpoint_name(step)}; save it first")

        def write_mark() -> None:
            if step is None:
                (self.folder / BEST).unlink(missing_ok=True)
            elif read_pointer(self.folder, BEST) != checkpoint_name(step):
                write_atomic(self.folder / BEST, f"{checkpoint_name(step)}\n")

        try:
            on_rank_zero(write_mark)
        except RankError as error:
            sentence = f"step {step} was not marked as the best: {error}; the mark before it stays"
            raise SaveError(sentence, cause=error) from error.__cause__

    @property
    def best(self) -> Path | None:
        """The folder of the best checkpoint, or None where none is marked."""
        name = read_pointer(self.folder, BEST)
        return self.folder / name if name is not None else None

    def _commit(
        self, temporary: Path, *, step: int, reports: list[list[Written]], meta: Mapping[str, JsonValue]
    ) -> None:
        """Rank 0: make a checkpoint of a folder of files. It exists from the rename on."""
        files = merge(reports)
        if not wait_until(lambda: all_arrived(temporary, files), patience=self.patience):
            missing = [entry.name for entry in files if not all_arrived(temporary, [entry])]
            raise UserError(
                f"{missing[0]} was written by another rank but did not arrive in {temporary} on {platform.node()}; "
                "checkpoints need a folder that all nodes share"
            )
        sequence = 1 + max((found.sequence or 0 for found in list_checkpoints(self.folder)), default=0)
        versions = {"python": platform.python_version(), **versions_of("torch", "safetensors", "ase_dist")}
        manifest = make_manifest(
            step=step, sequence=sequence, world_size=world_size(), versions=versions, files=files, meta=meta
        )
        write_atomic(temporary / MANIFEST, manifest.to_bytes())  # brings the folder's names to disk as well
        put_in_place(temporary, self.folder / checkpoint_name(step))
        try:
            write_atomic(self.folder / LATEST, f"{checkpoint_name(step)}\n")
            listed, best = list_checkpoints(self.folder), read_pointer(self.folder, BEST)
            for name in checkpoints_to_delete(listed, keep=self.keep, best=best, damaged=self._damaged):
                remove(self.folder / name)
            sweep(self.folder)
        except (OSError, RunError) as error:  # the checkpoint is saved, and none of this is needed to find it
            LOGGER.warning("step %d is saved, but tidying up after it failed (%s)", step, describe(error))

    # -----------------------------------------------------------------------------------------------------------------
    # Finding

    def find(self, resume: str | Path) -> Checkpoint | None:
        """The checkpoint to continue from: for "auto" the newest whole one, for "never" None, else that at the path.

        The newest is the one that was saved last. For a damaged one a warning names the file and what is wrong with
        it, and the one before is tried. None with "auto" means that nothing was ever saved here. Raises on all ranks
        UserError where there are checkpoints and none is whole, or where the one at the path is not; and RankError, of
        exit code 71, where a file cannot be read at the moment, so that a restart finds the same checkpoint.
        """
        if resume == "never":
            return None
        if resume != "auto":
            return open_checkpoint(Path(resume))
        names = on_rank_zero(self._candidates)
        for name in names:
            checkpoint, problems = open_whole(self.folder / name)
            if checkpoint is not None:
                return checkpoint
            self._damaged.add(name)
            if rank() == 0:
                LOGGER.warning("checkpoint %s is damaged and is passed over: %s", name, "; ".join(problems))
        if names:
            raise UserError(
                f"resume: none of the {len(names)} checkpoints in {self.folder} is whole (the last: {problems[0]}); "
                "restore one, name another with resume=PATH, or start afresh elsewhere with output=FOLDER"
            )
        return None

    def _candidates(self) -> list[str]:
        """Rank 0: names, newest first; a warning where ``latest`` names another."""
        listed = list_checkpoints(self.folder)
        latest = read_pointer(self.folder, LATEST)
        newest = next((found.name for found in listed if found.sequence is not None), None)
        if None not in (latest, newest) and latest != newest:
            LOGGER.warning("%s names %s, but %s was saved last", self.folder / LATEST, latest, newest)
        return [found.name for found in listed]


def _check_shared(folder: Path, *, patience: float) -> None:
    """Make and tidy the folder, and check that every rank reads there what rank 0 writes there."""
    probe = folder / _PROBE

    def write_token() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        token = f"{platform.node()} {os.getpid()} {time.time_ns()}"
        write_atomic(probe, token)
        return token

    try:
        token = on_rank_zero(write_token)
    except RankError as error:
        raise file_error(
            error,
            f"checkpoints: cannot write to {str(folder)!r} ({error}); "
            "name a folder that can be written to with output=FOLDER",
        ) from None
    seen = on_every_rank(
        lambda: (platform.node(), wait_until(lambda: probe.is_file() and probe.read_text() == token, patience=patience))
    )
    on_rank_zero(lambda: probe.unlink(missing_ok=True))
    blind = [f"rank {index} on {host}" for index, (host, sees_it) in enumerate(seen) if not sees_it]
    if blind:
        raise UserError(
            f"checkpoints: {blind[0]} does not see the folder {str(folder)!r} of rank 0 on {seen[0][0]}"
            f"{f' (nor do {len(blind) - 1} others)' if len(blind) > 1 else ''}; "
            "name a folder on a file system that all nodes share with output=FOLDER"
        )


def _check_same(step: int, meta: Mapping[str, JsonValue]) -> None:
    """Raise RankError on all ranks unless all save the same step with the same meta, and that is plain JSON."""

    def hashes() -> dict[str, str]:  # of each value: small, because every rank gets those of all
        make_manifest(step=step, sequence=0, world_size=1, versions={}, files=[], meta=meta)  # raises for no JSON
        return {"step": str(step), **{f"meta[{key!r}]": json_digest(value) for key, value in meta.items()}}

    first, *others = on_every_rank(hashes)
    for index, other in enumerate(others, start=1):
        differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if differing:
            raise RankError(f"{differing[0]} differs between rank 0 and rank {index}; what differs belongs into shards")
