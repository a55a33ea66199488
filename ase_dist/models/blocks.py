"""One transformer block for all task streams at once, with experts, LoRA or nothing in its FFN.

Letters: t tasks, B images, P tokens (prefix and patches), D width, N experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ase_dist.moe import MoEFFN
from ase_dist.moe.layer import TaskIndex
from ase_dist.ops.modes import autocast as enter_autocast


class BlockOutput(NamedTuple):
    """What a block computes.

    ``x_tBPD``; ``aux_loss`` a scalar, 0 without experts; ``expert_counts`` [t, N] int64 and ``mean_gates`` [t, N]
    float32, [t, 0] without experts.
    """

    x_tBPD: Tensor
    aux_loss: Tensor
    expert_counts: Tensor
    mean_gates: Tensor


class TaskBlock(nn.Module):
    """A timm block with the task streams as a batch dimension, and a MoE layer of either kind in place of its FFN.

    1. x + drop_path(ls1(attention(norm1(x)))), tasks and images merged into one batch
    2. x + drop_path(ls2(FFN(norm2(x)))): a MoE layer is told which tasks the streams are, timm's FFN is not

    The parts keep timm's names. The block has no parameters of its own, which ZeRO-3 would not gather when activation
    checkpointing calls ``forward`` a second time. Drop path draws per task and image, from PyTorch's global generator.
    """

    def __init__(self, block: Block, *, moe: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1
        self.norm2, self.ls2, self.drop_path2 = block.norm2, block.ls2, block.drop_path2
        self.mlp = block.mlp if moe is None else moe
        self.has_moe = moe is not None

    def forward(
        self,
        x_tBPD: Tensor,
        task: TaskIndex = None,
        autocast: torch.dtype | None = None,
        unfinished: bool = False,
    ) -> tuple[Tensor, ...]:
        """The fields of ``BlockOutput`` as a plain tuple; ``task`` as in ``MoEFFN.forward``.

        ``unfinished``: x_tBPD and the sums [t, M] from which ``finish_layers`` makes the others for all blocks at once;
        M is 0 without experts.

        ``autocast`` is the mode of the caller, for the second run under activation checkpointing: fairscale 0.4.13
        would run it in float16 in every case, and without autocast on the CPU.
        """
        with enter_autocast(x_tBPD.device.type, autocast):
            x_XPD = x_tBPD.flatten(0, 1)
            x_XPD = x_XPD + self.drop_path1(self.ls1(self.attn(self.norm1(x_XPD))))
            ffn_tBPD, *statistics = self._ffn(self.norm2(x_XPD).unflatten(0, x_tBPD.shape[:2]), task, unfinished)
            x_XPD = x_XPD + self.drop_path2(self.ls2(ffn_tBPD.flatten(0, 1)))
            return (x_XPD.unflatten(0, x_tBPD.shape[:2]), *statistics)

    def _ffn(self, x_tBPD: Tensor, task: TaskIndex, unfinished: bool) -> tuple[Tensor, ...]:
        if not self.has_moe:
            empty = x_tBPD.new_zeros(x_tBPD.shape[0], 0, dtype=torch.float32)
            statistics = (empty,) if unfinished else (empty.sum(), empty.long(), empty)
            return self.mlp(x_tBPD), *statistics
        assert isinstance(self.mlp, MoEFFN)
        if unfinished:
            output, sums = self.mlp.with_sums(x_tBPD, task=task)
            return output, sums.sums_tM
        return tuple(self.mlp.with_statistics(x_tBPD, task=task))
