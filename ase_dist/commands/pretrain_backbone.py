"""Make the small backbone that ships with the package: train it on scenes, keep the backbone in fp16.

After an interruption the same command continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ase_dist.commands.cli import command_parser, path, path_or_name, run_command

CONFIG = "scenes_pretrain"
EPILOG = """examples:
  python launch/pretrain_backbone.py
  python launch/pretrain_backbone.py --out backbone.safetensors train.max_steps=400 output=runs/backbone
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("pretrain_backbone", description=__doc__, epilog=EPILOG)
    p.add_argument("--out", type=path, help="the .safetensors file (default: the package's own)")
    p.add_argument("--deepspeed_config", type=path_or_name, metavar="FILE", help="as for train")
    p.add_argument("settings", nargs="*", metavar="key=value", help=f"settings that override {CONFIG}'s")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then write the weights and a JSON card next to them; the exit code of the training."""
    arguments = parser().parse_args(argv)
    from ase_dist.commands.train import main as train
    from ase_dist.overwriting import contains, refuse_foreign

    def check_out() -> int:
        if arguments.out is not None:
            card = arguments.out.with_suffix(".json")
            is_card = contains(b"launch/pretrain_backbone.py")
            refuse_foreign([arguments.out, card], is_own=lambda _: card.is_file() and is_card(card), option="--out")
        return 0

    options = ["--deepspeed_config", arguments.deepspeed_config] if arguments.deepspeed_config else []
    return (
        run_command(check_out)
        or train(["--config", CONFIG, *options, *arguments.settings])
        or run_command(lambda: _keep(arguments.settings, arguments.out))
    )


def _keep(overrides: Sequence[str], out: Path | None) -> int:
    """Write the backbone of the finished run, and the card that says how it was trained."""
    from ase_dist.files import write_atomic
    from ase_dist.models.pretrained import FOLDER, save_backbone
    from ase_dist.read_config import load_settings
    from ase_dist.training.record.environment import harmless_settings
    from ase_dist.training.record.run_folder import RunFolder
    from ase_dist.training.state.checkpoint import open_checkpoint

    settings = load_settings(CONFIG, overrides)
    run = RunFolder(settings.output)
    summary = run.read_summary()
    out = out or FOLDER / f"{settings.model.backbone}.safetensors"
    with open_checkpoint(run.checkpoints / f"step_{summary['step']}") as checkpoint:
        prefix = "weight/"
        weights = {name.removeprefix(prefix): name for name in checkpoint.names() if name.startswith(prefix)}
        save_backbone(
            {name: checkpoint.tensor(source) for name, source in weights.items()}, out, size=settings.data.size
        )
    card = {
        "command": " ".join(["python launch/pretrain_backbone.py", *harmless_settings(overrides)]),
        "data": f"{settings.data.scenes.train_images} generated scenes, seed {settings.data.scenes.seed}",
        "steps": summary["step"],
        "metrics": {
            task.name: {task.metric: summary["metrics"][task.name][task.metric]} for task in settings.chosen_tasks()
        },
        "license": "Apache-2.0, like the package; trained on generated images only",
    }
    write_atomic(out.with_suffix(".json"), json.dumps(card, indent=2) + "\n")
    return 0
