"""Which routed experts live on which rank of an expert-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Rank ``index`` of ``count`` holds ``slots`` consecutive experts of ``routed``.

    The slots are equal on all ranks; where ``count`` does not divide ``routed`` the last ones are padding: they have
    ids >= ``routed``, no router can choose them and they never leave their rank.
    """

    routed: int
    index: int = 0
    count: int = 1

    @property
    def slots(self) -> int:
        """Experts per rank, padding included."""
        return -(-self.routed // self.count)

    @property
    def ids(self) -> range:
        """Global ids of this rank's slots."""
        return range(self.index * self.slots, (self.index + 1) * self.slots)

    @property
    def real(self) -> int:
        """How many of this rank's slots are real experts."""
        return len(range(self.ids.start, min(self.ids.stop, self.routed)))

    def own(self, full: Tensor) -> Tensor:
        """This rank's real rows of a tensor [routed, ...] in global order: a view [real, ...]."""
        return full[self.ids.start : self.ids.start + self.real]
