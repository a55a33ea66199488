"""The scores that an evaluation is compared with: the paper's, or those of another run, export or file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ase_dist.deployment.trained_model import choose_checkpoint, read_run
from ase_dist.errors import UserError, describe, file_error
from ase_dist.evaluation.comparison import Reference, paper_reference
from ase_dist.evaluation.tables import FORMAT
from ase_dist.hub import is_hub
from ase_dist.json_files import read_object
from ase_dist.models.export_file import CARD, fetch_export
from ase_dist.tasks import RENAMED_SCORES, TOLERANCE
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.meta import read_meta

PAPER = "paper"
EVALUATION_FILE = "metrics.json"  # of the folder that an evaluation writes


def read_reference(name: str) -> Reference:
    """'paper' is its single-task baseline; of a run or export the last evaluation in its folder, else its own metrics.

    ``RUN@best`` (``@newest``, ``@step_90``) is the evaluation while training that the checkpoint holds. A folder may be
    that of an evaluation; a file is the JSON of one, or plain {task: {score: value}}. Raises UserError where there are
    no scores.
    """
    if name == PAPER:
        return paper_reference()
    path = fetch_export(name, (CARD,)).path.parent if is_hub(name) else Path(name)
    run = RunFolder(path)
    for file in (path, path / EVALUATION_FILE, run.evaluation / EVALUATION_FILE):
        if file.is_file():
            return _from_file(file, name)
    folder, at, checkpoint = name.rpartition("@")
    if at and not path.exists() and RunFolder(folder).config.is_file():
        return _from_checkpoint(folder, checkpoint, name)
    if (path / CARD).is_file():
        card = _read(path / CARD)
        tasks = card.get("tasks")
        listed = [task for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
        tolerances = {str(task.get("name")): task.get("tolerance") for task in listed}
        return _reference(name, card.get("data", ""), card.get("metrics"), path / CARD, tolerances=tolerances)
    if run.config.is_file():
        summary = _read(run.summary)
        found = summary.get("tolerances")
        return _reference(name, summary.get("data", ""), summary.get("metrics"), run.summary, tolerances=found or {})
    raise UserError(
        f"--reference: got {name!r}, wanted {PAPER!r}, the folder of a run, an export or an "
        "evaluation, RUN@best, or a JSON file"
    )


def _from_file(path: Path, name: str) -> Reference:
    tree = _read(path)
    if tree.get("format") == FORMAT:
        title, data = str(tree.get("title", name)), str(tree.get("data", ""))
        return _reference(title, data, tree.get("results"), path, tolerances=tree.get("tolerances") or {})
    return _reference(name, "", tree, path)


def _from_checkpoint(run: str, checkpoint: str, name: str) -> Reference:
    """What the run found when it evaluated at the step of the checkpoint."""
    with choose_checkpoint(Path(run), checkpoint) as found:
        meta, step = read_meta(found), found.step
    history = meta.history
    if history.latest is None or history.evaluated_at != step:
        raise UserError(
            f"--reference: {name} was not evaluated while training; evaluate it and give the folder of that"
        )
    data = read_run(Path(run)).data.name
    return _reference(name, data, history.latest, found.path, tolerances=meta.tolerances)


def _reference(name: str, data: str, scores: Any, path: Path, *, tolerances: Any = None) -> Reference:
    """The scores as numbers; null, where there was nothing to count, as NaN.

    ``tolerances`` None: nothing is known about them. Earlier versions wrote none and counted with ``TOLERANCE``.
    """
    by_task = list(scores.values()) if isinstance(scores, dict) else []
    values = [value for of_task in by_task if isinstance(of_task, dict) for value in of_task.values()]
    are_scores = all(isinstance(of_task, dict) for of_task in by_task)
    are_numbers = all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)
    if not (by_task and are_scores and are_numbers):
        raise UserError(f"--reference: {path} holds no scores, wanted {{task: {{score: value}}}}; evaluate it first")
    numbers = {
        task: {
            RENAMED_SCORES.get(key, key): math.nan if value is None else float(value) for key, value in of_task.items()
        }
        for task, of_task in scores.items()
    }
    known = {} if tolerances is None else {task: TOLERANCE for task, of_task in numbers.items() if "ods_f" in of_task}
    if isinstance(tolerances, dict):
        known |= {task: float(found) for task, found in tolerances.items() if isinstance(found, (int, float))}
    return Reference(name, data, numbers, known)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, UserError) as error:
        raise file_error(error, f"--reference: cannot read {path} ({describe(error)})") from None
