"""Train one vision transformer for many dense-prediction tasks with LoRA experts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ase_dist.baselines import baselines
from ase_dist.commands.cli import RenamedOption, command_parser, path, path_or_name, run_command
from ase_dist.config import Settings, setting_keys
from ase_dist.errors import UserError
from ase_dist.files import is_regular
from ase_dist.printable import show
from ase_dist.read_config import DEFAULT_CONFIG, load_settings, shipped_configs, to_yaml
from ase_dist.training.ds_config import own_ds_config, read_ds_config, shipped_ds_configs
from ase_dist.training.record.run_folder import RunFolder

EPILOG = """examples:
  deepspeed launch/train.py --deepspeed_config ds_configs/z2.json
  torchrun --nproc_per_node 2 launch/train.py --deepspeed_config ds_configs/z2.json output=runs/two
  python launch/train.py --config pascal_ase_16_3_1_4 data.root=PASCAL_MT model.pretrained=hub
  python launch/train.py --resume runs/two train.max_steps=400
  python launch/train.py --print-config model.moe.num_experts=32
"""


def parser() -> argparse.ArgumentParser:
    """The options; what the launchers add (--local_rank) is accepted and not needed."""
    p = command_parser("train", description=__doc__, epilog=EPILOG)
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the config's")
    p.add_argument(
        "--config",
        type=path_or_name,
        help=f"a YAML file or one of: {', '.join(shipped_configs())} (default {DEFAULT_CONFIG})",
    )
    p.add_argument("--resume", type=path, metavar="RUN", help="go on with this run, by its own settings")
    p.add_argument("--baseline", metavar="NAME", help=f"a model of the paper's comparison: {', '.join(baselines())}")
    p.add_argument("--row", dest="baseline", action=RenamedOption, const="--baseline", help=argparse.SUPPRESS)
    p.add_argument("--deepspeed", action="store_true", help="accepted for DeepSpeed's sake; it is always used")
    p.add_argument(
        "--deepspeed_config",
        type=path_or_name,
        metavar="FILE",
        help=f"DeepSpeed's JSON or one of: {', '.join(shipped_ds_configs())}; without: ZeRO 0, in bf16 1",
    )
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    p.add_argument("--print-config", action="store_true", help="print the settings that would be used, and exit")
    p.add_argument("--print-keys", action="store_true", help="print the name of every setting, and exit")
    p.add_argument("--dry-run", action="store_true", help="build, take one step, print the tables, write nothing")
    p.add_argument("--max-restarts", type=int, default=0, metavar="N", help="start again after a crash, N times")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (see ``ase_dist.errors.ExitCode``)."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_intermixed_args(words)
    return run_command(lambda: _train(arguments, words))


def _train(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    settings, ds_config = _own_settings(arguments) if arguments.resume else _given_settings(arguments)
    if arguments.print_config or arguments.print_keys:
        show("\n".join(setting_keys()) + "\n" if arguments.print_keys else to_yaml(settings))
        return 0
    if arguments.max_restarts:
        from ase_dist.training.process.restarts import supervise

        again = _without_option(words, "--max-restarts")
        return supervise(["-m", "ase_dist", "train", *again], settings, restarts=arguments.max_restarts)
    from ase_dist.training.loop import run

    work = run.dry_run if arguments.dry_run else run.run
    return work(settings, ds_config)


def _given_settings(arguments: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """The settings and DeepSpeed's JSON that the options name."""
    settings = load_settings(arguments.config or DEFAULT_CONFIG, arguments.settings, baseline=arguments.baseline)
    return settings, read_ds_config(arguments.deepspeed_config)


def _own_settings(arguments: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """Those of the run that ``--resume`` names, with the overrides of the command line."""
    run = RunFolder(arguments.resume)
    if arguments.config or arguments.baseline:
        raise UserError("--resume: the run has its own settings; leave --config and --baseline out")
    if not is_regular(run.config):
        raise UserError(f"--resume: {str(run.path)!r} is no run, there is no {run.config.name} in it")
    settings = load_settings(run.config, [f"output={run.path}", "resume=auto", *arguments.settings])
    return settings, read_ds_config(arguments.deepspeed_config) if arguments.deepspeed_config else own_ds_config(run)


def _without_option(argv: Sequence[str], option: str) -> list[str]:
    """``argv`` without ``option VALUE`` and ``option=VALUE``."""
    kept, is_value = [], False
    for argument in argv:
        if not is_value and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        is_value = argument == option
    return kept
