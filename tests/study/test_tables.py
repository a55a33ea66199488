"""Numbers of the tables against sums by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from ase_dist.evaluation.seeds import mean_and_spread, paired_difference
from ase_dist.study.collect import _delta_by_seed, task_information, task_overlap
from ase_dist.study.tables import as_csv, markdown
from ase_dist.study.variants import STUDIES, references
from ase_dist.tasks import DATA_SETS

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
    "differences": [],
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


def test_differences_are_paired_by_seed_and_called_none_where_the_interval_holds_0():
    rng = np.random.default_rng(0)
    seeds, hard = range(5), rng.normal(size=5)  # what a seed does to both rows
    reference = {i: 40 + 10 * hard[i] for i in seeds}
    better = {i: reference[i] + 1 + 0.1 * rng.normal() for i in seeds}
    found = paired_difference({**better, 7: 1.0}, {**reference, 8: 2.0})  # seeds of one row alone do not count
    wanted = stats.ttest_rel(list(better.values()), list(reference.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high)) and found.pairs == 5
    assert not found.is_none and paired_difference(reference, better).high < 0
    assert paired_difference(dict(enumerate(hard)), dict.fromkeys(seeds, 0.0)).is_none
    alone = paired_difference({0: 1.0, 1: None, 2: math.nan}, {0: 0.5, 1: 0.5, 2: 0.5})
    assert (alone.mean, alone.pairs) == (0.5, 1) and alone.is_none and math.isnan(alone.low)


def test_the_second_table_tells_none_from_a_difference():
    def found(low, high):
        return {"mean": (low + high) / 2, "low": low, "high": high, "pairs": 3}

    variants = [variant(name, [10.0, 20.0, 15.0], [0.0] * 3) for name in "abc"]
    differences = [
        {"variant": "b", "minus": "a", "tasks": {"semseg": found(0.5, 1.5)}, "delta_m": found(-1.0, 3.0)},
        {"variant": "c", "minus": "b", "tasks": {"semseg": found(-2.5, -1.5)}, "delta_m": found(1.0, 3.0)},
    ]
    text = markdown("T", "toy", {**RESULTS, "variants": variants, "differences": differences})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "minus" in line]
    assert cells == [
        ["row b minus row a", "+1.00 [+0.50, +1.50]", "none: +1.00 [-1.00, +3.00]", "3"],
        ["row c minus row b", "-2.00 [-2.50, -1.50]", "+2.00 [+1.00, +3.00]", "3"],
    ]


def test_specialisation_against_sums_over_tasks_and_experts():
    load = np.random.default_rng(0).random((2, 3, 5))
    for layer, (information, overlap) in enumerate(zip(task_information(load), task_overlap(load), strict=True)):
        p = load[layer] / load[layer].sum(axis=1, keepdims=True)
        total = sum(
            p[t, e] / 3 * math.log(p[t, e] / (sum(p[u, e] for u in range(3)) / 3)) for t in range(3) for e in range(5)
        )
        common = [sum(min(p[t, e], p[u, e]) for e in range(5)) for t in range(3) for u in range(t)]
        assert information == pytest.approx(total / math.log(3)) and overlap == pytest.approx(sum(common) / 3)
    own, alike = np.eye(4)[None], np.ones((1, 4, 8))
    assert task_information(own) == pytest.approx(1) and task_overlap(own) == 0
    assert task_information(alike) == pytest.approx(0) and task_overlap(alike) == pytest.approx(1)


def test_csv_has_a_line_a_value():
    lines = as_csv(RESULTS).splitlines()
    assert lines[0] == "variant,label,seed,task,metric,value,tolerance"
    assert "a,row a,1,semseg,miou,20.0," in lines and "b,row b,0,,delta_m,100.0," in lines
    assert not [line for line in lines if line.startswith("c,")]
    edges = {"edge": {"bce": [0.1, 0.2], "ods_f": [50.0, 51.0]}}
    nyud = {"data": "nyud", "tasks": ["edge"], "variants": [variant("a", [1.0, 2.0], None, metrics=edges)]}
    lines = as_csv(nyud).splitlines()
    assert "a,row a,1,edge,ods_f,51.0,0.011" in lines and "a,row a,0,edge,bce,0.1," in lines


def test_the_tables_say_which_delta():
    text = markdown("Title", "toy data", {**RESULTS, "delta": "delta_p"})
    assert "Delta_p is relative to" in text and "Delta_p, %" in text and "Delta_m" not in text
    assert "b,row b,0,,delta_p,100.0," in as_csv({**RESULTS, "delta": "delta_p"}).splitlines()


def test_delta_p_of_a_seed_is_over_all_scores_of_a_task():
    table = DATA_SETS["nyuv2_13"].tasks
    base = {"semseg": {"miou": [40.0], "accuracy": [80.0]}, "depth": {"abs_err": [0.5], "rel": [0.25], "rmse": [1.0]}}
    ours = {"semseg": {"miou": [44.0], "accuracy": [80.0]}, "depth": {"abs_err": [0.4], "rel": [0.25], "rmse": [9.0]}}
    one, other = ({"metrics": metrics, "seeds": [0]} for metrics in (ours, base))
    assert _delta_by_seed(one, other, table, "delta_p") == [pytest.approx((10 / 2 + 20 / 2) / 2)]
    assert _delta_by_seed(one, other, table, "delta_m") == [pytest.approx((10 + 20) / 2)]
    del ours["depth"]["rel"]
    assert _delta_by_seed(one, other, table, "delta_p") == [None]


def test_every_variant_has_a_reference_with_its_tasks():
    preset = SimpleNamespace(steps=100, pair=("a", "b"), sizes=(64, 96))
    for name, study in STUDIES.items():
        variants = study.variants(preset)
        by_name = {v.name: v for v in variants}
        assert len(by_name) == len(variants), name
        for own, reference in references(study, preset, variants).items():
            assert by_name[own].tasks == by_name[reference].tasks
