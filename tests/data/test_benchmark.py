"""The benchmark of reading runs, packs, and tells the time of every part."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single_gpu

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


def test_it_times_three_sides_and_their_parts(tmp_path, monkeypatch, capsys):
    specification = importlib.util.spec_from_file_location("benchmark_of_data", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "benchmark_of_data", module)
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as where it is run as a script
    specification.loader.exec_module(module)
    options = [
        "--images",
        "2",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "out.json"),
        "--plot",
        str(tmp_path / "out.png"),
    ]
    monkeypatch.setattr(sys, "argv", ["data.py", *options])
    monkeypatch.setattr(module, "SHAPE", (60, 80))
    module.main()
    rows = json.loads((tmp_path / "out.json").read_text())["milliseconds_per_image"]
    assert [row["name"] for row in rows] == ["folder of files", "packed, --pictures files", "packed"]
    for row in rows:
        assert row["total"] == pytest.approx(row["image"] + row["labels"] + row["augment"])
    assert "times faster" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 1000
