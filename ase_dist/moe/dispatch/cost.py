"""What each dispatch puts on the wire, counted before anything runs, and the choice between them.

Letters: P ranks of the expert-parallel group, T tokens of all tasks on a rank, n routed experts, m slots per rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Literal

Choice = Literal["local", "gather", "all_to_all"]
GATE_BYTES = 4  # gates travel in float32
COUNT_BYTES = 16  # of a pair of ranks: how many rows, and how many pairs of a row and an expert


@dataclass(frozen=True)
class LayerShape:
    """The sizes that decide what a layer's dispatch costs.

    ``values_per_token`` is how many values a travelling token carries in a forward pass, both ways together;
    ``expert_values`` the parameters of one routed expert; ``element_bytes`` the size of one value. ``share`` is how
    many tokens the layer sees of those in the model's first block: less than 1 in the later stages of a pyramid.
    """

    routed: int
    active: int
    slots: int
    ranks: int
    values_per_token: int
    expert_values: int
    element_bytes: int
    share: float = 1.0

    def gather_bytes(self) -> int:
        """Bytes that a rank sends per forward and backward pass when experts travel: exact."""
        one_way = (self.ranks - 1) * self.slots * self.expert_values * self.element_bytes
        return 2 * one_way

    def all_to_all_bytes(self, rows: float) -> float:
        """Bytes that a rank sends per forward and backward pass when tokens travel and ``rows`` of them leave.

        Exact in the mean over ranks: what one rank sends out another sends back.
        """
        if self.ranks == 1:
            return 0.0
        values = 2 * rows * self.values_per_token * self.element_bytes
        return values + 2 * rows * self.slots * GATE_BYTES + (self.ranks - 1) * COUNT_BYTES

    def expected_rows(self, tokens: float) -> float:
        """Rows that leave a rank of ``tokens`` if all experts are equally likely: T times the mean remote ranks q."""
        total = comb(self.routed, self.active)
        remote = 0.0
        for start in range(self.slots, self.routed, self.slots):  # ranks are alike; rank 0 is at home
            real = min(self.slots, self.routed - start)
            remote += 1 - comb(self.routed - real, self.active) / total
        return tokens * remote

    def cheaper(self, tokens: float) -> Choice:
        """The dispatch that moves fewer bytes for ``tokens`` on each rank."""
        if self.ranks == 1:
            return "local"
        return "gather" if self.gather_bytes() <= self.all_to_all_bytes(self.expected_rows(tokens)) else "all_to_all"

    def crossover(self) -> float:
        """Tokens per rank from which ``gather`` moves fewer bytes."""
        per_token = self.all_to_all_bytes(self.expected_rows(1.0)) - self.all_to_all_bytes(0.0)
        return (self.gather_bytes() - self.all_to_all_bytes(0.0)) / per_token if per_token else float("inf")
