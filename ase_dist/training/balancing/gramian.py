"""The Gram matrix of the tasks' loss gradients over the global batch, the same for any number of ranks.

A gradient of the global batch is the mean over ranks and micro-steps of what each of them finds, so means are taken of
gradients and not of Gram matrices. A rank keeps a slice of them: the sums of slices cost half of what whole ones do.

Letters: t tasks, M gradient values, m of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.data.batch import Batch
from ase_dist.errors import UserError
from ase_dist.models.activation_checkpointing import without_checkpointing
from ase_dist.models.names import trained_entries
from ase_dist.moe import MoEFFN, deepspeed_compat
from ase_dist.tasks import Task
from ase_dist.training.loop import losses
from ase_dist.training.loop.conflict import same_random_state


class Measurement:
    """Gram matrices of the gradients of ``tasks`` with respect to what they share in ``model`` (collective).

    ``scales`` multiply the losses. ``on``:

    - ``parameters``: of every trained tensor that the losses of at least two tasks depend on. Heads are not among them,
      nor are tensors that stack a part per task: routers and the task embedding. A pass over its own stream for each
      task, so all of them cost about what the step itself does.
    - ``representation``: of the tokens that the heads get. Each task has a stream of its own, so position by position
      the streams stand for one representation, as they would be with equal routers. One pass without a backward pass
      through the blocks.

    The passes go by the engine's module, not by the engine, which would take their backward passes for the step's.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[Task], scales: Mapping[str, float], *, on: str) -> None:
        self.model, self.tasks, self.on = model, tasks, on
        self._scales = [scales[task.name] for task in tasks]
        self._shared: list[Tensor] | None = None

    def __call__(self, batches: Sequence[Batch], counts: Tensor) -> tuple[Tensor, Tensor]:
        """The Gram matrix [t, t] and the losses [t], each times its scale, float32 or wider, equal on all ranks.

        ``counts`` as ``losses.task_losses`` wants them. The random state is left as it was, and gradients as they are.
        """
        share = 1.0 / (len(batches) * collectives.world_size())
        with ExitStack() as closing:
            closing.enter_context(same_random_state(counts.device))
            closing.enter_context(torch.enable_grad())
            if self.on == "parameters":
                closing.enter_context(without_checkpointing())
                gramian_tt, sums_t = self._on_parameters(batches, counts)
            else:
                gramian_tt, sums_t = self._on_representation(batches, counts)
        together = collectives.all_reduce_sum(torch.cat([gramian_tt * share**2, sums_t[:, None] * share], dim=1))
        return together[:, :-1], together[:, -1]

    # -----------------------------------------------------------------------------------------------------------------
    # Parameters

    def _on_parameters(self, batches: Sequence[Batch], counts: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of the Gram matrix, and of the sum of the losses over its micro-steps."""
        gradients: list[Tensor] = []  # [t, M] of each shared tensor
        losses_t = torch.zeros(len(self.tasks), device=counts.device)
        for batch in batches:
            found = [self._gradients(i, batch, counts) for i in range(len(self.tasks))]
            columns = list(zip(*(gradients for _, gradients in found), strict=True))
            if self._shared is None:
                self._shared = [p for p, column in zip(self._wanted(), columns, strict=True) if _is_shared(column)]
                columns = list(filter(_is_shared, columns))
                if not columns:
                    raise UserError(
                        "train.balancing.on: the tasks share no weights that are trained; set it to representation"
                    )
            stacked = list(map(_stacked, columns))
            gradients = [one + two for one, two in zip(gradients, stacked, strict=True)] if gradients else stacked
            losses_t = losses_t + torch.stack([loss for loss, _ in found])
        gramian_tt = gradients[0].new_zeros(len(self.tasks), len(self.tasks))
        for group, members in self._groups():
            together_tM = torch.cat([gradients[k] for k in members], dim=1)
            gramian_tt = gramian_tt + inner_products(_own_slice(together_tM, group))
        return gramian_tt, losses_t.to(gramian_tt.dtype)

    def _gradients(self, i: int, batch: Batch, counts: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss of task ``i``, and its gradients on ``_wanted``, None where it does not depend on a tensor."""
        loss = self._loss(i, self.model(batch.images, tasks=[self.tasks[i].name]).predictions, batch, counts)
        return loss.detach(), torch.autograd.grad(loss, self._wanted(), allow_unused=True)

    def _wanted(self) -> list[Tensor]:
        """The shared tensors; until the first batch has shown which they are all that are trained and have no part of
        their own for each task."""
        if self._shared is not None:
            return self._shared
        return [entry.tensor for entry in trained_entries(self.model) if not entry.task_axes]

    def _groups(self) -> Iterator[tuple[dist.ProcessGroup | None, list[int]]]:
        """The numbers of the tensors whose gradients the ranks of one group add up: all ranks, or an expert's."""
        sizes = {
            id(parameter): layer.shard.count
            for layer in self.model.modules()
            if isinstance(layer, MoEFFN)
            for parameter in layer.routed.parameters()
        }
        by_size: dict[int, list[int]] = {}
        for k, parameter in enumerate(self._shared or ()):
            by_size.setdefault(sizes.get(id(parameter), 1), []).append(k)
        for size, members in sorted(by_size.items()):
            yield (collectives.all_ranks() if size == 1 else deepspeed_compat.expert_data_group(size)), members

    # -----------------------------------------------------------------------------------------------------------------
    # Representation

    def _on_representation(self, batches: Sequence[Batch], counts: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_on_parameters``; the gradient of the whole batch is what the ranks have, one after another."""
        products: list[Tensor] = []
        losses_t = torch.zeros(len(self.tasks), device=counts.device)
        for batch in batches:
            with inputs_of_heads(self.model) as inputs:
                predictions = self.model(batch.images).predictions
            found = [self._loss(i, predictions, batch, counts) for i in range(len(self.tasks))]
            rows = [
                torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, inputs[task.name])])
                for task, loss in zip(self.tasks, found, strict=True)
            ]
            products.append(inner_products(_widened(torch.stack(rows))))
            losses_t = losses_t + torch.stack(found).detach()
        gramian_tt = torch.stack(products).sum(dim=0)
        return gramian_tt, losses_t.to(gramian_tt.dtype)

    def _loss(self, i: int, predictions: Mapping[str, Tensor], batch: Batch, counts: Tensor) -> Tensor:
        task = self.tasks[i]
        return losses.task_losses(predictions, batch.labels, [task], counts[i : i + 1])[task.name] * self._scales[i]


@contextmanager
def inputs_of_heads(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Cut the graph at what the heads of ``model`` get while it is open; gives that by task, a tensor per level."""
    inputs: dict[str, list[Tensor]] = {}

    def cut(name: str) -> Any:
        def hook(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens, *others = arguments
            levels = [tokens] if isinstance(tokens, Tensor) else tokens
            inputs[name] = [level.detach().requires_grad_() for level in levels]
            return (inputs[name][0] if isinstance(tokens, Tensor) else inputs[name], *others)

        return hook

    with ExitStack() as closing:
        for name, head in model.heads.items():  # before ZeRO-3's hooks, which release a head's weights by its input
            closing.callback(head.register_forward_pre_hook(cut(name), prepend=True).remove)
        yield inputs


def inner_products(rows_tM: Tensor) -> Tensor:
    """rows @ rows.T [t, t] without a matrix product, which ``train.tf32`` would round to three digits."""
    return torch.stack([(rows_tM * row_M).sum(dim=-1) for row_M in rows_tM])


def _is_shared(column: Sequence[Tensor | None]) -> bool:
    return sum(gradient is not None for gradient in column) > 1


def _stacked(column: Sequence[Tensor | None]) -> Tensor:
    """A tensor's gradients by task as rows [t, M], 0 where a loss does not depend on it."""
    like = next(gradient for gradient in column if gradient is not None)
    rows = [torch.zeros_like(like) if gradient is None else gradient for gradient in column]
    return _widened(torch.stack(rows)).flatten(1)


def _own_slice(gradients_tM: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's slice [t, m] of the sum over a group's ranks; the group has every value exactly once."""
    size = collectives.group_size(group)
    if size == 1:
        return gradients_tM
    padded_tM = nn.functional.pad(gradients_tM, (0, -gradients_tM.shape[1] % size))
    slices = padded_tM.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)  # [size * t, m]
    return collectives.reduce_scatter_rows(slices.contiguous(), group=group)


def _widened(gradient: Tensor) -> Tensor:
    """``gradient`` in float32, or as it is where that is wider."""
    return gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
