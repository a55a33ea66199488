"""Adding a gating mode: a function, and a line in one table.

A mode turns router logits [..., N], the S shared experts last, into ``Gates``: the weights of the experts' outputs, the
mask of those that are active, and the probabilities that the router losses look at. When a layer is built the mode is
tried on a few logits and held to the rules of ``Gates``. Once ``GATINGS`` has it, ``model.moe.gating=sigmoid`` is a
setting, and ``MoEFFN(..., gating="sigmoid")`` works too. In a checkout the line goes into ``ase_dist/registries.py``.
"""

from typing import Any

from torch import Tensor

from ase_dist.examples import small
from ase_dist.moe.gating import Gates, top_routed
from ase_dist.registries import GATINGS


def sigmoid(logits_TN: Tensor, *, k: int, num_shared: int) -> Gates:
    """Every active expert's gate is the sigmoid of its own logit: none competes with another."""
    active_TN = top_routed(logits_TN, k=k, num_shared=num_shared)
    return Gates(logits_TN.sigmoid() * active_TN, active_TN, logits_TN.softmax(dim=-1))


def main() -> dict[str, Any]:
    """Train two steps with it and evaluate; the run's summary."""
    GATINGS["sigmoid"] = sigmoid  # the one line
    return small.run("model.moe.gating=sigmoid")


if __name__ == "__main__":
    main()
