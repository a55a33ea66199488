"""The layer in a model of another library: in the place of its FFN, over an FFN whose parts have other names.

block.mlp = TaskFFN(MoEFFN(block.mlp, num_tasks=2))      # for every block
set_tasks(model, [0, 1])                                 # the first half of the batch is task 0's, the other task 1's
loss = criterion(model(batch)) + router_loss(model)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ase_dist.errors import UserError
from ase_dist.moe.layer import MoEFFN, MoEOutput


class TaskFFN(nn.Module):
    """A ``MoEFFN`` or ``ASEMoE`` where a model expects its FFN: one tensor in, one tensor out.

    ``tasks`` are those whose tokens come, as ``set_tasks`` says: the first axis of the input is cut into as many equal
    parts. Before, only a layer of one task is taken. They follow ``MoEFFN.keep_tasks``: of the tasks that were set
    those that are kept remain, under their new numbers. A model has no way to pass on what the layer computes besides
    its output, so ``last`` keeps it until the next forward pass; copies and pickles leave it out.
    """

    def __init__(self, layer: MoEFFN) -> None:
        super().__init__()
        self.layer = layer
        self._tasks: tuple[int, ...] | None = None  # as numbered when the layer was built
        self.last: MoEOutput | None = None

    @property
    def tasks(self) -> tuple[int, ...]:
        """The tasks of the equal parts of a batch, in order; all of the layer's before they are set."""
        now = {built: number for number, built in enumerate(self.layer.kept_tasks)}
        tasks = tuple(now[task] for task in self._tasks or () if task in now)
        return tasks or tuple(range(self.layer.num_tasks))

    @tasks.setter
    def tasks(self, tasks: Sequence[int]) -> None:
        self._tasks = tuple(self.layer.kept_tasks[number] for number in self.checked_tasks(tasks))

    def checked_tasks(self, tasks: Sequence[int]) -> tuple[int, ...]:
        """``tasks`` as numbers; UserError where the layer does not have one of them."""
        try:
            numbers = tuple(operator.index(task) for task in tasks)
        except TypeError:
            numbers = ()
        if not numbers or any(not 0 <= number < self.layer.num_tasks for number in numbers):
            got = list(tasks) if isinstance(tasks, Sequence) and not isinstance(tasks, str) else tasks
            raise UserError(f"set_tasks: got {got!r}, wanted one or more numbers from 0 to {self.layer.num_tasks - 1}")
        return numbers

    def forward(self, x: Tensor) -> Tensor:
        """[tasks * B, ..., D] to the same; UserError where tasks were never set or the parts cannot be equal."""
        tasks = self.tasks
        if self._tasks is None and len(tasks) > 1:
            raise UserError(
                f"x: got a batch of {x.shape[0]} before set_tasks, and the layer has {len(tasks)} tasks; say whose the "
                f"equal parts of a batch are with set_tasks(model, [...]), all tasks in turn with {list(tasks)}"
            )
        if x.shape[0] % len(tasks):
            raise UserError(
                f"x: got a batch of {x.shape[0]} for the tasks {list(tasks)}, wanted equally many for each; "
                "say whose they are with set_tasks(model, [...])"
            )
        self.last = self.layer.with_statistics(x.unflatten(0, (len(tasks), -1)), task=tasks)
        return self.last.output.flatten(0, 1)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: not the last batch with its graph."""
        return {**vars(self), "last": None}


def set_tasks(model: nn.Module, tasks: Sequence[int]) -> None:
    """From now on the equal parts of a batch are of ``tasks``, in this order, in every ``TaskFFN`` of ``model``.

    Raises UserError, and changes nothing, where one of the layers does not have one of the tasks.
    """
    layers = _task_ffns(model)
    for layer in layers:
        layer.checked_tasks(tasks)
    for layer in layers:
        layer.tasks = tasks  # type: ignore[assignment]


def router_loss(model: nn.Module) -> Tensor:
    """The weighted router losses of the last forward pass, summed over every ``TaskFFN`` of ``model``: a scalar.

    Raises UserError before the first pass, and where a training pass kept no graph, so that the loss would train
    nothing: under ``torch.no_grad`` and in re-entrant checkpointing, whose first pass is one without gradients.
    """
    losses = []
    for ffn in _task_ffns(model):
        if ffn.last is None:
            continue
        loss, trains = ffn.last.aux_loss, ffn.layer.training and ffn.layer.router.weight.requires_grad
        if trains and torch.is_grad_enabled() and not loss.requires_grad:
            raise UserError(
                "router_loss: the last forward pass kept no graph, so the router losses would have no gradient; under "
                "activation checkpointing use checkpoint(..., use_reentrant=False), else call the model with gradients"
            )
        losses.append(loss)
    if not losses:
        raise UserError("router_loss: the model's TaskFFN layers have computed nothing yet; call the model first")
    return torch.stack(losses).sum()


def _task_ffns(model: nn.Module) -> list[TaskFFN]:
    found = [module for module in model.modules() if isinstance(module, TaskFFN)]
    if not found:
        raise UserError(f"model: got a {type(model).__name__} without a TaskFFN; put one in the place of each FFN")
    return found
