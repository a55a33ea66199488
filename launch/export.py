"""Export the model of a run for inference: model.safetensors and export.json, read by ``ase_dist.load(OUT)``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the output folder of a run")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--checkpoint", default="newest", metavar="WHICH", help="newest (default), best or a path")
    parser.add_argument("--dtype", default="fp32", help="fp32 (default), fp16 or bf16: how weights are stored")
    parser.add_argument("--check", action="store_true", help="evaluate the export and compare with the run's metrics")
    parser.add_argument("--device", help="where to check: cpu, cuda (default: a GPU where there is one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; exit code 0, 1 where the check finds other metrics, 2 for what cannot be exported."""
    args = parse(arguments)
    from ase_dist.training.export import check_export, export_run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        out = export_run(args.run, args.out, checkpoint=args.checkpoint, dtype=args.dtype)
        odd = check_export(args.run, out, device=args.device) if args.check else []
    except ValueError as error:
        logging.error("error: %s", error)
        return 2
    if odd:
        logging.error("error: %s does not score what the run found: %s", out, "; ".join(odd))
        return 1
    if args.check:
        logging.info("%s scores what the run found", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
