"""How far the tasks pull the shared experts in different directions: cosines between their gradients.

Letters: t tasks, L layers with shared experts, M weights of a layer's shared experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.config import Settings
from ase_dist.errors import UserError
from ase_dist.moe import MoEFFN


def check_conflict_settings(settings: Settings, *, num_tasks: int, zero_stage: int) -> None:
    """Raise UserError where ``eval.gradient_conflict_every`` asks for what a run cannot measure."""
    if not settings.eval.gradient_conflict_every:
        return
    moe = settings.model.moe
    problem = None
    if not moe.enabled or not moe.num_shared:
        problem = "there are no shared experts (model.moe.num_shared)"
    elif num_tasks < 2:
        problem = "one task alone has no conflict"
    elif zero_stage == 3:
        problem = "ZeRO 3 holds no whole gradient; use a lower stage"
    elif settings.model.checkpoint_activations != "none":
        problem = "a task's own gradient needs the activations; set model.checkpoint_activations=none"
    if problem:
        raise UserError(f"eval.gradient_conflict_every: cannot be measured here: {problem}")


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Restore the state of torch's generators afterwards, so that draws inside change nothing outside."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield


def gradient_conflict(losses: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Cosines between the tasks' gradients on the shared experts, over all ranks' tokens (collective).

    ``losses`` are scalars with their graph. Gives ``cosines`` [t][t] over all layers together, ``cosines_by_layer``
    [L], the mean over pairs of tasks in each layer, and ``conflicting``, the share of pairs (layers apart) whose cosine
    is negative (gradient conflict as in PCGrad, arXiv 2001.06782). A task without a gradient there has cosine 0 with
    every other.
    """
    layers = [layer.shared for layer in model.modules() if isinstance(layer, MoEFFN) and layer.shared is not None]
    weights = [list(layer.parameters()) for layer in layers]
    rows = []
    for loss in losses.values():  # one backward pass for each task
        found = torch.autograd.grad(
            loss, [*itertools.chain(*weights)], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.flatten().float() for gradient in found]))
    gradients_tM = collectives.all_reduce_sum(torch.stack(rows))
    by_layer = gradients_tM.split([sum(weight.numel() for weight in layer) for layer in weights], dim=-1)
    by_layer_Ltt = torch.stack([_cosines(layer_tM) for layer_tM in by_layer])
    pairs = list(itertools.combinations(range(len(losses)), 2))
    pairs_LP = torch.stack([by_layer_Ltt[:, a, b] for a, b in pairs], dim=-1)
    return {
        "cosines": _cosines(gradients_tM),
        "cosines_by_layer": pairs_LP.mean(dim=-1),
        "conflicting": (pairs_LP < 0).float().mean(),
    }


def _cosines(gradients_tM: Tensor) -> Tensor:
    unit_tM = nn.functional.normalize(gradients_tM, dim=-1)
    return unit_tM @ unit_tM.T
