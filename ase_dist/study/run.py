"""A whole study: its runs, its results, and the files that show them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ase_dist.errors import UserError, out_error
from ase_dist.files import json_safe, require_room, write_atomic
from ase_dist.overwriting import contains, refuse_foreign
from ase_dist.study.collect import collect
from ase_dist.study.figures import draw
from ase_dist.study.jobs import StudyJob, jobs_of, with_steps
from ase_dist.study.presets import PRESETS, Preset, find_preset
from ase_dist.study.runner import Runner, Slots
from ase_dist.study.tables import as_csv, markdown
from ase_dist.study.variants import Study, find_study, references
from ase_dist.training.process.folder_lock import FolderLock

LOGGER = logging.getLogger("ase_dist")
DONE, FAILED, STOPPED = 0, 1, 75  # exit codes: all runs are done, some failed, ended by a signal


def run_study(
    name: str,
    *,
    data: str,
    seeds: int,
    out: Path | None = None,
    steps: int | None = None,
    only: Sequence[str] = (),
    slots: Slots,
    keep_checkpoints: bool = False,
    train: bool = True,
    overrides: Iterable[str] = (),
) -> int:
    """Run what is missing (unless ``train`` is false), then write results.json, .md and .csv and plots/*.png.

    ``out`` is studies/NAME_DATA where None; ``only`` names the variants that are run and shown, with the reference.
    Raises UserError for settings that a run would refuse, and where another study runs in ``out``, before the first run
    starts.
    """
    study, preset = find_study(name), with_steps(find_preset(data), steps)
    if seeds < 1:
        raise UserError(f"--seeds: got {seeds}, wanted 1 or more")
    called = data if data in PRESETS else re.sub(r"\W+", "_", preset.title)
    out = (out or Path("studies") / f"{name}_{called}").absolute()
    variants = study.variants(preset)
    reference_of = references(study, preset, variants)
    for variant in only:
        if variant not in reference_of:
            raise UserError(f"--only: this study has no variant {variant!r} (variants: {', '.join(reference_of)})")
    if only:
        wanted = {*only, *(reference_of[variant] for variant in only)}
        variants = [variant for variant in variants if variant.name in wanted]
        reference_of = references(study, preset, variants)
    jobs = jobs_of(variants, preset, seeds=seeds, out=out, overrides=overrides)
    steps = next(job for job in jobs if job.variant in reference_of).settings.train.max_steps
    facts_file, is_facts = out / "study.json", contains(b'"references"')
    is_study = facts_file.is_file() and is_facts(facts_file)  # then it has written the files below
    results_files = [out / f"results.{kind}" for kind in ("json", "md", "csv")]
    refuse_foreign(
        [facts_file, *results_files, *(out / "plots").glob("*.png")], is_own=lambda _: is_study, option="--out"
    )
    facts = {
        "name": name,
        "title": study.title,
        "data": preset.title,
        "steps": steps,
        "seeds": list(range(seeds)),
        "axis": study.axis,
        "references": reference_of,
    }
    code = DONE
    try:
        if train:
            require_room(out)
    except OSError as error:
        raise out_error(error, out) from None
    with FolderLock(out / "study.lock", folder=out, doing="running a study", other="--out") as lock:
        if train:  # --tables-only shows what is done while the study goes on
            lock.take()
        write_atomic(facts_file, json.dumps(facts, indent=2) + "\n")
        if train:
            runner = Runner(jobs, slots, keep_checkpoints=keep_checkpoints)
            failed = runner.run()
            code = STOPPED if runner.stopped else FAILED if failed else DONE
    measured_on = f"{preset.title}, {steps} steps a run"
    _write_results(out, study, preset, measured_on, jobs, collect(variants, jobs, reference_of, study.contrasts))
    return code


def _write_results(
    out: Path, study: Study, preset: Preset, measured_on: str, jobs: Sequence[StudyJob], results: Mapping[str, Any]
) -> None:
    text = markdown(study.title, measured_on, results)
    write_atomic(out / "results.json", json.dumps(json_safe(results), indent=2, allow_nan=False) + "\n")
    write_atomic(out / "results.md", text)
    write_atomic(out / "results.csv", as_csv(results))
    for file, image in draw(results, title=f"{study.title} ({preset.title})", axis=study.axis).items():
        write_atomic(out / "plots" / file, image)
    heat_map = next((job for job in jobs if job.variant == study.heat_map and job.is_done()), None)
    # expert activation by layer, early, midway and at the end of one run (Fig. 4)
    for source in [] if heat_map is None else sorted(heat_map.run.plots.glob("expert*.png")):
        (out / "plots").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out / "plots" / source.name)
    LOGGER.info("\n%s", text)
    LOGGER.info("the files are in %s", out)
