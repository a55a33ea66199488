"""One transformer block for all task streams at once, with experts, LoRA or nothing in its FFN.

Letters: t tasks, B images, P tokens (prefix and patches), D width, N experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import LayerScale
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from ase_dist.models.lora import Streams
from ase_dist.moe import MoEFFN
from ase_dist.moe.layer import TaskIndex
from ase_dist.ops.modes import attention
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

    A block of another form overrides ``attend``, ``ffn_input`` and ``add_ffn``, which are these two steps.

    The parts keep timm's names; a layer scale that timm holds as the block's ``gamma_1`` is ``ls1.gamma`` here, since
    the block has no parameters of its own: ZeRO-3 would not gather them when activation checkpointing calls ``forward``
    a second time. Drop path draws per task and image, from PyTorch's global generator.
    """

    attn: nn.Module
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module

    def __init__(self, block: Any, *, moe: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, _scale(block, 1), block.drop_path1
        self.norm2, self.ls2, self.drop_path2 = block.norm2, _scale(block, 2), block.drop_path2
        self.mlp = block.mlp if moe is None else moe
        if getattr(block.attn, "q_bias", None) is not None:
            # timm's attention of Eva and Swin v2 would take the weight out of qkv, past LoRA, to add the biases in the
            # same product
            block.attn.qkv_bias_separate = True
        self.streams = Streams()  # for LoRA with pairs of its own for each task

    @property
    def has_moe(self) -> bool:
        """Whether a layer with experts has replaced the FFN."""
        return isinstance(self.mlp, MoEFFN)

    def forward(
        self,
        x_tBPD: Tensor,
        task: TaskIndex = None,
        autocast: torch.dtype | None = None,
        unfinished: bool = False,
        rope: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The fields of ``BlockOutput`` as a plain tuple; ``task`` as in ``MoEFFN.forward``.

        ``unfinished``: x_tBPD and the sums [t, M] from which ``finish_layers`` makes the others for all blocks at once;
        M is 0 without experts. ``rope``: rotary positions of the patches, for all streams and images.

        ``autocast`` is the mode of the caller, for the second run under activation checkpointing: fairscale 0.4.13
        would run it in float16 in every case, and without autocast on the CPU.
        """
        self.streams.tasks = task  # type: ignore[assignment]  # a list: x_tBPD has an axis of tasks
        with enter_autocast(x_tBPD.device.type, autocast):
            x_XPD = self.attend(x_tBPD.flatten(0, 1), rope)
            ffn_tBPD, *statistics = self._ffn(self.ffn_input(x_XPD).unflatten(0, x_tBPD.shape[:2]), task, unfinished)
            x_XPD = self.add_ffn(x_XPD, ffn_tBPD.flatten(0, 1))
            return (x_XPD.unflatten(0, x_tBPD.shape[:2]), *statistics)

    def attend(self, x_XPD: Tensor, rope: Tensor | None) -> Tensor:
        """Step 1, [X, P, D] to the same."""
        return x_XPD + self.drop_path1(self.ls1(self._attention(self.norm1(x_XPD), rope)))  # type: ignore[no-any-return]

    def ffn_input(self, x_XPD: Tensor) -> Tensor:
        """What the FFN gets of the result of step 1."""
        return self.norm2(x_XPD)  # type: ignore[no-any-return]

    def add_ffn(self, x_XPD: Tensor, ffn_XPD: Tensor) -> Tensor:
        """The block's output, from the result of step 1 and the FFN's."""
        return x_XPD + self.drop_path2(self.ls2(ffn_XPD))  # type: ignore[no-any-return]

    def _attention(self, x_XPD: Tensor, rope: Tensor | None) -> Tensor:
        with attention(x_XPD, training=self.training):
            return self.attn(x_XPD) if rope is None else self.attn(x_XPD, rope=rope)  # type: ignore[no-any-return]

    def _ffn(self, x_tBPD: Tensor, task: TaskIndex, unfinished: bool) -> tuple[Tensor, ...]:
        if not isinstance(self.mlp, MoEFFN):
            empty = x_tBPD.new_zeros(x_tBPD.shape[0], 0, dtype=torch.float32)
            statistics = (empty,) if unfinished else (empty.sum(), empty.long(), empty)
            return self.mlp(x_tBPD), *statistics
        if unfinished:
            output, sums = self.mlp.with_sums(x_tBPD, task=task)
            return output, sums.sums_tM
        return tuple(self.mlp.with_statistics(x_tBPD, task=task))


class PostNormTaskBlock(TaskBlock):
    """A block with each norm on the output of its branch, x + drop_path(norm1(attention(x))), as EVA-CLIP's largest."""

    def attend(self, x_XPD: Tensor, rope: Tensor | None) -> Tensor:
        """Step 1, [X, P, D] to the same."""
        return x_XPD + self.drop_path1(self.norm1(self._attention(x_XPD, rope)))  # type: ignore[no-any-return]

    def ffn_input(self, x_XPD: Tensor) -> Tensor:
        """What the FFN gets of the result of step 1."""
        return x_XPD

    def add_ffn(self, x_XPD: Tensor, ffn_XPD: Tensor) -> Tensor:
        """The block's output, from the result of step 1 and the FFN's."""
        return x_XPD + self.drop_path2(self.norm2(ffn_XPD))  # type: ignore[no-any-return]


TASK_BLOCKS: dict[type[nn.Module], type[TaskBlock]] = {
    Block: TaskBlock,
    EvaBlock: TaskBlock,
    ResPostBlock: PostNormTaskBlock,
    EvaBlockPostNorm: PostNormTaskBlock,
}
WHY_NOT: dict[type[nn.Module], str] = {  # blocks that have no place for experts
    ParallelScalingBlock: "whose FFN is part of the linears of attention",
    DiffParallelScalingBlock: "whose FFN is part of the linears of attention",
    ParallelThingsBlock: "which have several FFNs side by side",
}


def _scale(block: Any, branch: int) -> nn.Module:
    """The layer scale of a branch as a module: timm's ViT has one, its Eva a parameter; an identity without."""
    scale: nn.Module = getattr(block, f"ls{branch}", nn.Identity())
    gamma = getattr(block, f"gamma_{branch}", None)
    if gamma is not None:
        scale = LayerScale(gamma.shape[0], device=gamma.device, dtype=gamma.dtype)
        scale.gamma = gamma
    return scale
