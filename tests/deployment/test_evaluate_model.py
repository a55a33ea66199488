"""``launch/evaluate.py``: run and export score what the run found, two ranks what one does; mistakes are a sentence."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ase_dist import load
from ase_dist.commands.evaluate import main
from ase_dist.config import Settings
from ase_dist.deployment import evaluate_model
from ase_dist.deployment.evaluate_model import EvaluationRequest, data_settings
from ase_dist.deployment.export import export_run
from ase_dist.deployment.reference import read_reference
from ase_dist.deployment.trained_model import at_size, open_trained_model
from ase_dist.errors import ExitCode, UserError
from ase_dist.image_size import ImageSize
from ase_dist.models.export_file import card_digest
from ase_dist.tasks import select_tasks
from ase_dist.training.process.folder_lock import FolderLock
from tests.deployment.conftest import make_export
from tests.training.conftest import start_world
from tests.training.test_run_nyud import write_folder
from tests.training.tiny_runs import ROOT, metric_lines, tiny_run

COMMAND = ROOT / "launch" / "evaluate.py"


def train(rank, folder):
    scenes = Path((folder / "scenes").read_text())
    return tiny_run(scenes, folder / "run", "eval.edge_ods=true", "train.max_steps=2", "checkpoint.every=1")


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    """A run that has scored odsF itself, and its export."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "scenes").write_text(str(scenes))
    codes, results = start_world(train, folder, seconds=200)()
    assert codes == [0] and results == [0]
    export_run(folder / "run", folder / "export")
    return folder


@pytest.fixture
def evaluate():
    return main


@pytest.fixture
def no_pool(monkeypatch):
    """Boundaries are counted in this process: two images are not worth others."""
    monkeypatch.setattr("ase_dist.deployment.evaluate_model.share_of_cores", lambda processes: 0)


def found(out):
    return json.loads((out / "metrics.json").read_text())


def close(one, two, *, rel):
    assert one.keys() == two.keys()
    for task in one:
        assert one[task] == pytest.approx(two[task], rel=rel, nan_ok=True), task


@pytest.mark.single_gpu
def test_the_run_its_export_and_the_command_agree(folder, scenes, tmp_path, evaluate, no_pool, capsys):
    """The run evaluated with its engine; the command rebuilds the model from either folder."""
    summary = json.loads((folder / "run" / "summary.json").read_text())["metrics"]
    assert summary["edge"]["ods_f"] == metric_lines(folder / "run", "eval")[2]["metrics"]["edge"]["ods_f"]
    assert evaluate([str(folder / "run"), "--edge-ods", "--device", "cpu"]) == 0
    out = folder / "run" / "evaluation"
    close(found(out)["results"], summary, rel=1e-3)
    printed = capsys.readouterr().out
    assert printed == (out / "metrics.md").read_text() and "odsF" in printed
    assert r"\toprule" in (out / "metrics.tex").read_text()
    data = [f"data.root={scenes}", "data.scenes.val_images=3", "data.scenes.train_images=10", "data.scenes.size=40"]
    export = [str(folder / "export"), "--edge-ods", "--out", str(tmp_path), "--device", "cpu", *data]
    assert evaluate([*export, "--reference", str(folder / "run")]) == 0
    close(found(tmp_path)["results"], found(out)["results"], rel=1e-6)
    assert found(tmp_path)["comparison"]["delta_m_percent"] == pytest.approx(0, abs=1e-3)
    assert found(tmp_path)["comparison"]["tasks"]["edge"]["score"] == "ods_f"


@pytest.mark.single_gpu
def test_other_input_sizes_than_the_trained_one(folder, scenes, tmp_path, evaluate, no_pool, capsys):
    """Positions are resampled as timm does it, everything else stays; run and export agree."""
    data = [f"data.root={scenes}", "data.scenes.val_images=3", "data.scenes.train_images=10", "data.scenes.size=40"]
    for name, more in (("run", []), ("export", data)):
        words = [str(folder / name), "data.size=32x64", "--out", str(tmp_path / name), "--device", "cpu", *more]
        assert evaluate(words) == 0
    first, second = found(tmp_path / "run"), found(tmp_path / "export")
    close(first["results"], second["results"], rel=1e-6)
    assert first["input_size"] == "32x64"
    trained = open_trained_model(folder / "run", device=torch.device("cpu"))
    wide, same = (at_size(trained, ImageSize(32, width)).model for width in (64, 32))
    old = trained.model.stem.pos_embed
    patches = old[:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, (2, 4), mode="bicubic", antialias=True)
    expected = torch.cat([old[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    torch.testing.assert_close(wide.stem.pos_embed, expected)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for task, logits in trained.model(images).predictions.items():
        torch.testing.assert_close(same(images).predictions[task], logits)
    capsys.readouterr()
    assert evaluate([str(folder / "run"), "data.size=33", "--out", str(tmp_path / "odd"), "--device", "cpu"]) == 2
    assert "data.size: got 33" in capsys.readouterr().err


@pytest.mark.single_gpu
def test_fewer_tasks_and_older_weights(folder, tmp_path, evaluate, no_pool):
    run = folder / "run"
    arguments = [str(run), "--tasks", "normals,semseg", "--checkpoint", str(run / "checkpoints" / "step_1")]
    assert evaluate([*arguments, "--reference", "paper", "--out", str(tmp_path), "--device", "cpu"]) == 0
    tree = found(tmp_path)
    assert list(tree["results"]) == ["normals", "semseg"] and tree["step"] == 1
    assert tree["comparison"]["left_out"] == ["edge", "human_parts", "saliency"]


@pytest.mark.multi_gpu
def test_two_ranks_find_what_one_does(folder, tmp_path, evaluate, no_pool):
    """Three images, one of the ranks has one more; a batch is one image, so that the arithmetic is the same."""
    arguments = [
        str(folder / "run"),
        "eval.batch_size=1",
        "--edge-ods",
        "--nms",
        "--device",
        "cpu",
        "--reference",
        "paper",
    ]
    assert evaluate([*arguments, "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, COMMAND, *arguments, "--out", str(tmp_path / "two")], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = found(tmp_path / "one"), found(tmp_path / "two")
    close(two.pop("results"), one.pop("results"), rel=1e-12)
    delta = (one.pop("comparison"), two.pop("comparison"))
    assert delta[0]["delta_m_percent"] == pytest.approx(delta[1]["delta_m_percent"], rel=1e-12)
    assert one == two and one["images"] == 3 and "non-maxima suppressed" in one["edges"]
    assert (tmp_path / "one" / "metrics.md").read_text() == (tmp_path / "two" / "metrics.md").read_text()
    printed = done.stdout
    if printed.startswith("[Gloo]"):  # which older torch prints (seen with 2.10)
        printed = printed[printed.index("# ") :]
    assert printed == (tmp_path / "two" / "metrics.md").read_text()  # once


@pytest.mark.single_gpu
def test_other_data_keep_the_model_and_lose_the_place(folder, tmp_path):
    saved = open_trained_model(folder / "run", device=torch.device("cpu"))
    own = data_settings(saved, EvaluationRequest(folder / "run"))
    assert own.data == saved.settings.data and own.tasks == ("semseg", "human_parts", "saliency", "edge", "normals")
    named = data_settings(saved, EvaluationRequest(folder / "run", data="pascal_context")).data
    assert (named.name, named.root) == ("pascal_context", None)
    placed = data_settings(
        saved, EvaluationRequest(folder / "run", data=str(tmp_path), overrides=("data.limit_val=2",))
    ).data
    assert (placed.name, placed.root, placed.limit_val) == ("pascal_context", tmp_path, 2)


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    "name", ["bob's data", 'a "b"', "set #2", "{x}", "[1]", "a: b", "2024-11-25", "no", " a ", "%s"]
)
def test_a_data_folder_may_have_any_name(name, tmp_path):
    (tmp_path / name).mkdir()
    trained = SimpleNamespace(settings=Settings(), tasks=select_tasks("scenes"))
    for path in (tmp_path / name, tmp_path / name / ".." / name):
        chosen = data_settings(trained, EvaluationRequest("run", data=str(path), overrides=("data.limit_val=2",)))
        assert (chosen.data.root, chosen.data.limit_val) == (path, 2)
    given = data_settings(trained, EvaluationRequest("run", overrides=(f"data.root={tmp_path / name}",)))
    assert given.data.root == tmp_path / name


MISTAKES = {
    "nothing": (["nowhere"], r"'nowhere' is neither a run nor an export"),
    "checkpoint": (["RUN", "--checkpoint", "nowhere"], r"'nowhere', no such checkpoint; .* holds step_1, step_2"),
    "no such step": (
        ["RUN", "--checkpoint", "step_90"],
        r"'step_90', no such checkpoint; .* holds step_1, step_2",
    ),
    "no such reference": (["RUN", "--reference", "RUN@step_9"], r"'step_9', no such checkpoint"),
    "checkpoint of an export": (["EXPORT", "--checkpoint", "best"], r"--checkpoint: .* is an export"),
    "task": (["RUN", "--tasks", "depth"], "the model has no 'depth', wanted some of"),
    "task of the data": (["RUN", "--data", "nyud", "--tasks", "depth"], r"the model has no 'depth', wanted some of"),
    "classes": (["RUN", "--data", "nyud", "--tasks", "semseg"], r"semseg has 40 channels in nyud, 21 in the model"),
    "data": (["RUN", "--data", "pascal"], r"--data: 'pascal' is neither a folder nor one of .* did you mean"),
    "no data": (["RUN", "--data", "EMPTY"], r"no such list"),
    "setting": (["RUN", "train.lr=1"], r"an evaluation sets data\.\*, eval\.\* and tasks only"),
    "unknown setting": (["RUN", "data.rooot=x"], r"data\.rooot: there is no such setting"),
    "nms": (["RUN", "--nms"], r"--nms: .*add --edge-ods"),
    "no edges": (["RUN", "--edge-ods", "--tasks", "semseg"], r"--edge-ods: there is no edge task among semseg"),
    "paper without ods": (["RUN", "--reference", "paper"], r"scores edge by ods_f.*add --edge-ods"),
    "reference": (["RUN", "--reference", "nowhere"], r"--reference: got 'nowhere', wanted 'paper'"),
    "empty reference": (["RUN", "--reference", "EMPTY/x.json"], r"x\.json holds no scores"),
    "broken reference": (["RUN", "--reference", "EMPTY/y.json"], r"cannot read .*y\.json"),
    "short reference": (["RUN", "--reference", "EMPTY/z.json"], r"has no task 'semseg', it has edge"),
    "device": (["RUN", "--device", "tpu9"], r"--device: "),
    "out": (["RUN", "--out", "EMPTY/x.json/deeper", "--tasks", "normals"], r"--out: cannot write to"),
}


@pytest.mark.single_gpu
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake, folder, tmp_path, evaluate, no_pool, capsys):
    arguments, sentence = MISTAKES[mistake]
    places = {"RUN": str(folder / "run"), "EXPORT": str(folder / "export"), "EMPTY": str(tmp_path)}
    for name, text in (("x", "{}"), ("y", "{"), ("z", '{"edge": {"bce": 1}}')):
        (tmp_path / f"{name}.json").write_text(text)
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    if "--device" not in arguments:
        arguments += ["--device", "cpu"]
    assert evaluate(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(sentence, errors[0]), errors[0]


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("error", "code"),
    [(errno.ENOSPC, ExitCode.NOT_SAVED), (errno.EROFS, ExitCode.USAGE), (errno.EIO, ExitCode.IO_ERROR)],
)
def test_an_output_without_room_is_found_before_the_work(folder, tmp_path, evaluate, monkeypatch, capsys, error, code):
    def no_room(path):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr("ase_dist.files.fsync", no_room)
    monkeypatch.setattr(evaluate_model, "evaluate", None)  # calling it would be a bug, and a traceback
    assert evaluate([str(folder / "run"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: --out: cannot write to '{tmp_path / 'out'}' ({os.strerror(error)}); name another"
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.single_gpu
def test_two_evaluations_and_two_exports_do_not_mix(folder, tmp_path, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_model, "evaluate", None)
    for lock_file, out, doing in [
        ("out/evaluation.lock", "out", "evaluating"),
        (".export.lock", "export", "exporting"),
    ]:
        (tmp_path / lock_file).parent.mkdir(exist_ok=True)
        with FolderLock(tmp_path / lock_file, folder=tmp_path / out, doing=doing, other="--out") as lock:
            lock.take()
            if doing == "evaluating":
                assert evaluate([str(folder / "run"), "--out", str(tmp_path / out), "--device", "cpu"]) == 2
                said = capsys.readouterr().err.splitlines()[-1]
            else:
                with pytest.raises(UserError) as raised:
                    export_run(folder / "run", tmp_path / out)
                said = str(raised.value)
            assert f"'{tmp_path / out}' is in use: process {os.getpid()} on " in said and f"been {doing} there" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not [*(tmp_path / "out").iterdir()]


@pytest.mark.single_gpu
def test_boundaries_are_matched_as_the_data_they_are_scored_on_have_it(tmp_path, evaluate, no_pool):
    """A model of PASCAL's tasks scored on NYUD; and an export of NYUD from before its classes had names."""
    root = write_folder(tmp_path / "NYUD_MT")
    export = make_export(tmp_path / "export", tasks=["edge"])
    assert load(export).tasks[0].tolerance == 0.0075
    more = ["--device", "cpu", "data.limit_val=1", f"data.root={root}"]
    arguments = [str(export), "--data", "nyud", "--tasks", "edge", "--edge-ods", "--out", str(tmp_path / "out")]
    assert evaluate([*arguments, *more]) == 0
    report = found(tmp_path / "out")
    assert report["tolerances"] == {"edge": 0.011} and "within 0.011 of the diagonal" in report["edges"]
    for file in ("metrics.md", "metrics.tex"):
        text = (tmp_path / "out" / file).read_text()
        assert text.count("odsF (tolerance 0.011)") >= 4 and "0.0075" not in text
    export = make_export(tmp_path / "old", data="nyud", tasks=["semseg"])
    card = json.loads((export / "export.json").read_text())
    assert card["tasks"][0]["class_names"][:2] == ["wall", "floor"]
    card["tasks"][0]["class_names"] = [f"class {i + 1}" for i in range(40)]
    card["card_sha256"] = card_digest({key: card[key] for key in card if key != "card_sha256"})
    (export / "export.json").write_text(json.dumps(card))
    assert evaluate([str(export), "--out", str(tmp_path / "older"), *more]) == 0


@pytest.mark.single_gpu
def test_references_come_from_wherever_scores_are_kept(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "checkpoints"))
    summary, card = read_reference(str(run)), read_reference(str(folder / "export"))
    assert summary.scores == card.scores and summary.data == card.data == "scenes"
    assert summary.tolerances == card.tolerances == {"edge": 0.0075}
    (run / "evaluation").mkdir()
    report = {
        "format": "ase_dist evaluation",
        "title": "t",
        "data": "d",
        "results": {"edge": {"bce": 1.0, "ods_f": None}, "depth": {"absrel": 0.5}},
    }
    (run / "evaluation" / "metrics.json").write_text(json.dumps(report))
    assert read_reference(str(run)).tolerances == {"edge": 0.0075}  # of an earlier version, which had no other
    (run / "evaluation" / "metrics.json").write_text(json.dumps({**report, "tolerances": {"edge": 0.011}}))
    newer = read_reference(str(run))
    assert newer.tolerances == {"edge": 0.011} and newer.scores["depth"] == {"rel": 0.5}
    assert (newer.name, newer.data, newer.scores["edge"]["bce"]) == ("t", "d", 1.0)
    shutil.copytree(folder / "export", tmp_path / "odd")
    odd = json.loads((folder / "export" / "export.json").read_text()) | {"tasks": 5}
    (tmp_path / "odd" / "export.json").write_text(json.dumps(odd))
    assert read_reference(str(tmp_path / "odd")).scores == card.scores  # whose own damage is told when it is opened
    (tmp_path / "plain.json").write_text('{"edge": {"bce": 2}}')
    assert read_reference(str(tmp_path / "plain.json")).scores == {"edge": {"bce": 2.0}}
    assert read_reference(str(tmp_path / "plain.json")).tolerances == {}


@pytest.mark.single_gpu
def test_an_evaluation_replaces_none_of_another_checkpoint_or_of_other_data(folder, evaluate, no_pool, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    common = [str(run), "--device", "cpu", "--tasks", "normals"]
    for arguments in ([], ["--checkpoint", "step_1"], ["--split", "train", "--checkpoint", "2"], ["data.limit_val=1"]):
        code = evaluate([*common, *arguments])
        assert code == (2 if "2" in arguments else 0)
    assert evaluate([*common, "--split", "train"]) == 0
    assert evaluate([*common, "--checkpoint", "step_1", "--out", str(run / "evaluation")]) == 2
    reports = {str(path.parent.relative_to(run)): found(path.parent) for path in run.glob("evaluation/**/metrics.json")}
    assert {name: (tree["step"], tree["split"]) for name, tree in reports.items()} == {
        "evaluation": (2, "val"),
        "evaluation/step_1_scenes_val_32": (1, "val"),
        "evaluation/step_2_scenes_train_32": (2, "train"),
    }
    assert reports["evaluation"]["images"] == 1  # of the same checkpoint and data the last one counts


@pytest.mark.single_gpu
def test_a_reference_is_a_checkpoint_of_a_run_or_an_evaluations_folder(folder, tmp_path, evaluate, no_pool):
    run = folder / "run"
    found_while_training = metric_lines(run, "eval")[2]["metrics"]
    two = read_reference(f"{run}@best").scores
    assert read_reference(f"{run}@best").tolerances == {"edge": 0.0075}
    assert two == read_reference(f"{run}@newest").scores == read_reference(f"{run}@step_2").scores
    assert two["normals"]["mean"] == pytest.approx(found_while_training["normals"]["mean"])
    with pytest.raises(ValueError, match="step_1 was not evaluated while training"):
        read_reference(f"{run}@step_1")
    out = tmp_path / "mine"
    assert evaluate([str(run), "--device", "cpu", "--tasks", "normals", "--out", str(out)]) == 0
    assert read_reference(str(out)).scores["normals"]["mean"] == pytest.approx(two["normals"]["mean"], rel=1e-6)
