"""Export the model of a run for inference: model.safetensors and export.json, read by ``ase_dist.load(OUT)``.

With --format also programs that run without this package: images in, logits by task out, see docs/export.md.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, path_or_name, refuse, run_command
from ase_dist.errors import ExitCode, UserError
from ase_dist.printable import log_messages


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("export", description=__doc__)
    p.add_argument("run", type=path, help="the output folder of a run; or an export, to make programs of it")
    p.add_argument("out", type=path, help="the folder to make")
    p.add_argument(
        "--checkpoint",
        type=path_or_name,
        default="newest",
        metavar="WHICH",
        help="newest (default), best, step_N or a path",
    )
    p.add_argument("--dtype", default="fp32", help="fp32 (default), fp16 or bf16: how weights are stored")
    p.add_argument("--format", metavar="A,B", help="also write programs: pt2 (torch.export), onnx (ase-dist[onnx])")
    p.add_argument("--tasks", metavar="A,B", help="what the programs predict (default: all tasks)")
    p.add_argument("--check", action="store_true", help="evaluate the export and compare with the run's metrics")
    p.add_argument("--device", help="where to check: cpu, cuda (default: a GPU where there is one)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 where the check finds other metrics, 2 for what cannot be exported."""
    arguments = parser().parse_args(argv)
    log_messages()
    return run_command(lambda: _export(arguments))


def _export(arguments: argparse.Namespace) -> int:
    from ase_dist.deployment.export import check_export, export_run
    from ase_dist.deployment.exported import load
    from ase_dist.deployment.programs import check_formats, deploy
    from ase_dist.deployment.trained_model import is_export

    formats, tasks = _words(arguments.format), _words(arguments.tasks)
    check_formats(formats or ())
    if tasks and not formats:
        raise UserError("--tasks: an export holds all tasks of the model; add --format for programs of some")
    if is_export(arguments.run):
        if not formats or arguments.check:
            raise UserError(f"{str(arguments.run)!r} is an export already; give --format, and no --check")
        source, odd = arguments.run, []
    else:
        source = export_run(arguments.run, arguments.out, checkpoint=arguments.checkpoint, dtype=arguments.dtype)
        odd = check_export(arguments.run, source, device=arguments.device) if arguments.check else []
    if formats and not odd:
        deploy(load(source), arguments.out, formats=formats, tasks=tasks)
    if odd:
        found = f"{arguments.out} does not score what the run found: {'; '.join(odd)}"
        return refuse(found, code=ExitCode.FAILED)
    if arguments.check:
        logging.info("%s scores what the run found", arguments.out)
    return 0


def _words(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")
