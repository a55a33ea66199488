"""Tables as Markdown, LaTeX (booktabs), CSV and plain text: the one place that writes them.

Control characters in cells, such as those in the name of a file, are replaced (see ``ase_dist.printable``).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ase_dist.printable import MARK, printable

MISSING = "-"  # how a cell without a value is shown
UP, DOWN = " (up)", " (down)"
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
LATEX_MATH = {"Delta_m": r"$\Delta_m$", "Delta_p": r"$\Delta_p$", UP: r" $\uparrow$", DOWN: r" $\downarrow$"}


@dataclass(frozen=True)
class Column:
    """How a column is headed: ``title``, ``unit`` after a comma, and an arrow where one direction is better.

    ``group`` stands above the heading in LaTeX. With ``mark_best`` the best of the column's ``Measured`` cells is bold
    in Markdown; NaN is never the best.
    """

    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    group: str = ""
    mark_best: bool = False

    @property
    def heading(self) -> str:
        """Title, unit and arrow: ``mIoU, % (up)``."""
        arrow = {True: UP, False: DOWN, None: ""}[self.higher_is_better]
        return (f"{self.title}, {self.unit}" if self.unit else self.title) + arrow


class Measured(NamedTuple):
    """A cell with its own text, such as a mean with its deviation, that is compared with others by ``value``."""

    text: str
    value: float


Cell = str | float | None | Measured


@dataclass(frozen=True)
class Table:
    """Columns (a string is a column with that heading) and rows with a cell for each of them.

    Numbers are written with four significant digits, integers with commas, None as "-". A column stands to the right
    where all of its cells are numbers, or text that reads as a number. ``title`` heads plain text and is the caption
    in LaTeX.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""

    def to_markdown(self) -> str:
        """A Markdown table without a last newline; a bar in a cell is escaped, the best of a column is bold."""
        rows = [list(row) for row in self._texts()]
        for i, column in enumerate(self._columns()):
            for row in self._best(i) if column.mark_best else ():
                rows[row][i] = f"**{rows[row][i]}**"
        align = ["---:" if right else "---" for right in self._is_right(rows)]
        heads, *body = ([cell.replace("|", r"\|") for cell in row] for row in (self._headings(), *rows))
        return "\n".join(f"| {' | '.join(line)} |" for line in (heads, align, *body))

    def to_latex(self) -> str:
        """A ``table`` environment that needs the package booktabs; what TeX would read as its own is escaped."""
        rows = self._texts()
        align = "".join("r" if right else "l" for right in self._is_right(rows))
        groups = [column.group for column in self._columns()]
        heads = [groups, self._headings()] if any(groups) else [self._headings()]
        lines = ["    " + " & ".join(latex_text(cell) for cell in row) + r" \\" for row in (*heads, *rows)]
        return "\n".join(
            [
                r"\begin{table}",
                r"  \centering",
                f"  \\caption{{{latex_text(self.title)}}}",
                f"  \\begin{{tabular}}{{{align}}}",
                r"    \toprule",
                *lines[: len(heads)],
                r"    \midrule",
                *lines[len(heads) :],
                r"    \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
            ]
        )

    def to_csv(self) -> str:
        """Headings and rows as CSV; numbers at full precision, None as nothing."""
        buffer = io.StringIO()
        rows = [[_csv_value(cell) for cell in row] for row in self.rows]
        csv.writer(buffer, lineterminator="\n").writerows([self._headings(), *rows])
        return buffer.getvalue()

    def to_text(self) -> str:
        """Aligned columns of plain text under the title, without a last newline: for logs, terminals and files."""
        rows = self._texts()
        right = self._is_right(rows)
        widths = [max(map(len, column)) for column in zip(self._headings(), *rows, strict=True)]
        heads, *body = (
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            for row in (self._headings(), *rows)
        )
        rule = "-" * len(heads)
        top = [rule, heads, rule] if heads.strip() else [rule]  # a table may need no headings
        return "\n".join(line.rstrip() for line in [printable(self.title), *top, *body, rule])

    def _columns(self) -> list[Column]:
        return [Column(column) if isinstance(column, str) else column for column in self.columns]

    def _headings(self) -> list[str]:
        return [printable(column.heading) for column in self._columns()]

    def _texts(self) -> list[list[str]]:
        return [[_text(cell) for cell in row] for row in self.rows]

    def _is_right(self, texts: Sequence[Sequence[str]]) -> list[bool]:
        """Which columns stand to the right: those that hold nothing but numbers, shown as ``texts``."""
        pairs = [list(zip(row, shown, strict=True)) for row, shown in zip(self.rows, texts, strict=True)]
        return [bool(pairs) and all(_is_number(*row[i]) for row in pairs) for i in range(len(self.columns))]

    def _best(self, column: int) -> list[int]:
        """The rows whose measured value in ``column`` is the best one."""
        cells = [row[column] for row in self.rows]
        values = [cell.value if isinstance(cell, Measured) else math.nan for cell in cells]
        known = [value for value in values if math.isfinite(value)]
        choose = min if self._columns()[column].higher_is_better is False else max
        return [row for row, value in enumerate(values) if known and value == choose(known)]


def latex_text(text: str) -> str:
    """``text`` with TeX's special characters escaped, control characters removed; Delta_m, arrows as mathematics."""
    text = _escaped(printable(text).replace(MARK, ""))
    for plain, mathematics in LATEX_MATH.items():
        text = text.replace(_escaped(plain), mathematics)
    return text


def _escaped(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(character, character) for character in text)


def _text(cell: Cell) -> str:
    if cell is None:
        return MISSING
    if isinstance(cell, Measured):
        return printable(cell.text)
    if isinstance(cell, (str, bool)):
        return printable(str(cell))
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"


def _csv_value(cell: Cell) -> str | float | None:
    if isinstance(cell, Measured):
        return cell.value
    return printable(cell, lines=True) if isinstance(cell, str) else cell


def _is_number(cell: Cell, text: str) -> bool:
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return True
    try:
        float(text)
    except ValueError:
        return text == MISSING
    return True
