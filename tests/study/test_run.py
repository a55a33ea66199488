"""Every study at toy size: all of its variants run, once, and its table, CSV and plots show them."""

import csv
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ase_dist.baselines import find_baseline
from ase_dist.commands import study
from ase_dist.errors import UserError
from ase_dist.study.jobs import jobs_of
from ase_dist.study.run import run_study
from ase_dist.study.runner import Runner, Slots
from ase_dist.study.variants import STUDIES

pytestmark = pytest.mark.single_gpu

SOME = {  # where all variants would take long and say nothing more
    "table1": ["stl_resnet18", "cross_stitch", "mtan", "nddr_cnn", "stl_vit", "mtl_vit", "mtl_vit_lora",
               "naive_16_3_1_4", "ase_16_3_1_4", "m3vit_ffn", "mod_squad_ffn"],
    "transition": ["naive_16_3_1_4"],
    "evidence": ["lora_moe_16_4_0_4", "naive_16_3_1_4", "ase_64_12_4_1"],
    "topk": ["lora_moe_k3", "lora_moe_k7", "ase_k3", "ase_k7"],
    "router_cost": ["n16", "n256"],
    "balancing": ["fixed", "dwa", "upgrad"],
    "heads": ["pup", "hrnet"],
    "mtlora": ["swin_t_mtlora", "swin_t_ase_16_3_1_4"],
    "resolution": ["mtl_vit_lora_32", "ase_16_3_1_4_48"],
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_and_shows_its_variants(name, toy, in_process, tmp_path):
    only = SOME.get(name, [])
    out = tmp_path / "out"
    assert run_study(name, data="toy", seeds=1, out=out, only=only, slots=Slots()) == 0
    results = json.loads((out / "results.json").read_text())
    variants = results["variants"]
    assert [v["name"] for v in variants] == (only or [v.name for v in STUDIES[name].variants(toy)]) or only
    assert {v["name"] for v in variants} == {n.split("/")[0] for n in in_process} - {"first_task"}
    assert all(v["seeds"] == [0] and not v["missing"] and v["flops"]["forward"] > 0 for v in variants)
    assert all(set(v["metrics"]) <= {"semseg", "edge", "normals"} and v["parameters"]["trained"] > 0 for v in variants)
    references = {v["reference"] for v in variants}
    assert all(v["delta_m"] == [0.0] for v in variants if v["name"] in references)
    text = (out / "results.md").read_text()
    assert all(f"| {v['label']} |" in text for v in variants)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["variant"] for row in rows} == {v["name"] for v in variants}
    with Image.open(out / "plots" / "gains.png") as image:
        assert image.width > 400


def test_conflict_and_shared_gates_are_collected(toy, in_process, tmp_path):
    out = tmp_path / "out"
    only, often = ["naive_16_3_1_4_pair", "ase_16_3_1_4_pair"], ["eval.every=2"]
    run_study("naive_vs_ase", data="toy", seeds=2, out=out, only=only, slots=Slots(), overrides=often)
    results = json.loads((out / "results.json").read_text())
    lora, naive, ase = results["variants"]
    assert "conflict" not in lora and "shared_gate" not in lora
    assert ase["conflict"]["steps"] == [1, 2, 3] and len(ase["conflict"]["cosine"][0]) == 2
    assert all(0 < gate < 1 for values in ase["shared_gate"]["gate"] for gate in values)
    assert (
        ase["scores"]["steps"][-1] == 3 and ase["scores"]["by_task"]["semseg"][-1] == ase["metrics"]["semseg"]["miou"]
    )
    gates = ase["shared_gate"]
    assert set(gates["by_task"]) == {"semseg", "edge"} and len(gates["by_layer"]) == 2
    by_task, by_layer = (np.mean(list(lines), axis=0) for lines in (gates["by_task"].values(), gates["by_layer"]))
    assert np.allclose(by_task, by_layer) and np.allclose(by_task, np.mean(gates["gate"], axis=1))
    assert lora["specialisation"]["steps"] == ase["specialisation"]["steps"]
    assert all(0 <= value <= 1 for kind in ("information", "overlap") for value in ase["specialisation"][kind][-1])
    pairs = [(naive, lora), (ase, lora), (ase, naive)]
    for found, (one, other) in zip(results["differences"], pairs, strict=True):
        assert (found["variant"], found["minus"]) == (one["name"], other["name"])
        scores = [variant["metrics"]["semseg"]["miou"] for variant in (one, other)]
        gains = [variant["delta_m"] for variant in (one, other)]
        for difference, values in ((found["tasks"]["semseg"], scores), (found["delta_m"], gains)):
            assert difference["pairs"] == 2 and np.isclose(difference["mean"], np.subtract(*values).mean())
    assert "paired by seed" in (out / "results.md").read_text()
    drawn = {path.name for path in (out / "plots").glob("*.png")}
    assert drawn >= {
        "conflict.png",
        "cosine.png",
        "shared_gate.png",
        "shared_gate_by_task.png",
        "shared_gate_by_layer.png",
    }
    assert drawn >= {"scores.png", "task_information.png", "task_overlap.png"}
    assert set(ase["metrics"]) == {"semseg", "edge"}


def test_results_say_which_versions_made_the_runs(toy, in_process, tmp_path):
    out, only = tmp_path / "out", ["ase", "separate"]
    assert run_study("norm_ablation", data="toy", seeds=1, out=out, only=only, slots=Slots()) == 0
    (one,) = json.loads((out / "results.json").read_text())["made_by"]
    assert one["runs"] == 3 and one["packages"]["torch"] == torch.__version__ and one["torch_threads"] == 1
    environment = out / "runs/ase/seed_0/env.json"
    tree = json.loads(environment.read_text()) | {"git_commit": "0123456789abcdef"}
    environment.write_text(json.dumps(tree))
    assert run_study("norm_ablation", data="toy", seeds=1, out=out, only=only, slots=Slots(), train=False) == 0
    assert [each["runs"] for each in json.loads((out / "results.json").read_text())["made_by"]] == [2, 1]
    lines = (out / "results.md").read_text().splitlines()
    assert lines[-1].startswith("Runs: 1 of commit 0123456, cpu, threads 1, ase-dist ")
    assert lines[-3].startswith("Runs: 2 ")
    for damaged in ('{"packages": [1]}', "{", None):
        environment.unlink() if damaged is None else environment.write_text(damaged)
        assert run_study("norm_ablation", data="toy", seeds=1, out=out, only=only, slots=Slots(), train=False) == 0
        assert (out / "results.md").read_text().splitlines()[-1] == "Runs: 1 of unknown versions."


def test_a_class_that_only_some_runs_predict_is_in_no_mean_iou(toy, in_process, tmp_path):
    """No label shows it: it has an IoU, of 0, in the runs alone that predict a pixel of it."""
    out, only = tmp_path / "out", ["ase", "separate"]

    def collected(*, train=False):
        options = {"overrides": ["eval.every=2"], "slots": Slots(), "train": train}
        assert run_study("norm_ablation", data="toy", seeds=1, out=out, only=only, **options) == 0
        return json.loads((out / "results.json").read_text())

    before = collected(train=True)
    classes = [name for name in before["variants"][0]["metrics"]["semseg"] if name.startswith("iou/")]
    assert before["left_out"] == {} and "left out" not in (out / "results.md").read_text()
    summary = out / "runs/ase/seed_0/summary.json"
    tree = json.loads(summary.read_text())
    scores = tree["metrics"]["semseg"]
    scores["miou"] *= len(classes) / (len(classes) + 1)
    summary.write_text(json.dumps({**tree, "metrics": {**tree["metrics"], "semseg": {**scores, "iou/ghost": 0.0}}}))
    after = collected()
    assert after["left_out"] == {"semseg": ["ghost"]}
    for one, other in zip(after["variants"], before["variants"], strict=True):
        assert one["metrics"]["semseg"].keys() == other["metrics"]["semseg"].keys()
        assert one["metrics"]["semseg"]["miou"] == pytest.approx(other["metrics"]["semseg"]["miou"], rel=1e-12)
        curves = [np.array(each["scores"]["by_task"]["semseg"]) for each in (one, other)]
        np.testing.assert_allclose(*curves, rtol=1e-12)
    assert "classes that all runs have an IoU of; left out: ghost" in (out / "results.md").read_text()


def test_the_runs_of_a_transition_start_from_the_export_of_a_run_of_one_task(toy, in_process, tmp_path):
    out, toy = tmp_path / "out", dataclasses.replace(toy, steps=20)
    variants = [v for v in STUDIES["transition"].variants(toy) if not v.name.startswith("lora")]
    jobs = jobs_of(variants, toy, seeds=1, out=out)
    runner = Runner(jobs[::-1], Slots())  # whatever the order, the one that others start from comes first
    assert runner.run() == []
    assert in_process[0] == "first_task/seed_0" and len(in_process) == 3
    assert all("took the backbone" in (job.folder / "train.log").read_text() for job in jobs[1:])
    assert not (jobs[0].run.checkpoints).exists() and jobs[0].export.is_dir()
    assert [job.settings.train.max_steps for job in jobs] == [20, 2, 2]
    assert Runner(jobs_of(variants, toy, seeds=1, out=out), Slots()).waiting == []
    only = [variant.name for variant in variants]
    assert run_study("transition", data="toy", seeds=1, out=tmp_path / "few", steps=20, only=only, slots=Slots()) == 0
    assert ", 2 steps a run" in (tmp_path / "few" / "results.md").read_text()


def test_what_is_done_is_skipped_and_what_differs_is_refused(toy, in_process, tmp_path):
    out, only = tmp_path / "out", ["mtl_vit_lora_32"]
    run_study("resolution", data="toy", seeds=1, out=out, only=only, slots=Slots())
    run_study("resolution", data="toy", seeds=2, out=out, only=only, slots=Slots())
    assert in_process == ["mtl_vit_lora_32/seed_0", "mtl_vit_lora_32/seed_1"]
    assert not list(out.glob("runs/*/*/checkpoints"))
    with pytest.raises(ValueError, match=r"holds a run with train.max_steps = 3, this study wants 4"):
        run_study("resolution", data="toy", seeds=1, out=out, only=only, steps=4, slots=Slots())


def test_a_folder_that_cannot_be_written_is_told_before_the_first_run(toy, in_process, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: cannot write to '.*/file/study' \(Not a directory\); name another"):
        run_study("norm_ablation", data="toy", seeds=1, out=tmp_path / "file" / "study", slots=Slots())
    assert not in_process


def test_tables_of_a_study_that_is_not_done_say_so(toy, in_process, tmp_path):
    out = tmp_path / "out"
    assert run_study("norm_ablation", data="toy", seeds=1, out=out, slots=Slots(), train=False) == 0
    assert not in_process
    assert "Not done: ase/seed_0, renormalised/seed_0" in (out / "results.md").read_text()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("table", {}, "did you mean 'table1'"),
        ("table1", {"data": "scene"}, "did you mean 'scenes'"),
        ("table1", {"seeds": 0}, "--seeds: got 0"),
        ("table1", {"steps": 0}, "--steps: got 0"),
        ("table1", {"only": ["ase"]}, "--only: this study has no variant 'ase'"),
        ("topk", {"overrides": ["model.moe.kk=2"]}, "no such setting"),
        ("topk", {"overrides": ["model.moe.k=5"]}, "model.moe.k: every variant of this study has a value of its own"),
        (
            "topk",
            {"overrides": ["model.moe={k: 5}"]},
            "model.moe.k: every variant of this study has a value of its own",
        ),
        ("norm_ablation", {"overrides": ["model.moe.gating=dense"]}, "model.moe.gating: every variant"),
        ("table1", {"overrides": ["train.backbone_lr_factor=0.5"]}, "train.backbone_lr_factor: every variant"),
        ("table1", {"overrides": ["seed=5"]}, "seed: in a study --seeds decides it"),
        ("table1", {"overrides": ["output=x"]}, "output: in a study --out decides it"),
        ("table1", {"overrides": ["train.max_steps=5"]}, "train.max_steps: in a study --steps decides it"),
        ("table1", {"overrides": ["train.epochs=5"]}, "train.epochs: in a study --steps decides it"),
    ],
)
def test_what_cannot_be_run_is_refused(name, options, sentence, toy, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        run_study(name, **{"data": "toy", "seeds": 1, "out": tmp_path, "slots": Slots(), **options})


def test_a_learning_rate_given_to_a_study_keeps_the_factors_that_baselines_need(toy, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ase_dist")
    variants = STUDIES["table1"].variants(toy)
    given = ["train.lr=0.02", "model.moe.k=5", "model.lora_rank=2", "eval.pictures=1"]
    jobs = {job.variant: job.settings for job in jobs_of(variants, toy, seeds=1, out=tmp_path, overrides=given)}
    for variant in variants:
        baseline, settings = find_baseline(variant.baseline), jobs[variant.name]
        assert settings.train.lr == pytest.approx(0.02 * baseline.lr_factor), variant.name
        assert settings.train.backbone_lr_factor == baseline.backbone_lr_factor
        assert settings.eval.pictures == 1
    assert jobs["mtl_resnet18"].train.lr == pytest.approx(0.005) and jobs["ase_16_3_1_4"].train.lr == 0.02
    assert jobs["ase_16_3_1_4"].model.moe.k == 3 and jobs["ase_16_3_1_4"].model.lora_rank == 2
    assert jobs["mtl_vit"].model.lora_rank == 0
    assert "train.lr = 0.005 in stl_resnet18, mtl_resnet18, mtan" in caplog.text
    assert "model.lora_rank = 0 in stl_resnet18" in caplog.text


@pytest.mark.parametrize(
    ("options", "jobs", "devices"),
    [
        ([], 1, ()),
        (["--devices", "0,1,2,3"], 4, ("0", "1", "2", "3")),
        (["--devices", "0,1", "--jobs", "6"], 6, ("0", "1")),
        (["--jobs", "3"], 3, ()),
    ],
)
def test_there_is_a_job_for_each_device_unless_said_otherwise(options, jobs, devices, monkeypatch):
    asked = {}
    monkeypatch.setattr("ase_dist.study.run.run_study", lambda name, **given: asked.update(given) or 0)
    assert study.main(["table1", *options]) == 0
    assert asked["slots"] == Slots(jobs, devices)
