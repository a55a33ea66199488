"""The boundary F-measure of edges as a metric: images are counted one by one, in other processes, and thrown away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ase_dist.cores import usable_cores
from ase_dist.evaluation.binary import EdgesMetric
from ase_dist.evaluation.boundary import boundary_scores, threshold_values, with_best
from ase_dist.evaluation.boundary_counts import TRUE, Floats, Protocol
from ase_dist.evaluation.boundary_workers import ImageCounter
from ase_dist.evaluation.metric import NOTHING
from ase_dist.tasks import Task

THRESHOLDS = 99  # the protocol of PASCAL-Context and NYUD papers; ``Task.tolerance`` has how far pixels may match
SCORES = ("ods_f", "ods_precision", "ods_recall", "ods_threshold", "ois_f")


@dataclass(frozen=True)
class EdgeOds:
    """How boundaries are scored: ``nms`` suppresses non-maxima first; ``workers`` processes count, None: all cores."""

    nms: bool = False
    workers: int | None = None


class BoundaryMetric(EdgesMetric):
    """What ``EdgesMetric`` has, and the boundary F-measure at 99 thresholds within ``task.tolerance`` of the diagonal.

    - ``ods_f``, ``ods_precision``, ``ods_recall`` (percent) at ``ods_threshold``, the best one of the whole set;
      ``ois_f`` (percent): each image at its own best. NaN where no label of the set has an
      edge. See ``boundary.evaluate_boundaries``.

    Labels are taken as they are, so they should be thin; pixels labelled 255 count as neither true nor predicted.
    """

    def __init__(self, task: Task, *, ods: EdgeOds) -> None:
        super().__init__(task)
        self._edges = len(self.totals)
        self.totals = torch.cat((self.totals, torch.zeros(4 * (THRESHOLDS + 1), dtype=torch.float64)))
        levels = tuple(threshold_values(THRESHOLDS).tolist())
        assert task.tolerance is not None  # edges have one
        protocol = Protocol(levels, max_dist=task.tolerance, thin=True, nms=ods.nms, matching="published")
        self._counter = ImageCounter(protocol, workers=usable_cores() if ods.workers is None else ods.workers)
        self._pushed = 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """As every metric's; the boundaries are counted meanwhile, ``finish`` waits for them.

        Counting is the host's work, so this one waits for the device, once.
        """
        super().update(prediction, label)
        visible = prediction.masked_fill(label.to(prediction.device) > 1, 0)
        visible, edges = torch.stack((visible, (label == 1).to(visible))).cpu().numpy()
        if np.isnan(visible).any():  # the totals are NaN from here on
            return
        self._add(self._counter.push((self._pushed, visible, [edges.astype(bool)])))
        self._pushed += 1

    def finish(self) -> None:
        """Wait until all boundaries are counted and add them to ``totals``."""
        self._add(self._counter.drain())
        self.close()

    def close(self) -> None:
        """End the processes; what they have not counted yet is lost."""
        self._counter.close()

    def result(self) -> dict[str, float]:
        """``bce`` (nats), ``edge_share`` (percent), and the boundary scores."""
        edges = super().result()
        counts = self.totals[self._edges :].cpu().numpy().reshape(-1, 4)
        if not counts[:, TRUE].sum() > 0:  # no edge in the labels, or NaN
            return {**edges, **dict.fromkeys(SCORES, NOTHING)}
        scores = boundary_scores(counts, thresholds=THRESHOLDS)
        return {**edges, **{name: getattr(scores, name) * (1 if name == "ods_threshold" else 100) for name in SCORES}}

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        edges = super()._count(prediction, label)
        return torch.cat((edges, edges.new_zeros(len(self.totals) - self._edges)))

    def _add(self, counts: Iterable[Floats]) -> None:
        for counts_T4 in counts:
            row = torch.from_numpy(np.ascontiguousarray(with_best(counts_T4)).ravel())
            self.totals[self._edges :] += row.to(self.totals.device)
