"""The content of a run's page, gathered from its folder; a file that cannot be read becomes a sentence on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.report import curves, listing
from ase_dist.report.described_data import described_data
from ase_dist.report.heatmaps import draw_matrix, heat_maps, short
from ase_dist.report.images import Candidate, make_album
from ase_dist.report.ranks import RankReport
from ase_dist.report.results import class_colors, gains, other_metrics, result_rows
from ase_dist.report.run_files import read_run_files
from ase_dist.report.settings import settings_sections
from ase_dist.report.text import DASH, many, plural, significant, size
from ase_dist.training.record.console import clock
from ase_dist.training.record.records import Records, branch, number, texts
from ase_dist.training.record.run_folder import RunFolder

MOST_RANKS = 64  # rows of the table of ranks


def run_content(run: RunFolder) -> dict[str, Any]:
    """What the template ``run.html`` shows."""
    files, name = read_run_files(run), run.path.name
    summary, environment, settings, records = files.summary, files.environment, files.settings, files.records
    rows, matrix = result_rows(records), curves.last_matrix(records)
    return {
        # after the name of the variant where it is a seed of a study
        "title": f"{run.path.parent.name}, {name}" if name.startswith("seed_") else name,
        "about": _about(settings, records),
        "outcome": files.outcome,
        "problems": files.problems,
        "facts": _facts(summary, settings, environment, records, files.total),
        "rows": rows,
        "gain": gains(rows),
        "evaluated_at": [int(record["step"]) for record in records.of_kind("eval")],
        "other_metrics": other_metrics(records),
        "class_colors": class_colors(records),
        "album": make_album(prediction_candidates(run)),
        "metric_charts": curves.metric_charts(records, rows),
        "loss_charts": curves.loss_charts(records),
        "weight_charts": curves.weight_charts(records),
        "course_charts": curves.course_charts(records),
        "heat": heat_maps(records),
        "gate_charts": curves.gate_charts(records),
        "conflict_charts": curves.conflict_charts(records),
        "matrix": None if matrix is None else (matrix[0], draw_matrix(matrix[1], [short(t) for t in records.tasks])),
        "described": described_data(settings),
        "sections": settings_sections(settings) if settings else [],
        "environment": _environment(environment),
        "starts": [(int(r["step"]), r.get("world"), texts(r.get("changed"))) for r in records.of_kind("run")],
        **_ranks(files.ranks, records, settings),
        "files": listing.list_files(run.path),
        "checkpoints": listing.list_checkpoints(run.checkpoints),
        "commands": listing.commands(run, environment),
        "folder": str(run.path),
    }


def prediction_candidates(run: RunFolder, *, label: str = "") -> list[Candidate]:
    """The run's pictures of predictions by step; others after them by name."""
    found = []
    for path in run.predictions.glob("*.png"):
        step = run.step_of_prediction(path)
        order = (10**12 if step is None else step, path.name)
        caption = path.stem if step is None else f"Step {step:,}"
        found.append((order, Candidate(path, f"{label}{caption}")))
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _facts(
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    records: Records,
    total: int | None,
) -> list[tuple[str, str, str]]:
    """Name, value and a smaller note; unknown values are left out."""
    step, world = max(records.last_step, 0), environment.get("world_size") or summary.get("world_size")
    data, parameters = branch(settings, "data"), branch(summary, "parameters", "all")
    seconds, speed = number(summary.get("train_seconds")), records.series("train", "images_per_second").last
    memory = max(records.series("train", "memory_bytes").values, default=float("nan"))
    place = (environment.get("device"), environment.get("hostname"))
    name = str(records.data or data.get("name", "")).replace("_", " ")
    found = [
        ("Data", name, _pixels(data.get("size"))),
        ("Steps", f"{step:,}", f"of {total:,}" if total else ""),
        ("Training time", clock(seconds), "h:mm:ss, evaluations left out"),
        ("Speed", significant(number(summary.get("images_per_second") or speed), 3), "images/s"),
        ("Peak memory", size(memory), "a rank"),
        ("Trained", many(number(parameters.get("trained"))), f"of {many(number(parameters.get('total')))} parameters"),
        ("Ranks", str(world or ""), " on ".join(str(word) for word in place if word)),
        (
            "Best after",
            f"step {summary['best_step']:,}"
            if isinstance(summary.get("best_step"), int) and summary["best_step"] >= 0
            else "",
            "by mean gain",
        ),
    ]
    return [fact for fact in found if fact[1] and fact[1] not in (DASH, "-")]


def _about(settings: Mapping[str, Any], records: Records) -> str:
    """The model and its tasks in one line."""
    model, moe = branch(settings, "model"), branch(settings, "model", "moe")
    words = [str(model["backbone"])] if "backbone" in model else []
    if moe.get("enabled") and "num_experts" in moe:
        size_of = "/".join(str(moe.get(key)) for key in ("num_experts", "k", "num_shared", "rank"))
        words.append(f"experts {size_of} (N/k/S/r), gating {moe.get('gating')}")
    titles = [records.facts_of(name).title for name in records.tasks]
    return "; ".join([*words, *([", ".join(titles)] if titles else [])])


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of text, one per package; sizes in their unit."""
    rows = []
    for key, value in environment.items():
        if key == "packages" and isinstance(value, dict):
            rows += [(str(name), str(version)) for name, version in value.items() if version]
        elif key == "memory_bytes":
            rows.append(("memory", size(number(value))))
        elif key != "command" and value is not None:
            rows.append((key.replace("_", " "), str(value)))
    return rows


def _ranks(ranks: list[RankReport], records: Records, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The table of ranks, with notes; where there are too many, ranks with errors or warnings are preferred."""
    train = branch(settings, "train")
    batch, accumulation = train.get("batch_size"), train.get("gradient_accumulation_steps")
    per_step = batch * accumulation if isinstance(batch, int) and isinstance(accumulation, int) else None
    step = max(records.last_step, 0)
    images = f"Each rank trained on {step * per_step:,} images up to step {step:,}." if per_step else ""
    notable = sorted(ranks, key=lambda r: (not r.errors, not r.warnings, r.ended == "done", r.rank))[:MOST_RANKS]
    left_out = len(ranks) - len(notable)
    return {
        "ranks": sorted(notable, key=lambda report: report.rank),
        "rank_notes": [
            *([images] if images else []),
            "Waiting times are not recorded.",
            *([f"{plural(left_out, 'more rank')} with nothing to report."] if left_out else []),
        ],
    }


def _pixels(input_size: object) -> str:
    """``data.size`` of a config in words; nothing where it holds no size."""
    try:
        return f"{ImageSize.read(input_size)} px"
    except UserError:
        return ""
