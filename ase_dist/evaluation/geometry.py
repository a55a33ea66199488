"""Scores of surface normals and depth, pooled over the valid pixels of the whole set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ase_dist.evaluation.metric import NOTHING, Metric, count_values, ratio
from ase_dist.tasks import Task

ANGLES = (11.25, 22.5, 30.0)
BIN_DEGREES = 0.01
BINS = 18000  # bins of 0.01 degree up to 180
DELTA = 1.25
NEAREST = 1e-3  # metres: depths below this are raised to it in ratios and logarithms


class NormalsMetric(Metric):
    """The angle in degrees between predicted and true normal, over all valid pixels (label not zero) of the set.

    - ``mean``; ``rmse``: the root of the mean squared angle.
    - ``median``: the middle of the 0.01 degree bin that holds the median, so at most 0.005 degrees off.
    - ``within_11.25``, ``within_22.5``, ``within_30``: pixels with a smaller angle than that, percent.

    Neither vector needs unit length; a predicted vector of length zero has no direction and counts as 90 degrees off.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task, size=3 + len(ANGLES) + BINS)

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        predicted, true, valid = prediction.double(), label.double(), (label != 0).any(dim=0)
        # from sine and cosine, because arccos loses half the digits near 0
        cosine = (predicted * true).sum(dim=0)
        sine = torch.linalg.cross(predicted, true, dim=0).square().sum(dim=0).sqrt()  # vector_norm is slow along dim 0
        no_direction = (predicted == 0).all(dim=0)
        angle = torch.rad2deg(torch.atan2(sine, cosine)).masked_fill(no_direction, 90.0)
        inside = [((angle < limit) & valid).sum() for limit in ANGLES]
        bins = (angle.nan_to_num(180.0) / BIN_DEGREES).long().clamp(max=BINS - 1)
        histogram = count_values(bins.masked_fill(~valid, BINS), BINS + 1)[:BINS]
        angle = angle.masked_fill(~valid, 0)
        return torch.cat((torch.stack((valid.sum(), angle.sum(), angle.square().sum(), *inside)), histogram))

    def result(self) -> dict[str, float]:
        """``mean``, ``median`` and ``rmse`` in degrees, ``within_*`` in percent."""
        totals = self.totals.cpu()
        pixels, total, squares, *inside = totals[: 3 + len(ANGLES)]
        shares = {f"within_{a:g}": 100 * ratio(n, pixels) for a, n in zip(ANGLES, inside, strict=True)}
        reached = totals[-BINS:].cumsum(0)
        median = NOTHING
        if reached[-1] > 0:  # false for NaN too
            median = BIN_DEGREES * (int(torch.searchsorted(reached, reached[-1] / 2)) + 0.5)
        return {
            "mean": ratio(total, pixels),
            "median": median,
            "rmse": math.sqrt(ratio(squares, pixels)),
            **shares,
        }


class DepthMetric(Metric):
    """Depth in metres, over all valid pixels (label above zero) of the set; p is predicted, d is true.

    Every mean is over the pixels of the whole set, not first over those of an image: an image with more valid pixels
    counts more. So count ASTMT, MTI-Net and InvPT (RMSE), and LibMTL (the other two).

    - ``rmse``: the root of the mean of (p - d)^2, metres.
    - ``abs_err``: the mean of |p - d|, metres.
    - ``rel``: the mean of |p - d| / d.
    - ``log10``: the mean of |log10 p - log10 d|.
    - ``delta1``, ``delta2``, ``delta3``: pixels with max(p / d, d / p) below 1.25, 1.25^2, 1.25^3, percent.

    In ``log10`` and ``delta*`` a prediction below 1 mm counts as 1 mm. Disparities (``task.inverse_depth``) have the
    same scores in their own unit.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task, size=8)

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        valid = label > 0
        true, predicted = (depth.masked_fill(~valid, 1).double() for depth in (label, prediction))
        error, scale = (predicted - true).abs(), (predicted.clamp(min=NEAREST) / true).log10().abs()
        near = [((scale < k * math.log10(DELTA)) & valid).sum() for k in (1, 2, 3)]
        sums = (valid.sum(), error.square().sum(), error.sum(), (error / true).sum(), scale.sum())
        return torch.stack((*sums, *near)).double()

    def result(self) -> dict[str, float]:
        """``rmse`` and ``abs_err`` (metres), ``rel``, ``log10`` and ``delta1`` to ``delta3`` (percent)."""
        pixels, squares, absolute, relative, logs, *near = self.totals.cpu()
        scores = {
            "rmse": math.sqrt(ratio(squares, pixels)),
            "abs_err": ratio(absolute, pixels),
            "rel": ratio(relative, pixels),
            "log10": ratio(logs, pixels),
        }
        return {**scores, **{f"delta{k + 1}": 100 * ratio(n, pixels) for k, n in enumerate(near)}}
