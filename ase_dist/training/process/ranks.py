"""The ranks of a command that computes without an engine: torch's process group where a launcher made several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ase_dist.cluster import launchers
from ase_dist.cores import share_of_cores
from ase_dist.errors import UserError
from ase_dist.training.process.runtime import World, keep_freed_memory

TIMEOUT = 1800.0  # seconds that a collective may take


@contextmanager
def join(*, device: str | None, timeout: float = TIMEOUT) -> Iterator[World]:
    """This process among those that torchrun, deepspeed or srun started, or alone; the group is left at the end.

    ``device`` None: this rank's GPU where there are any, else the CPU. Raises UserError for a device that is not here.
    """
    os.environ.update(launchers.task_variables(os.environ))
    os.environ.update(launchers.interface_variables(os.environ))
    size, rank, local_rank = (
        int(os.environ.get(name) or i) for name, i in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    where = find_device(device, local_rank=local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
        torch.set_num_threads(share_of_cores(local_size))
    is_ours = size > 1 and not dist.is_initialized()
    if is_ours:
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield World(rank, size, local_rank, local_size, where, native_bf16=False)
    finally:
        if is_ours:
            dist.destroy_process_group()


def find_device(device: str | None, *, local_rank: int = 0) -> torch.device:
    """The device of that name, with this rank's number where it has none; UserError where there is no such device."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: got {name!r}, wanted cpu, cuda or one GPU such as cuda:1") from None
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", local_rank)
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if found.type not in ("cpu", "cuda") or (found.index or 0) >= count:
        raise UserError(f"--device: there is no {found} here, there are {torch.cuda.device_count()} GPUs and the cpu")
    return found
