"""Tables: the same cells in Markdown, LaTeX, CSV and plain text; numbers to the right, nothing read as mark-up."""

from __future__ import annotations

import csv
import io
import math
import re

from ase_dist.tables import Column, Measured, Table, latex_text


def test_numbers_stand_to_the_right_and_bars_do_not_split_cells() -> None:
    table = Table(("a|b", "n"), [("x", "1.0"), ("y", "-")]).to_markdown()
    assert table.splitlines() == ["| a\\|b | n |", "| --- | ---: |", "| x | 1.0 |", "| y | - |"]


def test_plain_text_has_aligned_columns() -> None:
    rows = [["semseg", 0.123456, 1234567, True], ["human parts", None, 8, "no"]]
    text = Table(["name", "loss", "pixels", "used"], rows, title="Tasks").to_text()
    assert text.isascii() and not text.endswith("\n")
    title, rule, head, _, first, second, end = text.split("\n")
    assert title == "Tasks" and rule == end and set(rule) == {"-"}
    assert head.split() == ["name", "loss", "pixels", "used"]
    assert first.split() == ["semseg", "0.1235", "1,234,567", "True"]
    assert second.split() == ["human", "parts", "-", "8", "no"]
    ends = [line.index(cell) + len(cell) for line, cell in ((head, "pixels"), (first, "1,234,567"), (second, "8"))]
    assert len(set(ends)) == 1  # numbers stand to the right
    assert first.index("True") == head.index("used")


def test_without_rows_there_are_the_headings() -> None:
    empty = Table(["a", "bb"], [], title="Empty")
    assert empty.to_text().split("\n") == ["Empty", "-----", "a  bb", "-----", "-----"]
    assert empty.to_markdown() == "| a | bb |\n| --- | --- |" and empty.to_csv() == "a,bb\n"


def test_a_heading_has_unit_and_direction() -> None:
    columns = [Column("mIoU", "%", True), Column("RMSE", "m", higher_is_better=False), Column("share")]
    assert [column.heading for column in columns] == ["mIoU, % (up)", "RMSE, m (down)", "share"]


def test_the_best_of_a_column_is_bold_in_its_own_direction_and_never_nan() -> None:
    rows = [[Measured("2 +- 1", 2.0), Measured("2", 2.0)], [Measured("3", 3.0)] * 2, [Measured("-", math.nan)] * 2]
    columns = [Column("a", higher_is_better=True, mark_best=True), Column("b", higher_is_better=False, mark_best=True)]
    body = Table(columns, rows).to_markdown().splitlines()[2:]
    assert body == ["| 2 +- 1 | **2** |", "| **3** | 3 |", "| - | - |"]
    assert "**" not in Table([Column("a", mark_best=True)], [[Measured("-", math.nan)]]).to_markdown()
    assert "**" not in Table(["a"], [[Measured("1", 1.0)]]).to_markdown()


def test_csv_keeps_whole_numbers_and_what_is_in_text() -> None:
    text = Table(("name", "x"), [('a, "b"\nc', 0.1 + 0.2), ("", None), ("m", Measured("1 +- 2", 1.5))]).to_csv()
    rows = list(csv.reader(io.StringIO(text)))
    assert rows == [["name", "x"], ['a, "b"\nc', "0.30000000000000004"], ["", ""], ["m", "1.5"]]


def test_latex_has_as_many_cells_as_columns_in_every_row_and_groups_above() -> None:
    columns = [Column("method"), Column("mIoU", "%", True, group="A & B"), Column("F", group="C")]
    text = Table(columns, [["x_1", 50.0, "-"], ["y&z", 1, 2]], title="50% of all").to_latex()
    align, body = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)[0]
    rows = [line.strip() for line in body.splitlines() if line.endswith(r" \\")]
    assert align == "lrr" and all(len(re.split(r"(?<!\\)&", row)) == 3 for row in rows)
    assert rows == [
        r" & A \& B & C \\".strip(),
        r"method & mIoU, \% $\uparrow$ & F \\",
        r"x\_1 & 50 & - \\",
        r"y\&z & 1 & 2 \\",
    ]
    assert r"\caption{50\% of all}" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert body.count(rule) == 1


def test_special_characters_stand_for_themselves() -> None:
    assert latex_text(r"50% of a_b\{c}") == r"50\% of a\_b\textbackslash{}\{c\}"
    assert latex_text("Delta_m (up)") == r"$\Delta_m$ $\uparrow$"


def test_without_headings_there_is_no_line_for_them() -> None:
    assert Table(("", ""), [("a", "x y")], title="run").to_text().split("\n") == ["run", "------", "a  x y", "------"]
