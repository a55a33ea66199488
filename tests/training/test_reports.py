"""The table of an evaluation: each task's own metric, and odsF beside the cross-entropy of edges where there is one."""

import pytest

from ase_dist.tasks import PASCAL_TASKS
from ase_dist.training.record.reports import result_table

pytestmark = pytest.mark.single_gpu
TASKS = (PASCAL_TASKS["semseg"], PASCAL_TASKS["edge"])
TRIVIAL = {"semseg": {"miou": 3.5}, "edge": {"bce": 0.05}}
NOW = {"semseg": {"miou": 26.6}, "edge": {"bce": 0.04, "ods_f": 41.2}}


def rows(first):
    """The cells of each row, the columns being two or more spaces apart."""
    lines = result_table("t", TASKS, NOW, TRIVIAL, first).splitlines()[4:-1]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_ods_has_a_row_of_its_own_without_a_trivial_value():
    assert rows(None) == [
        ["Semantic segmentation", "mIoU %", "higher", "3.5", "-", "26.6"],
        ["Edges", "BCE", "lower", "0.05", "-", "0.04"],
        ["Edges", "odsF %", "higher", "-", "-", "41.2"],
    ]


def test_the_first_evaluation_may_have_been_without_it():
    first = {"semseg": {"miou": 8.0}, "edge": {"bce": 0.06}}
    assert [row[4] for row in rows(first)] == ["8", "0.06", "-"]
