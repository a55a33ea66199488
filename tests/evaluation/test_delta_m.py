"""Delta_m reproduces the paper's printed column and refuses to compare different tasks."""

import pytest

from ase_dist.evaluation.delta_m import PAPER_HIGHER_IS_BETTER, PAPER_REFERENCE, PAPER_TABLE, delta_m, directions
from ase_dist.tasks import PASCAL_TASKS

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("row", PAPER_TABLE, ids=[row.method for row in PAPER_TABLE])
def test_the_papers_column_follows_from_its_scores(row):
    value = delta_m(row.scores, PAPER_REFERENCE.scores, higher_is_better=PAPER_HIGHER_IS_BETTER)
    assert value == pytest.approx(row.delta_m, abs=0.0101)


def test_a_row_of_nyud_that_its_table_prints_otherwise():
    """M-ViT of M3ViT's table (arXiv 2210.14793): 40.9 mIoU and 0.631 m over 43.9 and 0.585, printed as -6.27."""
    directions = {"semseg": True, "depth": False}
    value = delta_m({"semseg": 40.9, "depth": 0.631}, {"semseg": 43.9, "depth": 0.585}, higher_is_better=directions)
    assert value == pytest.approx(-7.35, abs=0.005)


def test_lower_is_better_turns_the_sign():
    assert delta_m({"a": 9.0}, {"a": 10.0}, higher_is_better={"a": False}) == pytest.approx(10)
    assert delta_m({"a": 9.0}, {"a": 10.0}, higher_is_better={"a": True}) == pytest.approx(-10)


def test_directions_come_from_the_task_table():
    assert directions(PASCAL_TASKS.values()) == {
        "semseg": True, "human_parts": True, "saliency": True, "edge": False, "normals": False,
    }  # fmt: skip
    assert set(PAPER_HIGHER_IS_BETTER) == set(PASCAL_TASKS)


@pytest.mark.parametrize("argument", ["scores", "reference", "higher_is_better"])
def test_four_tasks_where_five_ran_is_an_error_that_names_the_missing_one(argument):
    arguments = {
        "scores": dict(PAPER_TABLE[1].scores),
        "reference": dict(PAPER_REFERENCE.scores),
        "higher_is_better": dict(PAPER_HIGHER_IS_BETTER),
    }
    del arguments[argument]["edge"]
    with pytest.raises(ValueError, match=r"Delta_m over \d tasks where the .* only one side has \['edge'\]"):
        delta_m(arguments["scores"], arguments["reference"], higher_is_better=arguments["higher_is_better"])


@pytest.mark.parametrize(("score", "base"), [(float("nan"), 1.0), (1.0, 0.0), (1.0, float("inf"))])
def test_scores_that_give_no_gain_are_named(score, base):
    with pytest.raises(ValueError, match=f"got {score} for semseg against {base}"):
        delta_m({"semseg": score}, {"semseg": base}, higher_is_better={"semseg": True})


def test_no_task_at_all_is_an_error():
    with pytest.raises(ValueError, match="no task"):
        delta_m({}, {}, higher_is_better={})
