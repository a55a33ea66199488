"""How convolutional networks share features among tasks: fully, by MTAN's attention, by NDDR or by cross-stitch units.

Each trunk is a module ``trunk(images [B, 3, H, W]) -> list of features [B, C, h, w]``, one a task; ``TRUNKS`` lists
them by the name that ``model.sharing`` has. Letters: t tasks, B images, C channels.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.models.resnet import ResNetParts, group_norm

OWN_SHARE = 0.9  # of a task's own features where units start; the other tasks have the rest in equal parts


class Sharing(nn.Module):
    """What trains to share features, apart from the networks themselves; ``parameters.py`` counts it by this class."""


class SharedTrunk(nn.Module):
    """One network; every task reads its last features (the plain multi-task baseline, or one task alone)."""

    def __init__(self, parts: ResNetParts, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.stem, self.stages = parts.stem, nn.ModuleList(parts.stages)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """The same features for each task."""
        x = self.stem(images_BCHW)
        for stage in self.stages:
            x = stage(x)
        return [x] * self.num_tasks


class TaskList(nn.ModuleList):
    """A module per task, in the order of the tasks: checkpoints find them by this class (``names.py``)."""


class MixingConv(nn.Conv2d):
    """A convolution whose input channels are those of all tasks side by side."""


class CrossStitch(Sharing):
    """x'_t = sum_s a[t, s, c] x_s for channel c (Misra et al. 2016, arXiv 1604.03539)."""

    def __init__(self, channels: int, num_tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_start_shares(num_tasks).unsqueeze(-1).repeat(1, 1, channels))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """t tensors [B, C, h, w] to as many."""
        return list(torch.einsum("tsc,sbchw->tbchw", self.weight, torch.stack(list(features))).unbind(0))


class NDDR(Sharing):
    """Per task ReLU(norm(conv1x1(all tasks' features side by side))) (NDDR-CNN, Gao et al. 2019, arXiv 1801.08297).

    The convolutions start as the shares of a cross-stitch unit, and so does the layer, up to norm and ReLU.
    """

    def __init__(self, channels: int, num_tasks: int) -> None:
        super().__init__()
        convs = [MixingConv(channels * num_tasks, channels, 1, bias=False) for _ in range(num_tasks)]
        self.convs = TaskList(convs)
        self.norms = TaskList(group_norm(channels) for _ in range(num_tasks))
        own_CC = torch.eye(channels)
        for conv, shares_t in zip(convs, _start_shares(num_tasks), strict=True):
            with torch.no_grad():
                conv.weight.copy_(torch.cat([share * own_CC for share in shares_t], dim=1)[..., None, None])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """t tensors [B, C, h, w] to as many."""
        together = torch.cat(list(features), dim=1)
        return [F.relu(norm(conv(together))) for conv, norm in zip(self.convs, self.norms, strict=True)]


class ParallelTrunk(nn.Module):
    """A network per task, all starting alike, with a unit after each stage that mixes their features."""

    def __init__(self, parts: ResNetParts, num_tasks: int, *, unit: Callable[[int, int], Sharing]) -> None:
        super().__init__()
        self.stems = _PerTask(copy.deepcopy(parts.stem) for _ in range(num_tasks))
        self.stages = nn.ModuleList(_PerTask(copy.deepcopy(stage) for _ in range(num_tasks)) for stage in parts.stages)
        self.units = nn.ModuleList(unit(width, num_tasks) for width in parts.widths)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Each task's own features after the last unit."""
        features = self.stems([images_BCHW] * len(self.stems))
        for stage, unit in zip(self.stages, self.units, strict=True):
            features = unit(stage(features))
        return features  # type: ignore[no-any-return]


class MTANTrunk(nn.Module):
    """One network, and per task and stage an attention mask on its features (MTAN, Liu et al. 2019, arXiv 1803.10704).

    With u the stage's features before its last block and p those after it, task by task:

    1. mask = sigmoid(norm(conv1x1(ReLU(norm(conv1x1([u, f]))))), f what this task kept of the stage before
    2. f = block(mask * p), to the next stage's width and size; the block is shared by the tasks
    """

    def __init__(self, parts: ResNetParts, num_tasks: int) -> None:
        super().__init__()
        self.stem = parts.stem
        self.stages = nn.ModuleList(stage[:-1] for stage in parts.stages)
        self.last_blocks = nn.ModuleList(stage[-1] for stage in parts.stages)
        inputs = [parts.widths[0], *(2 * width for width in parts.widths[1:])]
        self.masks = nn.ModuleList(
            _Masks(_Mask(dim_in, width) for _ in range(num_tasks))
            for dim_in, width in zip(inputs, parts.widths, strict=True)
        )
        self.keep = nn.ModuleList(_Keep(a, b) for a, b in itertools.pairwise(parts.widths))

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Each task's masked features of the last stage."""
        x = self.stem(images_BCHW)
        kept: list[Tensor] = []
        masked: list[Tensor] = []
        for i, (stage, last_block, masks) in enumerate(zip(self.stages, self.last_blocks, self.masks, strict=True)):
            u = stage(x)
            x = last_block(u)
            masked = [mask * x for mask in masks(u, kept)]
            kept = [self.keep[i](f) for f in masked] if i < len(self.keep) else []
        return masked


class _PerTask(TaskList):
    """Each task's module on the features of its own."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self, features, strict=True)]


class _Masks(TaskList):
    """Step 1 of ``MTANTrunk`` for all tasks; ``kept`` is empty at the first stage."""

    def forward(self, u_BChw: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
        size = u_BChw.shape[-2:]  # may be smaller than that of the stage before
        fitted = [f if f.shape[-2:] == size else F.adaptive_max_pool2d(f, size) for f in kept]
        inputs = [torch.cat([u_BChw, f], dim=1) for f in fitted] or [u_BChw] * len(self)
        return [mask(x) for mask, x in zip(self, inputs, strict=True)]


class _Mask(Sharing):
    """sigmoid(norm(conv1x1(ReLU(norm(conv1x1(x)))))), as wide as the stage."""

    def __init__(self, dim_in: int, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 4)
        self.squeeze, self.norm1 = nn.Conv2d(dim_in, hidden, 1, bias=False), group_norm(hidden)
        self.expand, self.norm2 = nn.Conv2d(hidden, width, 1, bias=False), group_norm(width)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return torch.sigmoid(self.norm2(self.expand(F.relu(self.norm1(self.squeeze(x_BChw))))))


class _Keep(Sharing):
    """Step 2 of ``MTANTrunk``."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim_in, dim_out, 3, padding=1, bias=False), group_norm(dim_out)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x_BChw)))


def _start_shares(num_tasks: int) -> Tensor:
    """[t, t]: what a task takes of each at first; all of itself where it is alone."""
    if num_tasks == 1:
        return torch.ones(1, 1)
    other = (1 - OWN_SHARE) / (num_tasks - 1)
    return torch.full((num_tasks, num_tasks), other).fill_diagonal_(OWN_SHARE)


TRUNKS: dict[str, Callable[[ResNetParts, int], nn.Module]] = {
    "shared": SharedTrunk,
    "mtan": MTANTrunk,
    "nddr": functools.partial(ParallelTrunk, unit=NDDR),
    "cross_stitch": functools.partial(ParallelTrunk, unit=CrossStitch),
}
