"""Evaluate a run or an export: every metric at original image size, tables in Markdown, JSON and LaTeX, Delta_m."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, path_or_name, run_command
from ase_dist.errors import UserError
from ase_dist.printable import show

PATIENCE = 1800.0  # seconds without progress after which the command ends; also the limit of a collective
EPILOG = """examples:
  python launch/evaluate.py runs/scenes --edge-ods
  torchrun --nproc_per_node 2 launch/evaluate.py exports/ase --data PASCAL_MT --edge-ods --reference paper
  python launch/evaluate.py runs/ase --reference runs/stl --tasks semseg,normals data.limit_val=100

exit codes: 0 done, 2 something cannot be used (one sentence says what)
"""


def parser() -> argparse.ArgumentParser:
    """The options; what launchers add (--local_rank) is accepted and not needed."""
    p = command_parser("evaluate", description=__doc__, epilog=EPILOG)
    p.add_argument(
        "model",
        type=path,
        metavar="RUN_OR_EXPORT",
        help="the output folder of a run, or an export, perhaps hf://owner/name",
    )
    p.add_argument("settings", nargs="*", metavar="key=value", help="data.*, eval.* and tasks, over the model's own")
    p.add_argument(
        "--checkpoint",
        type=path_or_name,
        default="newest",
        metavar="WHICH",
        help="of a run: newest (default), best, step_N or a path",
    )
    p.add_argument(
        "--data",
        type=path_or_name,
        metavar="NAME_OR_ROOT",
        help="another data set's name or folder (default: the run's)",
    )
    p.add_argument("--split", choices=("val", "train"), default="val", help="which list (default %(default)s)")
    p.add_argument("--tasks", metavar="A,B", help="only these tasks; the streams of others are not computed")
    p.add_argument("--edge-ods", action="store_true", help="the boundary F-measure (odsF, oisF) of edges too")
    p.add_argument("--nms", action="store_true", help="suppress non-maxima of the edges before it")
    p.add_argument(
        "--reference",
        type=path_or_name,
        metavar="RESULTS",
        help="for Delta_m, or LibMTL's Delta_p with eval.delta=delta_p: paper (single-task ResNet-18), a run, "
        "RUN@best, an export, an evaluation's folder or JSON",
    )
    p.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="where to write (default: RUN_OR_EXPORT/evaluation, a folder in it for another checkpoint or other data)",
    )
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the first rank writes the files and prints the Markdown."""
    arguments = parser().parse_intermixed_args(argv)
    return run_command(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    from ase_dist.deployment.evaluate_model import (
        EvaluationRequest,
        evaluate_model,
        refuse_foreign_report,
        report_folder,
        require_room_for_report,
        write_report,
    )
    from ase_dist.evaluation.tables import to_markdown
    from ase_dist.hub import is_hub
    from ase_dist.training.process.folder_lock import FolderLock
    from ase_dist.training.process.runtime import join
    from ase_dist.training.process.watchdog import Watchdog
    from ase_dist.training.record.console import close_console, set_up_logging
    from ase_dist.training.record.run_folder import RunFolder

    request = EvaluationRequest(
        arguments.model,
        arguments.checkpoint,
        arguments.data,
        arguments.settings,
        arguments.tasks.split(",") if arguments.tasks else None,
        arguments.split,
        arguments.edge_ods,
        arguments.nms,
        arguments.reference,
        arguments.out,
    )
    if is_hub(arguments.model) and arguments.out is None:
        raise UserError("--out: the model is on the hub; name the folder for the report, such as --out evaluation")
    run = RunFolder(arguments.model)
    out = arguments.out or run.evaluation
    lock = FolderLock(out / "evaluation.lock", folder=out, doing="evaluating", other="--out")

    def claim() -> None:
        require_room_for_report(out)
        lock.take()

    try:
        refuse_foreign_report(out)
        watchdog = Watchdog(None, timeout=PATIENCE)
        with lock, join(device=arguments.device, timeout=PATIENCE) as world, watchdog:
            console = set_up_logging(rank=world.rank)
            report = evaluate_model(request, world, console=console, claim=claim, beat=watchdog.beat)
            if world.is_first:
                write_report(report, arguments.out or report_folder(run, report))
                show(to_markdown(report))
    finally:
        close_console()
    return 0
