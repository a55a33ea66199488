"""One process: every shipped DeepSpeed JSON runs, resumes bit for bit, and computes what the others compute."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from ase_dist.read_config import load_settings
from ase_dist.training.loop.components import has_random_frozen_backbone
from ase_dist.training.state.checkpoint import open_checkpoint
from tests.training.conftest import start_world
from tests.training.tiny_runs import (
    checkpoint,
    close,
    distance,
    load_and_save,
    losses,
    metric_lines,
    same_bits,
    saved_meta,
    tiny_run,
    trained,
)

pytestmark = pytest.mark.single_gpu

SHIPPED = ("z0", "z1", "z2", "z2_offload", "z2_bf16", "z3")
BF16 = {"z0_in_bf16": "z0", "z1_in_bf16": "z1", "z3_in_bf16": "z3"}
# ZeRO-3 last: DeepSpeed replaces torch's linear by its own for the rest of the process
RUNS = {**{name: name for name in SHIPPED[:-1]}, "z0_in_bf16": "z0", "z1_in_bf16": "z1",
        "z3": "z3", "z3_offload": "z3_offload", "z3_in_bf16": "z3"}  # fmt: skip
DRAWN = ("z0", "z2_bf16", "z3")  # pictures take as long as such a run
FP32 = [name for name in RUNS if "bf16" not in name]
PATHS = [
    ("z2", "z0"),
    ("z0", "z1"),
    ("z1", "z3"),
    ("z3", "z2"),
    ("z2_offload", "z0"),
    ("z0", "z3_offload"),
    ("z2_bf16", "z0"),
    ("z0", "z0_in_bf16"),
    ("z0", "z1_in_bf16"),
    ("z0", "z2_bf16"),
    ("z0", "z3_in_bf16"),
]


def options(name):
    """drop_path draws from torch's generator in every step, so that a random state not restored would show."""
    # deterministic: bit for bit is promised of accelerators with it alone
    return ["model.drop_path=0.2", "train.deterministic=true", f"train.bf16={str('bf16' in name).lower()}"]


def resume(scenes, folder, name, *, source, target):
    path = folder / source / "checkpoints" / "step_3"
    return tiny_run(scenes, folder / target, f"resume={path}", *options(name), config=RUNS[name])


def one_process(rank, folder):
    """All runs of this module, one after another; the exit codes of the first ones."""
    scenes, codes = Path((folder / "scenes").read_text()), {}
    for name, config in RUNS.items():
        drawn = f"eval.pictures={int(name in DRAWN)}"
        codes[name] = tiny_run(scenes, folder / name, *options(name), "eval.every=3", drawn, config=config)
        resume(scenes, folder, name, source=name, target=f"{name}_resumed")
        if name == "z0":
            start_again(scenes, folder / name, *options(name), "eval.every=3")
    for source, name in PATHS:
        path, target = folder / source / "checkpoints" / "step_3", folder / f"{source}_to_{name}"
        load_and_save(scenes, path, target, *options(name), config=RUNS[name])
    resume(scenes, folder, "z3", source="z1", target="z1_goes_on_as_z3")
    batches(scenes, folder)
    best_of(scenes, folder)
    return codes


def start_again(scenes, output, *more):
    """Start a run that is over; what it had left behind is kept for comparison."""
    for name in ("summary.json", "metrics.jsonl"):
        (output / f"first_{name}").write_bytes((output / name).read_bytes())
    tiny_run(scenes, output, *more)


def batches(scenes, folder):
    """The same global batch as one micro-step and as two; the routers' losses, not linear in the batch, left out."""
    exact = ("model.moe.aux_losses={}", "train.max_steps=4")
    for config in ("z0", "z2", "z3"):
        tiny_run(scenes, folder / f"{config}_one", *exact, config=config)
        two = ("train.batch_size=2", "train.gradient_accumulation_steps=2")
        tiny_run(scenes, folder / f"{config}_two", *exact, *two, config=config)


def best_of(scenes, folder):
    """Evaluations with given scores, at steps without a checkpoint of their own; the second run goes back to step 4."""
    once = ("eval.every=2", "checkpoint.every=0", "checkpoint.keep=1", "train.log_every=4")
    with mock.patch("ase_dist.training.state.history.gain", side_effect=[1.0, 3.0, 2.0]):
        tiny_run(scenes, folder / "best", *once)
    with mock.patch("ase_dist.training.state.history.gain", side_effect=[1.0, 2.0, 3.0]):
        tiny_run(scenes, folder / "went_back", *once, "checkpoint.keep=2")
    step_4 = folder / "went_back" / "checkpoints" / "step_4"
    with mock.patch("ase_dist.training.state.history.gain", side_effect=[0.5]):
        tiny_run(scenes, folder / "went_back", *once, "checkpoint.keep=2", f"resume={step_4}")


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    (folder / "scenes").write_text(str(scenes))
    codes, results = start_world(one_process, folder, seconds=400)()
    assert codes == [0]
    return folder, results[0]


# ---------------------------------------------------------------------------------------------------------------------
# Every stage


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_everything_behind(runs, name):
    folder, codes = runs
    assert codes[name] == 0
    summary = json.loads((folder / name / "summary.json").read_text())
    assert summary["exit"] == "done" and summary["step"] == 6
    tasks = ["semseg", "human_parts", "saliency", "edge", "normals"]
    assert [*summary["metrics"]] == [*summary["trivial"]] == [*summary["first_metrics"]] == tasks
    assert summary["parameters"]["all"]["trained"] > 0 and summary["images_per_second"] > 0
    assert summary["peak_memory_bytes"] > 1e6 and summary["train_seconds"] > 0
    lines = metric_lines(folder / name)
    assert [*lines] == [1, 2, 3, 4, 5, 6] and {"lr", "epoch", "expert_load", "shared_gate"} <= lines[6].keys()
    assert [*metric_lines(folder / name, "eval")] == [3, 6]
    pictures = ["predictions/step_000006.png"] if name in DRAWN else []
    for file in ("env.json", "config.yaml", "ds_config.json", "train.log", *pictures):
        assert (folder / name / file).stat().st_size > 0
    assert "auto" not in (folder / name / "ds_config.json").read_text()
    assert "the backbone keeps the random weights" in (folder / name / "train.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["model.pretrained=none"], True),
        (["model.pretrained=builtin"], False),
        (["model.pretrained=none", "model.tune=full"], False),
        (["model.pretrained=none", "model.init_from=exports/run"], False),
        (["model.backbone=resnet18", "model.pretrained=none", "model.moe.enabled=false", "model.lora_rank=0"], False),
    ],
)
def test_a_backbone_that_is_random_and_frozen_is_warned_of(overrides, warned):
    assert has_random_frozen_backbone(load_settings("scenes", overrides).model) is warned


@pytest.mark.parametrize("name", [name for name in FP32 if name != "z0"])
def test_every_stage_computes_the_same(runs, name):
    folder, _ = runs
    assert close(losses(folder / name), losses(folder / "z0"), rel=1e-5)
    assert max(distance(trained(folder / name, 6), trained(folder / "z0", 6)).values()) < 1e-5


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" in name])
def test_bf16_stays_close(runs, name):
    folder, _ = runs
    assert close(losses(folder / name), losses(folder / "z0"), rel=0.05)
    weights = trained(folder / name, 6)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert 0 < distance(weights, trained(folder / "z0", 6))["weight"] < 0.02


def test_accumulated_micro_steps_are_one_batch(runs):
    folder, _ = runs
    for config in ("z0", "z2", "z3"):
        one, two = folder / f"{config}_one", folder / f"{config}_two"
        assert close(losses(two), losses(one), rel=1e-5), config
        assert max(distance(trained(two, 4), trained(one, 4)).values()) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_and_three_are_six(runs, name):
    """Weights, moments, random states, batches, metrics; step 3 is in the middle of an epoch."""
    folder, _ = runs
    whole, resumed = folder / name, folder / f"{name}_resumed"
    assert 0 < saved_meta(whole, 3)["sampler"]["consumed"] < 10
    assert same_bits(checkpoint(whole, 6), checkpoint(resumed, 6)) == []
    lines = metric_lines(whole)
    assert metric_lines(resumed) == {step: lines[step] for step in (4, 5, 6)}
    for key in ("sampler", "engine", "schedule", "optimizer_steps"):
        assert saved_meta(whole, 6)[key] == saved_meta(resumed, 6)[key]


@pytest.mark.parametrize(("source", "name"), PATHS)
def test_another_stage_loads_every_weight_and_moment(runs, source, name):
    folder, _ = runs
    saved = trained(folder / source, 3)
    assert same_bits(saved, trained(folder / f"{source}_to_{name}", 3)) == []
    assert any(tensor.abs().max() > 0 for key, tensor in saved.items() if key.startswith("exp_avg_sq/"))


def test_another_stage_goes_on_as_the_first_would(runs):
    folder, _ = runs
    expected = {step: values for step, values in losses(folder / "z1").items() if step > 3}
    assert close(losses(folder / "z1_goes_on_as_z3"), expected, rel=1e-5)


def test_a_run_that_is_over_stays_as_it_was(runs):
    output = runs[0] / "z0"
    first, again = (json.loads((output / f"{prefix}summary.json").read_text()) for prefix in ("first_", ""))
    assert {**first, "peak_memory_bytes": 0} == {**again, "peak_memory_bytes": 0}
    first, again = ((output / f"{prefix}metrics.jsonl").read_text().splitlines() for prefix in ("first_", ""))
    assert again == first


def test_the_best_is_marked_and_kept(runs):
    folder, _ = runs
    best = (folder / "z2" / "checkpoints" / "best").read_text().strip()
    summary = json.loads((folder / "z2" / "summary.json").read_text())
    assert best == f"step_{summary['best_step']}" and best in ("step_3", "step_6")


@pytest.mark.parametrize("name", ["best", "went_back"])
def test_the_best_weights_are_kept_wherever_they_were_evaluated(runs, name):
    """In the second run step 6, which was the best, was written over by a worse one."""
    output = runs[0] / name
    assert (output / "checkpoints" / "best").read_text() == "step_4\n"
    assert sorted(path.name for path in (output / "checkpoints").glob("step_*")) == ["step_4", "step_6"]
    assert json.loads((output / "summary.json").read_text())["best_step"] == 4
    with open_checkpoint(output / "checkpoints" / "step_4") as found:
        assert found.meta["history"]["evaluated_at"] == 4
    assert [*metric_lines(output)] == [2, 4, 6], "a line wherever a checkpoint may follow"


def test_the_written_settings_give_the_same_run(runs):
    folder, _ = runs
    written = load_settings(folder / "z2" / "config.yaml")
    assert written.model_dump(mode="json") == saved_meta(folder / "z2", 3)["settings"]
