"""Scores of probability maps: the Jaccard and F-measure of saliency, the weighted cross-entropy of edges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ase_dist.evaluation.metric import NOTHING, Metric, count_values, ratio
from ase_dist.tasks import EDGE_POSITIVE_WEIGHT, Task

TWENTIETHS = range(4, 19)
JACCARD_THRESHOLDS = tuple(k / 20 for k in TWENTIETHS)  # .20, .25, ... .90
LEVELS = 256  # thresholds of the F-measure: k / 255
BETA_SQUARED = 0.3
SMALLEST = 1e-7  # probabilities are kept this far from 0 and 1 in logarithms: float32 cannot go nearer to 1


class MaskMetric(Metric):
    """Saliency, as multi-task papers score it.

    - ``miou``: per image the Jaccard index of the foreground (prediction > threshold; 1 if both are empty), averaged
      over images; the best of the thresholds .20, .25, ... .90, percent. ``miou_threshold``: which one.
    - ``maxf``: the F-measure with beta^2 = 0.3 from pixel counts of the whole set, the best of the 256 thresholds
      k / 255 on predictions rounded to 8 bits (prediction >= threshold), percent; NaN where nothing in the set is
      salient. ``maxf_threshold``: which one.
    - ``mae``: per image the mean absolute error of the probability, averaged over images, 0..1.

    Pixels labelled 255 are not counted, and an image without any other is skipped.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task, size=2 + len(JACCARD_THRESHOLDS) + 2 * LEVELS)

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        true, valid = label == 1, label <= 1
        steps = torch.arange(TWENTIETHS.start, TWENTIETHS.stop, dtype=torch.float64, device=prediction.device)
        thresholds = (steps / 20).float().view(-1, 1, 1)  # made on the device: a copy of the host's would wait for it
        found = (prediction > thresholds) & valid
        union = (found | true).sum(dim=(1, 2))
        jaccard = (found & true).sum(dim=(1, 2)).double() / union.clamp(min=1)
        jaccard = jaccard.masked_fill(union == 0, 1.0)
        error = ((prediction.double() - true.double()).abs() * valid).sum() / valid.sum().clamp(min=1)
        seen = valid.any().double()
        level = (prediction * (LEVELS - 1)).round().long().clamp(0, LEVELS - 1)
        group = 2 - valid.long() - true.long()  # 0 true, 1 false, 2 ignored
        levels = count_values(group * LEVELS + level, 3 * LEVELS)[: 2 * LEVELS]
        return torch.cat((seen.view(1), (error * seen).view(1), jaccard * seen, levels.double()))

    def result(self) -> dict[str, float]:
        """``miou`` and ``maxf`` in percent with their thresholds, and ``mae``."""
        images, error, jaccard, levels = self.totals.cpu().split([1, 1, len(JACCARD_THRESHOLDS), 2 * LEVELS])
        hits, false_hits = levels.view(2, LEVELS).flip(1).cumsum(1).flip(1)  # at or above each level
        precision, recall = hits / (hits + false_hits).clamp(min=1), hits / hits[0].clamp(min=1)
        f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall).clamp(min=1e-12)
        best, best_f = int(jaccard.argmax()), int(f.argmax())
        miou, maxf = ratio(jaccard[best], images), ratio(f[best_f], hits[0].sign())
        return {
            "miou": 100 * miou,
            "miou_threshold": NOTHING if math.isnan(miou) else JACCARD_THRESHOLDS[best],
            "maxf": 100 * maxf,
            "maxf_threshold": NOTHING if math.isnan(maxf) else best_f / (LEVELS - 1),
            "mae": ratio(error, images),
        }


class EdgesMetric(Metric):
    """Edges: the value of the training loss on the validation set; ``ods`` adds the boundary F-measure.

    - ``bce``: the mean over all valid pixels of the set of -(0.95 y log p + 0.05 (1 - y) log(1 - p)), with the natural
      logarithm and p kept 1e-7 away from 0 and 1. It is not divided by the sum of the weights.
    - ``edge_share``: how many of the valid pixels are labelled as edges, percent.

    Pixels labelled 255 are not counted.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task, size=3)

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        true, valid = (label == 1).double(), (label <= 1).double()
        p = prediction.double().clamp(SMALLEST, 1 - SMALLEST)
        loss = -(EDGE_POSITIVE_WEIGHT * true * p.log() + (1 - EDGE_POSITIVE_WEIGHT) * (valid - true) * (1 - p).log())
        return torch.stack((valid.sum(), true.sum(), loss.sum()))

    def result(self) -> dict[str, float]:
        """``bce`` (nats) and ``edge_share`` (percent)."""
        pixels, edges, loss = self.totals[:3].cpu()
        return {"bce": ratio(loss, pixels), "edge_share": 100 * ratio(edges, pixels)}
