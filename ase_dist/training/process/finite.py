"""Non-finite numbers, and what all ranks decide in each step: whether it counts, and whether a rank must stop.

``ballot = vote(finite, stop=..., unread=...)`` begins an all-reduce before the forward pass; read after the step,
``ballot.stop`` says whether to save and leave without waiting for what the device has been given since. Several ranks
read ``ballot.unread`` before the forward pass, which no rank may begin without its batch. ``guard.take_step`` says
whether the step counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ase_dist.collectives import all_reduce_sum, gather_objects, rank
from ase_dist.errors import ExitCode, RunError, UserError


class Vote:
    """The ranks' common decision; reading the first property waits until it has reached the host, later reads do not.

    The copy to the host begins with the vote, so that a late read does not wait for work that was queued after it.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts, self._read = counts, (0.0, 0.0, 0.0)
        self._is_read = False
        self._arrival: torch.Event | None = None
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and counts.device.type == accelerator.type:
            self._counts = torch.empty_like(counts, device="cpu", pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._arrival = torch.Event(counts.device)
            self._arrival.record()

    @property
    def finite(self) -> bool:
        """Whether the numbers were finite on every rank."""
        return self._values()[0] == 0

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return self._values()[1] > 0

    @property
    def unread(self) -> bool:
        """Whether a rank could not read its images."""
        return self._values()[2] > 0

    def _values(self) -> tuple[float, float, float]:
        if not self._is_read:
            if self._arrival is not None:
                self._arrival.synchronize()
            not_finite, stopping, unread = self._counts.tolist()
            self._read, self._is_read = (not_finite, stopping, unread), True
        return self._read


def vote(finite: Tensor, *, stop: bool, unread: bool = False) -> Vote:
    """Add up ``[not finite, stop, unread]`` over the ranks, on the device of ``finite`` (bool, no dimensions).

    Collective. Nothing here waits for the device, so it can be called early and read late.
    """
    flags = [torch.full_like(finite, flag) for flag in (stop, unread)]
    return Vote(all_reduce_sum(torch.stack([~finite, *flags]).float()))


def all_finite(values: Iterable[Tensor]) -> Tensor:
    """Whether every number in ``values`` is finite, as a bool tensor without dimensions on their device."""
    return torch.stack([value.detach().isfinite().all() for value in values]).all()


class NonFiniteError(RunError):
    """A loss or a gradient is NaN or infinite and the run is to stop; the same sentence on all ranks."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, exit_code=ExitCode.NON_FINITE)


class FiniteGuard:
    """What a non-finite step leads to: "stop" at once, or "skip" it, at most ``max_skips`` in a row."""

    def __init__(self, *, policy: Literal["stop", "skip"] = "stop", max_skips: int = 10) -> None:
        if policy not in ("stop", "skip") or max_skips < 1:
            raise UserError(
                f"guard: got policy {policy!r} and {max_skips} skips, wanted 'stop' or 'skip' and at least 1"
            )
        self.policy, self.max_skips = policy, max_skips
        self.skips = 0  # in a row
        self.report = ""  # of the last non-finite step

    def take_step(
        self, finite: bool, *, step: int, values: Mapping[str, Tensor], batch: Sequence[object] | Tensor
    ) -> bool:
        """True: the step counts. False: it was skipped, ``report`` says why. ``finite`` must be the same on every rank.

        ``values`` are this rank's numbers by name (each task's loss, the gradient norm), ``batch`` the ids of its
        images; they are looked at only where the step is not finite, and then gathered over the ranks (collective).
        Raises NonFiniteError, with step, rank, names and ids, where the policy or the number of skips ends the run.
        """
        if finite:
            self.skips = 0
            return True
        found = [f"{name} {value.detach().sum().item()}" for name, value in values.items() if not all_finite([value])]
        ids = batch.tolist() if isinstance(batch, Tensor) else list(batch)
        clauses = gather_objects(f"rank {rank()}: {', '.join(found)}, batch {ids}" if found else "")
        where = "; ".join(str(clause) for clause in clauses if clause) or "in none of the values that were reported"
        self.report = f"step {step} is not finite ({where})"
        self.skips += 1
        if self.policy == "stop":
            raise NonFiniteError(
                f"{self.report}; the step was not taken (guard.non_finite=skip goes on past such steps)"
            )
        if self.skips > self.max_skips:
            raise NonFiniteError(f"{self.report}; that is more than {self.max_skips} such steps in a row")
        return False
