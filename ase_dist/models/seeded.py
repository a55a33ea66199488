"""Libraries' default initialisation made a function of a seed and a name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ase_dist.seeding import derive_seed


@contextmanager
def seeded_initialisation(seed: int, *names: str | int) -> Iterator[None]:
    """Draw from a seeded CPU generator inside, and leave the global one as it was.

    For constructors that take no generator (``nn.Conv2d``, timm's models). Only the CPU generator is touched: models
    are built on the CPU (or on the meta device) and moved afterwards.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(seed, *names))
    try:
        yield
    finally:
        torch.set_rng_state(state)
