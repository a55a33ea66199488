"""Two processes compute what one computes, and what they save one resumes, at any stage, experts sharded or not."""

import json
from pathlib import Path

import pytest

from tests.training.conftest import start_world
from tests.training.tiny_runs import (
    checkpoint,
    close,
    distance,
    load_and_save,
    losses,
    metric_lines,
    need_the_bits_of_then,
    same_bits,
    saved_meta,
    tiny_run,
    trained,
)

pytestmark = pytest.mark.multi_gpu

HALF, QUARTER = "train.batch_size=2", "train.batch_size=1"
REPEATABLE = "train.deterministic=true"  # bit for bit is promised of accelerators with it alone
DENSE = ("z0", "z1", "z2", "z3")  # ZeRO-3 last: DeepSpeed replaces torch's linear for the rest of the process
SHARDED = {"z2_gather": ("z2", "gather"), "z2_all_to_all": ("z2", "all_to_all"), "z0_gather": ("z0", "gather")}
# saved by two processes there, loaded by one here
PATHS = [(source, stage) for source in ("z2", "z2_gather") for stage in ("z0", "z1", "z3")]


# name: what was saved by one or two, the stage and the expert-parallel size of the four that load it
TO_FOUR = {
    "two_to_four_ep_4": ("z2_gather", "z2", 4),
    "two_to_four_ep_2": ("z2_all_to_all", "z0", 2),
    "two_to_four_ep_1": ("z2_gather", "z1", 1),
    "one_to_four_ep_4": ("one", "z1", 4),
}

# many groups of about the same size
DEEP = ("model.backbone_args={embed_dim: 24, depth: 6, num_heads: 2}", "tasks=[edge, normals]")


def sharded(dispatch):
    return ("model.moe.ep_size=2", f"model.moe.dispatch={dispatch}")


def from_step_3(folder, name):
    return f"resume={folder / name / 'checkpoints' / 'step_3'}"


def two(rank, folder):
    """Every run, whole and resumed."""
    scenes = Path((folder / "scenes").read_text())
    runs = {name: (stage, sharded(dispatch)) for name, (stage, dispatch) in SHARDED.items()}
    runs |= {name: (name, ()) for name in DENSE}
    for name, (stage, more) in runs.items():
        options = (HALF, REPEATABLE, *more)
        tiny_run(scenes, folder / name, *options, config=stage)
        tiny_run(scenes, folder / f"{name}_resumed", *options, from_step_3(folder, name), config=stage)
    tiny_run(scenes, folder / "deep", HALF, *DEEP, *sharded("gather"), config="z2")
    path = folder / "deep" / "checkpoints" / "step_3"
    cases = {"z2_gather": ("z2", sharded("gather")), "z0": ("z0", ()), "z3": ("z3", ())}
    return {name: load_and_save(scenes, path, folder / f"deep_{name}", HALF, *DEEP, *more, config=stage)
            for name, (stage, more) in cases.items()}  # fmt: skip


def one(rank, folder):
    """The same global batches in one process, and what it makes of the other world's checkpoints."""
    scenes = Path((folder / "scenes").read_text())
    tiny_run(scenes, folder / "one", config="z0")
    for source, stage in PATHS:
        path = folder / source / "checkpoints" / "step_3"
        load_and_save(scenes, path, folder / f"{source}_to_{stage}", config=stage)
        tiny_run(scenes, folder / f"{source}_on_{stage}", from_step_3(folder, source), config=stage)


def four(rank, folder):
    """What one and two processes have saved, in four: each expert on a rank of its own, in pairs, and everywhere."""
    scenes = Path((folder / "scenes").read_text())
    for name, (source, stage, ep_size) in TO_FOUR.items():
        options = (QUARTER, f"model.moe.ep_size={ep_size}")
        load_and_save(scenes, folder / source / "checkpoints" / "step_3", folder / name, *options, config=stage)
        tiny_run(scenes, folder / f"{name}_on", *options, from_step_3(folder, source), config=stage)


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "scenes").write_text(str(scenes))
    for worker, size in ((two, 2), (one, 1), (four, 4)):
        (folder / "rendezvous").unlink(missing_ok=True)
        ended = start_world(worker, folder, size=size, seconds=300)()
        assert ended.codes == [0] * size
        (folder / f"{worker.__name__}.json").write_text(json.dumps(ended.results))
    return folder


@pytest.mark.parametrize("name", [*DENSE, *SHARDED])
def test_two_ranks_are_one(folder, name):
    assert close(losses(folder / name), losses(folder / "one"), rel=1e-5)
    assert max(distance(trained(folder / name, 6), trained(folder / "one", 6)).values()) < 1e-5


@pytest.mark.parametrize("name", [*DENSE, *SHARDED])
def test_three_steps_and_three_are_six(folder, name):
    whole, resumed = folder / name, folder / f"{name}_resumed"
    assert same_bits(checkpoint(whole, 6), checkpoint(resumed, 6)) == []
    lines = metric_lines(whole)
    assert metric_lines(resumed) == {step: lines[step] for step in (4, 5, 6)}
    for key in ("sampler", "engine", "schedule", "optimizer_steps"):
        assert saved_meta(whole, 6)[key] == saved_meta(resumed, 6)[key]


@pytest.mark.parametrize(("source", "stage"), PATHS)
def test_one_process_resumes_what_two_have_saved(folder, source, stage):
    saved = trained(folder / source, 3)
    assert same_bits(saved, trained(folder / f"{source}_to_{stage}", 3)) == []
    expected = {step: values for step, values in losses(folder / source).items() if step > 3}
    assert close(losses(folder / f"{source}_on_{stage}"), expected, rel=1e-5)
    assert max(distance(trained(folder / f"{source}_on_{stage}", 6), trained(folder / source, 6)).values()) < 1e-5


@pytest.mark.parametrize("name", TO_FOUR)
def test_four_processes_resume_what_fewer_have_saved(folder, name):
    source = TO_FOUR[name][0]
    assert same_bits(trained(folder / source, 3), trained(folder / name, 3)) == []
    expected = {step: values for step, values in losses(folder / source).items() if step > 3}
    assert close(losses(folder / f"{name}_on"), expected, rel=1e-5)
    assert max(distance(trained(folder / f"{name}_on", 6), trained(folder / source, 6)).values()) < 1e-5


@pytest.mark.parametrize("name", ["z2_gather", "z0", "z3"])
def test_no_rank_holds_more_than_one_group_at_a_time(folder, name):
    """Beside the model, while loading and while saving; a group is a block's weights and moments."""
    for rank in json.loads((folder / "two.json").read_text()):
        held = rank[name]
        assert held["all"] > 5 * held["group"], "else the test could not fail"
        assert 0 < held["saving"] <= held["group"] + held["parameter"]
        assert 0 < held["loading"] < held["group"]


def test_no_name_tells_the_topology(folder):
    names = trained(folder / "one", 3).keys()
    assert all(trained(folder / name, 3).keys() == names for name in [*DENSE, *SHARDED])


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint that two processes of commit b13e2a2 wrote, feed-forward experts sharded over them

OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint_b13e2a2" / "ffn_ep2"
OLD_SETTINGS = (
    "model.backbone_args={embed_dim: 16, depth: 2, num_heads: 2}", "model.lora_rank=2", "model.moe.rank=2",
    "model.drop_path=0.2", "tasks=[saliency, edge]", "train.max_steps=4", "checkpoint.every=2", "eval.every=2",
    "eval.pictures=0", "model.moe.shared_logit_warmup=3", "model.moe.experts=ffn", "model.moe.hidden=8",
    "model.moe.gating=ase", "model.moe.ep_size=2", "model.moe.dispatch=gather", "train.batch_size=2",
)  # fmt: skip


def two_old(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    resume = f"resume={OLD / 'checkpoints' / 'step_2'}"
    tiny_run(scenes, folder / "old", *OLD_SETTINGS, resume, config="z2")


def one_old(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    path = OLD / "checkpoints" / "step_2"
    load_and_save(scenes, path, folder / "alone", *OLD_SETTINGS[:-3], "train.batch_size=4", config="z1")


def test_an_old_run_of_two_processes_goes_on_as_it_did_then(scenes, tmp_path):
    need_the_bits_of_then(OLD)
    (tmp_path / "scenes").write_text(str(scenes))
    assert start_world(two_old, tmp_path, size=2, seconds=300)().codes == [0, 0]
    then = {step: values for step, values in losses(OLD).items() if step > 2}
    assert close(losses(tmp_path / "old"), then, rel=1e-6)


def test_an_old_checkpoint_of_two_processes_is_whole_in_one(scenes, tmp_path):
    need_the_bits_of_then(OLD)
    (tmp_path / "scenes").write_text(str(scenes))
    assert start_world(one_old, tmp_path, seconds=300)().codes == [0]
    assert same_bits(trained(OLD, 2), trained(tmp_path / "alone", 2)) == []


def eight(rank, folder):
    """Four routed experts on eight ranks: the last four have none."""
    scenes = Path((folder / "scenes").read_text())
    tiny_run(scenes, folder / "eight", QUARTER, "model.moe.ep_size=8", "train.max_steps=3", config="z2")


def one_of_eight(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    tiny_run(scenes, folder / "one", "train.batch_size=8", "train.max_steps=3", config="z0")


@pytest.mark.nightly
def test_eight_processes_compute_what_one_computes(tmp_path, scenes):
    (tmp_path / "scenes").write_text(str(scenes))
    assert start_world(one_of_eight, tmp_path, seconds=200)().codes == [0]
    assert start_world(eight, tmp_path, size=8, seconds=300)().codes == [0] * 8
    assert close(losses(tmp_path / "eight"), losses(tmp_path / "one"), rel=1e-4)
    assert distance(trained(tmp_path / "eight", 3), trained(tmp_path / "one", 3))["weight"] < 1e-4
