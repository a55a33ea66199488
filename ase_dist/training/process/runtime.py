"""The process of a run: its rank, device, threads, memory allocator and seeds."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import random
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from ase_dist import collectives
from ase_dist.cluster.environment import interface_variables, task_variables
from ase_dist.cores import share_of_cores
from ase_dist.errors import ExitCode, RunError, UserError
from ase_dist.moe import deepspeed_compat
from ase_dist.seeding import derive_seed
from ase_dist.training.process.launcher_watch import remember_launchers

LOGGER = logging.getLogger("ase_dist")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INT_MAX = 2**31 - 1
PORT_KEY = "ase_dist/port"  # of the store that this attempt's ranks meet in


class JoinError(RunError):
    """The ranks did not join within the time limit; one sentence that says where and why."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, exit_code=ExitCode.SILENT)


@dataclass(frozen=True)
class World:
    """This process among all ranks, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    native_bf16: bool

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files that exist once."""
        return self.rank == 0


def start(*, timeout: float, threads: int | None) -> World:
    """Join the process group that the launcher describes, or a group of one without a launcher; for an engine.

    ``timeout`` in seconds bounds every collective. Works under deepspeed, torchrun, srun, mpirun and plain python, on
    any accelerator that DeepSpeed finds. Raises UserError where only some of the launcher's variables are set or the
    port is taken, JoinError where another rank does not come in time.
    """
    _read_launcher()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank == 0:
        warn_of_build_locks()
    is_cpu = accelerator.device_name() == "cpu"
    if is_cpu:
        deepspeed_compat.skip_cpu_communication_build()
        _compute_on_cpu(threads)
    else:
        accelerator.set_device(local_rank)
    backend, limit = accelerator.communication_backend_name(), timedelta(seconds=timeout)
    with _told_in_a_sentence(timeout):
        if _is_under_torchrun():
            _join_under_torchrun(backend, limit=limit)
        deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False)
    device = torch.device("cpu") if is_cpu else torch.device(accelerator.device_name(), local_rank)
    return _world(device, native_bf16=not is_cpu and bool(accelerator.is_bf16_supported()))


@contextlib.contextmanager
def join(*, device: str | None, timeout: float = 1800.0) -> Iterator[World]:
    """``start`` for a command that computes without an engine; the process group is left at the end.

    There is a group only where a launcher made several ranks. ``device`` None: this rank's GPU where there are any,
    else the CPU. Raises UserError as ``start``, and for a device that does not exist.
    """
    _read_launcher()
    found = find_device(device, local_rank=int(os.environ["LOCAL_RANK"]))
    if found.type == "cuda":
        torch.cuda.set_device(found)
    else:
        _compute_on_cpu(None)
    is_new = not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1
    if is_new:
        backend, limit = "nccl" if found.type == "cuda" else "gloo", timedelta(seconds=timeout)
        with _told_in_a_sentence(timeout):
            if _is_under_torchrun():
                _join_under_torchrun(backend, limit=limit)
            else:
                dist.init_process_group(backend, timeout=limit)
    try:
        yield _world(found, native_bf16=False)
    finally:
        if is_new:
            stop()


def find_device(device: str | None, *, local_rank: int = 0) -> torch.device:
    """The device called ``device``, with this rank's index where none is given; UserError if it does not exist."""
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


def _read_launcher() -> None:
    """Set RANK and its like as torchrun would, for any launcher; refuse where only some of them are set."""
    remember_launchers()
    if dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it as well
        return
    os.environ.update(task_variables(os.environ))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        raise UserError(
            f"launcher: {', '.join(missing)} missing, though RANK or WORLD_SIZE is set; start with deepspeed or "
            "torchrun, or unset both for a single process"
        )
    if missing:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({**alone, "MASTER_PORT": str(free_port())})
    os.environ.update(interface_variables(os.environ))


def _world(device: torch.device, *, native_bf16: bool) -> World:
    local_rank = int(os.environ["LOCAL_RANK"])
    return World(collectives.rank(), collectives.world_size(), local_rank, _local_size(), device, native_bf16)


def _compute_on_cpu(threads: int | None) -> None:
    keep_freed_memory()
    torch.set_num_threads(threads or share_of_cores(_local_size()))


@contextlib.contextmanager
def _told_in_a_sentence(timeout: float) -> Iterator[None]:
    """Turn what torch raises where ranks do not come together into one sentence.

    A port that another program listens on is known at once, and no other start finds it free.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistError where a rank is missing, gloo's own where it went again
        rank, size, address, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"rank {rank}: port {port}, at which the ranks are to meet, is in use on {platform.node()} by another "
                "program; give the launcher another with --master_port, or wait until that program has ended"
            ) from None
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise JoinError(
            f"rank {rank} of {size} could not join the others at {address}:{port} within {timeout:g} s ({reason}); "
            "a rank that ended before it joined says why in its own output"
        ) from None


def _is_under_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized()


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

    With an older torch a process that needs such an extension waits silently and without limit until its lock file is
    gone, and a process that was killed while it compiled leaves the file there. Nothing to do where torch locks the
    file itself (2.14 does): that lock ends with its process.
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


def free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
