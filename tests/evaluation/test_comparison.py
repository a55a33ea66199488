"""Gains over a reference: the paper's rows by way of their own scores, and what cannot be compared."""

import math

import pytest

from ase_dist.evaluation.comparison import Reference, compare, paper_reference
from ase_dist.evaluation.delta_m import PAPER_METRICS, PAPER_TABLE
from ase_dist.tasks import NYUD_TASKS, PASCAL_TASKS

pytestmark = pytest.mark.single_gpu
TASKS = tuple(PASCAL_TASKS.values())


def results_of(row):
    return {task: {"bce": 0.05, PAPER_METRICS[task]: value} for task, value in row.scores.items()}


@pytest.mark.parametrize("row", PAPER_TABLE, ids=[row.method for row in PAPER_TABLE])
def test_the_papers_rows_have_their_printed_delta_m(row):
    comparison = compare(TASKS, results_of(row), paper_reference())
    assert comparison.value == pytest.approx(row.delta_m, abs=0.0101) and comparison.left_out == ()
    assert sum(gain.percent for gain in comparison.gains) / 5 == pytest.approx(comparison.value)
    assert {gain.task.name: gain.key for gain in comparison.gains} == PAPER_METRICS


def test_fewer_degrees_are_a_gain():
    tasks = (PASCAL_TASKS["normals"],)
    comparison = compare(tasks, {"normals": {"mean": 13.86}}, paper_reference())
    assert comparison.value == pytest.approx(10) and comparison.gains[0].percent == pytest.approx(10)
    assert comparison.left_out == ("edge", "human_parts", "saliency", "semseg")


def test_edges_are_compared_by_what_both_sides_have():
    tasks = (PASCAL_TASKS["edge"],)
    ours, theirs = {"edge": {"bce": 0.04, "ods_f": 55.0}}, {"edge": {"bce": 0.05, "ods_f": 50.0}}
    assert compare(tasks, ours, Reference("x", "", theirs)).gains[0].key == "ods_f"
    for other in ({"bce": 0.05}, {"bce": 0.05, "ods_f": math.nan}):
        gain = compare(tasks, ours, Reference("x", "", {"edge": other})).gains[0]
        assert gain.key == "bce" and gain.percent == pytest.approx(20)  # lower is better


def test_boundaries_counted_with_other_tolerances_are_not_compared():
    ours, theirs = {"edge": {"bce": 0.04, "ods_f": 55.0}}, {"edge": {"bce": 0.05, "ods_f": 50.0}}
    for task in (PASCAL_TASKS["edge"], NYUD_TASKS["edge"]):
        same = Reference("x", "", theirs, {"edge": task.tolerance})
        assert compare([task], ours, same).value == pytest.approx(10)
    with pytest.raises(ValueError, match=r"within 0\.0075 of the diagonal in STL, ResNet-18.*, within 0\.011 here"):
        compare([NYUD_TASKS["edge"]], ours, paper_reference())
    other = Reference("x", "", theirs, {"edge": 0.011})
    gain = compare([PASCAL_TASKS["edge"]], {"edge": {"bce": 0.04}}, other).gains[0]  # without odsF there is no conflict
    assert gain.key == "bce" and gain.percent == pytest.approx(20)


@pytest.mark.parametrize(
    ("tasks", "results", "scores", "message"),
    [
        (["edge"], {"edge": {"bce": 0.1}}, {"edge": {"ods_f": 50.0}}, r"scores edge by ods_f.*add --edge-ods"),
        (["semseg"], {"semseg": {"miou": 1.0}}, {"semseg": {"accuracy": 50.0}}, r"scores semseg by accuracy.*mIoU"),
        (["semseg"], {"semseg": {"miou": 1.0}}, {"edge": {"bce": 1.0}}, r"a row has no task 'semseg', it has edge"),
        (["semseg"], {"semseg": {"miou": math.nan}}, {"semseg": {"miou": 1.0}}, r"Delta_m: got nan for semseg"),
    ],
)
def test_what_cannot_be_compared_is_told(tasks, results, scores, message):
    with pytest.raises(ValueError, match=message):
        compare([PASCAL_TASKS[name] for name in tasks], results, Reference("a row", "", scores))
