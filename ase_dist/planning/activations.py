"""How much memory a training step keeps for its backward pass, computed from shapes alone.

Letters: B images, t tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ase_dist.config import Settings
from ase_dist.planning.flops import on_fake_tensors
from ase_dist.training.loop import losses


class Activations(NamedTuple):
    """Bytes kept for one image: inside the blocks and inside the one that keeps most, as the blocks' inputs, and by
    everything else, losses included. ``levels`` are those of ``inputs`` that a head on several levels keeps too."""

    blocks: int
    largest_block: int
    inputs: int
    rest: int
    levels: int

    def kept(self, mode: str) -> int:
        """Peak bytes under ``model.checkpoint_activations`` = ``mode``.

        A checkpointed block keeps its input until it is recomputed; with ``offload`` the inputs are on the host, and
        on the device what heads keep of them.
        """
        if mode == "none":
            return self.blocks + self.rest
        return self.largest_block + self.rest + (self.inputs if mode == "recompute" else self.levels)


def measure_activations(settings: Settings, *, width: int) -> Activations:
    """What autograd keeps for one image in a step of ``settings``, without the weights and the image itself.

    ``width`` is the bytes of an activation element; what is always float32 (gates, losses) has 4.
    """
    fits = width == 4 and settings.model.moe.experts != "ffn"  # else shapes are taken in bf16, and their bytes scaled
    size, tasks = settings.data.size, settings.chosen_tasks()
    with on_fake_tensors(settings, dtype=torch.float32 if fits else torch.bfloat16) as (model, image):
        kept = _SavedBytes([image, *model.parameters(), *model.buffers()], width=width)
        for block in model.blocks:
            block.register_forward_pre_hook(kept.enter_block)
            block.register_forward_hook(kept.leave_block)
        with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
            output = model(image)
            labels = {
                task.name: torch.ones(1, task.channels, *size)
                if task.kind in {"normals", "depth"}
                else torch.ones(1, *size, dtype=torch.uint8)
                for task in tasks
            }
            losses.task_losses(output.predictions, labels, tasks, torch.ones(len(tasks), 2))
    return Activations(kept.blocks, kept.largest_block, kept.inputs, kept.rest, kept.levels)


class _SavedBytes:
    """Bytes that autograd saves for backward; each storage counts once, where it is saved first."""

    def __init__(self, known: Sequence[Tensor], *, width: int) -> None:
        self.blocks = self.largest_block = self.inputs = self.rest = self.levels = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._inputs: dict[int, int] = {}  # bytes of a block's input by its storage
        self._alive: list[Tensor] = []  # a freed storage's address could be used again
        self._width = width
        self._in_block = False
        self._before = 0

    def save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            size = self._bytes(tensor, storage.nbytes())
            self.blocks += size if self._in_block else 0
            self.rest += 0 if self._in_block else size
        elif not self._in_block:
            self.levels += self._inputs.pop(storage._cdata, 0)
        return tensor

    def enter_block(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._in_block, self._before = True, self.blocks
        size = self._bytes(inputs[0], inputs[0].numel() * inputs[0].element_size())
        self.inputs += size
        self._inputs[inputs[0].untyped_storage()._cdata] = size

    def leave_block(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._in_block = False
        self.largest_block = max(self.largest_block, self.blocks - self._before)

    def _bytes(self, tensor: Tensor, size: int) -> int:
        return size * self._width // 2 if tensor.dtype == torch.bfloat16 else size
