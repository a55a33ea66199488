"""Results: first, latest and best in the direction of each task, and the mean gain."""

import math
from dataclasses import asdict

import pytest

from ase_dist.evaluation.delta_m import delta_m
from ase_dist.report.results import gains, other_metrics, result_rows
from ase_dist.tasks import DATA_SETS
from ase_dist.training.record.records import Records
from tests.report.conftest import eval_values

pytestmark = pytest.mark.single_gpu


def evaluated(*values, tasks=("edge", "semseg")):
    run = {"kind": "run", "step": 0, "tasks": list(tasks), "data": "scenes"}
    return Records([run, *({"kind": "eval", "step": 10 * i, **value} for i, value in enumerate(values))])


def scores(miou, bce):
    return {"metrics": {"semseg": {"miou": miou}, "edge": {"bce": bce}}, "trivial": eval_values(0)["trivial"]}


def test_best_is_the_greatest_or_the_least():
    rows = {
        row.facts.name: row for row in result_rows(evaluated(scores(5.0, 0.2), scores(30.0, 0.05), scores(20.0, 0.08)))
    }
    assert list(rows) == ["edge", "semseg"]  # the model's order
    semseg, edge = rows["semseg"], rows["edge"]
    assert (semseg.first, semseg.latest, semseg.best, semseg.best_step) == (5.0, 20.0, (30.0, 10.0), "10")
    assert (edge.first, edge.latest, edge.best, edge.trivial) == (0.2, 0.08, (0.05, 10.0), 0.09)
    assert (semseg.verdict, edge.verdict) == ("beats trivial", "beats trivial")


@pytest.mark.parametrize(
    ("miou", "bce", "verdicts"),
    [(12.0, 0.09, ["as trivial"] * 2), (11.0, 0.1, ["below trivial"] * 2), (None, 0.01, ["", "beats trivial"])],
)
def test_the_verdict_goes_by_the_direction(miou, bce, verdicts):
    rows = result_rows(evaluated(scores(miou, bce), tasks=("semseg", "edge")))
    assert [row.verdict for row in rows] == verdicts


def test_gains_are_delta_m_where_all_tasks_have_a_value():
    records = evaluated(scores(24.0, 0.045), scores(None, 0.01), scores(6.0, 0.18))
    found = gains(result_rows(records))
    directions = {"semseg": True, "edge": False}
    reference = {"semseg": 12.0, "edge": 0.09}
    assert found.steps == [0, 20]
    assert found.values == pytest.approx([
        delta_m({"semseg": 24.0, "edge": 0.045}, reference, higher_is_better=directions),
        delta_m({"semseg": 6.0, "edge": 0.18}, reference, higher_is_better=directions)])  # fmt: skip


def test_without_a_trivial_predictor_there_is_no_gain_and_no_verdict():
    (row,) = result_rows(evaluated({"metrics": {"semseg": {"miou": 3.0}}}))
    assert math.isnan(row.trivial) and row.verdict == "" and not gains([row]) and not gains([])


@pytest.mark.parametrize("odd", [None, 3, [], {"semseg": None}, {"semseg": {"miou": "x"}}, {"semseg": {}}])
def test_odd_metrics_do_no_harm(odd):
    records = evaluated({"metrics": odd, "trivial": odd}, scores(1.0, 1.0), {"metrics": odd})
    assert {row.facts.name for row in result_rows(records)} == {"semseg", "edge"}
    assert len(other_metrics(records)) == 2


def test_every_metric_is_listed():
    listed = dict(other_metrics(evaluated(eval_values(0), eval_values(3), tasks=("semseg",))))
    assert [row[0] for row in listed["Semantic segmentation"]] == ["miou", "accuracy"]
    facts = {"edge": asdict(DATA_SETS["nyud"].tasks["edge"])}
    for recorded, tolerance in ((facts, "0.011"), ({}, "0.0075")):
        run = {"kind": "run", "step": 0, "tasks": ["edge"], "data": "nyud", "task_facts": recorded}
        scored = {"kind": "eval", "step": 3, "metrics": {"edge": {"bce": 0.1, "ods_f": 50.0}}}
        (edges,) = dict(other_metrics(Records([run, scored]))).values()
        assert [row[0] for row in edges] == ["bce", f"ods_f (tolerance {tolerance})"]
    assert listed["Semantic segmentation"][0][1:] == ("12.00", "10.00", "13.00")
