"""Export the model of a run for inference: model.safetensors and export.json, read by ``ase_dist.load(OUT)``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ase_dist.commands.cli import USAGE, command_parser


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("export", description=__doc__)
    p.add_argument("run", type=Path, help="the output folder of a run")
    p.add_argument("out", type=Path, help="the folder to make")
    p.add_argument("--checkpoint", default="newest", metavar="WHICH", help="newest (default), best or a path")
    p.add_argument("--dtype", default="fp32", help="fp32 (default), fp16 or bf16: how weights are stored")
    p.add_argument("--check", action="store_true", help="evaluate the export and compare with the run's metrics")
    p.add_argument("--device", help="where to check: cpu, cuda (default: a GPU where there is one)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 where the check finds other metrics, 2 for what cannot be exported."""
    arguments = parser().parse_args(argv)
    from ase_dist.training.export import check_export, export_run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        out = export_run(arguments.run, arguments.out, checkpoint=arguments.checkpoint, dtype=arguments.dtype)
        odd = check_export(arguments.run, out, device=arguments.device) if arguments.check else []
    except ValueError as error:
        logging.error("error: %s", error)
        return USAGE
    if odd:
        logging.error("error: %s does not score what the run found: %s", out, "; ".join(odd))
        return 1
    if arguments.check:
        logging.info("%s scores what the run found", out)
    return 0
