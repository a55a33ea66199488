"""The multi-task vision transformer: every task a stream of tokens through one backbone, all streams in one pass.

Letters: t tasks, B images, H W pixels, P tokens, D width, N experts, L layers with experts, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.errors import UserError, did_you_mean
from ase_dist.models.backbone import Backbone
from ase_dist.models.families import embed
from ase_dist.models.heads import Head, LevelsHead, finest
from ase_dist.models.lora import TaskPairs
from ase_dist.moe import MoEFFN
from ase_dist.moe.layer import finish_layers
from ase_dist.moe.router import RoutingSums
from ase_dist.ops.modes import autocast_dtype


class ModelOutput(NamedTuple):
    """What the model computes for the tasks asked for, in their order.

    ``predictions`` raw logits [B, C, h, w] per task at the head's resolution; ``aux_loss`` the weighted router losses
    summed over layers, a scalar; ``expert_counts`` [L, t, N] int64 and ``mean_gates`` [L, t, N] float32 over this
    process's tokens, prefix tokens included, without gradient; L and N are 0 where no layer has experts.
    """

    predictions: dict[str, Tensor]
    aux_loss: Tensor
    expert_counts: Tensor
    mean_gates: Tensor


class TaskEmbedding(nn.Module):
    """x_t = x + e_t: one learnable vector per task, zero at first, added once at the input of the blocks."""

    def __init__(self, num_tasks: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, dim))

    def forward(self, tokens_BPD: Tensor, tasks: Sequence[int]) -> Tensor:
        """The streams [t, B, P, D] of ``tasks``, given by number."""
        streams_tD = torch.stack([self.weight[task] for task in tasks])
        return tokens_BPD + streams_tD[:, None, None, :]

    def keep(self, tasks: Sequence[int]) -> None:
        """Drop the vectors of all others; those of ``tasks``, no longer trained, count from 0."""
        self.weight = nn.Parameter(self.weight.detach()[list(tasks)], requires_grad=False)


class MultiTaskViT(nn.Module):
    """A vision transformer with a stream of tokens, routers and a head per task.

    1. patch and position embedding, once for all tasks
    2. + task embedding: [t, B, P, D]
    3. the blocks, all streams in one pass, each MoE layer's router picked by task; where no part is a task's own the
       streams are equal, and one is computed
    4. the backbone's final norm on the patch tokens, then each task's head

    A head on several levels also gets the tokens that leave the earlier ``levels`` (numbers of blocks, from 1 to the
    last), without the final norm, as in DPT and InvPT. ``task_names`` gives the order of the streams. ``build_model``
    makes one from the settings.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Mapping[str, Head],
        *,
        levels: Sequence[int] = (),
        task_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.task_names = tuple(heads)
        numbers = tuple(levels) or (len(backbone.levels),)
        self.levels = tuple(backbone.level_blocks[number - 1] for number in numbers)
        whole = any(isinstance(head, LevelsHead) and head.reads_prefix for head in heads.values())
        self.prefix = 0 if whole else backbone.prefix  # tokens that no head gets
        several = any(isinstance(head, LevelsHead) for head in heads.values())
        level = finest([backbone.levels[number - 1] for number in numbers]) if several else backbone.levels[-1]
        self.covered = level.grid[0] * level.stride, level.grid[1] * level.stride  # pixels that predictions are for
        self.block_tokens = backbone.block_tokens
        self.stem = backbone.stem
        self.task_embedding = TaskEmbedding(len(heads), backbone.stem_width) if task_embedding else None
        self.blocks = nn.ModuleList(backbone.blocks)
        self.norm = backbone.norm
        of_tasks = (MoEFFN, TaskPairs)
        self.streams_differ = task_embedding or any(isinstance(module, of_tasks) for module in self.blocks.modules())
        self.heads = nn.ModuleDict(heads)

    def forward(self, images_BCHW: Tensor, *, tasks: Sequence[str] | None = None) -> ModelOutput:
        """Predict ``tasks`` (None: all) for normalised images; only their streams are computed.

        Raises UserError for a task that the model does not have, for none and for one named twice.
        """
        names = checked_tasks(tasks, self.task_names)
        streams = [self.task_names.index(name) for name in names]
        levels, sums = self._features(images_BCHW, streams)
        by_task = zip(*(x_tBPD.unbind(0) for x_tBPD in levels), strict=True)
        predictions = {name: _predict(self.heads[name], tokens) for name, tokens in zip(names, by_task, strict=True)}
        if (size := tuple(images_BCHW.shape[-2:])) != self.covered:
            predictions = {name: without_padding(x, self.covered, size) for name, x in predictions.items()}
        if not sums:
            empty = levels[-1].new_zeros(0, len(names), 0, dtype=torch.float32)
            return ModelOutput(predictions, empty.sum(), empty.long(), empty)
        layers = [block.mlp for block in self.blocks if isinstance(block.mlp, MoEFFN)]
        return ModelOutput(predictions, *finish_layers(layers, sums))

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop the streams, routers and heads of all other tasks, for good; what is left is for inference."""
        names = checked_tasks(names, self.task_names)
        streams = [self.task_names.index(name) for name in names]
        if self.task_embedding is not None:
            self.task_embedding.keep(streams)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, MoEFFN):
                    module.keep_tasks(streams)
                elif isinstance(module, TaskPairs):
                    module.keep(streams)
        self.heads = nn.ModuleDict({name: self.heads[name] for name in names})
        self.task_names = names

    def _features(self, images_BCHW: Tensor, streams: list[int]) -> tuple[list[Tensor], list[RoutingSums]]:
        """The tokens [t, B, P, D] of each of ``levels``, and the routing of the layers with experts."""
        autocast = autocast_dtype(images_BCHW.device.type)
        images_BCHW = images_BCHW.to(next(self.stem.parameters()).dtype)  # DeepSpeed's bf16 casts weights alone
        tokens_BPD, ropes = embed(self.stem, images_BCHW, blocks=len(self.blocks))
        x_tBPD = self._streams(tokens_BPD, streams if self.streams_differ else streams[:1])
        sums, kept = [], {}
        for number, (block, rope) in enumerate(zip(self.blocks, ropes, strict=True), start=1):
            x_tBPD, sums_tM = block(x_tBPD, streams, autocast, True, rope)  # positional, as checkpointing wants
            if block.has_moe:
                sums.append(RoutingSums(sums_tM, tokens=x_tBPD.shape[1] * x_tBPD.shape[2]))
            if number in self.levels:
                kept[number] = x_tBPD[:, :, self.prefix :]
        kept[number] = self.norm(kept[number])
        return [kept[number].expand(len(streams), -1, -1, -1) for number in self.levels], sums

    def _streams(self, tokens_BPD: Tensor, streams: list[int]) -> Tensor:
        if self.task_embedding is None:
            return tokens_BPD.expand(len(streams), -1, -1, -1)
        return self.task_embedding(tokens_BPD, streams)  # type: ignore[no-any-return]


def _predict(head: nn.Module, levels: tuple[Tensor, ...]) -> Tensor:
    """What ``head`` says of a task's levels, or of the last."""
    return head(list(levels) if isinstance(head, LevelsHead) else levels[-1])  # type: ignore[no-any-return]


def without_padding(logits_BChw: Tensor, covered: tuple[int, int], size: tuple[int, ...]) -> Tensor:
    """The part of ``logits`` that is the image, of ``size`` pixels, at the upper left of the ``covered`` ones.

    At the resolution of ``logits`` where that has no part of a cell, else in pixels.
    """
    cells = [n * side for n, side in zip(logits_BChw.shape[-2:], size, strict=True)]
    if any(n % whole for n, whole in zip(cells, covered, strict=True)):
        enlarged = F.interpolate(logits_BChw, size=covered, mode="bilinear", align_corners=False)
        return enlarged[..., : size[0], : size[1]]
    return logits_BChw[..., : cells[0] // covered[0], : cells[1] // covered[1]]


def checked_tasks(tasks: Sequence[str] | None, have: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks asked for (None: all that a model has); UserError for one unknown, none or one named twice."""
    if tasks is None:
        return have
    for name in tasks:
        if name not in have:
            raise UserError(
                f"tasks: the model has no task {name!r}, wanted some of {list(have)}{did_you_mean(name, have)}"
            )
    if isinstance(tasks, str) or not tasks or len(set(tasks)) != len(tasks):
        raise UserError(f"tasks: got {tasks!r}, wanted a list of at least one task, each at most once")
    return tuple(tasks)
