"""docs/balancing.md: its commands run, its tables are the registry's methods with their defaults, its example works."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from ase_dist.registries import BALANCINGS
from ase_dist.training.balancing.method import Seen
from ase_dist.training.record.metrics import read_metrics
from tests.test_own_data import SMALL
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu

PAGE = (Path(__file__).parents[1] / "docs" / "balancing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if not line.startswith("pip ")]
SCENES = ("data.root=scenes", "data.scenes.train_images=8", "data.scenes.val_images=2", "data.scenes.size=40")
STUDY = ("--only", "fixed,dwa", "--seeds", "1", "--steps", "2", *SMALL[:5], *SCENES, "train.batch_size=4")


def follow(rank, folder):
    """The trainings of the page in one process; the study starts its own."""
    from ase_dist.commands.main import main
    from ase_dist.training.process import runtime
    from ase_dist.training.record import plots

    runtime.stop = lambda: None  # DeepSpeed joins a process group once in a process
    plots.draw_all = lambda folder: None  # which takes longer than such a run
    os.chdir(folder)
    lines = [shlex.split(line) for line in COMMANDS]
    assert all(words[:3] == ["python", "-m", "ase_dist"] for words in lines)
    return [main([*words[3:], *((*SMALL, *SCENES) if words[3] == "train" else STUDY)]) for words in lines]


def test_every_command_of_the_page_works(tmp_path):
    codes, results = start_world(follow, tmp_path, seconds=300)()
    assert codes == [0] and results[0] == [0] * len(COMMANDS) and len(COMMANDS) == 4
    for method in ("uncertainty", "cagrad", "mgda"):
        lines = [r for r in read_metrics(tmp_path / "runs" / method / "metrics.jsonl") if r["kind"] == "train"]
        assert all(set(line["task_weights"]) == set(line["losses"]) for line in lines) and lines


def test_the_tables_name_every_method_with_its_arguments_and_their_defaults():
    tables = PAGE[: PAGE.index("## What a step costs")]
    rows = {cells[0].strip(" `"): cells for line in tables.splitlines() if (cells := line.split("|")[1:-1])}
    methods = {name: kind for name in BALANCINGS if name != "fixed" and (kind := BALANCINGS[name])}
    assert methods.keys() <= rows.keys()
    for name, kind in methods.items():
        said = {}
        for argument in re.findall(r"`(\w+: [^`]+)`", rows[name][2]):
            said |= yaml.safe_load(argument)
        assert said == {key: field.default for key, field in kind.Args.model_fields.items()}, name
        assert kind.uses_gramian == (PAGE.index(f"| `{name}`") > PAGE.index("## From gradients"))


def test_the_example_of_a_method_works():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    try:
        exec(code, {})
        kind = BALANCINGS["inverse"]
        method = kind(2, args=kind.Args(), lr=0.1, device=torch.device("cpu"))
        seen = Seen(torch.tensor([0.5, 0.0]), torch.tensor([True, False]), None, 0)
        assert method.weights(seen).tolist() == [pytest.approx(2.0), 0.0]
    finally:
        BALANCINGS.pop("inverse", None)
