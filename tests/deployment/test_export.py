"""A run of DeepSpeed, exported: it scores what the run found, from every kind of checkpoint; mistakes are refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

import ase_dist
from ase_dist.commands.export import main
from ase_dist.deployment.export import EXACT, ROUNDED, check_export, differences, export_run
from ase_dist.models.export_file import CARD, CARD_HASH, WEIGHTS, card_digest
from ase_dist.models.names import named_tensors
from ase_dist.tasks import PASCAL_TASKS
from tests.training.conftest import flip_byte, start_world
from tests.training.tiny_runs import checkpoint, said, tiny_run

pytestmark = pytest.mark.single_gpu


def train(rank, folder):
    """A run, and a second one that starts from its export with other tasks."""
    scenes = Path((folder / "scenes").read_text())
    code = tiny_run(scenes, folder / "run", "eval.every=3", "model.drop_path=0.1", config="z2")
    export_run(folder / "run", folder / "first")
    start = (
        f"model.init_from={folder / 'first'}",
        "tasks=[edge, normals]",
        "train.max_steps=3",
        "checkpoint.every=0",
        "eval.edge_ods=true",
    )
    return [code, tiny_run(scenes, folder / "second", *start), said(scenes, folder / "third", "model.init_from=x")]


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "scenes").write_text(str(scenes))
    codes, results = start_world(train, folder, seconds=200)()
    assert codes == [0] and results[0][:2] == [0, 0]
    assert results[0][2].startswith("UserError: model.init_from: x: no export")
    return folder


@pytest.fixture
def copy(runs, tmp_path):
    """The run's folder, to be damaged."""
    return shutil.copytree(runs / "run", tmp_path / "run")


@pytest.fixture
def command():
    return main


# ---------------------------------------------------------------------------------------------------------------------
# What is exported


def test_the_export_scores_what_the_run_found(runs):
    model = ase_dist.load(runs / "first")
    summary = json.loads((runs / "run" / "summary.json").read_text())
    assert model.card.step == summary["step"] == summary["metrics_step"] == 6
    assert json.loads((runs / "first" / CARD).read_text())["metrics"] == summary["metrics"]
    assert check_export(runs / "run", runs / "first", device="cpu") == []


def test_other_weights_do_not_pass_the_check(runs, tmp_path):
    """The metrics of step 6 beside the weights of step 3."""
    out = export_run(runs / "run", tmp_path / "out", checkpoint=str(runs / "run" / "checkpoints" / "step_3"))
    tree, other = (json.loads((folder / CARD).read_text()) for folder in (out, runs / "first"))
    assert check_export(runs / "run", out, device="cpu") == []
    changed = {name: value for name, value in tree.items() if name != CARD_HASH} | {"metrics": other["metrics"]}
    (out / CARD).write_text(json.dumps({**changed, CARD_HASH: card_digest(changed)}))
    assert check_export(runs / "run", out, device="cpu")


def test_every_trained_tensor_is_in_the_file_under_its_name(runs):
    saved = checkpoint(runs / "run", 6)
    named = named_tensors(ase_dist.load(runs / "first").model)
    weights = {name.removeprefix("weight/"): t for name, t in saved.items() if name.startswith("weight/")}
    assert all(torch.equal(named[name], tensor) for name, tensor in weights.items())
    assert {name for name in named.keys() - weights.keys() if name.startswith("heads.")} == set()


def test_the_card_tells_a_stranger_everything(runs):
    card = json.loads((runs / "first" / CARD).read_text())
    semseg = card["tasks"][0]
    assert (semseg["name"], semseg["channels"], len(semseg["class_names"]), len(semseg["palette"])) == (
        "semseg",
        21,
        21,
        21,
    )
    assert card["image"]["size"] == 32 and card["model"]["pretrained"] == "none" and card["model"]["init_from"] is None
    assert {"ase_dist", "torch", "timm", "safetensors"} <= card["versions"].keys()


def test_newest_is_what_is_whole_and_best_what_scored_best(runs, copy, tmp_path, caplog):
    flip_byte(sorted((copy / "checkpoints" / "step_6").glob("*.safetensors"))[0])
    assert ase_dist.load(export_run(copy, tmp_path / "newest")).card.step == 3
    assert "step_6 is damaged or gone and is passed over" in caplog.text
    (copy / "checkpoints" / "best").write_text("step_3\n")
    assert ase_dist.load(export_run(copy, tmp_path / "best", checkpoint="best")).card.step == 3


def test_a_second_run_starts_from_the_export_and_is_exported_too(runs, tmp_path):
    """Its own backbone comes from the export, so that the check of the frozen weights sees it again."""
    out = export_run(runs / "second", tmp_path / "out")
    assert [task.name for task in ase_dist.load(out).tasks] == ["edge", "normals"]
    assert "took the backbone" in (runs / "second" / "train.log").read_text()
    first, second = (named_tensors(ase_dist.load(folder).model) for folder in (runs / "first", out))
    assert torch.equal(first["stem.pos_embed"], second["stem.pos_embed"])
    assert check_export(runs / "second", out, device="cpu") == []


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_exports_and_checks(runs, tmp_path, command, caplog, capsys):
    caplog.set_level(logging.INFO)
    arguments = [str(runs / "run"), str(tmp_path / "out"), "--dtype", "bf16", "--check", "--device", "cpu"]
    assert command(arguments) == 0 and "scores what the run found" in caplog.text
    assert command(arguments) == 2 and "exists already" in capsys.readouterr().err


def test_the_command_writes_programs_beside_the_export(runs, tmp_path, command, caplog):
    caplog.set_level(logging.INFO)
    assert command([str(runs / "run"), str(tmp_path / "out"), "--format", "pt2", "--tasks", "edge,normals"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CARD, WEIGHTS, "model.pt2"}
    model = ase_dist.load(tmp_path / "out")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = torch.export.load(tmp_path / "out" / "model.pt2").module()(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image.mean, model.image.std))
    wanted = model((images - mean) / std, tasks=["edge", "normals"]).predictions
    assert list(found) == list(wanted)
    for name, logits in wanted.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-3, atol=1e-4)


def test_metrics_that_differ_are_exit_code_1(runs, copy, tmp_path, command, capsys):
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("limit_val: null", "limit_val: 1"))
    assert command([str(copy), str(tmp_path / "out"), "--check", "--device", "cpu"]) == 1
    assert "does not score what the run found: semseg" in capsys.readouterr().err


MISTAKES = {
    "no run": (lambda run: (run / "config.yaml").unlink(), {}, r"is no run.*config\.yaml"),
    "no checkpoints": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        {},
        r"'newest', no such checkpoint; .* none at all",
    ),
    "no best": (
        lambda run: (run / "checkpoints" / "best").unlink(),
        {"checkpoint": "best"},
        r"got 'best', no such checkpoint",
    ),
    "not one": (
        lambda run: None,
        {"checkpoint": "nowhere"},
        r"got 'nowhere', no such checkpoint; .* holds step_3, step_6",
    ),
    "type": (lambda run: None, {"dtype": "fp8"}, r"--dtype: got 'fp8'"),
    "other model": (
        lambda run: edit(run, "  k: 2", "  k: 1", "num_experts: 5", "num_experts: 4"),
        {},
        r"model\.moe\.num_experts is 5 there and 4 here, model\.moe\.k is 2 there",
    ),
    "other backbone": (lambda run: edit(run, "\nseed: 0", "\nseed: 1"), {}, r"frozen backbone.*is not the one"),
}


def edit(run, *pairs):
    text = (run / "config.yaml").read_text()
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    (run / "config.yaml").write_text(text)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_and_leave_nothing(mistake, copy, tmp_path):
    act, options, sentence = MISTAKES[mistake]
    act(copy)
    with pytest.raises(ValueError, match=sentence):
        export_run(copy, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


TASKS = (PASCAL_TASKS["semseg"], PASCAL_TASKS["edge"], PASCAL_TASKS["normals"])


def scores(miou, bce, mean, **more):
    return {"semseg": {"miou": miou, **more}, "edge": {"bce": bce, "ods_threshold": 0.3}, "normals": {"mean": mean}}


@pytest.mark.parametrize(
    ("tolerance", "near", "far"),
    [(EXACT, (40.05, 0.5004, 14.95), (40.2, 0.502, 15.2)), (ROUNDED, (40.7, 0.508, 15.4), (41.0, 0.52, 14.2))],
)
def test_headline_metrics_are_compared_by_their_units(tolerance, near, far):
    wanted = scores(40.0, 0.5, 15.0)
    assert differences(scores(*near), wanted, TASKS, tolerance=tolerance) == []
    found = differences(scores(*far), wanted, TASKS, tolerance=tolerance)
    assert [clause.split(" is ")[0] for clause in found] == ["semseg miou", "edge bce", "normals mean"]


def test_a_rare_class_and_a_threshold_that_moved_are_no_difference():
    wanted = scores(40.0, 0.5, 15.0, **{"iou/boat": 3.0})
    got = scores(40.0, 0.5, 15.0, **{"iou/boat": 2.0})
    got["edge"]["ods_threshold"] = 0.31
    assert differences(got, wanted, TASKS, tolerance=ROUNDED) == []
    assert differences(scores(39.0, 0.5, 15.0), wanted, TASKS, tolerance=ROUNDED) != []


def test_scores_near_zero_and_nan():
    nan = float("nan")
    assert differences(scores(0.3, nan, 15.0), scores(0.1, nan, 15.0), TASKS, tolerance=ROUNDED) == []
    found = differences(scores(nan, 0.5, 15.0), scores(40.0, nan, 15.0), TASKS, tolerance=ROUNDED)
    assert [clause.split(" is ")[0] for clause in found] == ["semseg miou", "edge bce"]


def test_odsf_is_checked_where_the_run_has_it():
    wanted = scores(40.0, 0.5, 15.0)
    wanted["edge"]["ods_f"] = 60.0
    got = {**wanted, "edge": {**wanted["edge"], "ods_f": 50.0}}
    assert differences(got, wanted, TASKS, tolerance=ROUNDED) == ["edge ods_f is 50, the run found 60"]
