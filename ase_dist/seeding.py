"""Random generators from a seed and a name: the same on every rank and in any order of construction."""

from __future__ import annotations

import hashlib

import torch
from torch.utils._python_dispatch import _disable_current_modes


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on ``seed`` and all of ``names``."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one tensor, seeded by ``derive_seed``."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def drawn_seed() -> int:
    """A seed from torch's generator, as ``nn.Linear`` draws its weights: repeated after ``torch.manual_seed``.

    Real also where tensors are not, on the meta device and under fake tensors.
    """
    with _disable_current_modes():  # type: ignore[no-untyped-call]
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
