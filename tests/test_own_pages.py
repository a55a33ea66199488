"""docs/runs.md and docs/own_model.md followed to the letter, in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_own_data import SMALL
from tests.training.conftest import start_world

ROOT = Path(__file__).parents[1]
RUNS, MODEL = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("runs.md", "own_model.md"))
SHORT = [option for option in SMALL if not option.startswith("train.max_steps")]
IMAGES = ["data.scenes.train_images=8", "data.scenes.val_images=4", "data.scenes.size=32"]


def lines_of(page):
    return [line for block in re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]


def follow(rank, folder):
    """Every command of runs.md in its order on a tiny model, the launcher's left out: one process joins one world."""
    from ase_dist.commands.main import main
    from ase_dist.training.process import runtime
    from ase_dist.training.record import plots

    runtime.stop = lambda: None  # DeepSpeed joins a process group once in a process
    plots.draw_all = lambda folder: None  # which takes longer than such a run
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    codes = {}
    for line in lines_of(RUNS):
        program, *words = shlex.split(line)
        if program == "torchrun":
            continue
        assert program == "ase-dist"
        words = [re.sub(r"^train.max_steps=200$", "train.max_steps=3", word) for word in words]
        if words[0] == "train" and "--resume" not in words:
            words += [*SHORT, *IMAGES, "train.max_steps=2"]
        codes[line] = main(words)
    return codes


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    codes, results = start_world(follow, folder, seconds=400)()
    assert codes == [0]
    return folder, results[0]


@pytest.mark.single_gpu
def test_every_command_on_runs_works(followed):
    folder, codes = followed
    assert len(codes) >= 9 and set(codes.values()) == {0}
    log = (folder / "runs/first/train.log").read_text()
    assert "changed since step 2: train.max_steps 2 -> 3, train.lr " in log
    assert json.loads((folder / "runs/first/summary.json").read_text())["step"] == 3
    page = (folder / "compared.html").read_text()
    for words in ("2 runs compared", "model.moe.enabled", "train.lr"):
        assert words in page
    assert (folder / "runs/lora/report.html").exists() is False  # the page reports on the first alone


@pytest.mark.single_gpu
def test_what_clean_leaves_can_be_evaluated(followed):
    folder, _ = followed
    kept = [path.name for path in (folder / "runs/first/checkpoints").iterdir() if path.is_dir()]
    assert len(kept) == 1
    assert json.loads((folder / "runs/first/evaluation/metrics.json").read_text())["results"].keys() >= {"semseg"}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("number", [0, 1], ids=["plain", "on ranks"])
def test_every_program_of_own_model_runs(number, tmp_path):
    """The program under its name and the page's command; of those of several launchers, torchrun's on a free port."""
    program = re.findall(r"^```python\n(.*?)^```$", MODEL, re.M | re.S)[number]
    name = ("with_experts.py", "on_ranks.py")[number]
    (tmp_path / name).write_text(program, encoding="utf-8")
    command = {0: [sys.executable, name], 1: [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                              "--nproc_per_node", "2", name]}[number]  # fmt: skip
    assert any(line.split()[-1] == name for line in lines_of(MODEL))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert len([*tmp_path.glob("*.safetensors")]) == 1
    if number == 0:
        assert "difference after saving and loading: 0\n" in done.stdout
