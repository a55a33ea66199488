"""Evaluate a trained model over all ranks, on its own data or other data, and write the report."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ase_dist.agreement import raise_together
from ase_dist.config import Settings
from ase_dist.cores import share_of_cores
from ase_dist.data.loader import EvalLoader, build_eval_loader
from ase_dist.deployment.reference import read_reference
from ase_dist.deployment.trained_model import TrainedModel, at_size, open_trained_model
from ase_dist.description import FILE_NAME, find_description
from ase_dist.errors import UserError, did_you_mean, out_error
from ase_dist.evaluation.comparison import Reference, compare
from ase_dist.evaluation.metrics import EdgeOds
from ase_dist.evaluation.ods import THRESHOLDS
from ase_dist.evaluation.tables import FORMAT, Report, to_json, to_latex, to_markdown
from ase_dist.files import require_room, sha256_of, write_atomic
from ase_dist.hub import is_hub
from ase_dist.json_files import read_object
from ase_dist.overwriting import refuse_foreign
from ase_dist.read_config import override_settings, parse_override
from ase_dist.tasks import DATA_SETS, LIBMTL_SCORES, Delta, Task
from ase_dist.training.loop.evaluate import Gallery, Results, evaluate, raise_unread
from ase_dist.training.process.runtime import World
from ase_dist.training.record.console import StepProgress
from ase_dist.training.record.run_folder import RunFolder

LOGGER = logging.getLogger("ase_dist")
ALLOWED = ("data", "eval", "tasks")  # settings that an evaluation may change
JSON_FILE = "metrics.json"
IDENTITY = ("step", "data", "folder", "split", "input_size")  # what makes one evaluation another
TEXT_FILES: dict[str, Callable[[Report], str]] = {"metrics.md": to_markdown, "metrics.tex": to_latex}


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on what, and how; the options of ``launch/evaluate.py``.

    ``data`` is the name of a data set or a folder in the layout of one; ``overrides`` are key=value for data, eval
    and tasks; ``reference`` as ``read_reference`` takes it; ``out`` is the folder for the report where one was named.
    """

    path: str | Path
    checkpoint: str = "newest"
    data: str | None = None
    overrides: Sequence[str] = ()
    tasks: Sequence[str] | None = None
    split: Literal["train", "val"] = "val"
    edge_ods: bool = False
    nms: bool = False
    reference: str | None = None
    out: Path | None = None


def evaluate_model(
    request: EvaluationRequest,
    world: World,
    *,
    console: Console | None = None,
    claim: Callable[[], None] = lambda: None,
    beat: Callable[[str], None] = lambda doing: None,
) -> Report:
    """The report of an evaluation, equal on all ranks (collective).

    ``claim`` is called on the first rank when all has been checked, before the work. ``beat`` is told what begins, as
    ``Watchdog.beat``.

    Raises UserError with one sentence where model, data, tasks or reference are missing or do not fit, and where
    ``request.out`` holds the report of another checkpoint or of other data.
    """
    reference = None if request.reference is None else read_reference(request.reference)
    trained = open_trained_model(request.path, checkpoint=request.checkpoint, device=world.device)
    settings = data_settings(trained, request)
    if settings.data.size != trained.settings.data.size:
        trained = at_size(trained, settings.data.size)
    own = {task.name: task for task in trained.tasks}
    there = settings.chosen_tasks()
    for task in there:
        if task.name not in own:
            raise UserError(f"--tasks: the model has no {task.name!r}, wanted some of {', '.join(own)}")
        if (own[task.name].kind, own[task.name].channels) != (task.kind, task.channels):
            raise UserError(
                f"--data: {task.name} has {task.channels} channels in {settings.data.name}, "
                f"{own[task.name].channels} in the model; leave it out with --tasks, or take other data"
            )
        names = {task.class_names, own[task.name].class_names}
        unnamed = {(), tuple(f"class {i + 1}" for i in range(task.channels))}  # the second: NYUD of earlier exports
        if len(names) > 1 and names.isdisjoint(unnamed):
            odd = next(
                pair for pair in zip(task.class_names, own[task.name].class_names, strict=True) if len({*pair}) > 1
            )
            raise UserError(
                f"--data: {task.name} has other classes in {settings.data.name}, {odd[0]!r} where the model has "
                f"{odd[1]!r}; leave it out with --tasks, or take other data"
            )
        if own[task.name].inverse_depth != task.inverse_depth:
            raise UserError(
                f"--data: {task.name} is {_quantity(task)} in {settings.data.name}, {_quantity(own[task.name])} in the "
                "model; leave it out with --tasks, or take other data"
            )
    # how far boundaries may be apart is a fact of the data that they are scored on, not of the model's own
    tasks = tuple(replace(own[task.name], tolerance=task.tolerance) for task in there)
    if request.nms and not request.edge_ods:
        raise UserError("--nms: it is a part of the boundary F-measure; add --edge-ods")
    if request.edge_ods and not any(task.kind == "edges" for task in tasks):
        raise UserError(f"--edge-ods: there is no edge task among {', '.join(task.name for task in tasks)}")
    ods = EdgeOds(request.nms, workers=share_of_cores(world.local_size)) if request.edge_ods else None
    if (
        reference is not None
    ):  # compare invented values first: a score missing in the reference is an error before the work
        keys = {task.name: {task.metric, "ods_f"} if ods and task.kind == "edges" else {task.metric} for task in tasks}
        keys = {task.name: keys[task.name].union(LIBMTL_SCORES.get(task.kind, ())) for task in tasks}
        invented = {name: dict.fromkeys(found, 1.0) for name, found in keys.items()}
        compare(tasks, invented, reference, delta=settings.eval.delta)
    place: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "device": world.device}
    loader = build_eval_loader(settings, tasks, split=request.split, **place)
    facts = _facts(trained, settings, request, tasks, images=len(loader.dataset), ods=ods)
    try:
        if request.out is not None and (other := _other_report(request.out, facts)):
            raise UserError(f"--out: {str(request.out)!r} holds the evaluation {other!r}; name another folder")
        raise_together(lambda: claim() if world.is_first else None)
        results = _evaluate_with_progress(trained, loader, tasks, world, ods, console, beat)
    finally:
        loader.close()
    return _report(trained, facts, tasks, results, reference=reference, delta=settings.eval.delta)


def report_folder(run: RunFolder, report: Report) -> Path:
    """Where a report belongs that no folder was named for: ``evaluation``.

    A folder in there, named by step, data and split, where ``evaluation`` holds that of another checkpoint or of other
    data, so that no evaluation replaces another one.
    """
    if _other_report(run.evaluation, report.facts) is None:
        return run.evaluation
    data = report.facts["folder"] or report.facts["data"]
    return run.evaluation / f"step_{report.facts['step']}_{data}_{report.facts['split']}_{report.facts['input_size']}"


def _other_report(folder: Path, facts: Mapping[str, object]) -> str | None:
    """The title of the report in ``folder`` where it is of another checkpoint or of other data than ``facts`` are."""
    try:
        tree = read_object(folder / JSON_FILE)
    except (OSError, UserError):  # missing, or not JSON
        return None
    is_other = tree.get("format") == FORMAT and any(tree.get(key) != facts[key] for key in IDENTITY)
    return str(tree.get("title")) if is_other else None


def refuse_foreign_report(out: Path) -> None:
    """Raise UserError where a file in ``out`` would be replaced that no evaluation has written, or that was changed.

    metrics.json has the SHA-256 of the two other files; one without hashes is from an earlier version, whose other
    files are then accepted by name.
    """
    try:
        tree = read_object(out / JSON_FILE)
    except (OSError, UserError):  # missing, or not JSON
        tree = {}
    files = tree.get("files", {})
    written = files if tree.get("format") == FORMAT and isinstance(files, dict) else None

    def is_own(path: Path) -> bool:
        if written is None:
            return False
        return path.name == JSON_FILE or path.name not in written or sha256_of(path) == written[path.name]

    refuse_foreign([out / name for name in (*TEXT_FILES, JSON_FILE)], is_own=is_own, option="--out")


def require_room_for_report(out: Path) -> None:
    """Raise UserError where ``out`` cannot be written to, RunError where it is full: before the work, not after it."""
    try:
        require_room(out)
    except OSError as error:
        raise out_error(error, out) from None


def write_report(report: Report, out: str | Path) -> None:
    """Write metrics.md, metrics.json and metrics.tex into ``out``, each whole or not at all.

    Raises what ``errors.file_error`` makes of an error of the file system.
    """
    out = Path(out)
    refuse_foreign_report(out)
    texts = {name: write(report) for name, write in TEXT_FILES.items()}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    try:
        write_atomic(out / JSON_FILE, to_json(report, files=hashes))
        for name, text in texts.items():
            write_atomic(out / name, text)
    except OSError as error:
        raise out_error(error, out) from None


def data_settings(trained: TrainedModel, request: EvaluationRequest) -> Settings:
    """The model's settings with the requested data, by default its own.

    A name is a data set, in its default folder unless it is the model's own; a folder is read as the dataset.yaml in it
    says, or without one in the layout of the model's own data set. A dataset.yaml may be named too, and of a model that
    was trained on several data sets one of these.
    """
    for override in request.overrides:
        section = override.partition("=")[0].strip().partition(".")[0]
        if section not in ALLOWED:
            raise UserError(f"{override!r}: an evaluation sets data.*, eval.* and tasks only")
    names = [task.name for task in trained.tasks] if request.tasks is None else [*request.tasks]
    values: dict[str, Any] = {"tasks": names}
    data, own, sets = request.data, trained.settings.data.name, trained.settings.data.sets
    if data in [each.title for each in sets]:
        only = trained.settings.data.only_set(str(data))
        values["data.sets"] = [only.model_dump(mode="json")]
        if request.tasks is None:
            values["tasks"] = [name for name in names if name in only.as_.values()]
    elif data is not None and (data != own or (data not in DATA_SETS and Path(data).exists())):
        name, root = data, None
        if data not in DATA_SETS and Path(data).is_dir() and not (Path(data) / FILE_NAME).is_file():
            if sets:
                raise UserError(
                    f"--data: the model was trained on {own}, so it is open how {data!r} is to be read; name one of "
                    "these and give data.root=FOLDER, or write a dataset.yaml"
                )
            name, root = trained.settings.data.data_set.layout or own, Path(data)
        elif data not in DATA_SETS and (described_by := find_description(data, None)) is not None:
            name = str(described_by)
        elif data not in DATA_SETS and ":" not in data:
            raise UserError(
                f"--data: {data!r} is neither a folder nor one of {', '.join(DATA_SETS)}{did_you_mean(data, DATA_SETS)}"
            )
        values |= {"data.sets": [], "data.name": name, "data.root": root}
    return override_settings(trained.settings, values | dict(map(parse_override, request.overrides)))


def _evaluate_with_progress(
    trained: TrainedModel,
    loader: EvalLoader,
    tasks: Sequence[Task],
    world: World,
    ods: EdgeOds | None,
    console: Console | None,
    beat: Callable[[str], None],
) -> Results:
    forward = functools.partial(trained.model, tasks=[task.name for task in tasks])
    done = 0
    with StepProgress("evaluate, batches", total=len(loader), console=console) as progress:

        def go_on(error: Exception | None) -> bool:
            nonlocal done
            done += 1
            beat(f"batch {done + 1} of {len(loader)}")
            progress.log_every_tenth(done)
            return raise_unread(error)

        evaluation = evaluate(
            forward,
            loader.until_error(),
            tasks,
            device=world.device,
            gallery=Gallery(limit=0),
            constants={},
            go_on=go_on,
            edge_ods=ods,
            dataset=loader.dataset,
        )
    assert evaluation is not None
    return evaluation.results


def _quantity(task: Task) -> str:
    return "disparity" if task.inverse_depth else "depth"


def _facts(
    trained: TrainedModel,
    settings: Settings,
    request: EvaluationRequest,
    tasks: Sequence[Task],
    *,
    images: int,
    ods: EdgeOds | None,
) -> dict[str, str | int | None]:
    """What was evaluated on what; nothing depends on the number of ranks."""
    data = settings.data
    folder = data.root.name if data.root is not None and data.name != "scenes" else None
    edges = None
    if ods is not None:
        first = "non-maxima suppressed, " if ods.nms else ""
        within = " and ".join(dict.fromkeys(f"{task.tolerance:g}" for task in tasks if task.tolerance is not None))
        edges = f"{first}{THRESHOLDS} thresholds, thinned, matched within {within} of the diagonal as published"
    return {
        "model": trained.name,
        "kind": trained.kind,
        "step": trained.step,
        "data": data.name,
        "folder": folder,
        "split": request.split,
        "images": images,
        "input_size": data.size.height if data.size.is_square else str(data.size),
        "edges": edges,
    }


def _report(
    trained: TrainedModel,
    facts: Mapping[str, str | int | None],
    tasks: tuple[Task, ...],
    results: Results,
    *,
    reference: Reference | None,
    delta: Delta,
) -> Report:
    """Without a comparison, and with a warning, where a score is undefined: the rest is still useful."""
    place, comparison = facts["folder"] or facts["data"], None
    called = trained.name.rpartition("/")[2] if is_hub(trained.name) else Path(trained.name).resolve().name
    title = f"{called}, step {trained.step}, on {place} ({facts['split']})"
    try:
        comparison = None if reference is None else compare(tasks, results, reference, delta=delta)
    except UserError as error:
        LOGGER.warning("no %s: %s", delta.capitalize(), error)
    return Report(title, facts, tasks, results, comparison)
