"""Adding a head: a class, and a line in one table.

A head turns the tokens of one task, [B, patches, dim], into logits [B, channels, h, w] of any size: losses and metrics
resize them. Once ``HEADS`` has it, ``model.head=mlp`` is a setting like any other: checked, saved, exported, listed in
errors. In a checkout the line goes into ``ase_dist/registries.py``, where every command finds it.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.examples import small
from ase_dist.models.heads import TaskHead
from ase_dist.registries import HEADS


class MLPHead(TaskHead):
    """One hidden layer on each token, 2 x 2 pixels of every patch."""

    def __init__(self, dim: int, channels: int, *, grid: tuple[int, int], patch: int, width: int) -> None:
        super().__init__(dim, grid=grid)
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, 4 * channels)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """Logits [B, C, 2 * grid]."""
        x = self.fc2(F.gelu(self.fc1(self.norm(tokens_BPD))))
        return F.pixel_shuffle(x.unflatten(1, self.grid).permute(0, 3, 1, 2), 2)


def main() -> dict[str, Any]:
    """Train two steps with it and evaluate; the run's summary."""
    HEADS["mlp"] = MLPHead  # the one line; "my_package.heads:MLPHead" would do too, imported when it is used
    return small.run("model.head=mlp", "model.head_width=16")


if __name__ == "__main__":
    main()
