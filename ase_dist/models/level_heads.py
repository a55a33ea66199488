"""Heads that read several levels of a backbone: DPT's, HRNet's, and the fusion of scales of InvPT.

No statistic crosses images: GroupNorm stands for their BatchNorm. Images are resized bilinearly between the centres of
cells, and a 1x1 convolution comes before an enlargement that the papers have before it: the same function, since both
are linear and bilinear weights sum to 1. Letters: B images, P tokens, D width of a level, W ``width``, C channels of
the task, h w a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.errors import UserError, did_you_mean
from ase_dist.models.heads import Level, LevelsHead, finest
from ase_dist.ops.doubled_conv import double, doubled_conv

FINEST = 4  # pixels of a cell of the features that these heads end with
READOUTS = ("ignore", "add", "project")


class HRNetHead(LevelsHead):
    """All levels side by side, two 1x1 convolutions: HRNetV2's head (arXiv 1908.07919) as ASTMT and MTLoRA have it.

    1. LayerNorm on each level
    2. all levels at one size, side by side, and a 1x1 convolution to W channels; here a linear map of each level, and
       the sum of what comes out at one size
    3. GroupNorm, ReLU, conv 1x1

    The size is that of the level with the smallest cells, doubled until these have about 4 pixels. W is ``width``; the
    published code takes the sum of the levels' widths, 3072 for a ViT-B.
    """

    def __init__(self, levels: Sequence[Level], channels: int, *, width: int) -> None:
        super().__init__(levels)
        last = len(levels) - 1
        self.linears = nn.ModuleList(nn.Linear(level.width, width, bias=i == last) for i, level in enumerate(levels))
        self.norm = _group_norm(width)
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits [B, C, h, w] of cells of about 4 pixels."""
        target = finest(self.levels)
        images = _at_one_size(self, self.linears, tokens, target)
        x = sum(images[1:], images[0])
        for _ in range(_doublings(target)):
            x = double(x)
        return self.last(F.relu(self.norm(x)))  # type: ignore[no-any-return]


class MultiLevelHead(LevelsHead):
    """A linear map of each level and a convolution over all: how InvPT fuses its scales (arXiv 2203.07997).

    1. LayerNorm and a linear map to W channels on each level
    2. all levels at one size, side by side
    3. conv 3x3 to W channels, GroupNorm, ReLU, conv 1x1

    The size is as in ``HRNetHead``. InvPT adds up what is side by side here: the convolution with equal parts.
    """

    def __init__(self, levels: Sequence[Level], channels: int, *, width: int) -> None:
        super().__init__(levels)
        self.linears = nn.ModuleList(nn.Linear(level.width, width) for level in levels)
        self.fuse = nn.Conv2d(len(levels) * width, width, 3, padding=1)
        self.norm = _group_norm(width)
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits [B, C, h, w] of cells of about 4 pixels."""
        target = finest(self.levels)
        images = _at_one_size(self, self.linears, tokens, target)
        x, doublings = torch.cat(images, dim=1), _doublings(target)
        for _ in range(doublings - 1):
            x = double(x)
        x = doubled_conv(x, self.fuse) if doublings else self.fuse(x)
        return self.last(F.relu(self.norm(x)))  # type: ignore[no-any-return]


def _at_one_size(head: LevelsHead, linears: nn.ModuleList, tokens: Sequence[Tensor], target: Level) -> list[Tensor]:
    """Each level of ``head`` normalised, mapped by its linear, and brought to the cells of ``target``: images."""
    maps = [linear(x) for linear, x in zip(linears, head.normalised(tokens), strict=True)]
    return [_onto(target, _image(x, level.grid), level) for x, level in zip(maps, head.levels, strict=True)]


class DPTHead(LevelsHead):
    """The dense prediction transformer (Ranftl et al. 2021, arXiv 2103.13413) on four levels.

    1. Reassemble: LayerNorm; the class token is left out, added to each token or, with ``readout='project'``, appended
       to it and the pair mapped by GELU(linear); 1x1 convolution to an eighth, a quarter, a half and all of the width;
       resampled to cells of 4, 8, 16 and 32 pixels by (transposed) convolutions; conv 3x3 to W channels
    2. Fusion from the deepest on: x = up(conv1x1(RCU(x + RCU(level)))), twofold and cut to the size of the next level,
       RCU being RefineNet's residual unit z + norm(conv(ReLU(norm(conv(ReLU(z))))))
    3. Output: conv 3x3, GroupNorm, ReLU, conv 1x1, twofold up

    Steps 2 and 3 enlarge between the centres of cells, where the published code aligns corners: what is predicted for
    a pixel stands where the losses look for it. A level of a pyramid (Swin) that has its cells and its width already
    goes to the 3x3 convolution as it is.
    """

    def __init__(self, levels: Sequence[Level], channels: int, *, width: int, readout: str = "ignore") -> None:
        super().__init__(levels)
        if len(levels) != 4:
            raise UserError(f"model.levels: got {len(levels)}, wanted 4 for the head 'dpt'")
        if width < 2:
            raise UserError(f"model.head_width: got {width}, wanted 2 or more for the head 'dpt'")
        if readout not in READOUTS:
            raise UserError(
                f"model.head_args.readout: got {readout!r}, wanted one of {list(READOUTS)}"
                f"{did_you_mean(str(readout), READOUTS)}"
            )
        self.reads_prefix = readout != "ignore"
        if self.reads_prefix and not all(level.prefix for level in levels):
            raise UserError(
                f"model.head_args.readout: got {readout!r}, but the backbone has no class token; take 'ignore'"
            )
        readouts = {"ignore": nn.Identity, "add": _AddedReadout, "project": _ProjectedReadout}
        self.readouts = nn.ModuleList(readouts[readout](level) for level in levels)
        widest = levels[-1].width
        stages = [
            _Reassemble(level, min(level.width, max(1, widest >> (3 - i))), stride=FINEST << i)
            for i, level in enumerate(levels)
        ]
        self.reassemble = nn.ModuleList(stages)
        self.convs = nn.ModuleList(nn.Conv2d(stage.width, width, 3, padding=1, bias=False) for stage in stages)
        self.skips = nn.ModuleList(_ResidualUnit(width) for _ in levels[:-1])  # the deepest level has nothing to join
        self.units = nn.ModuleList(_ResidualUnit(width) for _ in levels)
        self.projections = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in levels)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = _group_norm(width)
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits [B, C, h, w] of about a pixel, four times the grid of the first level resampled."""
        told = [readout(x) for readout, x in zip(self.readouts, self.normalised(tokens), strict=True)]
        images = [stage(x) for stage, x in zip(self.reassemble, told, strict=True)]
        images = [conv(image) for conv, image in zip(self.convs, images, strict=True)]
        x = self.projections[3](self.units[3](images[3]))
        for i in (2, 1, 0):
            rows, columns = images[i].shape[-2:]  # odd ones were rounded up in the deeper level
            x = double(x)[..., :rows, :columns] + self.skips[i](images[i])
            x = self.projections[i](self.units[i](x))
        return double(self.last(F.relu(self.norm(doubled_conv(x, self.conv)))))


class _AddedReadout(nn.Module):
    """cell + readout, the first of the tokens before those of the cells."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.prefix = level.prefix

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        return tokens_BPD[:, self.prefix :] + tokens_BPD[:, :1]


class _ProjectedReadout(nn.Module):
    """GELU(linear([cell, readout])), the linear in two parts, of which the readout's is computed once an image."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.prefix = level.prefix
        self.cell = nn.Linear(level.width, level.width)
        self.readout = nn.Linear(level.width, level.width, bias=False)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        return F.gelu(self.cell(tokens_BPD[:, self.prefix :]) + self.readout(tokens_BPD[:, :1]))


class _Reassemble(nn.Module):
    """A level as an image of ``width`` channels whose cells have about ``stride`` pixels."""

    def __init__(self, level: Level, width: int, *, stride: int) -> None:
        super().__init__()
        self.grid, self.width = level.grid, width
        steps = round(math.log2(level.stride / stride))
        self.project = nn.Identity() if not steps and level.width == width else nn.Linear(level.width, width)
        self.resample: nn.Module = nn.Identity()
        if steps > 0:
            self.resample = nn.ConvTranspose2d(width, width, 2**steps, stride=2**steps)
        elif steps < 0:
            factor = 2**-steps
            self.resample = nn.Conv2d(width, width, factor + 1, stride=factor, padding=factor // 2)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        return self.resample(_image(self.project(tokens_BPD), self.grid))  # type: ignore[no-any-return]


class _ResidualUnit(nn.Module):
    """z + norm(conv3x3(ReLU(norm(conv3x3(ReLU(z)))))): RefineNet's unit (arXiv 1611.06612) as DPT has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), _group_norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), _group_norm(width)

    def forward(self, z_BWhw: Tensor) -> Tensor:
        x = self.norm1(self.conv1(F.relu(z_BWhw)))
        return z_BWhw + self.norm2(self.conv2(F.relu(x)))  # type: ignore[no-any-return]


def _image(tokens_BPD: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens_BPD.unflatten(1, grid).permute(0, 3, 1, 2)


def _resize(x_BDhw: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinearly at the centres of cells; where that is not a doubling the gradient is added up in float32 or wider."""
    h, w = x_BDhw.shape[-2:]
    if tuple(size) == (h, w):
        return x_BDhw
    if tuple(size) == (2 * h, 2 * w):
        return double(x_BDhw)
    wide = x_BDhw.to(torch.promote_types(x_BDhw.dtype, torch.float32))
    return F.interpolate(wide, size=tuple(size), mode="bilinear", align_corners=False).to(x_BDhw.dtype)


def _onto(target: Level, x_BDhw: Tensor, level: Level) -> Tensor:
    """The image of ``level`` at the cells of ``target``, without the padding of a pyramid, which lies outside them."""
    rows, columns = (n * level.stride // target.stride for n in level.grid)
    x_BDhw = _resize(x_BDhw, (rows, columns))
    return x_BDhw if (rows, columns) == target.grid else x_BDhw[..., : target.grid[0], : target.grid[1]]


def _doublings(level: Level) -> int:
    return max(0, round(math.log2(level.stride / FINEST)))


def _group_norm(width: int) -> nn.GroupNorm:
    """Up to 32 groups of at least two channels: at 1 x 1 cells, of one image, one value would have no variance."""
    groups = math.gcd(32, width)
    return nn.GroupNorm(groups if groups < width else max(1, groups // 2), width)
