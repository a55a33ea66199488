"""Make the small backbone that ships with the package: train it on one task over scenes, keep the backbone in fp16.

Run again after an interruption it goes on from the newest checkpoint. Anything after -- overrides settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

CONFIG = "scenes_pretrain"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the .safetensors file (default: the package's own)")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed's JSON; without one: ZeRO 0")
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"settings that override {CONFIG}'s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, then write the weights and a JSON card beside them; the exit code of the training."""
    args = parse(arguments)
    from ase_dist.command import main as train
    from ase_dist.config import load_settings
    from ase_dist.files import write_atomic
    from ase_dist.models.pretrained import FOLDER, save_backbone
    from ase_dist.training.checkpoint import open_checkpoint

    options = ["--deepspeed_config", args.deepspeed_config] if args.deepspeed_config else []
    code = train(["--config", CONFIG, *options, *args.settings])
    if code:
        return code
    settings = load_settings(CONFIG, args.settings)
    summary = json.loads((settings.output / "summary.json").read_text())
    out = args.out or FOLDER / f"{settings.model.backbone}.safetensors"
    with open_checkpoint(settings.output / "checkpoints" / f"step_{summary['step']}") as checkpoint:
        prefix = "weight/"
        weights = {name.removeprefix(prefix): name for name in checkpoint.names() if name.startswith(prefix)}
        save_backbone({name: checkpoint.tensor(source) for name, source in weights.items()}, out)
    card = {
        "command": f"python launch/pretrain_backbone.py {' '.join(args.settings)}".strip(),
        "data": f"{settings.data.train_images} generated scenes, seed {settings.data.scene_seed}",
        "steps": summary["step"],
        "semseg": {key: summary["metrics"]["semseg"][key] for key in ("miou", "accuracy")},
        "license": "Apache-2.0, like the package; trained on generated images only",
    }
    write_atomic(out.with_suffix(".json"), json.dumps(card, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
