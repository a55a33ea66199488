"""Dense or grouped: which form of a layer's routed LoRA experts costs less, counted before anything runs.

The dense form multiplies every token with the pairs of all n routed experts, n * r columns, and masks by the gates. The
grouped form sorts tokens by expert and multiplies each with the pairs of its k experts, k * r columns; that adds passes
over memory for every active expert, which cost as much time as a number of columns would. Counted in such columns:

    dense    n * r
    grouped  k * r + k * per_expert + per_token

An accelerator computes some 270 FLOPs in the time that a byte takes (H100, bf16; float32 has both twice as dear). A
dense column is 6 FLOPs per value of a token's input and output, and about 0.01 bytes per value for gates in rank space;
an active expert's output is written and read once in each direction, 4 passes of 2 bytes, and a token's values are
read and written 8 times more: 122 columns for an expert and 244 for a token. On a CPU groups are small products in the
cache: 32 columns for an expert, measured on ViT-S, where both forms cost the same at about 130 columns for 32/4/0/4
and 200 for 16/3/1/16, and 256/4/0/16 is 6 times cheaper grouped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["dense", "grouped"]
ACCELERATOR_COLUMNS = 122, 244  # per active expert, per token
CPU_COLUMNS = 32, 0


@dataclass(frozen=True)
class FormCost:
    """What both forms cost per token, in columns of a low-rank product, on a device of this type.

    ``routed`` experts of which ``active`` act on a token, each of rank ``rank``. The meta device counts as accelerator.
    """

    routed: int
    active: int
    rank: int
    device_type: str

    @property
    def dense(self) -> int:
        """Columns of the dense form."""
        return self.routed * self.rank

    @property
    def grouped(self) -> int:
        """Columns of the grouped form, its passes over memory included."""
        per_expert, per_token = CPU_COLUMNS if self.device_type == "cpu" else ACCELERATOR_COLUMNS
        return self.active * (self.rank + per_expert) + per_token

    def cheaper(self) -> Form:
        """The form that costs less."""
        return "grouped" if self.active and self.grouped < self.dense else "dense"

    def describe(self) -> str:
        """The choice and what it follows from, for the start-up table."""
        return (
            f"{self.cheaper()} (a token costs {self.dense:,} columns with all experts, {self.grouped:,} with its own)"
        )
