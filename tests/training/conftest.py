"""Checkpoints whose contents tell their step, ways to damage them, and worlds of processes."""

import json
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from ase_dist.training.state.checkpoint import CheckpointStore

META = {"settings": "abc", "sampler": {"epoch": 3, "seen": [1, 2]}, "best": 0.1 + 0.2, "none": None}
SECONDS = 60  # nothing here takes more than a few; what does not end is killed and fails the test

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2, patience=0.2)


def groups(step):
    """Two files of tensors that depend on the step."""
    generator = torch.Generator().manual_seed(step)
    yield "weights", {"w": torch.randn(6, 5, generator=generator), "step": torch.tensor(step)}
    yield "optimizer", {"w.exp_avg": torch.randn(6, 5, generator=generator)}


def save(store, *steps):
    for step in steps:
        store.save(step, groups(step), meta=META)


def loads(store):
    """The step that "auto" finds, checked against the tensors themselves."""
    with store.find("auto") as found:
        expected = {name: tensor for _, group in groups(found.step) for name, tensor in group.items()}
        assert found.names() == sorted(expected)
        assert all(torch.equal(found.tensor(name), expected[name]) for name in expected)
        return found.step


def entries(store):
    return sorted(path.name for path in store.folder.iterdir())


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class World(NamedTuple):
    """By rank: the exit code (negative: killed by that signal) and what the worker returned, through JSON, or None."""

    codes: list[int | None]
    results: list[Any]


class Running(NamedTuple):
    """The processes of a world, in order of rank; calling it waits for their end."""

    processes: list[Any]
    folder: Path
    seconds: float

    def __call__(self) -> World:
        for process in self.processes:
            process.join(self.seconds)
            if process.is_alive():
                process.kill()
                process.join()
        results = [_result(self.folder, rank) for rank in range(len(self.processes))]
        return World([process.exitcode for process in self.processes], results)


def start_world(
    worker: Callable[[int, Path], Any], folder: Path, *, size: int = 1, seconds: float = SECONDS
) -> Running:
    """Start ``worker(rank, folder)`` on ``size`` gloo ranks, without a group where that is 1.

    The worker is a function at the top of a module.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ase_dist.training.loop.run"])  # and with it all that takes long to import
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_enter, args=(worker, rank, size, folder, seconds), daemon=True)
                 for rank in range(size)]  # fmt: skip
    for process in processes:
        process.start()
    return Running(processes, folder, seconds)


def _enter(worker: Callable[[int, Path], Any], rank: int, size: int, folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    if size > 1:
        rendezvous = f"file://{folder / 'rendezvous'}"
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
    result = worker(rank, folder)
    temporary = folder / f"result_{rank}.tmp"
    temporary.write_text(json.dumps(result))
    temporary.replace(folder / f"result_{rank}.json")
    if size > 1:
        dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result_{rank}.json"
    return json.loads(path.read_text()) if path.is_file() else None
