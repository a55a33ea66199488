"""docs/heads.md: its commands train, its table names every head, its example is a head."""

import io
import os
import re
import shlex
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from ase_dist.models import build_model
from ase_dist.read_config import load_settings
from ase_dist.registries import HEADS
from ase_dist.tasks import select_tasks
from tests.test_own_data import SMALL
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu

PAGE = (Path(__file__).parents[1] / "docs" / "heads.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
SHORT = [option for option in SMALL if not option.startswith(("model.head", "model.backbone_args"))]
SCENES = ("data.root=scenes", "data.scenes.train_images=8", "data.scenes.val_images=2", "data.scenes.size=40",
          "model.backbone_args={embed_dim: 24, depth: 8, num_heads: 2}", "tasks=[semseg, edge]")  # fmt: skip


def follow(rank, folder):
    """The trainings of the page in one process."""
    from ase_dist.commands.main import main
    from ase_dist.training.process import runtime
    from ase_dist.training.record import plots

    runtime.stop = lambda: None  # DeepSpeed joins a process group once in a process
    plots.draw_all = lambda folder: None  # which takes longer than such a run
    os.chdir(folder)
    lines = [shlex.split(line) for line in COMMANDS]
    assert all(words[:4] == ["python", "-m", "ase_dist", "train"] for words in lines)
    codes = [main([*words[3:], *SHORT, *SCENES]) for words in lines]
    with redirect_stderr(io.StringIO()) as said:  # resumed with other levels
        codes.append(main([*lines[-1][3:], *SHORT, *SCENES, "model.levels=[2, 6, 8]", "train.max_steps=3"]))
    return codes, said.getvalue()


def test_every_command_of_the_page_works_and_other_levels_are_refused(tmp_path):
    world = start_world(follow, tmp_path, seconds=300)()
    codes, said = world.results[0]
    assert world.codes == [0] and codes == [0, 0, 2]
    assert "model.levels" in said


def test_the_tables_name_every_head():
    first, second = (re.findall(r"^\| `(\w+)` \|", part, re.M) for part in PAGE.split("## What they cost"))
    assert first == second == list(HEADS)


def test_the_example_is_a_head(monkeypatch):
    monkeypatch.setitem(HEADS, "mean", None)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(compile(code, "heads.md", "exec"), {"__name__": "heads"})
    settings = load_settings(None, [*SHORT, *SCENES, "model.head=mean", "model.head_args={bias: false}"])
    model = build_model(settings, select_tasks("scenes", settings.tasks), expert_layer="plain")
    assert model.levels == (4, 8) and model.heads["edge"].linear.bias is None
