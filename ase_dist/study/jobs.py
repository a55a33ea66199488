"""From a study to its runs: which settings, seeds and folders, and which of them are done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ase_dist.baselines import baselines
from ase_dist.config import Settings, build_settings, flat, load_settings
from ase_dist.errors import UserError
from ase_dist.study.presets import Preset
from ase_dist.study.variants import Variant
from ase_dist.tasks import select_tasks
from ase_dist.training.record.run_folder import RunFolder

# settings that may differ between two starts of a run; bf16 is kept as it was resolved
UNCOMPARED = ("output", "resume", "train.threads", "train.bf16")


@dataclass(frozen=True)
class Job:
    """One training run of a variant; a variant whose tasks train separately has one per task and seed."""

    variant: str
    seed: int
    settings: Settings
    out: Path

    @property
    def folder(self) -> Path:
        """The run's output."""
        return self.settings.output

    @property
    def run(self) -> RunFolder:
        """The files in it."""
        return RunFolder(self.folder)

    @property
    def name(self) -> str:
        """Variant, seed and, where there is one, task."""
        return self.folder.relative_to(self.out / "runs").as_posix()

    @property
    def config(self) -> Path:
        """The file of settings that the run is started with."""
        return self.out / "settings" / f"{self.name.replace('/', '-')}.yaml"

    def is_done(self) -> bool:
        """Whether the run took its last step.

        Raises UserError where the folder holds a run of other settings, whose results would be mixed up with these.
        """
        self._check_same()
        try:
            summary = self.run.read_summary()
        except (OSError, json.JSONDecodeError):
            return False
        return bool(summary.get("exit") == "done" and summary.get("step") == summary.get("total_steps"))

    def _check_same(self) -> None:
        path = self.run.config
        if not path.is_file():
            return
        other = _comparable(load_settings(path))
        wanted = _comparable(self.settings)
        odd = sorted(key for key in wanted if other.get(key) != wanted[key])
        if odd:
            raise UserError(
                f"{self.folder}: holds a run with {odd[0]} = {other.get(odd[0])}, this study wants {wanted[odd[0]]}; "
                "name another folder with --out, or remove that run"
            )


def jobs_of(
    variants: Sequence[Variant], preset: Preset, *, seeds: int, out: Path, overrides: Iterable[str] = ()
) -> list[Job]:
    """Every run of a study, seed by seed, so that an interrupted one has whole tables of fewer seeds."""
    overrides = tuple(overrides)
    return [
        job
        for seed in range(seeds)
        for variant in variants
        for job in _jobs_of_variant(variant, preset, seed=seed, out=out, overrides=overrides)
    ]


def with_steps(preset: Preset, steps: int | None) -> Preset:
    """The preset with runs of ``steps`` steps."""
    if steps is None:
        return preset
    if steps < 1:
        raise UserError(f"--steps: got {steps}, wanted 1 or more")
    return replace(preset, steps=steps)


def _jobs_of_variant(
    variant: Variant, preset: Preset, *, seed: int, out: Path, overrides: tuple[str, ...]
) -> list[Job]:
    row = baselines()[variant.row]
    convolutional = preset.convolutional if "backbone" in row.model else {}
    fixed = {"train.max_steps": preset.steps, "train.epochs": None, "seed": seed}
    changes = {**preset.changes, **fixed, **convolutional, **variant.changes}
    settings = load_settings(preset.config, [*_as_overrides(changes), *overrides], row=variant.row)
    tasks = variant.tasks or settings.tasks or tuple(task.name for task in select_tasks(settings.data.name))
    folder = out / "runs" / variant.name / f"seed_{seed}"
    if not row.separate:
        return [Job(variant.name, seed, _with(settings, tasks=tasks, output=folder), out)]
    return [Job(variant.name, seed, _with(settings, tasks=(task,), output=folder / task), out) for task in tasks]


def _as_overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _with(settings: Settings, *, tasks: tuple[str, ...], output: Path) -> Settings:
    tree = settings.model_dump(mode="json")
    return build_settings({**tree, "tasks": list(tasks), "output": str(output)})


def _comparable(settings: Settings) -> dict[str, Any]:
    tree = flat(settings.model_dump(mode="json"))
    return {key: value for key, value in tree.items() if key not in UNCOMPARED}
