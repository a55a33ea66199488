"""The process a run lives in: its place in the world, device, threads, memory allocator and seeds."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import psutil
import torch
import torch.distributed as dist

from ase_dist.moe import deepspeed_seam as seam
from ase_dist.seeding import derive_seed

LOGGER = logging.getLogger("ase_dist")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class World:
    """Where this process stands, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    native_bf16: bool

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


def start(*, timeout: float, threads: int | None) -> World:
    """Join the process group that the launcher describes, or be a world of one without any launcher.

    ``timeout`` in seconds bounds every collective. Works under deepspeed, torchrun, and plain python, on whatever
    accelerator DeepSpeed finds. Raises ValueError where only some of the launcher's variables are set.
    """
    if not dist.is_initialized():
        _fill_launcher_variables()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank, local_size = int(os.environ.setdefault("LOCAL_RANK", "0")), _local_size()  # DeepSpeed reads it as well
    is_cpu = accelerator.device_name() == "cpu"
    if is_cpu:
        seam.skip_cpu_communication_build()
        keep_freed_memory()
        torch.set_num_threads(threads or threads_per_rank(local_size))
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(  # takes over a process group that is there already
        dist_backend=accelerator.communication_backend_name(), timeout=timedelta(seconds=timeout), verbose=False
    )
    device = torch.device("cpu") if is_cpu else torch.device(accelerator.device_name(), local_rank)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=device,
        native_bf16=not is_cpu and bool(accelerator.is_bf16_supported()),
    )


def stop() -> None:
    """Leave the process group; needed for a clean exit after work that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int, *, rank: int) -> None:
    """Seed Python, NumPy and torch on this rank; what must agree between ranks has generators of its own."""
    random.seed(derive_seed(seed, "python", rank))
    np.random.seed(derive_seed(seed, "numpy", rank) % 2**32)
    torch.manual_seed(derive_seed(seed, "torch", rank))


def threads_per_rank(local_size: int) -> int:
    """Physical cores that this process may use, shared among the ranks of its node; at least 1."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed) // local_size)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed tensors instead of giving them back to the kernel: a fifth of a CPU step is page faults.

    Nothing happens where the C library has no ``mallopt``.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_MMAP_THRESHOLD, INT_MAX)
    mallopt(M_TRIM_THRESHOLD, INT_MAX)


def _local_size() -> int:
    """Ranks on this node, as torchrun or deepspeed's launcher calls them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def _fill_launcher_variables() -> None:
    """Make plain ``python`` a world of one; refuse half a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if not missing:
        return
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"launcher: {', '.join(missing)} missing beside RANK or WORLD_SIZE; start with deepspeed or torchrun, or "
            "unset both for a single process"
        )
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(defaults)
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
