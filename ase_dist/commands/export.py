"""Export the model of a run for inference: model.safetensors and export.json, read by ``ase_dist.load(OUT)``.

With --format also programs that run without this package: images in, logits by task out, see docs/export.md. With
--card a model card, with --push all of it on the Hugging Face hub, see docs/hub.md.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ase_dist.commands.cli import command_parser, path, path_or_name, refuse, run_command
from ase_dist.errors import ExitCode, UserError
from ase_dist.printable import log_messages


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("export", description=__doc__)
    p.add_argument("run", type=path, help="the output folder of a run; or an export, to make more of it")
    p.add_argument("out", type=path, nargs="?", help="the folder to make; of an export by default its own")
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
    p.add_argument("--card", action="store_true", help="also write README.md, a model card with the hub's metadata")
    p.add_argument("--license", default="unknown", metavar="ID", help="for the card, the hub's word (default: unknown)")
    p.add_argument(
        "--base-model", metavar="OWNER/NAME", help="for the card (default: as the run's model.pretrained says)"
    )
    p.add_argument("--push", metavar="OWNER/NAME", help="upload the export with its card to this repository on the hub")
    p.add_argument("--private", action="store_true", help="with --push: make the repository a private one")
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
    from ase_dist.deployment.publish import FILE, base_model_of, push, write_model_card
    from ase_dist.deployment.trained_model import is_export, read_run
    from ase_dist.hub import check_upload
    from ase_dist.models.export_file import open_export

    formats, tasks = _words(arguments.format), _words(arguments.tasks)
    run, out, base = arguments.run, arguments.out, arguments.base_model
    check_formats(formats or ())
    if tasks and not formats:
        raise UserError("--tasks: an export holds all tasks of the model; add --format for programs of some")
    if arguments.push:
        check_upload(arguments.push)
    elif arguments.private:
        raise UserError("--private: it is said of the repository of --push; name one")
    publishes, odd = arguments.card or arguments.push, []
    if is_export(run):
        out = _folder_of_export(arguments)
    elif out is None:
        raise UserError(f"{str(run)!r} is no export, so wanted the folder to make too: RUN OUT")
    else:
        export_run(run, out, checkpoint=arguments.checkpoint, dtype=arguments.dtype)
        base = base or base_model_of(read_run(run).model)
        odd = check_export(run, out, device=arguments.device) if arguments.check else []
    if odd:
        return refuse(f"{out} does not score what the run found: {'; '.join(odd)}", code=ExitCode.FAILED)
    if arguments.check:
        logging.info("%s scores what the run found", out)
    if formats:
        deploy(load(run if is_export(run) else out), out, formats=formats, tasks=tasks)
    if publishes:
        export = open_export(out)
        if arguments.card or not (out / FILE).exists():
            card = write_model_card(export, repository=arguments.push, license_=arguments.license, base_model=base)
            logging.info("wrote %s", card)
        if arguments.push:
            logging.info("uploaded %s to %s", out, push(export, arguments.push, private=arguments.private))
    return 0


def _folder_of_export(arguments: argparse.Namespace) -> Path:
    """Where what is made of an export goes: into its own folder, programs also into another."""
    from ase_dist.hub import Place, is_hub

    export, publishes = arguments.run, arguments.card or arguments.push
    out: Path = arguments.out or export
    if not (arguments.format or publishes) or arguments.check:
        raise UserError(f"{str(export)!r} is an export already; give --format, --card or --push, and no --check")
    if is_hub(out):
        raise UserError(f"{Place.read(export)} is on the hub; name the folder for the programs too")
    if publishes and out.resolve() != export.resolve():
        raise UserError("--card, --push: of an export they are for its own folder; name that alone")
    return out


def _words(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")
