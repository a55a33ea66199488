"""What a method of balancing is: from the losses, or the Gram matrix of their gradients, to a weight per task.

Letters: t tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ase_dist.config import Section
from ase_dist.errors import UserError

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam, for what a method learns


class Seen(NamedTuple):
    """What a method may look at in a step; equal on all ranks.

    ``losses_t`` are the losses of the global batch, each times its ``train.loss_weights``, 0 for a task without labels
    in it, for which ``present_t`` is False (bool [t]). ``gramian_tt`` holds the inner products of their gradients;
    None where the method does not ask for it. Tensors are on the device of the run. ``seed`` is of this step alone.
    """

    losses_t: Tensor | None
    present_t: Tensor
    gramian_tt: Tensor | None
    seed: int


class Method:
    """A rule for the weights of the tasks; a subclass says in its first lines what it needs.

    1. ``weights(seen)`` before the backward pass of a step
    2. ``learn(seen, after_t)`` when the optimiser has taken the step

    Both are called in the steps that ``train.balancing.every`` makes due; with ``learns_always`` the second in every
    step. ``state`` holds what is learned or remembered, a tensor [t] by name: it is saved and restored, and a method
    has no other memory. A task without labels in a step moves nothing of its state. Nothing but ``OnHost`` may wait for
    the device.

    ``uses_losses``: ``weights`` wants the losses of the step. ``uses_gramian``: it wants the Gram matrix.
    ``uses_losses_after``: ``learn`` wants the losses of the same batch after the step, ``after_t``.
    ``learns``: ``learn`` does something, and wants the losses. ``lr``: the default of ``train.balancing.lr``, None for
    that of the model. ``modules`` are those of the extra packages that it needs.
    """

    uses_losses: ClassVar[bool] = False
    uses_gramian: ClassVar[bool] = False
    uses_losses_after: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    learns_always: ClassVar[bool] = False
    lr: ClassVar[float | None] = None
    modules: ClassVar[tuple[str, ...]] = ("torchjd",)

    class Args(Section):
        """The keys of ``train.balancing.args``."""

    def __init__(self, count: int, *, args: Any, lr: float, device: torch.device) -> None:
        self.count, self.args, self.learning_rate, self.device = count, args, lr, device
        self.state: dict[str, Tensor] = {}
        self.problem = ""  # why the last weights are not finite, where that is known, for the log

    def weights(self, seen: Seen) -> Tensor:
        """The factor of each task's loss [t]; where one is not finite those of the step before stay."""
        raise NotImplementedError

    def learn(self, seen: Seen, after_t: Tensor | None, *, window_ends: bool) -> None:
        """Update ``state`` after a step that was taken."""

    def remember(self, **values: float) -> None:
        """Begin ``state`` with a tensor [t] of each of ``values``."""
        for name, value in values.items():
            self.state[name] = torch.full((self.count,), value, device=self.device)

    def adam_step(self, name: str, gradient_t: Tensor, present_t: Tensor, *, weight_decay: float = 0.0) -> None:
        """A step of Adam (arXiv 1412.6980) on ``state[name]``, for the tasks of ``present_t`` alone.

        As torch.optim.Adam with a parameter per task; that one would have to know on the host which tasks are there.
        """
        beta1, beta2 = BETAS
        for moment in (f"{name}.exp_avg", f"{name}.exp_avg_sq", f"{name}.steps"):
            self.state.setdefault(moment, torch.zeros(self.count, device=self.device))
        value, mean, square, steps = (
            self.state[key] for key in (name, f"{name}.exp_avg", f"{name}.exp_avg_sq", f"{name}.steps")
        )
        gradient_t = gradient_t + weight_decay * value
        present_t = present_t & gradient_t.isfinite()
        new_steps = steps + 1
        new_mean = beta1 * mean + (1 - beta1) * gradient_t
        new_square = beta2 * square + (1 - beta2) * gradient_t.square()
        root = (new_square / (1 - beta2**new_steps)).sqrt() + EPS
        new_value = value - self.learning_rate * (new_mean / (1 - beta1**new_steps)) / root
        for key, new in (
            (name, new_value),
            (f"{name}.exp_avg", new_mean),
            (f"{name}.exp_avg_sq", new_square),
            (f"{name}.steps", new_steps),
        ):
            self.state[key] = torch.where(present_t, new, self.state[key])


class Fixed(Method):
    """The weights of ``train.loss_weights`` alone; ``Balancer`` then neither measures nor multiplies anything."""

    modules: ClassVar[tuple[str, ...]] = ()

    def weights(self, seen: Seen) -> Tensor:
        """Ones."""
        return torch.ones(self.count, device=self.device)


def slopes(function: Any, at_t: Tensor) -> Tensor:
    """The derivative [t] of a scalarizer's value with respect to the losses: the weights that it gives them."""
    with torch.enable_grad():
        leaf_t = at_t.detach().clone().requires_grad_()
        return torch.autograd.grad(function(leaf_t), leaf_t)[0]


def mean_of(values_t: Tensor, present_t: Tensor) -> Tensor:
    """The mean over the tasks of ``present_t``; 0 where there is none."""
    return (values_t * present_t).sum() / present_t.sum().clamp(min=1)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let torch's generator of the CPU, from which TorchJD draws, begin at ``seed``, and restore it afterwards."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on ``device``, without waiting for it."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def require_modules(method: str, modules: tuple[str, ...]) -> None:
    """Raise UserError unless the packages that a method needs are installed."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        what = "ecos" if missing == ["ecos"] else "'ase-dist[balancing]'"  # the extra lacks it from Python 3.13 on
        raise UserError(
            f"train.balancing.method: {method!r} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install {what}"
        )
