"""Every benchmark of speed at tiny size: it runs, compares what it says, and writes JSON and plot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.single_gpu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LAYER = ["--shapes", "vit_s", "--experts", "16/3/1/4", "--images", "1", "--few-images", "1", "--tokens", "6",
         "--repeats", "1", "--threads", "1"]  # fmt: skip
STEP = ["--shapes", "tiny", "--depth", "1", "--size", "64", "--head", "linear", "--repeats", "1", "--threads", "1"]
SCALING = ["--axes", "tokens", "rank", "--points", "2", "--images", "1", "--repeats", "1"]


def run(name, arguments, tmp_path):
    """What it printed, and its report."""
    report, plot = tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--json", str(report), "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    return done.stdout, json.loads(report.read_text())


def test_layer(tmp_path):
    printed, report = run("layer", LAYER, tmp_path)
    sides = {row["side"]: row for row in report["rows"]}
    compared = {name.split(",")[0] for name in (*sides, *report["skipped"])}
    assert compared == {"frozen FFN", "ours", "loop over experts", "plain LoRA", "DeepSpeed MoE", "fairscale MOELayer",
                        "peft X-LoRA", "MoE-PEFT MoLA", "MixLoRA", "Tutel"}  # fmt: skip
    floor, ours = sides["frozen FFN"], sides["ours"]
    assert floor["step_ratio"] == 1 and floor["saved_extra"] == 0
    rows, D, H, R, N = 30, 384, 1536, 64, 16
    pairs, router = 2 * rows * R * 2 * (D + H), 2 * rows * D * N
    assert ours["forward_gflop"] - floor["forward_gflop"] == pytest.approx((pairs + router) / 1e9, rel=1e-6)
    assert "of the frozen FFN: at most 1.25" in printed
    assert all(reason for reason in report["skipped"].values())


def test_layer_in_bfloat16(tmp_path):
    printed, report = run("layer", [*LAYER, "--dtype", "bfloat16", "--without-libraries"], tmp_path)
    assert {row["side"] for row in report["rows"]} == {"frozen FFN", "ours", "loop over experts", "plain LoRA, peft"}
    assert "bfloat16" in json.dumps(report) and "ours" in printed


def test_train_step(tmp_path):
    printed, report = run("train_step", STEP, tmp_path)
    rows = {row["side"]: row for row in report["rows"]}
    assert set(rows) == {"ase_16_3_1_4", "a pass per task", "a pass per task, torch", "mtl_vit_lora",
                         "mtl_vit_lora, torch", "neither"}  # fmt: skip
    parts = rows["ase_16_3_1_4"]["parts_ms"]
    assert all(parts[name] > 0 for name in ("patch embedding", "attention", "base FFN", "experts", "routers", "heads",
                                            "loss", "optimiser"))  # fmt: skip
    assert rows["neither"]["parts_ms"]["routers"] == 0
    assert rows["neither"]["trained"] < rows["mtl_vit_lora"]["trained"] < rows["ase_16_3_1_4"]["trained"]
    assert "times faster than a pass per task" in printed


def test_scaling(tmp_path):
    printed, report = run("scaling", SCALING, tmp_path)
    assert set(report["slopes"]) == {"tokens", "rank"}
    assert [row["at"] for row in report["rows"]] == [246.25, 492.5, 1, 2]
    assert "slope along tokens" in printed
