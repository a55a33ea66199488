"""Methods that look at the losses alone. Letters: t tasks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ase_dist.config import Section
from ase_dist.training.balancing.method import Method, Seen, drawing_from, mean_of, slopes, to_device

EPSILON = 1e-8  # added to a loss before its logarithm or its reciprocal, as FAMO's authors do


class LearnedScales(Method):
    """A scalarizer of TorchJD with one learned number per task, which a step of Adam moves along the batch's losses."""

    learns: ClassVar[bool] = True
    scalarizer: ClassVar[str]

    def __init__(self, count: int, *, args: Any, lr: float, device: torch.device) -> None:
        super().__init__(count, args=args, lr=lr, device=device)
        import torchjd.scalarization

        self._function = getattr(torchjd.scalarization, self.scalarizer)(count).to(device)
        self.remember(log_scale=0.0)

    def weights(self, seen: Seen) -> Tensor:
        """The derivative of the scalarizer with respect to each loss, on which it does not depend."""
        return slopes(self._with_scales(), torch.ones(self.count, device=self.device))

    def learn(self, seen: Seen, after_t: Tensor | None, *, window_ends: bool) -> None:
        """A step of Adam down the scalarizer's value."""
        assert seen.losses_t is not None
        function = self._with_scales()
        with torch.enable_grad():
            (gradient_t,) = torch.autograd.grad(function(seen.losses_t), list(function.parameters()))
        self.adam_step("log_scale", gradient_t, seen.present_t)

    def _with_scales(self) -> Any:
        (scales,) = self._function.parameters()
        scales.data.copy_(self.state["log_scale"])
        return self._function


class Uncertainty(LearnedScales):
    """Sum of exp(-s) L / 2 + s / 2 with learned s, the logarithm of a variance (Kendall et al., arXiv 1705.07115)."""

    scalarizer: ClassVar[str] = "UW"


class ImpartialLosses(LearnedScales):
    """IMTL-L: sum of exp(s) L - s with learned s (Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021)."""

    scalarizer: ClassVar[str] = "IMTLL"


class DynamicAverage(Method):
    """Weights by how slowly a loss falls (Liu et al., arXiv 1803.10704, Eq. 7).

    lambda_i = t softmax_i(r / T) with r_i the loss averaged over the last window of steps over that of the window
    before; 1 while there are not yet two of them. In a step t counts the tasks with labels, over which the softmax is.
    """

    learns: ClassVar[bool] = True
    learns_always: ClassVar[bool] = True

    class Args(Section):
        """The temperature, and what the losses are averaged over."""

        temperature: float = Field(2.0, gt=0, description="T; larger ones make the weights more equal")
        window: int | None = Field(None, ge=1, description="steps that a loss is averaged over; null: an epoch's")

    def __init__(self, count: int, *, args: Any, lr: float, device: torch.device) -> None:
        super().__init__(count, args=args, lr=lr, device=device)
        self.remember(sum=0.0, steps=0.0, newer=0.0, older=0.0)

    def weights(self, seen: Seen) -> Tensor:
        """TorchJD's, which is told the two averages as two epochs of one step."""
        from torchjd.scalarization import DWA

        older_t, newer_t = self.state["older"], self.state["newer"]
        known_t = (older_t > 0) & (newer_t > 0)
        ones_t = torch.ones_like(older_t)
        function = DWA(self.args.temperature)
        for average_t in (older_t, newer_t):
            function(torch.where(known_t, average_t, ones_t))
            function.step()
        weights_t = slopes(function, ones_t) * seen.present_t
        return weights_t * seen.present_t.sum() / weights_t.sum().clamp(min=EPSILON)

    def learn(self, seen: Seen, after_t: Tensor | None, *, window_ends: bool) -> None:
        """Add the step's losses to their averages; at the end of a window it becomes the newer of the two."""
        assert seen.losses_t is not None
        state = self.state
        state["sum"] = state["sum"] + seen.losses_t * seen.present_t
        state["steps"] = state["steps"] + seen.present_t
        if window_ends:
            seen_t = state["steps"] > 0  # a task without a label in the whole window keeps its averages
            average_t = state["sum"] / state["steps"].clamp(min=1)
            state["older"] = torch.where(seen_t, state["newer"], state["older"])
            state["newer"] = torch.where(seen_t, average_t, state["newer"])
            state["sum"], state["steps"] = torch.zeros_like(average_t), torch.zeros_like(average_t)


class GeometricMean(Method):
    """GLS: the gradient of the geometric mean of the losses, w_i = (L_1 ... L_t)^(1/t) / (t L_i).

    Chennupati et al., MultiNet++, CVPR workshops 2019. TorchJD's own looks for negative losses on the host, which waits
    for the device in every step, and has no place for a task without labels.
    """

    uses_losses: ClassVar[bool] = True
    modules: ClassVar[tuple[str, ...]] = ()

    def weights(self, seen: Seen) -> Tensor:
        """Over the tasks with labels; 0 for the others."""
        assert seen.losses_t is not None
        losses_t = seen.losses_t.clamp(min=EPSILON)
        mean = mean_of(losses_t.log(), seen.present_t).exp()
        return seen.present_t * mean / (seen.present_t.sum().clamp(min=1) * losses_t)


class RandomWeights(Method):
    """RLW: the softmax of normal numbers drawn anew in every step (Lin et al., arXiv 2111.10603).

    They follow from the run's seed and the step, so that a resumed run draws them again without any saved state.
    """

    def weights(self, seen: Seen) -> Tensor:
        """TorchJD's, drawn on the CPU; the tasks with labels share the sum of 1."""
        from torchjd.scalarization import Random

        with drawing_from(seen.seed):
            drawn_t = slopes(Random(), torch.ones(self.count))
        weights_t = to_device(drawn_t, self.device) * seen.present_t
        return weights_t / weights_t.sum().clamp(min=EPSILON)


class Famo(Method):
    """FAMO (Liu et al., arXiv 2306.03792, Algorithm 1): all losses are to fall by the same share.

    1. w_i = c z_i / L_i with z the softmax of learned logits and c such that the weights add up to 1
    2. after the step, the losses of the same batch once more: d_i = log L_i before - log L_i after
    3. a step of Adam on the logits along the gradient of z . d, with the authors' weight decay

    TorchJD's own hides Adam's moments, which a checkpoint must hold, and has no place for a task without labels.
    """

    uses_losses: ClassVar[bool] = True
    uses_losses_after: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    lr: ClassVar[float | None] = 0.025
    modules: ClassVar[tuple[str, ...]] = ()

    class Args(Section):
        """The regulariser of the logits."""

        weight_decay: float = Field(1e-3, ge=0, description="pulls the logits to 0, and so the weights to each other")

    def __init__(self, count: int, *, args: Any, lr: float, device: torch.device) -> None:
        super().__init__(count, args=args, lr=lr, device=device)
        self.remember(logit=0.0)

    def _shares(self, present_t: Tensor) -> Tensor:
        """z over the tasks with labels; 0 for the others."""
        shares_t = self.state["logit"].softmax(dim=0) * present_t
        return shares_t / shares_t.sum().clamp(min=EPSILON)

    def weights(self, seen: Seen) -> Tensor:
        """See step 1."""
        assert seen.losses_t is not None
        parts_t = self._shares(seen.present_t) / (seen.losses_t + EPSILON)
        return parts_t / parts_t.sum().clamp(min=EPSILON)

    def learn(self, seen: Seen, after_t: Tensor | None, *, window_ends: bool) -> None:
        """See steps 2 and 3."""
        assert seen.losses_t is not None and after_t is not None
        falls_t = ((seen.losses_t + EPSILON).log() - (after_t + EPSILON).log()) * seen.present_t
        shares_t = self._shares(seen.present_t)
        gradient_t = shares_t * (falls_t - (shares_t * falls_t).sum())
        self.adam_step("logit", gradient_t, seen.present_t, weight_decay=self.args.weight_decay)
