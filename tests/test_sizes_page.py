"""docs/sizes.md followed to the letter: its commands, one after another, in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
SHORT = ("train.max_steps=2", "train.log_every=1", "eval.at_start=false", "eval.pictures=0", "model.head_width=8",
         "monitor.tensorboard=false", "train.threads=1")  # fmt: skip

pytestmark = [pytest.mark.single_gpu, pytest.mark.nightly]  # six commands, each with its imports


def test_the_commands_of_the_page_run_in_their_order(tmp_path):
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "ase_dist"]
        words += (
            SHORT if words[3] == "train" else ["--world", "2", "model.backbone_args={depth: 1}"] * (words[3] == "plan")
        )
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    card = json.loads((tmp_path / "exports/wide/export.json").read_text())
    assert card["image"]["size"] == [96, 128] and (tmp_path / "exports/wide/model.pt2").is_file()
