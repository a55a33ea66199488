"""Which frozen weights a model has. A checkpoint does not hold them, but what tells them from others.

Every start makes them anew, from a file or a seed. Positions are resampled to the size of the images, and random
weights are logarithms and cosines of random bits: another processor or another torch rounds both otherwise, which is no
reason to refuse a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

PERIOD = 65536  # of the signs
ROUNDING = 1e-4  # of a norm: positions resampled in half precision differ by 2e-5, the same file in it by 3e-4

Sketch = Sequence[tuple[float, float]]


class FrozenWeights(NamedTuple):
    """The SHA-256 of a model's frozen tensors in the order of their names, and a ``sketch`` of them.

    That has for each tensor its norm, and the sum of its values with fixed random signs over the norm: two tensors
    that differ by the share d of their norm differ by about d in it. None in checkpoints of earlier versions.
    """

    name: str  # of the backbone
    sha256: str
    sketch: Sketch | None

    @classmethod
    def of(cls, model: nn.Module, name: str) -> FrozenWeights:
        """Those of ``model``, whose backbone is called ``name``."""
        digest, sketch = hashlib.sha256(), []
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad:
                tensor = parameter.detach().cpu().contiguous()
                digest.update(tensor.view(torch.uint8).numpy().data)
                sketch.append(_sketch(tensor))
        return cls(name, digest.hexdigest(), sketch)

    def compare(self, other: FrozenWeights) -> Literal["same", "rounded", "other"]:
        """Whether these are the weights of ``other``, or these rounded otherwise, or others."""
        if (self.name, self.sha256) == (other.name, other.sha256):
            return "same"
        if self.name != other.name or self.sketch is None or other.sketch is None:
            return "other"
        if len(self.sketch) != len(other.sketch):
            return "other"
        is_near = all(
            abs(norm - other_norm) <= ROUNDING * max(norm, other_norm) and abs(signed - other_signed) <= ROUNDING
            for (norm, signed), (other_norm, other_signed) in zip(self.sketch, other.sketch, strict=True)
        )
        return "rounded" if is_near else "other"


def _sketch(tensor: Tensor) -> tuple[float, float]:
    flat, signs = tensor.flatten(), _signs()
    norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
    if not norm:
        return 0.0, 0.0
    whole = flat.numel() // PERIOD * PERIOD
    rest = flat[whole:].double()
    signed = flat[:whole].view(-1, PERIOD).sum(dim=0, dtype=torch.float64) @ signs + rest @ signs[: len(rest)]
    return float(f"{norm:.9g}"), float(f"{float(signed) / norm:.9g}")


@lru_cache(maxsize=1)
def _signs() -> Tensor:
    """1 and -1, the same in every version and on every machine."""
    bits = torch.tensor(list(hashlib.shake_256(b"ase_dist: signs of frozen weights").digest(PERIOD // 8)))
    return 1.0 - 2.0 * (bits[:, None] >> torch.arange(8) & 1).flatten().double()
