"""Resuming: checkpoints of an earlier version, tasks by name, settings that are refused or listed, wrong values."""

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from ase_dist import collectives
from ase_dist.baselines import baselines
from ase_dist.config import ON_RESUME, setting_keys
from ase_dist.deployment.export import export_run
from ase_dist.read_config import build_settings, load_settings, override_settings
from ase_dist.training.state.checkpoint import manifest as manifests
from ase_dist.training.state.checkpoint import open_checkpoint
from ase_dist.training.state.compare_settings import compare_settings
from tests.training.conftest import start_world
from tests.training.tiny_runs import (
    close,
    load_and_save,
    losses,
    metric_lines,
    need_the_bits_of_then,
    said,
    same_bits,
    tiny_run,
    trained,
)

pytestmark = pytest.mark.single_gpu

OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint_b13e2a2" / "lora"
OLD_SETTINGS = (
    "model.backbone_args={embed_dim: 16, depth: 2, num_heads: 2}",
    "model.lora_rank=2",
    "model.moe.rank=2",
    "model.drop_path=0.2",
    "model.moe.shared_logit_warmup=3",
    "tasks=[saliency, edge]",
    "train.max_steps=4",
    "checkpoint.every=2",
    "eval.every=2",
    "eval.pictures=0",
)
STEP_2 = OLD / "checkpoints" / "step_2"
EDGE_FIRST = [option.replace("[saliency, edge]", "[edge, saliency]") for option in OLD_SETTINGS]


def change(folder, **changes):
    """Rewrite the manifest of a checkpoint with other values, by dotted key of its tree, and with the right hash.

    ``None`` takes a key away.
    """
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    for key, value in changes.items():
        *above, last = key.split("__")
        branch = tree
        for name in above:
            branch = branch[name]
        branch.pop(last) if value is None else branch.update({last: value})
    path.write_text(json.dumps({**tree, "sha256": manifests.json_digest(tree)}))
    return folder


def change_tensor(folder, file, edit):
    """Rewrite one file of a checkpoint, ``edit`` applied to its tensors, and its entry in the manifest."""
    from safetensors.torch import load_file, save_file

    save_file(edit(load_file(folder / file)), folder / file)
    data = (folder / file).read_bytes()
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    for entry in entries:
        if entry["name"] == file:
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return change(folder, files=entries)


def of_another_device(tensors):
    return {n: torch.arange(16, dtype=torch.uint8) if n.endswith("/device") else t for n, t in tensors.items()}


def half(tensors):
    return {n: t.half() if n.startswith("weight/") else t for n, t in tensors.items()}


def not_finite(tensors):
    return {n: t.fill_(torch.inf) if n.startswith("exp_avg_sq/") else t for n, t in tensors.items()}


def other_state(tensors):
    return {n: t[:7].clone() if n.endswith("/torch") else t for n, t in tensors.items()}


REFUSED = {
    "gating": (["model.moe.gating=naive"], "model.moe.gating is 'ase' there and 'naive' here"),
    "alpha": (["model.moe.alpha=7"], "model.moe.alpha is null there and 7.0 here"),
    "several": (
        ["model.moe.k=1", "seed=3", "model.lora_alpha=5", "train.lr=1"],
        "model.lora_alpha is null there and 5.0 here, model.moe.k is 2 there and 1 here; use the run's own values",
    ),
    "set of tasks": (["tasks=[edge, normals]"], 'tasks is ["saliency", "edge"] there and ["edge", "normals"] here'),
    "size": (["data.size=48"], "data.size is 32 there and 48 here; use the run's own value,"),
    "baseline": (
        ["model.tune=full", "model.lora_rank=0", "model.task_embedding=false", "model.moe.enabled=false"],
        "the run was started without --baseline mtl_vit or its settings: model.tune is 'adapters' there",
    ),
    "beyond the end": (["train.max_steps=1"], "of step 2, beyond the end of this run at step 1"),
}
FORGED = {  # changes of the manifest, and what must be said of them, the file by name
    "negative epoch": ({"meta__schedule__last_epoch": -100}, "meta.schedule.last_epoch"),
    "too far": ({"meta__schedule__last_epoch": 100}, "more steps of the optimiser or the schedule"),
    "no sampler": ({"meta__sampler": None}, "meta.sampler"),
    "no counter": ({"meta__engine__micro_steps": None}, "a part of engine or backbone is missing"),
    "no tasks known": ({"meta__settings__data": None}, "meta.settings"),
    "a switch for a data set": ({"meta__settings__data__name": True}, "meta.settings: data.name: got True"),
    "steps of a fraction": ({"meta__optimizer_steps": 1.5}, "meta.optimizer_steps"),
    "history of text": ({"meta__history": "best"}, "meta.history"),
}
OTHER_WEIGHTS = {  # the same
    "another file": ({"meta__settings__model__pretrained": "a.pth"}, "model.pretrained 'a.pth' -> 'none'; use those"),
    "file has changed": ({}, "model.pretrained 'none' gives others now"),
}
LISTED = ["train.lr=2e-3", "train.loss_weights={edge: 7}", "train.batch_size=2"]


def one_process(rank, folder):
    """All runs of this module, one after another; what they said."""
    scenes, sentences = Path((folder / "scenes").read_text()), {}

    def copy(name):
        shutil.copytree(STEP_2, folder / name)
        return folder / name

    load_and_save(scenes, STEP_2, folder / "loaded", *OLD_SETTINGS, config="z2")
    tiny_run(scenes, folder / "old", *OLD_SETTINGS, f"resume={STEP_2}", config="z2")
    for stage in ("z0", "z3"):
        load_and_save(scenes, STEP_2, folder / f"reordered_{stage}", *EDGE_FIRST, config=stage)
    for name, options in (("saliency_first", OLD_SETTINGS), ("edge_first", EDGE_FIRST)):
        # drop_path draws by the position of a token, and so by that of its task
        tiny_run(scenes, folder / name, *options, f"resume={STEP_2}", "model.drop_path=0", config="z2")
    for name, sketch in (("rounded", lambda found: found), ("unlike", lambda found: [[2 * n, s] for n, s in found])):
        shutil.copytree(folder / "loaded" / "checkpoints" / "step_2", folder / name)
        found = json.loads((folder / name / "manifest.json").read_text())["meta"]["frozen"]
        path = change(folder / name, meta__backbone__sha256="0" * 64, meta__frozen=sketch(found))
        sentences[name] = said(scenes, folder / f"{name}_run", *OLD_SETTINGS, f"resume={path}", config="z2")
    tiny_run(scenes, folder / "listed", *OLD_SETTINGS, *LISTED, f"resume={STEP_2}", config="z2")
    for name, (overrides, _) in REFUSED.items():
        sentences[name] = said(scenes, folder / name, *OLD_SETTINGS, f"resume={STEP_2}", *overrides)
    for name, (changes, _) in FORGED.items():
        path = change(copy(f"forged_{name}"), **changes)
        sentences[name] = said(scenes, folder / name, *OLD_SETTINGS, f"resume={path}")
    for name, (changes, _) in OTHER_WEIGHTS.items():
        path = change(copy(f"forged_{name}"), meta__backbone__sha256="0" * 64, **changes)
        sentences[name] = said(scenes, folder / name, *OLD_SETTINGS, f"resume={path}")
    path = change_tensor(copy("half"), "heads.edge.safetensors", half)
    sentences["half"] = said(scenes, folder / "half_run", *OLD_SETTINGS, f"resume={path}")
    for name, file, edit in (
        ("infinite", "heads.edge.safetensors", not_finite),
        ("states", "random_0.safetensors", other_state),
    ):
        path = change_tensor(copy(name), file, edit)
        sentences[name] = said(scenes, folder / f"{name}_run", *OLD_SETTINGS, f"resume={path}")
    for name, device in (("gpu", {"meta__device": "cuda"}), ("old_gpu", {})):
        path = change(change_tensor(copy(name), "random_0.safetensors", of_another_device), **device)
        sentences[name] = said(scenes, folder / f"{name}_run", *OLD_SETTINGS, f"resume={path}", config="z2")
    sizes, gather = [], collectives.gather_objects
    counted = lambda value: sizes.append(len(pickle.dumps(value))) or gather(value)  # noqa: E731
    with mock.patch.object(collectives, "gather_objects", counted):
        load_and_save(scenes, STEP_2, folder / "counted", *OLD_SETTINGS, config="z2")
    sentences["largest exchange"] = max(sizes)
    return sentences


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    need_the_bits_of_then(OLD)
    folder = tmp_path_factory.mktemp("resume")
    (folder / "scenes").write_text(str(scenes))
    codes, results = start_world(one_process, folder, seconds=400)()
    assert codes == [0]
    return folder, results[0]


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint that commit b13e2a2 wrote


def test_every_tensor_of_an_old_checkpoint_is_loaded(runs):
    with open_checkpoint(STEP_2) as found:
        old = {name: found.tensor(name) for name in found.names() if not name.startswith("random/")}
    assert same_bits(old, trained(runs[0] / "loaded", 2)) == []
    assert any(tensor.any() for name, tensor in old.items() if name.startswith("exp_avg_sq/"))


def test_an_old_run_goes_on_as_it_did_then(runs):
    """Every loss and metric that b13e2a2 wrote for steps 3 and 4; another CPU may differ in the last digits."""
    then = {step: values for step, values in losses(OLD).items() if step > 2}
    assert close(losses(runs[0] / "old"), then, rel=1e-6)
    before, now = metric_lines(OLD, "eval")[4]["metrics"], metric_lines(runs[0] / "old", "eval")[4]["metrics"]
    assert now["edge"]["bce"] == pytest.approx(before["edge"]["bce"], rel=1e-6)


def test_an_old_run_is_exported(scenes, tmp_path):
    need_the_bits_of_then(OLD)
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    export_run(run, tmp_path / "out")
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "out" / "model.safetensors")
    with open_checkpoint(STEP_2) as found:
        weights = {n.removeprefix("weight/"): found.tensor(n) for n in found.names() if n.startswith("weight/")}
    assert weights.keys() < exported.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks by name


@pytest.mark.parametrize("stage", ["z0", "z3"])
def test_the_tasks_in_another_order_take_their_own_routers_embeddings_and_moments(runs, stage):
    after = trained(runs[0] / f"reordered_{stage}", 2)
    with open_checkpoint(STEP_2) as found:
        before = {name: found.tensor(name) for name in after}
    for name, tensor in after.items():
        moved = name.endswith(("router.weight", "task_embedding.weight"))
        assert torch.equal(tensor, before[name].flip(0) if moved else before[name]), name


def test_the_tasks_in_another_order_train_on_alike(runs):
    assert close(losses(runs[0] / "edge_first"), losses(runs[0] / "saliency_first"), rel=1e-5)


def test_the_export_of_an_earlier_order_is_the_same_model(tmp_path):
    """config.yaml has the order of the last start, the checkpoint that of its own."""
    need_the_bits_of_then(OLD)
    for name, order in (("run", "saliency\n- edge"), ("turned", "edge\n- saliency")):
        shutil.copytree(OLD, tmp_path / name)
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace("saliency\n- edge", order))
        export_run(tmp_path / name, tmp_path / f"{name}_out")
    import ase_dist

    models = [ase_dist.load(tmp_path / f"{name}_out") for name in ("run", "turned")]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (model(images).predictions for model in models)
    assert [*two] == ["edge", "saliency"]
    assert all(torch.allclose(one[task], two[task], atol=1e-6) for task in one)


def test_the_export_of_a_checkpoint_of_another_function_is_refused(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("gating: ase", "gating: naive"))
    with pytest.raises(ValueError, match=r"model\.moe\.gating is 'ase' there and 'naive' here"):
        export_run(tmp_path / "run", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(runs, name):
    sentence = runs[1][name]
    assert REFUSED[name][1] in sentence and str(STEP_2) in sentence and "\n" not in sentence


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_other_frozen_weights_are_explained_by_the_setting_that_names_them(runs, name):
    assert f"was trained on other frozen weights: {OTHER_WEIGHTS[name][1]}" in runs[1][name]
    assert "000" not in runs[1][name] and "a checkpoint of this age" in runs[1][name]


def test_frozen_weights_that_are_rounded_otherwise_are_taken(runs):
    assert "was trained on other frozen weights: model.pretrained 'none' gives others now; use" in runs[1]["unlike"]
    assert "of this age" not in runs[1]["unlike"]
    assert "rounding of the frozen weights" in (runs[0] / "rounded_run" / "train.log").read_text()
    assert close(losses(runs[0] / "rounded_run"), losses(runs[0] / "old"), rel=0)


@pytest.mark.parametrize("name", [name for name in baselines() if name != "ase_16_3_1_4"])  # that is the config itself
@pytest.mark.parametrize("started", ["with", "without"])
def test_a_baseline_that_explains_what_is_refused_is_named(name, started):
    """Started with it and gone on without, and the reverse; not where other settings differ too."""
    alone, tasks = load_settings("scenes"), ("edge", "normals")[: 2 - ("stl" in name)]
    other = load_settings("scenes", baseline=name)
    saved, now = (other, alone) if started == "with" else (alone, other)
    found = compare_settings(saved.model_dump(mode="json"), now, tasks=tasks, saved_tasks=tasks)
    which = f"{started} --baseline {name}"
    if started == "without" and name.startswith(("lora_moe", "naive", "ase")):
        which = "with --baseline ase_16_3_1_4"  # what the config is
    assert found.refused and found.baseline == f"the run was started {which} or its settings"
    assert found.why_refused.startswith(f"{found.baseline}: model.")
    more = override_settings(now, ["seed=9"])
    assert not compare_settings(saved.model_dump(mode="json"), more, tasks=tasks, saved_tasks=tasks).baseline


def test_what_may_differ_is_listed_and_honoured(runs):
    folder, _ = runs
    log = (folder / "listed" / "train.log").read_text()
    for words in (
        "changed since step ",
        "train.lr 0.001 -> 0.002",
        'train.loss_weights {} -> {"edge": 7.0}',
        "train.batch_size 4 -> 2",
    ):
        assert words in log
    assert "train.lr " not in (folder / "old" / "train.log").read_text()
    rates = [metric_lines(folder / name)[4]["lr"] for name in ("listed", "old")]
    assert rates[0] == pytest.approx(2 * rates[1])


@pytest.mark.parametrize("key", [key for key in setting_keys() if ON_RESUME[key] != "ignored"])
def test_every_setting_is_compared(key):
    """Each alone, changed by hand in what was saved."""
    settings = load_settings("scenes")
    saved = settings.model_dump(mode="json")
    branch, (*above, last) = saved, key.split(".")
    for name in above:
        branch = branch[name]
    branch[last] = [{"name": "nyud"}] if key == "data.sets" else "another"
    tasks = ("edge", "normals")
    there = ("normals", "saliency") if key == "tasks" else tasks
    found = compare_settings(saved, settings, tasks=tasks, saved_tasks=there)
    assert [*getattr(found, ON_RESUME[key])] == [key]
    assert len(found.refused) + len(found.listed) == 1


def test_an_older_checkpoint_lacks_a_setting_and_a_scale_of_one_has_two_names():
    settings = build_settings({"model": {"moe": {"alpha": 4.0, "rank": 4}}})
    saved = settings.model_dump(mode="json")
    saved["model"]["moe"]["alpha"] = None
    del saved["train"]["compile"], saved["model"]["moe"]["gating"]
    assert compare_settings(saved, settings, tasks=("edge",), saved_tasks=("edge",)) == ({}, {}, "")
    other = build_settings({"model": {"moe": {"alpha": 4.0, "rank": 4, "gating": "naive"}}})
    assert [*compare_settings(saved, other, tasks=("edge",), saved_tasks=("edge",)).refused] == ["model.moe.gating"]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong values, other devices, what goes over the wire


@pytest.mark.parametrize("name", FORGED)
def test_a_wrong_value_is_one_sentence_that_names_the_file(runs, name):
    sentence = runs[1][name]
    assert sentence.startswith("UserError") and FORGED[name][1] in sentence and "\n" not in sentence
    assert re.search(r"forged_[\w ]+/manifest\.json", sentence)


def test_weights_of_another_type_are_refused(runs):
    assert re.search(r"tensors differ, the first, 'weight/heads\.edge[^']*', is .* of type F16 there", runs[1]["half"])


def test_moments_that_are_not_finite_and_other_random_states_are_told(runs):
    assert re.match(r"UserError.*infinite: 'exp_avg_sq/heads\.edge.*is not finite", runs[1]["infinite"])
    assert re.match(r"UserError.*states: the random states in it are none", runs[1]["states"])


@pytest.mark.parametrize("name", ["gpu", "old_gpu"])
def test_a_run_saved_on_a_gpu_goes_on_on_a_cpu(runs, name):
    assert runs[1][name] == 0
    assert close(losses(runs[0] / f"{name}_run"), losses(runs[0] / "old"), rel=1e-12)


def test_a_resume_exchanges_no_names(runs):
    """What a rank gathers does not grow with the model: a name alone has thirty bytes, the tiny model 300 of them."""
    assert runs[1]["largest exchange"] < 2000
