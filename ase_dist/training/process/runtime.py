"""The process a run lives in: its place in the world, device, threads, memory allocator and seeds."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from ase_dist.cluster import launchers
from ase_dist.cores import share_of_cores
from ase_dist.errors import UserError
from ase_dist.moe import deepspeed_compat
from ase_dist.seeding import derive_seed

LOGGER = logging.getLogger("ase_dist")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INT_MAX = 2**31 - 1
PORT_KEY = "ase_dist/port"  # of the store that this attempt's ranks meet in


class JoinError(RuntimeError):
    """The ranks did not come together within the time limit; one sentence that says where and why."""


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
    accelerator DeepSpeed finds. Raises UserError where only some of the launcher's variables are set, JoinError where
    another rank does not come in time.
    """
    if not dist.is_initialized():
        os.environ.update(launchers.task_variables(os.environ))
        _fill_launcher_variables()
        os.environ.update(launchers.interface_variables(os.environ))
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank, local_size = int(os.environ.setdefault("LOCAL_RANK", "0")), _local_size()  # DeepSpeed reads it as well
    if local_rank == 0:
        warn_of_build_locks()
    is_cpu = accelerator.device_name() == "cpu"
    if is_cpu:
        deepspeed_compat.skip_cpu_communication_build()
        keep_freed_memory()
        torch.set_num_threads(threads or share_of_cores(local_size))
    else:
        accelerator.set_device(local_rank)
    _join(accelerator.communication_backend_name(), timeout=timeout)
    device = torch.device("cpu") if is_cpu else torch.device(accelerator.device_name(), local_rank)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=device,
        native_bf16=not is_cpu and bool(accelerator.is_bf16_supported()),
    )


def _join(backend: str, *, timeout: float) -> None:
    """Make the process group, or take over the one that is there already."""
    import deepspeed

    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
            _join_under_torchrun(backend, limit=timedelta(seconds=timeout))
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout), verbose=False)
    except RuntimeError as error:  # torch's DistError where a rank is missing, gloo's own where it went again
        rank, size, address, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise JoinError(
            f"rank {rank} of {size} could not join the others at {address}:{port} within {timeout:g} s ({reason}); "
            "a rank that ended before it joined says why in its own output"
        ) from None


def _join_under_torchrun(backend: str, *, limit: timedelta) -> None:
    """Make the group through a store of this attempt alone: torchrun has one store for all of its restarts.

    In that one torch 2.14 finds the addresses of the ranks that were killed, and no restart ever comes together. So
    rank 0 opens a new one and leaves its port in torchrun's until all have joined. A port that a rank 0 which was
    killed meanwhile has left there refuses connections; then the others look again.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, deadline = os.environ["MASTER_ADDR"], time.monotonic() + limit.total_seconds()
    shared = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    own: TCPStore | None = None
    if rank == 0:
        own = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
        shared.set(PORT_KEY, str(own.port))
    while own is None:
        try:
            own = TCPStore(address, int(shared.get(PORT_KEY)), is_master=False, timeout=timedelta(seconds=1))
        except DistNetworkError:
            if time.monotonic() > deadline:
                raise
    own.set_timeout(limit)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
    if rank == 0:
        shared.delete_key(PORT_KEY)


def stop() -> None:
    """Leave the process group; needed for a clean exit after work that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int, *, rank: int) -> None:
    """Seed Python, NumPy and torch on this rank; what must agree between ranks has generators of its own."""
    random.seed(derive_seed(seed, "python", rank))
    np.random.seed(derive_seed(seed, "numpy", rank) % 2**32)
    torch.manual_seed(derive_seed(seed, "torch", rank))


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


def warn_of_build_locks() -> None:
    """Name the lock files in the folder where torch compiles extensions, DeepSpeed's ops among them.

    With an older torch whoever needs such an extension waits, in silence and without limit, until its lock file is
    gone, and a process that was killed while it compiled leaves the file behind. Nothing happens where torch locks the
    file itself (2.14 does), a lock that dies with its holder.
    """
    from torch.utils import cpp_extension

    if not hasattr(cpp_extension, "FileBaton"):
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        with contextlib.suppress(FileNotFoundError):  # the compilation has just ended
            minutes = (time.time() - lock.stat().st_mtime) / 60
            LOGGER.warning(
                "%s has been there for %.0f min: a start that needs %s waits until it is gone; if nothing is being "
                "compiled any more, a killed process has left it, delete it",
                lock,
                minutes,
                lock.parent.name,
            )


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
        raise UserError(
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
