"""Heat maps: every cell's colour and number, the frames that are kept, odd records."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from ase_dist.report.heatmaps import (
    LEVELS,
    MAX_FRAMES,
    MAX_NUMBERS,
    UNIT,
    chosen_steps,
    draw_matrix,
    heat_maps,
    level,
    palette,
)
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.record.records import Records
from tests.report.conftest import EXPERTS, LAYERS, SHARED, STEPS, TASKS, load_at, write_metrics

pytestmark = pytest.mark.single_gpu


@pytest.fixture
def records(tmp_path):
    write_metrics(tmp_path)
    return Records(read_metrics(tmp_path / "metrics.jsonl"))


def test_the_numbers_of_all_frames_are_there(records):
    data = json.loads(str(heat_maps(records).json))
    assert data["labels"] == [f"step {s}, {'1 epoch' if s // 3 == 1 else f'{s // 3} epochs'} done" for s in STEPS]
    for values, step in zip(data["values"]["expert_load"], STEPS, strict=True):
        assert np.abs(np.array(values) / UNIT - load_at(step).ravel()).max() <= 0.5 / UNIT
    assert (data["experts"], data["tops"]["expert_load"]) == (EXPERTS, 1.0)
    assert len(data["tasks"]) == len(TASKS) and data["colors"] == palette() and len(palette()) == LEVELS


def test_without_a_script_the_last_record_is_seen(records):
    maps = heat_maps(records).maps
    assert len(maps) == LAYERS
    for layer, element in enumerate(maps):
        fills = [rect.get("fill") for rect in ElementTree.fromstring(str(element)).iter("rect")]
        expected = [palette()[level(v, 1.0)] for v in load_at(STEPS[-1])[layer].ravel()]
        assert fills == expected and len(set(fills)) > 3


def test_the_shared_experts_are_framed_and_named(records):
    root = ElementTree.fromstring(str(heat_maps(records).maps[0]))
    (frame,) = [path for path in root.iter("path") if path.get("class") == "shared"]
    cells = list(root.iter("rect"))
    assert float(frame.get("d")[1:].split()[0]) == pytest.approx(float(cells[SHARED[0]].get("x")), abs=0.01)
    assert [text.text for text in root.iter("text") if text.get("class") == "shared-name"] == ["S"]


@pytest.mark.parametrize(("count", "numbers"), [(3, 10), (1000, 10), (5000, 5000), (100_000, 10**9)])
def test_frames_are_as_many_as_fit_with_both_ends(count, numbers):
    chosen = chosen_steps(list(range(count)), numbers=numbers)
    assert (chosen[0], chosen[-1]) == (0, count - 1) and chosen == sorted(set(chosen))
    assert len(chosen) <= MAX_FRAMES and (len(chosen) * numbers <= MAX_NUMBERS or len(chosen) == 2)
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 1


def test_colours_rise_with_the_square_root():
    assert [level(v, 4.0) for v in (0.0, 1.0, 4.0, 9.0, float("nan"))] == [
        0,
        round((LEVELS - 1) / 2),
        LEVELS - 1,
        LEVELS - 1,
        0,
    ]


@pytest.mark.parametrize("load", [None, [[1]], "x", [[[1], [2, 3]]], []])
def test_records_without_experts_have_no_maps(load):
    assert heat_maps(Records([{"kind": "train", "step": 1, "expert_load": load}])) is None


def test_values_that_are_missing_are_the_lowest(records):
    lines = [{"kind": "train", "step": 1, "expert_load": [[[None, 0.5]]], "epoch": True}]
    found = heat_maps(Records(lines))
    assert json.loads(str(found.json))["values"]["expert_load"] == [[0, UNIT // 2]]
    assert found.labels == ["step 1"] and found.kinds == {"expert_load": "Activation frequency"}


def test_markup_in_names_stays_inside_the_data():
    lines = [
        {"kind": "run", "step": 0, "tasks": ["</script>"]},
        {"kind": "train", "step": 1, "expert_load": [[[0.1, 0.2]]]},
    ]
    found = heat_maps(Records(lines))
    assert "<" not in found.json and json.loads(str(found.json))["tasks"] == ["</script>"]
    assert "</script>" not in found.maps[0]


def test_the_matrix_says_its_numbers_in_two_colours():
    root = ElementTree.fromstring(str(draw_matrix(np.array([[1.0, -0.25], [0.5, np.nan]]), ["a", "b"])))
    texts = [text.text for text in root.iter("text") if text.get("class") == "number"]
    assert texts == ["\u00b7", "\u22120.25", "+0.50", "\u00b7"]
    fills = [(rect.get("fill"), float(rect.get("fill-opacity"))) for rect in root.iter("rect")]
    assert fills[1][0] != fills[2][0] and fills[0][1] == fills[3][1] == 0 < fills[1][1] < fills[2][1]
