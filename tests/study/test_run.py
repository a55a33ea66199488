"""Every study at toy size: all of its variants run, once, and its table, CSV and plots show them."""

import csv
import json

import pytest
from PIL import Image

from ase_dist.study.run import run_study
from ase_dist.study.runner import Slots
from ase_dist.study.variants import STUDIES

pytestmark = pytest.mark.single_gpu

SOME = {  # where all variants would take long and say nothing more
    "table1": ["stl_resnet18", "cross_stitch", "mtan", "nddr_cnn", "stl_vit", "mtl_vit", "mtl_vit_lora",
               "naive_16_3_1_4", "ase_16_3_1_4", "m3vit_ffn", "mod_squad_ffn"],
    "topk": ["lora_moe_k3", "lora_moe_k7", "ase_k3", "ase_k7"],
    "router_cost": ["n16", "n256"],
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
    assert {v["name"] for v in variants} == {n.split("/")[0] for n in in_process}
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
    run_study("naive_vs_ase", data="toy", seeds=2, out=out, only=["ase_16_3_1_4_pair"], slots=Slots())
    lora, ase = json.loads((out / "results.json").read_text())["variants"]
    assert "conflict" not in lora and "shared_gate" not in lora
    assert ase["conflict"]["steps"] == [1, 2, 3] and len(ase["conflict"]["cosine"][0]) == 2
    assert all(0 < gate < 1 for values in ase["shared_gate"]["gate"] for gate in values)
    assert {path.name for path in (out / "plots").glob("*.png")} >= {"conflict.png", "cosine.png", "shared_gate.png"}
    assert set(ase["metrics"]) == {"semseg", "edge"}


def test_what_is_done_is_skipped_and_what_differs_is_refused(toy, in_process, tmp_path):
    out, only = tmp_path / "out", ["mtl_vit_lora_32"]
    run_study("resolution", data="toy", seeds=1, out=out, only=only, slots=Slots())
    run_study("resolution", data="toy", seeds=2, out=out, only=only, slots=Slots())
    assert in_process == ["mtl_vit_lora_32/seed_0", "mtl_vit_lora_32/seed_1"]
    assert not list(out.glob("runs/*/*/checkpoints"))
    with pytest.raises(ValueError, match=r"holds a run with train.max_steps = 3, this study wants 4"):
        run_study("resolution", data="toy", seeds=1, out=out, only=only, steps=4, slots=Slots())


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
    ],
)
def test_what_cannot_be_run_is_refused(name, options, sentence, toy, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        run_study(name, **{"data": "toy", "seeds": 1, "out": tmp_path, "slots": Slots(), **options})
