"""Methods that look at the Gram matrix of the tasks' gradients. Letters: t tasks."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ase_dist import collectives
from ase_dist.config import Section
from ase_dist.errors import describe
from ase_dist.training.balancing.method import Method, Seen, drawing_from, mean_of, to_device

LEAST_WEIGHT = 1e-3  # of GradNorm, whose steps would else lead to 0 and below


class GradNorm(Method):
    """GradNorm (Chen et al., arXiv 1711.02257, Algorithm 1): gradients of equal norm, larger where a loss lags behind.

    1. G_i = w_i |g_i| with g_i the gradient of task i; r_i = (L_i / L_i at the first step) over its mean
    2. a step of Adam on w down the sum of |G_i - mean(G) r_i^alpha|, the second term held constant
    3. the weights are scaled so that they add up to t

    The step itself takes the weights as they were before, as the paper does. Tasks without labels keep theirs, and the
    others are scaled so that all still add up to t: from equal weights on they have those of a run without the absent.
    """

    uses_losses: ClassVar[bool] = True
    uses_gramian: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    lr: ClassVar[float | None] = 0.025
    modules: ClassVar[tuple[str, ...]] = ()

    class Args(Section):
        """The strength of the balancing."""

        alpha: float = Field(1.5, ge=0, description="how much a task that learns slowly is helped; 0: equal norms")

    def __init__(self, count: int, *, args: Any, lr: float, device: torch.device) -> None:
        super().__init__(count, args=args, lr=lr, device=device)
        self.remember(weight=1.0, initial=0.0)

    def weights(self, seen: Seen) -> Tensor:
        """As they have been learned up to now."""
        return self.state["weight"]

    def learn(self, seen: Seen, after_t: Tensor | None, *, window_ends: bool) -> None:
        """See the steps above, over the tasks with labels."""
        assert seen.losses_t is not None and seen.gramian_tt is not None
        state, present_t = self.state, seen.present_t
        state["initial"] = torch.where(present_t & (state["initial"] == 0), seen.losses_t, state["initial"])
        rate_t = seen.losses_t / torch.where(state["initial"] > 0, state["initial"], torch.ones_like(seen.losses_t))
        mean_rate = mean_of(rate_t, present_t)
        rate_t = rate_t / torch.where(mean_rate > 0, mean_rate, torch.ones_like(mean_rate))
        norms_t = seen.gramian_tt.diagonal().clamp(min=0).sqrt().to(rate_t.dtype)
        scaled_t = state["weight"] * norms_t
        target_t = mean_of(scaled_t, present_t) * rate_t**self.args.alpha
        self.adam_step("weight", (scaled_t - target_t).sign() * norms_t, present_t)
        weight_t = state["weight"].clamp(min=LEAST_WEIGHT) * present_t
        absent_t = state["weight"] * ~present_t
        share = (self.count - absent_t.sum()) / weight_t.sum().clamp(min=LEAST_WEIGHT)
        state["weight"] = weight_t * share + absent_t


class OnHost(Method):
    """A weighting of TorchJD, computed on the host in float64: the host waits for the Gram matrix once each time.

    The first rank's weights hold on all ranks. ``is_scale_free``: a multiple of the matrix has the same weights, so it
    is given with a trace of 1; TorchJD takes one below 1e-4, as small gradients have it, for zero.
    """

    uses_gramian: ClassVar[bool] = True
    is_scale_free: ClassVar[bool] = True

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """The weights [t] of the tasks whose Gram matrix [t, t], float64 on the host, is given.

        ``present_t`` says which of all tasks they are.
        """
        raise NotImplementedError

    def weights(self, seen: Seen) -> Tensor:
        """Of the tasks with labels; 0 for the others, and NaN where the matrix is zero or not finite."""
        assert seen.gramian_tt is not None
        found = torch.cat([seen.gramian_tt.flatten(), seen.present_t.to(seen.gramian_tt.dtype)]).cpu().double()
        gramian_tt, present_t = found[: -self.count].view(self.count, self.count), found[-self.count :] > 0
        gramian_tt = gramian_tt[present_t][:, present_t]
        trace = gramian_tt.diagonal().sum()
        weights_t = torch.full((self.count,), torch.nan, dtype=torch.float64)
        self.problem = "no gradient, or one that is not finite"
        if gramian_tt.isfinite().all() and trace > 0:
            try:
                with drawing_from(seen.seed):
                    solved = self.solve(gramian_tt / trace if self.is_scale_free else gramian_tt, present_t)
                weights_t = torch.zeros_like(weights_t).masked_scatter(present_t, solved.double())
                self.problem = ""
            except Exception as error:  # of whichever solver: a matrix that it cannot do must not end a run
                self.problem = describe(error)
        if collectives.rank() > 0:
            weights_t = torch.zeros_like(weights_t)
        return collectives.all_reduce_sum(to_device(weights_t.float(), self.device))


class MultipleGradientDescent(OnHost):
    """MGDA: the shortest vector among the convex combinations (Sener and Koltun, arXiv 1810.04650, Algorithm 2)."""

    class Args(Section):
        """When Frank and Wolfe's iteration ends."""

        epsilon: float = Field(1e-3, gt=0, description="the least step of the iteration")
        max_iters: int = Field(100, ge=1, description="the most iterations")

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """See ``OnHost.solve``."""
        from torchjd.aggregation import MGDAWeighting

        return MGDAWeighting(epsilon=self.args.epsilon, max_iters=self.args.max_iters)(gramian_tt)


class ProjectedConflicts(OnHost):
    """PCGrad: each gradient loses what opposes another (Yu et al., arXiv 2001.06782, Algorithm 1), in random order."""

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """See ``OnHost.solve``."""
        from torchjd.aggregation import PCGradWeighting

        return PCGradWeighting()(gramian_tt)


class ConflictAverse(OnHost):
    """CAGrad: the best worst improvement in a ball about the mean gradient (Liu et al., arXiv 2110.14048)."""

    modules: ClassVar[tuple[str, ...]] = ("torchjd", "cvxpy", "clarabel")

    class Args(Section):
        """The size of the ball."""

        c: float = Field(0.4, ge=0, lt=1, description="its radius over the mean gradient's norm; 0: the mean itself")

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """See ``OnHost.solve``."""
        from torchjd.aggregation import CAGradWeighting

        return CAGradWeighting(c=self.args.c)(gramian_tt)


class ImpartialGradients(OnHost):
    """IMTL-G: a sum with equal projections on all gradients (Liu et al., ICLR 2021); weights may be negative."""

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """See ``OnHost.solve``."""
        from torchjd.aggregation import IMTLGWeighting

        return IMTLGWeighting()(gramian_tt)


class NashBargaining(OnHost):
    """Nash-MTL: G alpha = 1 / alpha (Navon et al., arXiv 2202.01017, Algorithm 1), each solution begun at the last.

    TorchJD's takes gradients: it is given the root of the Gram matrix, whose rows have the same inner products. It
    scales the matrix by its norm and cuts the sum's norm at ``max_norm``.
    """

    is_scale_free: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ("torchjd", "cvxpy", "ecos")

    class Args(Section):
        """The solver, and how long the sum may be."""

        max_norm: float = Field(
            1.0, ge=0, description="the most that the norm of the weighted gradient is; 0: no limit"
        )
        iterations: int = Field(20, ge=1, description="convex problems solved one after another")

    def __init__(self, count: int, *, args: Any, lr: float, device: torch.device) -> None:
        super().__init__(count, args=args, lr=lr, device=device)
        self.state["alpha"] = torch.ones(count, dtype=torch.float64)

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """See ``OnHost.solve``; the solution is the next one's beginning."""
        from torchjd.aggregation import NashMTL

        values_t, vectors_tt = torch.linalg.eigh(gramian_tt)
        root_tt = vectors_tt * values_t.clamp(min=0).sqrt()
        weighting = NashMTL(len(root_tt), max_norm=self.args.max_norm, optim_niter=self.args.iterations).weighting
        weighting.prvs_alpha = self.state["alpha"][present_t].numpy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\s*You are solving a parameterized problem", UserWarning)
            weights_t = weighting(root_tt)
        alpha_t = torch.as_tensor(weighting.prvs_alpha, dtype=torch.float64)
        self.state["alpha"] = self.state["alpha"].masked_scatter(present_t, alpha_t)
        return weights_t


class AlignedComponents(OnHost):
    """Aligned-MTL: the principal components of the gradients scaled to one size (Senushkin et al., CVPR 2023)."""

    class Args(Section):
        """The size that they are scaled to."""

        scale: Literal["min", "median", "rmse"] = Field("min", description="of the eigenvalues of the Gram matrix")

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """See ``OnHost.solve``."""
        from torchjd.aggregation import AlignedMTLWeighting

        return AlignedMTLWeighting(scale_mode=self.args.scale)(gramian_tt)


class UnconflictingProjections(OnHost):
    """UPGrad: the mean of the gradients, each projected so that it opposes none (Quinton and Rey, arXiv 2406.16232)."""

    modules: ClassVar[tuple[str, ...]] = ("torchjd", "qpsolvers", "quadprog")

    def solve(self, gramian_tt: Tensor, present_t: Tensor) -> Tensor:
        """See ``OnHost.solve``."""
        from torchjd.aggregation import UPGradWeighting

        return UPGradWeighting()(gramian_tt)
