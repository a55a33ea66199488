"""Predict images with an export: a picture per task, a sheet with all of them, and raw arrays, at original size."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, run_command
from ase_dist.errors import ExitCode, UserError

EPILOG = """examples:
  python launch/predict.py exports/scenes photo.jpg holiday/ --out predictions
  python launch/predict.py exports/scenes holiday/ --out predictions --tasks semseg,edge --batch 16 --device cuda

for holiday/a.jpg: a_semseg.png (pixels are class ids) and so on, a_sheet.png, and a.npz with an array per task
exit codes: 0 all predicted, 2 something cannot be used (one sentence says what), 3 some files were skipped
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("predict", description=__doc__, epilog=EPILOG)
    p.add_argument(
        "export", type=path, metavar="EXPORT", help="a folder that the command export has written, or hf://owner/name"
    )
    p.add_argument(
        "images", type=path, nargs="+", metavar="IMAGE_OR_FOLDER", help="files, and folders with all in them"
    )
    p.add_argument("--out", type=path, required=True, metavar="DIR", help="where to write; made where it is missing")
    p.add_argument("--tasks", metavar="A,B", help="only these; the streams of other tasks are not computed")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="images at a time (default %(default)s)")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_intermixed_args(argv)
    return run_command(lambda: _predict(arguments))


def _predict(arguments: argparse.Namespace) -> int:
    from ase_dist.deployment.predict_folder import choose_tasks, find_sources, predict_files
    from ase_dist.deployment.predictor import load
    from ase_dist.training.process.device import find_device
    from ase_dist.training.record.console import StepProgress, close_console, set_up_logging

    console = set_up_logging(rank=0)
    try:
        if arguments.batch < 1:
            raise UserError(f"--batch: got {arguments.batch}, wanted at least 1")
        sources = find_sources(arguments.images, out=arguments.out)
        model = load(arguments.export, device=find_device(arguments.device))
        tasks = choose_tasks(model, arguments.tasks.split(",") if arguments.tasks else None)
        with StepProgress("predict, images", total=len(sources), console=console) as progress:
            outcome = predict_files(
                model, sources, arguments.out, tasks=tasks, batch_size=arguments.batch, advance=progress.log_every_tenth
            )
        logging.getLogger("ase_dist").info(
            "%d images in %s, %d files skipped", len(outcome.written), arguments.out, len(outcome.skipped)
        )
    finally:
        close_console()
    return ExitCode.SKIPPED if outcome.skipped else ExitCode.DONE
