"""The weights of the tasks' losses over a run: measured, learned, kept between, saved and restored.

In a step that is due (``train.balancing.every``) the weights come about before its backward passes, one for each
micro-step, all with the same weights; so any number of ranks and micro-steps has the weights of one process with the
whole batch. What that takes in addition:

=====================  ======================================================================================
from losses            an all-reduce of t numbers
  before the weights   with several micro-steps a forward pass of their own (geometric mean, FAMO)
  after the step       a forward pass (FAMO)
from gradients         the passes of ``gramian.Measurement``; the host waits for the device once (not GradNorm)
=====================  ======================================================================================

Letters: t tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from ase_dist import collectives
from ase_dist.config import Settings
from ase_dist.data.batch import Batch
from ase_dist.errors import UserError, did_you_mean, first_problem
from ase_dist.registries import BALANCINGS
from ase_dist.seeding import derive_seed
from ase_dist.tasks import Task
from ase_dist.training.balancing.gramian import Measurement
from ase_dist.training.balancing.method import Method, Seen, require_modules
from ase_dist.training.loop import losses
from ase_dist.training.loop.conflict import same_random_state

LOGGER = logging.getLogger("ase_dist")
FIXED = "fixed"


class StoredBalancing(BaseModel):
    """What a checkpoint holds of it: the method, its weights and its state, each by task."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    method: str
    weights: dict[str, float]
    state: dict[str, dict[str, float]]


class _Step(NamedTuple):
    """What the step under way has seen, and the batches that it has it from."""

    number: int
    seen: Seen
    batches: Sequence[Batch]
    counts: Tensor
    is_due: bool


class Balancer:
    """The weighted sum of the tasks' losses, of each step of a run.

    1. ``begin_step`` measures what the method needs
    2. ``weighted_sum`` of the losses of each micro-step
    3. ``end_step`` lets the method learn, where the optimiser has taken the step

    Where a method finds no finite weights those of the step before stay; ``count_kept`` says how often.

    Raises UserError for what the settings cannot mean and for packages that are missing. With ``fixed``, the default,
    the sum is that of ``train.loss_weights`` alone, and nothing is measured or communicated.
    """

    def __init__(self, settings: Settings, tasks: Sequence[Task], model: nn.Module, device: torch.device) -> None:
        balancing, self.seed = settings.train.balancing, settings.seed
        self.name, self.every, self.on = balancing.method, balancing.every, balancing.on
        self.tasks, self.model, self.device = tasks, model, device
        self.overrides = settings.train.loss_weights
        self.scales = losses.loss_weights(tasks, self.overrides)
        self._window: int | None = None
        self._step: _Step | None = None
        self._is_kept_told = False
        self.method: Method | None = None
        self.weights_t: Tensor | None = None  # None with fixed weights
        kind = BALANCINGS[self.name]
        args = _arguments(self.name, kind, balancing.args)
        if self.name == FIXED:
            return
        if len(tasks) < 2:
            raise UserError(f"train.balancing.method: got {self.name!r} with one task, wanted two or more; use 'fixed'")
        require_modules(self.name, kind.modules)
        rate = balancing.lr if balancing.lr is not None else kind.lr
        rate = settings.train.lr if rate is None else rate
        self.method = kind(len(tasks), args=args, lr=rate, device=device)
        self._window = getattr(args, "window", None)
        self._measure = Measurement(model, tasks, self.scales, on=self.on)
        self.weights_t = torch.ones(len(tasks), device=device)
        self._zeros_t = torch.zeros(len(tasks), device=device)
        self._kept_2 = torch.zeros(2, device=device)  # updates without finite weights, and the step of the first
        self._scales_t = torch.tensor([self.scales[task.name] for task in tasks], device=device)

    def describe(self) -> str:
        """A line for the table at a run's start."""
        if self.method is None:
            return "fixed weights"
        of = f" of gradients on the shared {self.on}" if self.method.uses_gramian else " of losses"
        return f"{self.name},{of}, every {self.every} steps" if self.every > 1 else f"{self.name},{of}, every step"

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def begin_step(self, step: int, batches: Sequence[Batch], counts: Tensor, *, beat: Callable[[str], None]) -> None:
        """Measure what the weights of this step need before its forward pass (collective).

        ``counts`` [t, 2] as ``losses.task_losses`` wants them.
        """
        method = self.method
        if method is None:
            return
        is_due = (step - 1) % self.every == 0
        present_t = (counts.sum(dim=1) > 0) & (self._scales_t > 0)
        seen = Seen(None, present_t, None, derive_seed(self.seed, "balancing", step))
        if is_due and method.uses_gramian:
            beat(f"task gradients of step {step}")
            gramian_tt, losses_t = self._measure(batches, counts)
            seen = seen._replace(losses_t=losses_t.float(), gramian_tt=gramian_tt)
        elif is_due and method.uses_losses and len(batches) > 1:
            beat(f"task losses of step {step}")
            seen = seen._replace(losses_t=self._losses_of(batches, counts))
        self._step = _Step(step, seen, batches, counts, is_due)
        if is_due and (seen.losses_t is not None or not method.uses_losses):
            self._take_weights()

    def weighted_sum(self, by_task: Mapping[str, Tensor]) -> Tensor:
        """The scalar to train on, of a micro-step's losses (collective where the method looks at them)."""
        if self.method is None:
            return losses.weighted_sum(by_task, self.tasks, self.overrides)
        assert self._step is not None and self.weights_t is not None, "begin_step comes first"
        losses_t = torch.stack([by_task[task.name] for task in self.tasks]) * self._scales_t
        if self._step.is_due and self.method.uses_losses and self._step.seen.losses_t is None:
            mean_t = collectives.all_reduce_sum(losses_t) / collectives.world_size()
            self._step = self._step._replace(seen=self._step.seen._replace(losses_t=mean_t))
            self._take_weights()
        return (self.weights_t * losses_t).sum()

    def end_step(self, step: int, by_task: Sequence[Mapping[str, Tensor]], *, epoch_ends: bool) -> None:
        """Let the method learn from the losses of a step that was taken, its micro-steps' ``by_task`` (collective).

        ``epoch_ends``: the images of the next step belong to another epoch than the first of this one.
        """
        under_way, method = self._step, self.method
        self._step = None
        if method is None or under_way is None or not method.learns:
            return
        if not (under_way.is_due or method.learns_always):
            return
        seen = under_way.seen
        if seen.losses_t is None:
            rows = torch.stack([torch.stack([row[task.name] for task in self.tasks]) for row in by_task])
            mean_t = collectives.all_reduce_sum(rows.mean(dim=0)) / collectives.world_size()
            seen = seen._replace(losses_t=mean_t * self._scales_t)
        after_t = self._losses_of(under_way.batches, under_way.counts) if method.uses_losses_after else None
        ends = step % self._window == 0 if self._window is not None else epoch_ends
        method.learn(seen, after_t, window_ends=ends)

    def count_kept(self) -> int:
        """Updates since the last call that found no finite weights; the first of a run is told in the log.

        The host waits for the device.
        """
        if self.method is None:
            return 0
        count, first = map(int, self._kept_2.tolist())
        self._kept_2 = torch.zeros_like(self._kept_2)
        if count and not self._is_kept_told and collectives.rank() == 0:
            self._is_kept_told = True
            LOGGER.warning(
                "train.balancing.method: %r found no finite weights at step %d%s; those of the step before stay, and "
                "metrics.jsonl counts such steps as kept_weights",
                self.name,
                first,
                f" ({self.method.problem})" if self.method.problem else "",
            )
        return count

    def _take_weights(self) -> None:
        assert self.method is not None and self._step is not None and self.weights_t is not None
        new_t = self.method.weights(self._step.seen)
        is_finite = new_t.isfinite().all()
        self.weights_t = torch.where(is_finite, new_t, self.weights_t)
        count, first = self._kept_2
        first = torch.where(is_finite | (count > 0), first, torch.full_like(first, self._step.number))
        self._kept_2 = torch.stack([count + ~is_finite, first])

    def _losses_of(self, batches: Sequence[Batch], counts: Tensor) -> Tensor:
        """The losses [t] of all ranks' batches by a forward pass, times their scales; the random state stays."""
        total_t = self._zeros_t
        with torch.no_grad(), same_random_state(self.device):
            for batch in batches:
                predictions = self.model(batch.images).predictions
                by_task = losses.task_losses(predictions, batch.labels, self.tasks, counts)
                total_t = total_t + torch.stack([by_task[task.name] for task in self.tasks]) / len(batches)
        return collectives.all_reduce_sum(total_t) / collectives.world_size() * self._scales_t

    # -----------------------------------------------------------------------------------------------------------------
    # In a checkpoint

    def to_meta(self) -> dict[str, Any] | None:
        """Plain JSON, the same on all ranks, whose numbers are read back bit for bit; None with fixed weights."""
        if self.method is None or self.weights_t is None:
            return None
        return {
            "method": self.name,
            "weights": self._by_task(self.weights_t),
            "state": {name: self._by_task(value_t) for name, value_t in self.method.state.items()},
        }

    def load_meta(self, stored: StoredBalancing | None) -> None:
        """The reverse of ``to_meta``, by the names of the tasks; another method's state is not taken over."""
        if self.method is None or self.weights_t is None or stored is None or stored.method != self.name:
            return
        self.weights_t = self._of_tasks(stored.weights, like=self.weights_t)
        for name, values in stored.state.items():
            like = self.method.state.get(name, self._zeros_t)  # Adam's moments begin with the first step
            self.method.state[name] = self._of_tasks(values, like=like)

    def _by_task(self, values_t: Tensor) -> dict[str, float]:
        return dict(zip([task.name for task in self.tasks], values_t.tolist(), strict=True))

    def _of_tasks(self, values: Mapping[str, float], *, like: Tensor) -> Tensor:
        return torch.tensor([values[task.name] for task in self.tasks], dtype=like.dtype, device=like.device)


def _arguments(name: str, kind: type[Method], given: Mapping[str, Any]) -> Any:
    """``train.balancing.args`` as the method's own. Raises UserError for a key or a value that it does not take."""
    known = kind.Args.model_fields
    for key in given:
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise UserError(f"train.balancing.args: got {key!r}, but {name!r} {takes}{did_you_mean(key, known)}")
    try:
        return kind.Args.model_validate(dict(given))
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(f"train.balancing.args.{problem.where}: got {problem.got!r}; {problem.why}") from None
