"""The convolutional multi-task models that the paper compares with, behind the interface of ``MultiTaskViT``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ase_dist.models.heads import Head
from ase_dist.models.multitask import ModelOutput, MultiTaskViT, checked_tasks


class MultiTaskResNet(nn.Module):
    """A ResNet trunk that shares features among tasks as ``model.sharing`` says, and a head per task.

    1. the trunk's features [B, C, H/8, W/8] per task
    2. each task's head on them, read as tokens of 8 x 8 pixels

    ``blocks`` is empty: there are no experts. ``build_model`` makes one from the settings.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.task_names = tuple(heads)
        self.trunk = trunk
        self.blocks = nn.ModuleList()
        self.heads = nn.ModuleDict(heads)

    def forward(self, images_BCHW: Tensor, *, tasks: Sequence[str] | None = None) -> ModelOutput:
        """As ``MultiTaskViT.forward``; the trunk computes all tasks' features, the heads those of ``tasks`` only."""
        names = checked_tasks(tasks, self.task_names)
        dtype = next(self.trunk.parameters()).dtype  # DeepSpeed's bf16 casts weights alone
        features = dict(zip(self.task_names, self.trunk(images_BCHW.to(dtype)), strict=True))
        predictions = {name: self.heads[name](features[name].flatten(2).transpose(1, 2)) for name in names}
        empty = torch.zeros(0, len(names), 0, device=images_BCHW.device)
        return ModelOutput(predictions, empty.sum(), empty.long(), empty)

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop the heads of all other tasks, for good; the trunk, which may mix tasks, stays as it is."""
        self.heads = nn.ModuleDict({name: self.heads[name] for name in checked_tasks(names, self.task_names)})


MultiTaskModel = MultiTaskViT | MultiTaskResNet
