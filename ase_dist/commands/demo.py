"""Open a local page for an export: drop a picture, see every task's prediction and the experts that it used."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from ase_dist.commands.cli import command_parser, path, run_command
from ase_dist.printable import log_messages

EPILOG = """examples:
  python launch/demo.py exports/scenes
  python launch/demo.py exports/scenes --port 7860 --device cuda

It needs the extra demo (pip install 'ase-dist[demo]'), listens on this machine alone, and sends nothing anywhere.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("demo", description=__doc__, epilog=EPILOG)
    p.add_argument("export", type=path, metavar="EXPORT", help="a folder that the command export has written")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    p.add_argument("--port", type=int, default=0, metavar="N", help="default: one that is free")
    p.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="listen on another address, such as 0.0.0.0: all who can reach it can use the page (default %(default)s)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0 after Ctrl-C, or 2 after one sentence about what is wrong."""
    arguments = parser().parse_args(argv)
    log_messages(sys.stdout)

    def show() -> int:
        from ase_dist.deployment.demo import import_gradio, serve
        from ase_dist.deployment.predictor import load
        from ase_dist.training.process.device import find_device

        import_gradio()  # before a model is loaded for nothing
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the pictures are deleted
        model = load(arguments.export, device=find_device(arguments.device))
        serve(
            model,
            title=arguments.export.absolute().name,
            host=arguments.host,
            port=arguments.port,
            ready=lambda address: logging.info("%s shows %s; Ctrl-C ends it", address, arguments.export),
        )
        return 0

    return run_command(show)
