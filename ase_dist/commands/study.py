"""Run a study of the paper's questions: baselines and settings compared over seeds, as a table and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, path_or_name, run_command
from ase_dist.printable import log_messages
from ase_dist.study.presets import PRESETS
from ase_dist.study.variants import STUDIES

EPILOG = """examples:
  python launch/study.py table1 --data scenes --seeds 3
  python launch/study.py naive_vs_ase --data ccp data.root=ccp_mt model.pretrained=dinov2_vits14.safetensors
  python launch/study.py topk --data pascal --jobs 8 --devices 0,1,2,3,4,5,6,7 data.root=PASCAL_MT

exit codes: 0 all runs are done, 1 some failed, 2 not usable, 75 stopped by a signal; the same command goes on
"""


def parser() -> argparse.ArgumentParser:
    """The options; settings may follow them."""
    p = command_parser("study", description=__doc__, epilog=EPILOG)
    p.add_argument("name", metavar="NAME", help=f"one of: {', '.join(STUDIES)}")
    p.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings of every run; a baseline keeps what it needs, and its factor of train.lr",
    )
    p.add_argument(
        "--data",
        type=path_or_name,
        default="scenes",
        help=f"one of: {', '.join(PRESETS)} (default %(default)s), a folder with a dataset.yaml, or your own config",
    )
    p.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1 (default %(default)s)")
    p.add_argument("--out", type=path, metavar="DIR", help="the study's folder (default studies/NAME_DATA)")
    p.add_argument("--steps", type=int, metavar="N", help="optimiser steps of a run (default: the data's)")
    p.add_argument(
        "--only", default="", metavar="VARIANT,...", help="these variants, and what they are measured against"
    )
    p.add_argument("--jobs", type=int, metavar="J", help="runs at once (default: one for each of --devices, or one)")
    p.add_argument("--devices", default="", metavar="ID,...", help="GPUs that the runs are spread over")
    p.add_argument("--keep-checkpoints", action="store_true", help="keep those of finished runs")
    p.add_argument("--tables-only", action="store_true", help="train nothing, show what is done")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    log_messages(sys.stdout)

    def study() -> int:
        from ase_dist.study.run import run_study
        from ase_dist.study.runner import Slots

        devices = tuple(_names(arguments.devices))
        return run_study(
            arguments.name,
            data=arguments.data,
            seeds=arguments.seeds,
            out=arguments.out,
            steps=arguments.steps,
            only=_names(arguments.only),
            slots=Slots(len(devices) or 1 if arguments.jobs is None else arguments.jobs, devices),
            keep_checkpoints=arguments.keep_checkpoints,
            train=not arguments.tables_only,
            overrides=arguments.settings,
        )

    return run_command(study)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
