"""The history of a run, which is saved with its checkpoints: results, the best of them, time spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ase_dist import collectives
from ase_dist.evaluation.delta_m import delta_m, directions
from ase_dist.files import json_safe
from ase_dist.tasks import RENAMED_SCORES, Task
from ase_dist.training.loop.evaluate import Results
from ase_dist.training.state.meta import StoredHistory, StoredResults

NEVER = -1


@dataclass
class History:
    """Results of the first and the latest evaluation, of the trivial predictors, and after which step they were best.

    ``best_score`` is Delta_m over the trivial predictors, percent; an evaluation before the first step has none.
    ``train_seconds`` and ``images`` (of all ranks) count every start of the run.
    """

    first: Results | None = None
    latest: Results | None = None
    trivial: Results = field(default_factory=dict)
    evaluated_at: int = NEVER
    best_step: int = NEVER
    best_score: float = -math.inf
    train_seconds: float = 0.0
    images: int = 0

    def add(self, step: int, results: Results, tasks: Sequence[Task]) -> None:
        """Keep the results of the evaluation at ``step``; ``trivial`` must be there."""
        self.first, self.latest, self.evaluated_at = self.first or results, results, step
        score = gain(tasks, results, self.trivial)
        if step > 0 and score > self.best_score:
            self.best_step, self.best_score = step, score

    def to_meta(self) -> dict[str, Any]:
        """Plain JSON, the same on all ranks (collective: clocks differ, the first rank's holds)."""
        values = {**vars(self), "train_seconds": collectives.gather_objects(self.train_seconds)[0]}
        return {name: json_safe(value) for name, value in values.items()}

    @classmethod
    def from_meta(cls, stored: StoredHistory) -> History:
        """The reverse of ``to_meta``."""
        return cls(
            first=_results(stored.first),
            latest=_results(stored.latest),
            trivial=_results(stored.trivial) or {},
            evaluated_at=stored.evaluated_at,
            best_step=stored.best_step,
            best_score=-math.inf if stored.best_score is None else stored.best_score,
            train_seconds=stored.train_seconds,
            images=stored.images,
        )


def gain(tasks: Sequence[Task], results: Results, trivial: Results) -> float:
    """Delta_m of ``results`` over ``trivial``, percent, over the tasks where ``trivial`` is defined and not 0.

    -inf where there is no such task, and where a result of one is NaN: a model that fails a task is never the best.
    """
    pairs = {
        task.name: (results[task.name][task.metric], trivial[task.name][task.metric])
        for task in tasks
        if task.name in trivial
    }
    defined = {name: pair for name, pair in pairs.items() if math.isfinite(pair[1]) and pair[1] != 0}
    if not defined or not all(math.isfinite(result) for result, _ in defined.values()):
        return -math.inf
    scores, reference = ({name: pair[i] for name, pair in defined.items()} for i in (0, 1))
    chosen = [task for task in tasks if task.name in defined]
    return delta_m(scores, reference, higher_is_better=directions(chosen))


def _results(stored: StoredResults | None) -> Results | None:
    if stored is None:
        return None
    return {
        task: {RENAMED_SCORES.get(name, name): math.nan if value is None else value for name, value in metrics.items()}
        for task, metrics in stored.items()
    }
