"""The layer in a model of another library: in the place of its FFN, over an FFN whose parts have other names.

block.mlp = TaskFFN(MoEFFN(block.mlp, num_tasks=2))      # for every block
set_tasks(model, [0, 1])                                 # the first half of the batch is task 0's, the other task 1's
loss = criterion(model(batch)) + router_loss(model)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ase_dist.errors import UserError
from ase_dist.moe.layer import MoEFFN, MoEOutput
from ase_dist.ops.lowrank import Activation

if TYPE_CHECKING:
    from ase_dist.moe.deepspeed_layer import ASEMoE


class FFN(nn.Module):
    """fc2(act(fc1(x))) of parts that a model already has, under the names that ``MoEFFN`` wants its base to have."""

    def __init__(self, fc1: nn.Module, act: Activation, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class TaskFFN(nn.Module):
    """A MoE layer of either kind where a model expects its FFN: one tensor in, one tensor out.

    ``tasks``, at first all of the layer's, are those whose tokens come: the first axis of the input is cut into as many
    equal parts. What the layer computes beside its output the model around has no way to pass on: ``last`` keeps it
    until the next forward pass.
    """

    def __init__(self, layer: MoEFFN | ASEMoE) -> None:
        super().__init__()
        self.layer = layer
        core = layer if isinstance(layer, MoEFFN) else layer.moe
        self.tasks: tuple[int, ...] = tuple(range(core.num_tasks))
        self.last: MoEOutput | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[tasks * B, ..., D] to the same; UserError where the parts cannot be equal."""
        if x.shape[0] % len(self.tasks):
            raise UserError(
                f"x: got a batch of {x.shape[0]} for the tasks {list(self.tasks)}, wanted equally many for each; "
                "say whose they are with set_tasks(model, [...])"
            )
        streams = x.unflatten(0, (len(self.tasks), -1))
        if isinstance(self.layer, MoEFFN):
            self.last = self.layer(streams, task=self.tasks)
        else:
            self.last = self.layer(streams, task=self.tasks, with_stats=True)
        assert self.last is not None
        return self.last.output.flatten(0, 1)


def set_tasks(model: nn.Module, tasks: Sequence[int]) -> None:
    """From now on the equal parts of a batch are of ``tasks``, in this order, in every ``TaskFFN`` of ``model``."""
    for layer in _layers(model):
        layer.tasks = tuple(tasks)


def router_loss(model: nn.Module) -> Tensor:
    """The weighted router losses of the last forward pass, summed over every ``TaskFFN`` of ``model``: a scalar."""
    losses = [layer.last.aux_loss for layer in _layers(model) if layer.last is not None]
    if not losses:
        raise UserError("router_loss: the model's TaskFFN layers have computed nothing yet; call the model first")
    return torch.stack(losses).sum()


def _layers(model: nn.Module) -> Iterator[TaskFFN]:
    found = [module for module in model.modules() if isinstance(module, TaskFFN)]
    if not found:
        raise UserError(f"model: got a {type(model).__name__} without a TaskFFN; put one in the place of each FFN")
    return iter(found)
