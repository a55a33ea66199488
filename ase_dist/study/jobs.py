"""The runs of a study: their settings, seeds and folders, and which of them are done."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ase_dist.baselines import apply_baseline, find_baseline
from ase_dist.config import Settings, flat
from ase_dist.errors import UserError
from ase_dist.read_config import build_settings, load_settings, override_settings, parse_override, recorded_settings
from ase_dist.study.presets import Preset
from ase_dist.study.variants import Variant
from ase_dist.training.record.run_folder import RunFolder

LOGGER = logging.getLogger("ase_dist")
DECIDED = {"seed": "--seeds", "output": "--out", "train.max_steps": "--steps", "train.epochs": "--steps"}
# settings that may differ between two starts of a run; bf16 is kept as it was resolved
UNCOMPARED = ("output", "resume", "train.threads", "train.bf16")


@dataclass(frozen=True)
class StudyJob:
    """One training run of a variant; a variant whose tasks train separately has one per task and seed.

    It starts from ``export`` of the job ``after``, where there is one.
    """

    variant: str
    seed: int
    settings: Settings
    out: Path
    after: StudyJob | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.settings.output

    @property
    def run(self) -> RunFolder:
        """The files in the run's folder."""
        return RunFolder(self.folder)

    @property
    def name(self) -> str:
        """Variant, seed and, for a run of a single task, the task."""
        return self.folder.relative_to(self.out / "runs").as_posix()

    @property
    def export(self) -> Path:
        """Where the export is that other jobs start from."""
        return self.out / "exports" / self.name

    @property
    def config(self) -> Path:
        """The file of settings that the run is started with."""
        return self.out / "settings" / f"{self.name.replace('/', '-')}.yaml"

    def is_done(self) -> bool:
        """Whether the run took its last step.

        Raises UserError where the folder holds a run of other settings, whose results would be mixed up with these.
        """
        config = self.run.config
        if config.is_file():
            other, wanted = _comparable(recorded_settings(config)), _comparable(self.settings)
            different = sorted(key for key in wanted if other.get(key) != wanted[key])
            if different:
                raise UserError(
                    f"{self.folder}: holds a run with {different[0]} = {other.get(different[0])}, this study wants "
                    f"{wanted[different[0]]}; name another folder with --out, or remove that run"
                )
        try:
            summary = self.run.read_summary()
        except (OSError, UserError):
            return False
        return bool(summary.get("exit") == "done" and summary.get("step") == summary.get("total_steps"))


def jobs_of(
    variants: Sequence[Variant], preset: Preset, *, seeds: int, out: Path, overrides: Iterable[str] = ()
) -> list[StudyJob]:
    """Every run of a study, seed by seed, so that an interrupted study has complete tables of fewer seeds.

    Settings come in this order, the last wins: the preset's config, the preset, ``overrides``, the variant's baseline,
    the variant. So a baseline's learning rate is its factor times the one given, and what variants differ in stays.
    Raises UserError for an override that would change no run, or that an option of the study decides.
    """
    given = dict(parse_override(override) for override in overrides)
    for key, option in DECIDED.items():
        if key in given:
            raise UserError(f"{key}: in a study {option} decides it; give that instead")
    fixed = {"train.max_steps": preset.steps, "train.epochs": None}
    base = override_settings(load_settings(preset.config), {**preset.changes, **fixed, **given})
    before = {variant.after.name: variant.after for variant in variants if variant.after is not None}
    settings: dict[str, Settings] = {}
    for variant in (*before.values(), *variants):
        tree = base.model_dump(mode="json")
        apply_baseline(tree, variant.baseline, lr=base.train.lr, output=base.output)
        settings[variant.name] = override_settings(build_settings(tree), _own_changes(variant, preset))
    _report_replaced(given, settings, variants, preset)
    jobs: list[StudyJob] = []
    for seed in range(seeds):
        first = {name: _job(variant, seed, settings[name], out) for name, variant in before.items()}
        jobs += first.values()
        for variant in variants:
            chosen = settings[variant.name]
            if variant.after is not None:
                job = first[variant.after.name]
                jobs.append(
                    _job(variant, seed, override_settings(chosen, {"model.init_from": str(job.export)}), out, job)
                )
            elif find_baseline(variant.baseline).separate:
                jobs += [_job(variant, seed, chosen, out, alone=task.name) for task in chosen.chosen_tasks()]
            else:
                jobs.append(_job(variant, seed, chosen, out))
    return jobs


def _job(
    variant: Variant,
    seed: int,
    settings: Settings,
    out: Path,
    after: StudyJob | None = None,
    *,
    alone: str | None = None,
) -> StudyJob:
    """The run of one seed, of the task ``alone`` where it has one."""
    names = [task.name for task in settings.chosen_tasks()] if alone is None else [alone]
    folder = out / "runs" / variant.name / f"seed_{seed}" / (alone or "")
    own = {"seed": seed, "output": folder, "tasks": names}
    return StudyJob(variant.name, seed, override_settings(settings, own), out, after)


def _own_changes(variant: Variant, preset: Preset) -> dict[str, Any]:
    """What the variant sets after its baseline, by dotted key."""
    other = preset.backbones.get(find_baseline(variant.baseline).model.get("backbone", ""), {})
    return {**other, **variant.changes, **({} if variant.tasks is None else {"tasks": variant.tasks})}


def _report_replaced(
    given: Mapping[str, Any], settings: Mapping[str, Settings], variants: Sequence[Variant], preset: Preset
) -> None:
    """Log which variants replace an override by a value of their own; UserError for an override that all replace."""
    for key in flat(given):
        own: dict[str, list[str]] = {}
        for variant in variants:
            baseline = find_baseline(variant.baseline)
            decided = [f"model.{name}" for name in baseline.model if name != "moe"]
            decided += [f"model.moe.{name}" for name in baseline.model.get("moe", {})]
            decided += ["train.backbone_lr_factor", *_own_changes(variant, preset)]
            if baseline.lr_factor != 1:
                decided.append("train.lr")
            if any(f"{key}.".startswith(f"{name}.") for name in decided):
                value: Any = settings[variant.name].model_dump(mode="json")
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, Mapping) else None
                own.setdefault(f"{key} = {value}", []).append(variant.name)
        if sum(map(len, own.values())) == len(variants) and key != "train.lr":
            raise UserError(f"{key}: every variant of this study has a value of its own, so this would change no run")
        for value, names in own.items():
            LOGGER.info("%s in %s, which the baseline or the study needs", value, ", ".join(names))


def with_steps(preset: Preset, steps: int | None) -> Preset:
    """The preset with runs of ``steps`` steps."""
    if steps is None:
        return preset
    if steps < 1:
        raise UserError(f"--steps: got {steps}, wanted 1 or more")
    return replace(preset, steps=steps)


def _comparable(settings: Settings) -> dict[str, Any]:
    tree = flat(settings.model_dump(mode="json"))
    return {key: value for key, value in tree.items() if key not in UNCOMPARED}
