"""Numbers out of records of any form; thinning and smoothing against slow references."""

import math

import numpy as np
import pytest

from ase_dist.training.record.records import Records, Series, array, number, task_facts

pytestmark = pytest.mark.single_gpu
NAN = math.nan


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (2.5, 2.5),
        (None, NAN),
        ("3", NAN),
        (True, NAN),
        ([1], NAN),
        (math.inf, NAN),
        (10**400, NAN),
        ({}, NAN),
    ],
)
def test_only_finite_numbers_are_numbers(value, expected):
    assert number(value) == pytest.approx(expected, nan_ok=True)


def test_ragged_and_foreign_arrays_are_none():
    assert array([[1, None], [2, 3]], ndim=2)[1].tolist() == [2.0, 3.0]
    assert math.isnan(array([[1, None]], ndim=2)[0, 1])
    for value in ([[1], [2, 3]], [["x"]], [1, 2], None, {}, "a", [[[1]]]):
        assert array(value, ndim=2) is None


def test_series_hold_what_is_there_and_nan_for_what_is_no_number():
    lines = [{"kind": "train", "step": s, "losses": losses} for s, losses in
             enumerate([{"a": 1.0}, {"b": 2.0}, {"a": None}, {"a": "x"}, None, [], {"a": 5}])]  # fmt: skip
    series = Records(lines).series("train", "losses", "a")
    assert series.steps == [0, 2, 3, 6]
    assert series.values == pytest.approx([1.0, NAN, NAN, 5.0], nan_ok=True)
    assert series.last == 5.0
    assert not Records(lines).series("train", "losses", "c") and not Series([1.0], [NAN])


def test_arrays_of_another_shape_than_the_last_are_left_out():
    lines = [
        {"kind": "train", "step": s, "x": x} for s, x in enumerate([[[1]], [[1, 2]], "no", [[3, 4]], [[5], [6, 7]]])
    ]
    assert {step: found.tolist() for step, found in Records(lines).arrays("train", "x", ndim=2).items()} == {
        1: [[1, 2]], 3: [[3, 4]]}  # fmt: skip


def test_what_a_run_line_says_in_odd_forms_counts_for_nothing():
    records = Records([{"kind": "run", "step": 0, "tasks": "semseg", "shared_experts": [3, "x", None], "data": 5}])
    assert (records.tasks, records.shared, records.data) == ([], [3], "5")
    assert Records([]).last_step == -1


@pytest.mark.parametrize("length", [1, 5, 39, 40, 200])
def test_smoothing_is_the_mean_of_the_known_values_in_the_window(length):
    values = np.random.default_rng(0).normal(size=length)
    values[::7] = NAN
    half = length // 40
    smoothed = Series(list(range(length)), values.tolist()).smoothed().values
    for i in range(length):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        assert smoothed[i] == pytest.approx(np.mean(window) if window else NAN, nan_ok=True)


def test_thinning_keeps_the_ends_the_spikes_and_the_gaps():
    values = [1.0 + i % 3 for i in range(5000)]
    values[1234], values[4321], values[2500] = 99.0, -99.0, NAN
    thin = Series(list(range(5000)), values).thinned(300)
    assert len(thin.values) <= 300
    assert (thin.steps[0], thin.steps[-1]) == (0, 4999) and thin.steps == sorted(thin.steps)
    kept = dict(zip(thin.steps, thin.values, strict=True))
    assert kept[1234] == 99.0 and kept[4321] == -99.0 and math.isnan(kept[2500])
    short = Series([1.0], [2.0])
    assert short.thinned(300) is short


def test_a_task_has_the_facts_of_its_table_or_none():
    assert task_facts("scenes", "edge").higher_is_better is False
    assert task_facts("nyud", "depth").arrow == "\u2193"
    assert task_facts("elsewhere", "semseg").metric == "miou"
    unknown = task_facts("scenes", "<b>", metrics=["f", "g"])
    assert (unknown.title, unknown.metric, unknown.higher_is_better, unknown.arrow) == ("<b>", "f", None, "")
    assert task_facts("scenes", "semseg", metrics=["accuracy"]).higher_is_better is None
