"""Numbers of the tables against sums by hand."""

import math
from types import SimpleNamespace

import pytest

from ase_dist.evaluation.seeds import mean_and_spread
from ase_dist.study.tables import as_csv, markdown
from ase_dist.study.variants import STUDIES, references

pytestmark = pytest.mark.single_gpu


def variant(name, scores, gains, **more):
    seeds = list(range(len(scores)))
    return {
        "name": name, "label": f"row {name}", "seeds": seeds, "missing": [], "reference": "a", "delta_m": gains,
        "metrics": {"semseg": {"miou": scores}} if scores else {}, "parameters": {"total": 3e6, "trained": 1e6},
        "flops": {"forward": 2e9, "backward": 4e9}, "images_per_second": [2.0, 4.0], "memory_bytes": [1e9], **more,
    }  # fmt: skip


RESULTS = {
    "data": "scenes",
    "tasks": ["semseg"],
    "variants": [variant("a", [10.0, 20.0], [-33.333, 33.333]), variant("b", [30.0], [100.0]),
                 variant("c", [], None, missing=["c/seed_0"], parameters=None)],
}  # fmt: skip


def test_mean_and_sample_deviation():
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([1.0, None, math.nan])[0] == 1.0 and math.isnan(mean_and_spread([1.0])[1])
    assert math.isnan(mean_and_spread([])[0])


def test_markdown_has_means_spreads_the_best_and_what_is_missing():
    lines = markdown("Title", "toy data", RESULTS).splitlines()
    assert lines[0] == "# Title" and "toy data" in lines[2] and "row a" in lines[2]
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if "row" in line and "|" in line
    }
    assert cells["row a"] == ["15.00 +- 7.07", "+0.00 +- 47.14", "1.00", "3.00", "2.00", "3.00", "1.00", "2"]
    assert cells["row b"][:2] == ["**30.00**", "**+100.00**"]
    assert cells["row c"][:4] == ["-", "-", "-", "-"]
    assert lines[-1] == "Not done: c/seed_0."


def test_csv_has_a_line_a_value():
    lines = as_csv(RESULTS).splitlines()
    assert lines[0] == "variant,label,seed,task,metric,value"
    assert "a,row a,1,semseg,miou,20.0" in lines and "b,row b,0,,delta_m,100.0" in lines
    assert not [line for line in lines if line.startswith("c,")]


def test_every_variant_has_a_reference_with_its_tasks():
    preset = SimpleNamespace(steps=100, pair=("a", "b"), sizes=(64, 96))
    for name, study in STUDIES.items():
        variants = study.variants(preset)
        by_name = {v.name: v for v in variants}
        assert len(by_name) == len(variants), name
        for own, reference in references(study, preset, variants).items():
            assert by_name[own].tasks == by_name[reference].tasks
