"""The device of a rank, and the arithmetic that is set once for a process: bf16, TF32, deterministic algorithms."""

from __future__ import annotations

import os
from typing import Any

import torch

from ase_dist.errors import UserError

WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may add up in another order in every call


def device_index(*, visible: int, local_rank: int, local_size: int) -> int:
    """The index among the ``visible`` accelerators of the one that the rank ``local_rank`` of this host computes on.

    One visible device and several ranks is what a scheduler makes that gives each rank its own (``srun
    --gpus-per-task=1``, CUDA_VISIBLE_DEVICES by rank, MIG): device 0. Raises UserError where there are too few, on all
    ranks of the host.
    """
    ranks = max(local_size, local_rank + 1)
    if ranks <= visible:
        return local_rank
    if visible == 1:
        return 0
    raise UserError(
        f"device: {visible} accelerators are visible to {ranks} ranks of this host, wanted one for each rank, or "
        "exactly one visible to each; start fewer ranks, or let the scheduler give each its own, as srun "
        "--gpus-per-task=1 does"
    )


def find_device(device: str | None, *, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device called ``device``, with this rank's index where none is given; UserError if it does not exist."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: got {name!r}, wanted cpu, cuda or one GPU such as cuda:1") from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if found.type == "cuda" and found.index is None and count:
        found = torch.device("cuda", device_index(visible=count, local_rank=local_rank, local_size=local_size))
    if found.type not in ("cpu", "cuda") or (found.index or 0) >= count:
        raise UserError(f"--device: there is no {found} here, there are {torch.cuda.device_count()} GPUs and the cpu")
    return found


def has_native_bf16(accelerator: Any) -> bool:
    """Whether DeepSpeed's ``accelerator`` computes in bf16 itself; a CPU and an emulating GPU (V100, T4) do not."""
    if accelerator.device_name() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return accelerator.device_name() != "cpu" and bool(accelerator.is_bf16_supported())


def set_arithmetic(*, tf32: bool, deterministic: bool) -> None:
    """Set how GPUs multiply float32, in products and convolutions alike, and whether results repeat bit for bit.

    ``deterministic`` chooses algorithms that give the same bits in every run; what has none raises RuntimeError.
    It must be set before the first product, as cuBLAS reads its workspace once.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(deterministic)
    # it would find bugs, at the price of a pass over all memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
