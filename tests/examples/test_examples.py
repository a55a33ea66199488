"""Every example does what it says: losses fall, outputs are unchanged at first, what is added is trained and scored."""

import importlib
import math
from pathlib import Path

import pytest

from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu

FOLDER = Path(__file__).parents[2] / "ase_dist" / "examples"
PAGES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "small"))
LINES = 60


def load(name):
    return importlib.import_module(f"ase_dist.examples.{name}")


def elsewhere(rank, folder):
    """``main`` of the example that the folder is named after, in a process of its own; what it returns."""
    return load(folder.name).main()


def run_elsewhere(name, tmp_path):
    codes, results = start_world(elsewhere, tmp_path / name, seconds=300)()
    assert codes == [0]
    return results[0]


def differ(row, other):
    return sum(abs(a - b) for a, b in zip(row, other, strict=True)) / 2  # of two distributions, 0 to 1


@pytest.mark.parametrize("name", PAGES)
def test_it_is_short_and_runs_as_a_module_and_changes_nothing_when_imported(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert text.count("\n") < LINES
    assert text.endswith('\n\nif __name__ == "__main__":\n    main()\n')
    top = [line for line in text.splitlines() if line and not line[0].isspace()]
    assert not [line for line in top if line.startswith(("HEADS[", "GATINGS[", "DATA_SETS["))]


def test_the_plain_loop_learns_both_tasks_with_gates_of_their_own(capsys):
    losses, gates = load("plain_loop").main()
    assert losses[-1] < losses[0] / 5
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in gates) and differ(*gates) > 0.1
    assert "task 1: mean gates" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["timm_ffn", "hf_ffn", "llama_ffn"])
def test_a_model_with_experts_computes_what_it_did_and_then_learns(name):
    pytest.importorskip("timm" if name == "timm_ffn" else "transformers")
    found = load(name).main()
    assert found["change"] < 1e-5
    assert found["last"] < 0.8 * found["first"]


def test_the_language_model_learns_both_tasks_and_routes_them_apart():
    losses, gates = load("language_model").main()
    assert all(by_step[0] > 1.5 and by_step[-1] < 0.1 for by_step in losses.values())
    assert differ(*gates) > 0.3


def test_the_deepspeed_loop_learns(tmp_path):
    losses = run_elsewhere("deepspeed_loop", tmp_path)
    assert losses[-1] < losses[0] / 5


ADDED = {
    "adding_a_head": {"semseg": "miou", "normals": "mean"},
    "adding_a_gating_mode": {"semseg": "miou", "edge": "bce"},
    "adding_a_task": {"light": "miou", "semseg": "miou"},
    "adding_a_data_set": {"shapes": "miou", "depth": "rmse"},
}


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_is_trained_two_steps_and_scored(name, tmp_path):
    summary = run_elsewhere(name, tmp_path)
    assert summary["exit"] == "done" and summary["step"] == 2
    for task, metric in ADDED[name].items():
        assert math.isfinite(summary["metrics"][task][metric])


def test_every_page_on_adding_is_tried():
    assert set(ADDED) == {name for name in PAGES if name.startswith("adding_")}
