"""docs/results.md: its commands run, its tables and plots are those of the studies' files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from ase_dist.commands.study import main
from tests.data.conftest import PascalFolder
from tests.test_own_data import SMALL
from tests.training.test_run_nyud import write_folder

pytestmark = pytest.mark.single_gpu

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
FOUND = sorted(re.findall(r"<!-- results: (\w+) -->", PAGE))


@pytest.fixture(scope="module")
def results():
    """docs/results.py as a module."""
    spec = importlib.util.spec_from_file_location("results", DOCS / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_works(command, in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "RGBD")
    for i in range(8):
        PascalFolder(tmp_path / "CCP").add(f"{i}", split="train" if i < 6 else "val")
    words = shlex.split(command)
    assert words[:2] == ["python", "launch/study.py"]
    one = {"norm_ablation": "ase", "shared_logit_floor": "warmup_30"}.get(words[2], "ase_16_3_1_4")
    given = [*words[2:], "--seeds", "1", "--steps", "2", "--only", one, *SMALL[:5], "train.batch_size=4"]
    runs = 3 if words[2] == "transition" else 2  # the variant and its reference, and what both start from
    assert main(given) == 0 and len(in_process) == runs


def test_the_tables_are_those_of_the_studies_files(results):
    assert results.renewed(PAGE) == PAGE
    assert sorted(path.stem for path in results.FOLDER.glob("*.json")) == FOUND


def test_every_plot_is_there_and_shown():
    shown = set(re.findall(r"\(results/(\w+/\w+\.png)\)", PAGE))
    assert shown == {path.relative_to(DOCS / "results").as_posix() for path in (DOCS / "results").rglob("*.png")}


def test_a_changed_number_is_seen(results):
    changed = re.sub(r"\| 5 \|$", "| 4 |", PAGE, count=1, flags=re.M)
    assert changed != PAGE and results.renewed(changed) == PAGE
