"""What a checkpoint holds about its run in addition to tensors: ``meta`` in its manifest, validated before use."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from ase_dist.errors import UserError, first_problem
from ase_dist.moe.deepspeed_compat import COUNTERS
from ase_dist.tasks import select_tasks
from ase_dist.training.balancing.balancer import StoredBalancing
from ase_dist.training.state.checkpoint import Checkpoint
from ase_dist.training.state.checkpoint.manifest import MANIFEST
from ase_dist.training.state.frozen import FrozenWeights

StoredResults = dict[str, dict[str, float | None]]  # None where a metric was not finite, which JSON cannot say


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)  # keys that a later version adds are ignored


class Topology(_Part):
    """The ranks, the expert-parallel size and the ZeRO stage that saved it."""

    world: int = Field(ge=1)
    ep_size: int = Field(ge=1)
    zero_stage: int = Field(ge=0, le=3)


class StoredHistory(_Part):
    """``History`` in JSON."""

    first: StoredResults | None
    latest: StoredResults | None
    trivial: StoredResults
    evaluated_at: int = Field(ge=-1)
    best_step: int = Field(ge=-1)
    best_score: float | None
    train_seconds: float = Field(ge=0)
    images: NonNegativeInt


class Schedule(_Part):
    """The state of the learning rate's schedule."""

    last_epoch: NonNegativeInt


class RunMeta(_Part):
    """``meta`` of a run's checkpoint.

    ``tasks`` is the order in which the model's tensors have the tasks, ``device`` the kind of device that the random
    states of devices are for; both are None in checkpoints of version 0.1.0 and before. ``balancing`` is None with
    fixed weights. ``weights_only``: the states of the optimiser and of random numbers were removed. ``tolerances``:
    with which odsF was counted, by task of edges.
    ``labelled_images`` counts the training images with a label, by task; None in earlier checkpoints.
    """

    settings: dict[str, Any]
    tasks: tuple[str, ...] | None = None
    backbone: dict[str, str]  # name, and the SHA-256 of what is frozen
    frozen: list[tuple[float, float]] | None = None  # the sketch of that
    topology: Topology
    sampler: dict[str, int | dict[str, dict[str, int]]]  # the second: of several data sets
    optimizer_steps: NonNegativeInt
    history: StoredHistory
    engine: dict[str, NonNegativeInt]  # the counts that deepspeed_compat.COUNTERS names
    schedule: Schedule
    device: str | None = None
    balancing: StoredBalancing | None = None
    weights_only: bool = False
    tolerances: dict[str, float] = {}
    labelled_images: dict[str, NonNegativeInt] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> RunMeta:
        if self.engine.keys() != {*COUNTERS} or self.backbone.keys() != {"name", "sha256"}:
            raise ValueError("a part of engine or backbone is missing")
        if max(self.optimizer_steps, self.schedule.last_epoch) > self.engine["global_steps"]:
            raise ValueError("more steps of the optimiser or the schedule than of the engine")
        if self.balancing is not None:
            columns = [self.balancing.weights, *self.balancing.state.values()]
            if any(column.keys() != {*self.task_names()} for column in columns):
                raise ValueError("the state of the balancing is not of the run's tasks")
        return self

    def frozen_weights(self) -> FrozenWeights:
        """Which frozen weights the run had."""
        return FrozenWeights(**self.backbone, sketch=self.frozen)

    def why_not_rounded(self) -> str:
        """Ends a sentence that says that its frozen weights are others: in old checkpoints they may be the same."""
        if self.frozen is not None:
            return ""
        return " (a checkpoint of this age cannot tell other weights from the rounding of another processor or torch)"

    def task_names(self) -> tuple[str, ...]:
        """The tasks in the order in which the model's tensors have them."""
        if self.tasks is not None:
            return self.tasks
        name = self.settings["data"]["name"]
        if not isinstance(name, str):
            raise TypeError(f"data.name: got {name!r:.80}, wanted a text")
        return tuple(task.name for task in select_tasks(name, self.settings["tasks"]))


def frozen_to_meta(frozen: FrozenWeights) -> dict[str, Any]:
    """The part of ``meta`` that ``frozen_weights`` reads."""
    sketch = None if frozen.sketch is None else [list(numbers) for numbers in frozen.sketch]
    return {"backbone": {"name": frozen.name, "sha256": frozen.sha256}, "frozen": sketch}


def read_meta(checkpoint: Checkpoint) -> RunMeta:
    """The meta of a run's checkpoint. Raises UserError, which names its file, where a part is missing or wrong."""
    try:
        meta = RunMeta.model_validate(checkpoint.meta)
        meta.task_names()
    except ValidationError as error:
        problem = first_problem(error)
        reason = f"meta.{problem.where}: {problem.why} (got {problem.got!r:.80})"
    except (KeyError, TypeError, ValueError) as error:
        reason = f"meta.settings: {error}"
    else:
        return meta
    raise UserError(
        f"{checkpoint.path / MANIFEST}: {reason}; it is not the checkpoint of a run, or was changed: use another"
    )
