"""Free the disk of runs: say what goes and how much that frees, then remove it. Settings, numbers and results stay."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, run_command

EPILOG = """examples:
  python launch/clean.py runs/scenes --dry-run
  python launch/clean.py runs/scenes --keep best --weights-only
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("clean", description=__doc__, epilog=EPILOG)
    p.add_argument("runs", type=path, nargs="+", metavar="RUN", help="the output folder of a run")
    p.add_argument(
        "--keep", choices=("best", "last"), help="the one checkpoint to keep (default: the best and the last)"
    )
    p.add_argument(
        "--weights-only",
        action="store_true",
        help="of runs that are done drop the optimiser's state too: they can be evaluated and exported, not continued",
    )
    p.add_argument("--dry-run", action="store_true", help="only say what would go")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong, before anything is removed."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: _clean(arguments))


def _clean(arguments: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from ase_dist.printable import show
    from ase_dist.training.process.folder_lock import FolderLock
    from ase_dist.training.record.run_folder import RunFolder
    from ase_dist.training.state.cleaning import apply_removals, plan_removals

    runs = [RunFolder(folder) for folder in arguments.runs]
    with ExitStack() as locked:
        planned = []
        for run in runs:
            if run.config.is_file() and not arguments.dry_run:  # no one trains there meanwhile
                lock = FolderLock(run.lock, folder=run.path, doing="cleaning", other="another RUN")
                locked.enter_context(lock).take()
            planned += plan_removals(run, keep=arguments.keep, weights_only=arguments.weights_only)
        for removal in planned:
            what = "remove" if removal.whole else "drop the optimiser's state of"
            show(f"{what} {removal.checkpoint}: {removal.bytes / 1e6:,.1f} MB\n")
        total = sum(removal.bytes for removal in planned) / 1e6
        if arguments.dry_run:
            show(f"{total:,.1f} MB would be freed; nothing was removed\n")
            return 0
        apply_removals(planned)
        show(f"{total:,.1f} MB freed\n")
    return 0
