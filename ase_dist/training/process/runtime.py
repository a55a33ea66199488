"""The process of a run: its rank among the others, threads, memory allocator and seeds."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import platform
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from ase_dist import collectives
from ase_dist.agreement import raise_together
from ase_dist.cluster.environment import interface_variables, task_variables
from ase_dist.cores import share_of_cores
from ase_dist.errors import ExitCode, RunError, UserError
from ase_dist.moe import deepspeed_compat
from ase_dist.seeding import derive_seed
from ase_dist.training.process.device import device_index, find_device, has_native_bf16, set_arithmetic
from ase_dist.training.process.launcher_watch import watch_launchers

LOGGER = logging.getLogger("ase_dist")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INT_MAX = 2**31 - 1
REFUSAL_GRACE = 60.0  # seconds that the other ranks get to come and hear why rank 0 does not start
JOIN_GRACE = 10.0  # seconds that torch gets to notice its own time limit
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


def start(
    *,
    timeout: float,
    threads: int | None,
    tf32: bool = False,
    deterministic: bool = False,
    claim: Callable[[], None] = lambda: None,
) -> World:
    """Join the process group that the launcher describes, or a group of one without a launcher; for an engine.

    ``claim`` is called on rank 0 before it joins, so that no other process is disturbed where it raises; rank 0 then
    joins all the same, and all ranks raise. ``timeout`` in seconds bounds every collective. Works under deepspeed,
    torchrun, srun, mpirun and plain python, on any accelerator that DeepSpeed finds; ``tf32`` and ``deterministic`` as
    ``set_arithmetic``. Raises UserError where only some of the launcher's variables are set, the port is taken, or
    there are more ranks than accelerators, JoinError where another rank does not come in time.
    """
    _read_launcher()
    _require_proc()
    refusal: Exception | None = None
    if dist.is_initialized():
        raise_together(lambda: claim() if collectives.rank() == 0 else None)
    elif os.environ["RANK"] == "0":
        try:
            claim()
        except Exception as error:  # of any kind: the other ranks are to hear of it
            if os.environ["WORLD_SIZE"] == "1":
                raise
            refusal, timeout = error, min(timeout, REFUSAL_GRACE)
    deepspeed = deepspeed_compat.import_deepspeed()
    accelerator = deepspeed.accelerator.get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank == 0:
        for sentence in build_locks():
            LOGGER.warning("%s", sentence)
    torch.set_num_threads(threads or share_of_cores(_local_size()))
    is_cpu = accelerator.device_name() == "cpu"
    set_arithmetic(tf32=tf32 and not is_cpu, deterministic=deterministic)
    if is_cpu:
        deepspeed_compat.skip_cpu_communication_build()
        keep_freed_memory()
        device = torch.device("cpu")
    else:
        index = device_index(visible=accelerator.device_count(), local_rank=local_rank, local_size=_local_size())
        device = torch.device(accelerator.device_name(), index)
        accelerator.set_device(index)
    backend = accelerator.communication_backend_name()
    _join_and_tell(backend, device=device, timeout=timeout, refusal=refusal)
    atexit.register(_leave_alone)
    # only wraps the group that exists now
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout), verbose=False)
    return _world(device, native_bf16=has_native_bf16(accelerator))


@contextlib.contextmanager
def join(*, device: str | None, timeout: float = 1800.0) -> Iterator[World]:
    """``start`` for a command that computes without an engine; the process group is left at the end.

    There is a group only where a launcher made several ranks. ``device`` None: this rank's GPU where there are any,
    else the CPU. Raises UserError as ``start``, and for a device that does not exist.
    """
    _read_launcher()
    found = find_device(device, local_rank=int(os.environ["LOCAL_RANK"]), local_size=_local_size())
    torch.set_num_threads(share_of_cores(_local_size()))
    set_arithmetic(tf32=False, deterministic=False)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    else:
        keep_freed_memory()
    is_new = not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1
    if is_new:
        _join_group("nccl" if found.type == "cuda" else "gloo", device=found, timeout=timeout)
    try:
        yield _world(found, native_bf16=False)
    finally:
        if is_new:
            stop()


def _read_launcher() -> None:
    """Set RANK and its like as torchrun would, for any launcher; refuse where only some of them are set."""
    watch_launchers()
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


def _require_proc() -> None:
    """Raise UserError on a Linux host whose /proc this process does not see: DeepSpeed's import reads it (0.19.8)."""
    if sys.platform == "linux" and not Path("/proc/self/status").exists():
        raise UserError(
            "this process sees no /proc, which DeepSpeed needs; mount it (mount -t proc proc /proc), or start "
            "the container without masking it"
        )


def _world(device: torch.device, *, native_bf16: bool) -> World:
    local_rank = int(os.environ["LOCAL_RANK"])
    return World(collectives.rank(), collectives.world_size(), local_rank, _local_size(), device, native_bf16)


def _join_group(backend: str, *, device: torch.device, timeout: float) -> None:
    """Make the default group unless there is one. A group of several GPUs is bound to them, which starts NCCL at once.

    DeepSpeed would bind it to the GPU of index LOCAL_RANK (0.19.8), which does not exist where each rank sees one.
    """
    if dist.is_initialized():
        return
    limit = timedelta(seconds=timeout)
    is_bound = device.type == "cuda" and int(os.environ["WORLD_SIZE"]) > 1
    options: dict[str, Any] = {"timeout": limit, "device_id": device if is_bound else None}
    with _told_in_a_sentence(timeout):
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _join_under_torchrun(backend, limit=limit, options=options)
        else:
            dist.init_process_group(backend, **options)
    collectives.limit_all_groups(timeout)


def _join_and_tell(backend: str, *, device: torch.device, timeout: float, refusal: Exception | None) -> None:
    """``_join_group``, after which all ranks raise where rank 0 has a ``refusal``; it also where it cannot join."""

    def refuse() -> None:
        if refusal is not None:
            raise refusal

    try:
        _join_group(backend, device=device, timeout=timeout)
    except Exception:
        refuse()
        raise
    raise_together(refuse)


@contextlib.contextmanager
def _told_in_a_sentence(timeout: float) -> Iterator[None]:
    """Turn what torch raises where ranks do not come together into one sentence.

    A port that another program listens on is known at once, and no other start finds it free. Where that program takes
    connections and says nothing, torch 2.14 waits for its answer without a limit; then the process is ended.
    """
    rank, size, address, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))

    def sentence(reason: str) -> str:
        return (
            f"rank {rank} of {size} could not join the others at {address}:{port} within {timeout:g} s ({reason}); "
            "a rank that ended before it joined says why in its own output"
        )

    def end() -> None:
        sys.stderr.write(f"error: {sentence('what listens there does not answer, it may be another program')}\n")
        sys.stderr.flush()
        os._exit(ExitCode.SILENT)

    deadline = threading.Timer(timeout + JOIN_GRACE, end)
    deadline.daemon = True
    deadline.start()
    try:
        yield
    except RuntimeError as error:  # torch's DistError where a rank is missing, gloo's own where it went again
        if "Duplicate GPU" in str(error):  # NCCL's, where two ranks of a host have the same one
            raise UserError(
                f"rank {rank}: {platform.node()} has more ranks than GPUs, and NCCL wants one for each; start fewer "
                "ranks there, or let the scheduler give each rank its own GPU, as srun --gpus-per-task=1 does"
            ) from None
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"rank {rank}: port {port}, at which the ranks are to meet, is in use on {platform.node()} by another "
                "program; give the launcher another with --master_port, or wait until that program has ended"
            ) from None
        raise JoinError(sentence((str(error).splitlines() or [""])[0].rstrip("."))) from None
    finally:
        deadline.cancel()


def _join_under_torchrun(backend: str, *, limit: timedelta, options: dict[str, Any]) -> None:
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
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, **options)
    if rank == 0:
        shared.delete_key(PORT_KEY)


def stop() -> None:
    """Leave the process group; needed for a clean exit after work that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_alone() -> None:
    """Leave a group of one at the end of the process, however that ends: NCCL would add a warning to what was said.

    Not before, as DeepSpeed keeps its groups for the next run of the process.
    """
    if dist.is_initialized() and dist.get_world_size() == 1:
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


def build_locks() -> list[str]:
    """A sentence for each lock file in the folder where torch compiles extensions, DeepSpeed's ops among them.

    With an older torch a process that needs such an extension waits silently and without limit until its lock file is
    gone, and a process that was killed while it compiled leaves the file there. Nothing to do where torch locks the
    file itself (2.14 does): that lock ends with its process.
    """
    from torch.utils import cpp_extension

    if not hasattr(cpp_extension, "FileBaton"):
        return []
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    sentences = []
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        with contextlib.suppress(FileNotFoundError):  # the compilation has just ended
            minutes = (time.time() - lock.stat().st_mtime) / 60
            sentences.append(
                f"{lock} has been there for {minutes:.0f} min: a start that needs {lock.parent.name} waits until it is "
                "gone; if nothing is being compiled any more, a killed process has left it, delete it"
            )
    return sentences


def _local_size() -> int:
    """Ranks on this node, as torchrun or deepspeed's launcher calls them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
