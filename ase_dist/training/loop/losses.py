"""The loss of every task, the same for any number of ranks that the batch is spread over.

A rank divides the sum over its own pixels by the *mean over ranks* of the pixel counts, so the mean of the ranks'
losses and gradients, which data parallelism takes anyway, is the loss and gradient of one process with the whole
batch, however unevenly valid pixels fall on the ranks. Nothing here waits for the device: masks multiply, shapes are
static. Letters: B images, C channels, H W the label's size, h w the head's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ase_dist.errors import UserError, did_you_mean
from ase_dist.tasks import EDGE_POSITIVE_WEIGHT, IGNORE, Kind, Task

MIN_NORM = 1e-4  # shorter normals are not stretched to unit length: bounds the gradient at a zero vector by 1e4


def label_counts(labels: Mapping[str, Tensor], tasks: Sequence[Task]) -> Tensor:
    """What the losses divide by, float32 [tasks, 2]: for a mask (positives, negatives), else (valid pixels, 0).

    It needs the labels alone, so the loop can reduce it before the forward pass. ``task_losses`` wants its mean over
    everything whose gradients are averaged: ranks, and micro-steps where gradients accumulate.
    """
    counts = []
    for task in tasks:
        label = labels[task.name]
        if task.kind == "mask":
            counts.append(torch.stack([(label == 1).sum(), (label == 0).sum()]))
        else:
            valid = _is_measured(label) if task.kind in {"normals", "depth"} else label != IGNORE
            counts.append(torch.stack([valid.sum(), valid.new_zeros((), dtype=torch.int64)]))
    return torch.stack(counts).float()


def task_losses(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], tasks: Sequence[Task], counts: Tensor
) -> dict[str, Tensor]:
    """The unweighted loss of each task, float32 scalars; 0 with zero gradient where no pixel is valid.

    ``logits`` [B, C, h, w] are resized bilinearly to the labels' size (see ``ase_dist.tasks`` for the labels);
    ``counts`` [tasks, 2] is the mean over ranks of ``label_counts``. Losses as in M3ViT (and ASTMT before it).
    """
    found = {}
    for task, count_2 in zip(tasks, counts.float().unbind(), strict=True):
        resized, label = logits[task.name].float(), labels[task.name]
        if resized.shape[-2:] != label.shape[-2:]:
            resized = F.interpolate(resized, size=label.shape[-2:], mode="bilinear", align_corners=False)
        found[task.name] = _LOSSES[task.kind](resized, label, count_2)
    return found


def weighted_sum(losses: Mapping[str, Tensor], tasks: Sequence[Task], overrides: Mapping[str, float]) -> Tensor:
    """The sum of the losses times the task table's weights, or those of ``overrides``; a scalar."""
    weights = loss_weights(tasks, overrides)
    return torch.stack([weights[task.name] * losses[task.name] for task in tasks]).sum()


def loss_weights(tasks: Sequence[Task], overrides: Mapping[str, float]) -> dict[str, float]:
    """The weight of each task in the sum; UserError for the name of no task and for a weight below 0."""
    names = [task.name for task in tasks]
    for name, weight in overrides.items():
        if name not in names:
            raise UserError(
                f"train.loss_weights: this run has no task {name!r}, wanted some of {names}{did_you_mean(name, names)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"train.loss_weights.{name}: got {weight}, wanted a number of 0 or more")
    return {task.name: overrides.get(task.name, task.loss_weight) for task in tasks}


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def _is_measured(label_BCHW: Tensor) -> Tensor:
    """Where a normal or a depth is known, bool [B, 1, H, W]: zero means ignored."""
    return (label_BCHW != 0).any(dim=1, keepdim=True)


def _over(total: Tensor, count: Tensor) -> Tensor:
    """``total`` / ``count``, and 0 where there is nothing to count; the mean count of many ranks may be below 1."""
    return total / torch.where(count > 0, count, torch.ones_like(count))


# ---------------------------------------------------------------------------------------------------------------------
# One loss per kind: logits at the label's size in float32, the label, (count, count)


def _cross_entropy(logits_BCHW: Tensor, label_BHW: Tensor, count_2: Tensor) -> Tensor:
    # summed here: torch's own sum over a map adds with atomics on CUDA, in another order in every run
    pixels_BHW = F.cross_entropy(logits_BCHW, label_BHW.long(), ignore_index=IGNORE, reduction="none")
    return _over(pixels_BHW.sum(), count_2[0])


def _balanced_bce(logits_B1HW: Tensor, label_BHW: Tensor, count_2: Tensor) -> Tensor:
    """Positives weigh the share of negatives and the reverse, shares of the whole batch on all ranks."""
    valid = count_2.sum()
    return _over(_bce_sum(logits_B1HW, label_BHW, positive_weight=_over(count_2[1], valid)), valid)


def _edge_bce(logits_B1HW: Tensor, label_BHW: Tensor, count_2: Tensor) -> Tensor:
    return _over(_bce_sum(logits_B1HW, label_BHW, positive_weight=EDGE_POSITIVE_WEIGHT), count_2[0])


def _bce_sum(logits_B1HW: Tensor, label_BHW: Tensor, *, positive_weight: Tensor | float) -> Tensor:
    """The sum of the weighted binary cross-entropy; ignored pixels are neither positive nor negative: weight 0."""
    positive = (label_BHW == 1).float()
    weight = positive * positive_weight + (label_BHW == 0).float() * (1.0 - positive_weight)
    return F.binary_cross_entropy_with_logits(logits_B1HW[:, 0], positive, weight=weight, reduction="sum")


def _normals_l1(logits_B3HW: Tensor, label_B3HW: Tensor, count_2: Tensor) -> Tensor:
    unit = F.normalize(logits_B3HW, dim=1, eps=MIN_NORM)
    return _over(_l1_sum(unit, label_B3HW), 3.0 * count_2[0])


def _depth_l1(logits_B1HW: Tensor, label_B1HW: Tensor, count_2: Tensor) -> Tensor:
    return _over(_l1_sum(logits_B1HW, label_B1HW), count_2[0])


def _l1_sum(prediction_BCHW: Tensor, label_BCHW: Tensor) -> Tensor:
    """The sum of absolute differences; an ignored label is zero, so a prediction masked to zero adds nothing."""
    return F.l1_loss(prediction_BCHW * _is_measured(label_BCHW), label_BCHW.float(), reduction="sum")


_LOSSES: dict[Kind, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "classes": _cross_entropy,
    "mask": _balanced_bce,
    "edges": _edge_bce,
    "normals": _normals_l1,
    "depth": _depth_l1,
}
