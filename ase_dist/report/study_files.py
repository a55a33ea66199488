"""The two files of a study, study.json and results.json, as typed values; see ``ase_dist.study``."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ase_dist.errors import UserError, first_problem
from ase_dist.json_files import parse_json

Values = list[float | None]  # one per complete seed
Model = TypeVar("Model", bound=BaseModel)


class _Tolerant(BaseModel):
    """Unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class StudyFacts(_Tolerant):
    """study.json: the question and its settings."""

    name: str = ""
    title: str = ""
    data: str = ""
    steps: int | None = None
    seeds: list[int] = []
    reference: str = ""
    references: dict[str, str] = {}


class Curve(_Tolerant):
    """A quantity over steps: for each step one value per seed."""

    steps: list[int] = []
    conflicting: list[Values] = []
    cosine: list[Values] = []
    gate: list[Values] = []


class VariantResult(_Tolerant):
    """One line of the table. ``missing`` names runs that are not done."""

    name: str
    label: str = ""
    settings: dict[str, Any] = {}
    seeds: list[int] | None = None
    runs: list[str] = []
    missing: list[str] = []
    reference: str = ""
    metrics: dict[str, dict[str, Values]] = {}
    delta_m: Values | None = None
    parameters: dict[str, float] | None = None
    flops: dict[str, float] | None = None
    images_per_second: Values = []
    memory_bytes: Values = []
    conflict: Curve | None = None
    shared_gate: Curve | None = None

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name

    @property
    def done(self) -> int:
        """How many seeds are complete."""
        if self.seeds is not None:
            return len(self.seeds)
        lengths = [len(values) for metrics in self.metrics.values() for values in metrics.values()]
        return max(lengths, default=0)


class Results(_Tolerant):
    """results.json."""

    data: str = ""
    tasks: list[str] = []
    task_facts: dict[str, Any] = {}
    delta: str = "delta_m"
    variants: list[VariantResult] = []


def parse(text: str, model: type[Model]) -> Model:
    """A file's text as ``model``. Raises UserError with one sentence: where, and what is wrong there."""
    tree = parse_json(text, allow_nan=True)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(f"at {problem.where or 'the top'}: {problem.why}") from None
