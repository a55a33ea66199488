"""Plan a run without starting it: memory, bytes on the wire and step time per rank for any world."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, path_or_name, run_command
from ase_dist.errors import UserError
from ase_dist.printable import show
from ase_dist.read_config import DEFAULT_CONFIG, load_settings, shipped_configs

EPILOG = """examples:
  python launch/plan.py --config pascal_ase_16_3_1_4 --world 64 --ep 1,8 --zero 0,2
  python launch/plan.py --world 4096 --ep 8 --plot crossover.png --json plan.json train.batch_size=4
"""


def parser() -> argparse.ArgumentParser:
    """The options; lists are comma-separated, so that settings may follow them."""
    p = command_parser("plan", description=__doc__, epilog=EPILOG)
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the config's")
    p.add_argument(
        "--config",
        type=path_or_name,
        default=DEFAULT_CONFIG,
        help=f"a YAML file or one of: {', '.join(shipped_configs())}",
    )
    p.add_argument("--world", type=int, default=8, metavar="W", help="ranks (default %(default)s)")
    p.add_argument(
        "--ep",
        metavar="P,...",
        help="expert-parallel sizes (default: the config's; where that is 1, "
        "those of 1, 2, 4, 8 that divide the world)",
    )
    p.add_argument("--zero", default="0,1,2", metavar="STAGE,...", help="ZeRO stages (default %(default)s)")
    p.add_argument(
        "--bandwidth",
        type=float,
        default=25.0,
        metavar="GB/s",
        help="what a rank sends (default %(default)s: one 200 Gbit/s adapter each)",
    )
    p.add_argument(
        "--flops",
        type=float,
        default=100.0,
        metavar="TFLOP/s",
        help="what a rank sustains (default %(default)s: a third of an A100's bf16)",
    )
    p.add_argument("--json", type=path, metavar="FILE", help="write every number here")
    p.add_argument("--plot", type=path, metavar="FILE", help="draw bytes against tokens per rank, the crossover marked")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong."""
    arguments = parser().parse_intermixed_args(argv)
    return run_command(lambda: _plan(arguments))


def _plan(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments.config, arguments.settings)
    stages = _numbers("--zero", arguments.zero)
    ep_sizes = None if arguments.ep is None else _numbers("--ep", arguments.ep)
    from ase_dist.files import write_atomic
    from ase_dist.overwriting import contains, is_own_png, refuse_foreign
    from ase_dist.planning import plan as planning
    from ase_dist.planning import plan_report

    for option, file, is_own in (
        ("--plot", arguments.plot, is_own_png),
        ("--json", arguments.json, contains(plan_report.ASSUMPTIONS[:40].encode())),
    ):
        refuse_foreign([] if file is None else [file], is_own=is_own, option=option)
    world, bandwidth, flops = arguments.world, arguments.bandwidth * 1e9, arguments.flops * 1e12
    ep_sizes = ep_sizes or planning.default_ep_sizes(settings, world=world, stages=stages)
    sizes, plans = planning.make_plans(
        settings, world=world, ep_sizes=ep_sizes, stages=stages, bandwidth=bandwidth, flops=flops
    )
    tokens = settings.train.batch_size * sizes.tokens_per_image
    show(plan_report.report(sizes, plans, tokens=tokens, bandwidth=bandwidth, flops=flops) + "\n")
    if arguments.plot is not None:
        write_atomic(arguments.plot, plan_report.draw_crossover(sizes, ep_sizes=ep_sizes, tokens=tokens))
    if arguments.json is not None:
        given = {
            "config": arguments.config,
            "overrides": arguments.settings,
            "tokens_per_rank": tokens,
            "bandwidth_bytes_per_second": bandwidth,
            "flops_per_second": flops,
        }
        write_atomic(arguments.json, json.dumps(plan_report.as_json(sizes, plans, **given), indent=2) + "\n")
    return 0


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: got {text!r}, wanted whole numbers separated by commas, such as 1,2") from None
