"""Heads that turn the tokens of one task into raw logits; ``ase_dist.registries.HEADS`` lists them.

Letters: B images, P patches, D width, C channels of the task, h w a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.ops.doubled_conv import double, doubled_conv


class TaskHead(nn.Module):
    """What every head is: ``head(tokens [B, P, D]) -> logits [B, C, h, w]`` for the patch grid it was built for."""

    def __init__(self, dim: int, *, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm: nn.Module = nn.LayerNorm(dim)

    def grid_tokens(self, tokens_BPD: Tensor) -> Tensor:
        """The normalised tokens as an image [B, D, h, w], which lies channels-last in memory as it comes.

        Convolutions keep that format (it saves 15 % of a PUP head's time on a CPU) although their weights
        are contiguous: DeepSpeed 0.19.8 cannot broadcast channels-last parameters over gloo.
        """
        return self.norm(tokens_BPD).unflatten(1, self.grid).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Level(NamedTuple):
    """The features of one level of a backbone: tokens [B, rows * columns, width], row by row.

    ``grid`` is rows x columns of cells, ``stride`` the side of a cell in pixels. ``prefix`` tokens that belong to no
    cell (class token, registers) stand before the others for a head that reads them.
    """

    width: int
    grid: tuple[int, int]
    stride: int
    prefix: int = 0


def finest(levels: Sequence[Level]) -> Level:
    """The one with the smallest cells."""
    return min(levels, key=lambda level: level.stride)


class LevelsHead(nn.Module):
    """A head on several levels: ``head([tokens [B, P, D] of each]) -> logits [B, C, h, w]``, shallow to deep.

    ``num_levels`` is how many it reads where ``model.levels`` does not say. ``reads_prefix``: it also wants the tokens
    before those of the cells, which then come first. Every level gets a LayerNorm of the head's own, since only the
    last comes through the backbone's.
    """

    num_levels: ClassVar[int] = 4
    reads_prefix: bool = False

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.norms = nn.ModuleList(nn.LayerNorm(level.width) for level in levels)

    def normalised(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Each level after its LayerNorm."""
        return [norm(x) for norm, x in zip(self.norms, tokens, strict=True)]


class PUPHead(TaskHead):
    """Progressive upsampling as in SETR and M3ViT: ``stages`` x [conv 3x3, norm, ReLU, x2 bilinear], then conv 1x1.

    1. LayerNorm, tokens to an image
    2. the stages; the last one's doubling comes after the 1x1 convolution, which is the same function (both are
       linear, and bilinear weights sum to 1) with C instead of ``width`` channels to enlarge

    GroupNorm stands for their (synchronised) BatchNorm: no statistic crosses images, so neither the batch nor the
    number of ranks changes a result. Four stages as there, fewer for patches of 8 pixels and less: output for about
    every pixel of the image (256 pixels for 224 with patches of 14).
    """

    def __init__(self, dim: int, channels: int, *, grid: tuple[int, int], patch: int, width: int) -> None:
        super().__init__(dim, grid=grid)
        stages = min(4, max(1, round(math.log2(patch))))
        widths = [dim] + [width] * stages
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(32, width), width) for _ in range(stages))
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """Logits [B, C, 2^stages * grid]."""
        x = self.grid_tokens(tokens_BPD)
        for stage, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = doubled_conv(x, cast(nn.Conv2d, conv)) if stage else conv(x)
            x = F.relu(norm(x))
        return double(self.last(x))


class LinearHead(TaskHead):
    """The light head: LayerNorm, one linear per token to C * s * s numbers, laid out as s x s pixels; no convolution.

    ``patch`` 8 or more gives s = 4, so the logits have a quarter of the image's side or more.
    """

    def __init__(self, dim: int, channels: int, *, grid: tuple[int, int], patch: int, width: int) -> None:
        super().__init__(dim, grid=grid)
        self.scale = max(1, min(4, patch // 2))
        self.linear = nn.Linear(dim, channels * self.scale**2)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """Logits [B, C, s * grid]."""
        x = self.linear(self.norm(tokens_BPD)).unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.pixel_shuffle(x, self.scale)


class PUPLinearHead(TaskHead):
    """The linear head plus a PUP head's correction of it, at the larger of their two sizes.

    The linear path learns within a few steps what the tokens already say; the convolutions, which may be narrow, add
    what lies between the patches. For short runs on small backbones.
    """

    def __init__(self, dim: int, channels: int, *, grid: tuple[int, int], patch: int, width: int) -> None:
        super().__init__(dim, grid=grid)
        self.norm = nn.Identity()  # each path has its own
        self.linear = LinearHead(dim, channels, grid=grid, patch=patch, width=width)
        self.pup = PUPHead(dim, channels, grid=grid, patch=patch, width=width)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """Logits [B, C, h, w] of the larger path."""
        small, large = sorted((self.linear(tokens_BPD), self.pup(tokens_BPD)), key=lambda logits: logits.shape[-1])
        # in float32 or wider, in which its backward pass then adds up; for bf16 that is up to 64 additions a cell
        wide = small.to(torch.promote_types(small.dtype, torch.float32))
        enlarged = F.interpolate(wide, size=large.shape[-2:], mode="bilinear", align_corners=False)
        return large + enlarged.to(large.dtype)


Head = TaskHead | LevelsHead


class HeadFactory(Protocol):
    """How heads on the last level are built; ``width`` is for those with hidden channels.

    Other keywords that it takes are the keys of ``model.head_args``.
    """

    def __call__(
        self, dim: int, channels: int, *, grid: tuple[int, int], patch: int, width: int, **args: Any
    ) -> TaskHead:
        """A head for tokens of width ``dim`` on ``grid`` patches of ``patch`` pixels."""


class LevelsHeadFactory(Protocol):
    """How heads on several levels are built; it has the attribute ``num_levels``, as ``LevelsHead`` has."""

    num_levels: int

    def __call__(self, levels: Sequence[Level], channels: int, *, width: int, **args: Any) -> LevelsHead:
        """A head for ``levels``, shallow to deep."""
