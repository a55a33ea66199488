"""Charts: where points lie, gaps, ticks, bands, and what the script is given."""

import json
import math
import re
from xml.etree import ElementTree

import pytest

from ase_dist.report.charts import BOTTOM, HEIGHT, LEFT, POINTS, RIGHT, TOP, WIDTH, Chart, Line
from ase_dist.training.record.records import Series

pytestmark = pytest.mark.single_gpu
NAN = math.nan


def paths(chart, name):
    root = ElementTree.fromstring(str(chart.svg))
    return [path for path in root.iter("path") if name in path.get("class").split()]


def points(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.get("d"))]


def test_points_lie_where_their_values_say():
    chart = Chart("a", [Line(Series([0, 5, 10], [1.0, 4.0, 2.0]), "#123456", "a")])
    (line,) = paths(chart, "line")
    assert line.get("stroke") == "#123456"
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT) and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(1 / 3, abs=0.01)  # upwards
    assert TOP < y1 < y2 < y0 < HEIGHT - BOTTOM


def test_a_missing_value_is_a_gap_and_a_lone_point_is_seen():
    chart = Chart("a", [Line(Series([0, 1, 2, 3], [1.0, NAN, 2.0, 3.0]))])
    assert re.findall("[ML]", paths(chart, "line")[0].get("d")) == ["M", "M", "L"]
    alone = Chart("a", [Line(Series([7], [2.0]))])
    assert len(points(paths(alone, "dots")[0])) == 1
    assert 0 < points(paths(alone, "dots")[0])[0][0] < WIDTH


@pytest.mark.parametrize("values", [[3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [-1e8, 1e8]])
def test_any_range_has_ticks_inside_the_picture(values):
    root = ElementTree.fromstring(str(Chart("a", [Line(Series([0, 1], values))]).svg))
    texts = list(root.iter("text"))
    assert any(text.get("text-anchor") == "end" and text.text for text in texts)
    assert all(0 <= float(text.get("y")) <= HEIGHT for text in texts)


def test_zero_is_in_sight_where_asked_for():
    line = Line(Series([0, 1], [5.0, 6.0]))
    labels = [
        [t.text for t in ElementTree.fromstring(str(Chart("a", [line], zero=z).svg)).iter("text")]
        for z in (True, False)
    ]
    assert "0" in labels[0][:-2] and "0" not in labels[1][:-2]


def test_a_band_lies_around_its_line():
    chart = Chart("a", [Line(Series([0, 1], [5.0, 6.0]), "#0072b2", "x", spread=[1.0, 0.5])])
    outline, line = points(paths(chart, "band")[0]), points(paths(chart, "line")[0])
    assert outline[0][1] < line[0][1] < outline[-1][1] and len(outline) == 4


def test_long_series_are_thinned_and_only_named_lines_answer():
    many = Series([float(i) for i in range(5000)], [math.sin(i / 50) for i in range(5000)])
    chart = Chart("a", [Line(many, style="pale"), Line(many, label="mean")])
    assert all(len(points(path)) <= POINTS for path in paths(chart, "line"))
    hover = json.loads(chart.hover)
    assert [name for name, _ in hover["lines"]] == ["mean"] and len(hover["lines"][0][1]) <= POINTS
    assert hover["x"] == [0, 4999]


def test_names_are_escaped():
    chart = Chart("<script>alert(1)</script>", [Line(Series([0, 1], [1.0, 2.0]))])
    assert "<script" not in chart.svg and ElementTree.fromstring(str(chart.svg)).get("aria-label").startswith(
        "<script>"
    )


def test_without_values_there_is_no_chart():
    assert not Chart("a", [Line(Series([], [])), Line(Series([1], [NAN]))])
