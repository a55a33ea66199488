"""Reports as text: the numbers are in their cells, JSON keeps them whole, and TeX reads nothing that was not meant."""

import json
import math
import re

import pytest

from ase_dist.evaluation.comparison import compare, paper_reference
from ase_dist.evaluation.tables import Report, to_json, to_latex, to_markdown
from ase_dist.tasks import PASCAL_TASKS

pytestmark = pytest.mark.single_gpu

TASKS = tuple(PASCAL_TASKS.values())
RESULTS = {
    "semseg": {"miou": 74.0, "accuracy": 90.123456789, "iou/background": 91.0, "iou/tvmonitor": math.nan},
    "human_parts": {"miou": 60.1},
    "saliency": {"miou": 63.2, "miou_threshold": 0.45, "maxf": 84.0},
    "edge": {"bce": 0.041, "ods_f": 55.3},
    "normals": {"mean": 17.3},
}
FACTS = {"data": "pascal_context", "folder": None, "images": 5105, "input_size": 224}


def report(*, compared=True, title="a_b & c|d {50%} #1 ~ ^ \\ $x$"):
    return Report(title, FACTS, TASKS, RESULTS, compare(TASKS, RESULTS, paper_reference()) if compared else None)


def cells(markdown):
    """Every row of every table as a list of cells."""
    rows = [line for line in markdown.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_markdown_has_every_score_and_the_gains():
    text = to_markdown(report())
    rows = cells(text)
    assert ["Surface normals", "mean angle, deg", "lower", "17.30", "15.40", "-12.34"] in rows
    assert ["Edges", "odsF (tolerance 0.0075), %", "higher", "55.30", "50.80", "+8.86"] in rows
    assert ["Saliency", "maxF (beta^2 = 0.3), %", "84.00"] in rows and ["Edges", "weighted BCE", "0.041"] in rows
    assert ["tvmonitor", "-"] in rows and ["background", "91.00"] in rows
    assert "Delta_m over 5 tasks: +7.50 % relative to STL, ResNet-18 (arXiv 2510.00570)" in text
    assert "- input size: 224" in text and "folder" not in text
    scores = sum(len(values) for values in RESULTS.values())
    assert len(rows) == 1 + 5 + 1 + (scores - 2) + 1 + 2  # three tables, two scores of which are classes'


def test_without_a_reference_there_is_no_gain():
    text = to_markdown(report(compared=False))
    assert "Delta_m" not in text and ["Edges", "odsF (tolerance 0.0075), %", "higher", "55.30"] in cells(text)


def test_tasks_that_only_the_reference_has_are_named():
    tasks = TASKS[:2]
    part = Report("x", FACTS, tasks, RESULTS, compare(tasks, RESULTS, paper_reference()))
    assert "Delta_m over 2 tasks" in to_markdown(part)
    assert "the reference has edge, normals, saliency too" in to_markdown(part)


def test_json_comes_back_whole():
    tree = json.loads(to_json(report()))
    assert tree["results"]["semseg"]["accuracy"] == 90.123456789 and tree["results"]["semseg"]["iou/tvmonitor"] is None
    assert tree["comparison"]["delta_m_percent"] == pytest.approx(7.49, abs=0.01) and tree["images"] == 5105
    assert tree["comparison"]["tasks"]["edge"]["score"] == "ods_f"
    assert json.loads(to_json(report(compared=False)))["comparison"] is None


UNESCAPED = re.compile(r"(?<!\\)[%#_&^~$|<>]")
MEANT = re.compile(r"\$\\(?:Delta_m|uparrow|downarrow)\$")


@pytest.mark.parametrize("compared", [True, False])
def test_latex_escapes_what_is_not_its_own(compared):
    body = to_latex(report(compared=compared)).splitlines()[1:]  # after the comment about the package
    assert sum(line.count(r"\begin{table}") for line in body) == 3
    for line in (MEANT.sub("", line) for line in body):
        row = line.removesuffix(r" \\")
        row = re.sub(r" & ", " ", row) if line.endswith(r" \\") else row
        assert not UNESCAPED.search(row), row
        plain = re.sub(r"\\[{}]", "", row)
        assert plain.count("{") == plain.count("}"), row


def test_every_row_of_a_latex_table_has_as_many_cells_as_columns():
    tables = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", to_latex(report()), re.DOTALL)
    assert len(tables) == 3
    for align, body in tables:
        rows = [line for line in body.splitlines() if line.endswith(r" \\")]
        assert len(rows) > 1 and all(len(re.split(r"(?<!\\)&", row)) == len(align) for row in rows)
        for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
            assert body.count(rule) == 1


def test_latex_has_a_row_per_method():
    text = to_latex(report(title="ours"))
    assert r"STL, ResNet-18 (arXiv 2510.00570) & 60.10 & 51.00 & 63.20 & 50.80 & 15.40 & 0.00 \\" in text
    assert r"ours & 74.00 & 60.10 & 63.20 & 55.30 & 17.30 & +7.50 \\" in text
    assert r"mean angle, deg $\downarrow$ & $\Delta_m$, \% \\" in text
