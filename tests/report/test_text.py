"""Numbers as text."""

import math

import pytest

from ase_dist.report.text import DASH, MINUS, brief, many, plural, significant, size

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (1, "1.000"), (12.3456, "12.35"), (0.0458123, "0.04581"), (1234567.0, "1,234,567"),
        (-5.0, MINUS + "5.000"),
        (1e-7, "1.000e-07"), (3e12, "3.000e+12"), (None, DASH), (math.nan, DASH), (math.inf, DASH), (99.996, "100.00"),
    ],
)  # fmt: skip
def test_significant(value, expected):
    assert significant(value) == expected


@pytest.mark.parametrize("value", [1.2345e-3, 0.5, 7.77, 123.456, 98765.4])
def test_significant_digits_say_the_value_to_their_number(value):
    assert float(significant(value).replace(",", "")) == pytest.approx(value, rel=5e-4)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2_210_000_000, "2.21 GB"), (math.nan, DASH), (None, DASH)],
)
def test_size(count, expected):
    assert size(count) == expected


def test_counts():
    assert [many(3_769_457), many(999), many(1.5e12), many(None)] == ["3.77 M", "999", "1.5 T", DASH]
    assert [plural(1, "step"), plural(4000, "step"), plural(2, "entry", "entries")] == [
        "1 step",
        "4,000 steps",
        "2 entries",
    ]
    assert [brief(0.30000000000000004), brief(-0.5), brief(1500)] == ["0.3", MINUS + "0.5", "1500"]
