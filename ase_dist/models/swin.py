"""Swin transformers of timm, v1 and v2, taken apart into patch embedding, blocks and norm for streams of tasks.

The stages become one sequence of blocks, numbered from 0 to the end of the last stage. The first block of a later stage
begins with the merging of 2x2 patches (``downsample``), so a block maps tokens to tokens as a plain ViT's does, but may
return a quarter of them at another width. Windows, shifts and masks are timm's own.

Letters: X images of all streams, B images, t tasks, P tokens, D width, h w a grid of tokens, S tokens of a window.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.errors import UserError
from ase_dist.models.blocks import TaskBlock

SWINS = (SwinTransformer, SwinTransformerV2)
BLOCKS = (SwinTransformerBlock, SwinTransformerV2Block)
TABLE = "relative_position_bias_table"  # of v1
SWINS_OWN = re.compile(rf"^blocks\.\d+\.attn\.({TABLE}|cpb_mlp\..*)$")
MERGINGS = (nn.Identity, swin_transformer.PatchMerging, swin_transformer_v2.PatchMerging)


class SwinTaskBlock(TaskBlock):
    """A Swin block with the task streams as a batch dimension, and a MoE layer of either kind in place of its FFN.

    1. 2x2 patches of ``grid_in`` merged into one, in the first block of a later stage
    2. x + drop_path(attention in windows, every second block's shifted by half of one)
    3. x + drop_path(FFN(x)), as in ``TaskBlock``

    The norms stand before attention and FFN in v1 and after them in v2 (``norm_last``). Where windows do not divide the
    ``grid`` it is padded with zeros at the right and at the bottom, as timm does.
    """

    attn_mask: Tensor | None

    def __init__(self, block: Any, *, downsample: nn.Module, grid_in: tuple[int, int]) -> None:
        super().__init__(block)
        self.downsample, self.grid_in = downsample, grid_in
        self.width = int(block.dim)
        self.norm_last = isinstance(block, SwinTransformerV2Block)
        self.grid: tuple[int, int] = _pair(block.input_resolution)
        self.window, self.shift = _pair(block.window_size), _pair(block.shift_size)
        self.register_buffer("attn_mask", block.attn_mask, persistent=False)
        if self.norm_last:
            block.attn.cpb_mlp.register_forward_pre_hook(_in_type_of_weights)

    def attend(self, x_XPD: Tensor, rope: Tensor | None) -> Tensor:
        """Steps 1 and 2, [X, P, D] to the same, or to a quarter of the tokens with another width."""
        x_XhwD = self.downsample(x_XPD.unflatten(1, self.grid_in))
        branch_XhwD = self.norm1(self._windows(x_XhwD)) if self.norm_last else self._windows(self.norm1(x_XhwD))
        return (x_XhwD + self.drop_path1(branch_XhwD)).flatten(1, 2)  # type: ignore[no-any-return]

    def ffn_input(self, x_XPD: Tensor) -> Tensor:
        """What the FFN gets of the result of step 2."""
        return x_XPD if self.norm_last else self.norm2(x_XPD)  # type: ignore[no-any-return]

    def add_ffn(self, x_XPD: Tensor, ffn_XPD: Tensor) -> Tensor:
        """The block's output, from the result of step 2 and the FFN's."""
        return x_XPD + self.drop_path2(self.norm2(ffn_XPD) if self.norm_last else ffn_XPD)  # type: ignore[no-any-return]

    def _windows(self, x_XhwD: Tensor) -> Tensor:
        """timm's attention within windows; those at the border of a shifted grid are masked where they wrap around."""
        height, width = self.grid
        if any(self.shift):
            x_XhwD = torch.roll(x_XhwD, (-self.shift[0], -self.shift[1]), dims=(1, 2))
        below, right = -height % self.window[0], -width % self.window[1]
        if below or right:
            x_XhwD = F.pad(x_XhwD, (0, 0, 0, right, 0, below))
        windows_WSD = window_partition(x_XhwD, self.window).flatten(1, 2)
        mask = None if self.attn_mask is None else self.attn_mask.to(x_XhwD.dtype)
        windows_WSD = self.attn(windows_WSD, mask=mask)
        x_XhwD = window_reverse(windows_WSD.unflatten(1, self.window), self.window, height + below, width + right)
        x_XhwD = x_XhwD[:, :height, :width]
        return torch.roll(x_XhwD, self.shift, dims=(1, 2)) if any(self.shift) else x_XhwD


def take_blocks(net: Any) -> list[SwinTaskBlock]:
    """The blocks of all stages in order; what is left of ``net`` embeds patches."""
    blocks, grid = [], _pair(net.patch_embed.grid_size)
    for stage in net.layers:
        for block in stage.blocks:
            downsample = stage.downsample if block is stage.blocks[0] else nn.Identity()
            blocks.append(SwinTaskBlock(block, downsample=downsample, grid_in=grid))
            grid = blocks[-1].grid
    net.layers = nn.Sequential()
    return blocks


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin's tensors, whose blocks are numbered over all stages, under timm's names; another model's as they are."""
    if not any(SWINS_OWN.search(name) for name in tensors):
        return dict(tensors)
    merged = (re.match(r"blocks\.(\d+)\.downsample\.", name) for name in tensors)
    starts = sorted({0} | {int(found[1]) for found in merged if found})
    renamed = {}
    for name, tensor in tensors.items():
        timms = name
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            stage = bisect(starts, int(found[1])) - 1
            place = "" if found[2].startswith("downsample.") else f"blocks.{int(found[1]) - starts[stage]}."
            timms = f"layers.{stage}.{place}{found[2]}"
        renamed[timms] = tensor
    return renamed


def resized_tables(
    tensors: Mapping[str, Tensor], blocks: Sequence[nn.Module], *, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """The tables of relative positions among ``tensors`` that have other windows than ``blocks``, resized by timm.

    ``tensors`` are of a model whose patches lie on ``grid``; a window there was no larger than the grid of its stage.
    """
    resized = {}
    for i, block in enumerate(blocks):
        if not isinstance(block, SwinTaskBlock):
            continue
        if not isinstance(block.downsample, nn.Identity):
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
        old = tensors.get(name := f"blocks.{i}.attn.{TABLE}")
        new = getattr(block.attn, TABLE, None)
        if old is None or new is None or old.shape[1:] != new.shape[1:]:
            continue
        windows = {(min(side, grid[0]), min(side, grid[1])) for side in range(1, max(grid) + 1)}
        window = next((w for w in windows if (2 * w[0] - 1) * (2 * w[1] - 1) == old.shape[0]), None)
        if window is not None and window != block.window:
            options = {"new_window_size": block.window, "new_bias_shape": new.shape, "old_window_size": window}
            resized[name] = resize_rel_pos_bias_table(old, **options)
    return resized


def check_stages(name: str, net: Any) -> None:
    """UserError for a Swin transformer that ``SwinTaskBlock`` does not stand for."""
    for stage in net.layers:
        if type(stage.downsample) not in MERGINGS:
            raise UserError(
                f"model.backbone: {name!r} has {type(stage.downsample).__name__}s between its stages, wanted the "
                "merging of 2x2 patches"
            )
        for block in stage.blocks:
            if type(block) not in BLOCKS:
                raise UserError(f"model.backbone: {name!r} has {type(block).__name__}s, wanted Swin's blocks")
    if net.dynamic_img_size:
        raise UserError(
            "model.backbone_args: got a Swin transformer for any size, and its size is data.size; leave "
            "strict_img_size and dynamic_img_size out"
        )


def _in_type_of_weights(mlp: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """v2's table of coordinates is a buffer, and DeepSpeed's bf16 casts weights alone."""
    return (inputs[0].to(next(mlp.parameters()).dtype),)


def _pair(sides: Any) -> tuple[int, int]:
    return int(sides[0]), int(sides[1])
