"""Every benchmark of speed at tiny size: it runs, compares what it says, and writes JSON and plot."""

import importlib.util
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ase_dist.registries import HEADS

pytestmark = pytest.mark.single_gpu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LAYER = ["--shapes", "vit_s", "--experts", "16/3/1/4", "--images", "1", "--few-images", "1", "--tokens", "6",
         "--repeats", "1", "--threads", "1"]  # fmt: skip
STEP = ["--shapes", "tiny", "--depth", "1", "--size", "64", "--head", "linear", "--repeats", "1", "--threads", "1"]
ROOFLINE = ["--shapes", "vit_s", "--experts", "16/3/1/4", "--tokens", "6", "--images", "2", "--step-shapes", "tiny",
            "--depth", "1", "--size", "64", "--modules", "--operators", "3"]  # fmt: skip
SCALING = ["--axes", "tokens", "rank", "--points", "2", "--images", "1", "--repeats", "1"]


def run(name, arguments, tmp_path):
    """What it printed, and its report."""
    report, plot = tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--json", str(report), "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads(report.read_text())
    assert report["benchmark"] == f"{name}.py" and report["date"].startswith("20") and "commit" in report
    spec = importlib.util.spec_from_file_location("figures", BENCHMARKS.parent / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    for make, file in figures.TABLES.values():  # the pages' tables can be made of it
        if file == f"{name}.json":
            columns, rows = make(report)
            assert rows and all(len(row) == len(columns) for row in rows)
    return done.stdout, report


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


def test_balancing(tmp_path):
    tiny = ["data.size=32", "data.scenes.size=40", "model.pretrained=none", "model.head=linear",
            "model.backbone=vit_tiny_patch16_224", "model.backbone_args={embed_dim: 24, depth: 2, num_heads: 2}",
            "model.moe.num_experts=4", "model.moe.k=2"]  # fmt: skip
    methods = ["gls", "gradnorm", "upgrad"]
    printed, report = run("balancing", [*tiny, "--methods", *methods, "--repeats", "1", "--every", "2"], tmp_path)
    rows = {row["method"]: row for row in report["rows"]}
    assert set(rows) == {"fixed", *methods, "gradnorm on representation"}
    assert rows["fixed"]["ratio"] == 1 and all(row["ratio"] > 0 for row in rows.values())
    assert "weights every 2 steps" in printed


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


def test_heads(tmp_path):
    report = tmp_path / "out.json"
    options = ["--shape", "tiny", "--depth", "4", "--images", "1", "--size", "64", "--head-width", "8"]
    command = [sys.executable, str(BENCHMARKS / "heads.py"), *options, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {row["head"]: row for row in json.loads(report.read_text())["rows"]}
    assert list(rows) == list(HEADS) and all(row["head"] in done.stdout for row in rows.values())
    bodies = {name: row["kernels"] - row["kernels, heads"] for name, row in rows.items()}
    # levels cost no kernel outside of the heads that read them; losses enlarge the logits of some heads
    assert len({bodies[name] for name in ("pup", "pup_linear", "dpt")}) == 1
    assert len({bodies[name] for name in ("linear", "hrnet", "multi_level")}) == 1


def test_host(tmp_path):
    report = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "host.py"), "--repeats", "2", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "least us" in done.stdout, done.stderr
    rows = {row["side"]: row for row in json.loads(report.read_text())["rows"]}
    assert list(rows) == ["frozen FFN", "plain LoRA", "ours"] and all(row["microseconds"] > 0 for row in rows.values())
    assert rows["plain LoRA"]["operators"] < rows["ours"]["operators"] < 2.2 * rows["plain LoRA"]["operators"]


def test_scaling(tmp_path):
    printed, report = run("scaling", SCALING, tmp_path)
    assert set(report["slopes"]) == {"tokens", "rank"}
    assert [row["at"] for row in report["rows"]] == [246.25, 492.5, 1, 2]
    assert "slope along tokens" in printed


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes the modules of benchmarks/ importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_fused(tmp_path):
    options = ("--shapes", "vit_s", "--tokens", "6", "--json", str(tmp_path / "out.json"))
    done = subprocess.run([sys.executable, str(BENCHMARKS / "fused.py"), *options], capture_output=True, text=True,
                          check=False, timeout=500)  # fmt: skip
    assert done.returncode == 0 and "COUNTED, not measured" in done.stdout, done.stderr
    rows = {row["side"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["frozen FFN"]["eager"] == rows["frozen FFN"]["fused"] == 6  # 2 products and GELU, 3 with its gradient
    assert rows["plain LoRA"]["eager"] == 22
    for kind in ("ours", "block, ours"):
        assert rows[kind]["fused"] < 0.7 * rows[kind]["eager"]


def test_roofline(tmp_path):
    printed, report = run("roofline", ROOFLINE, tmp_path)
    rows = {(row["what"], row["side"]): row for row in report["rows"]}
    sides = {"frozen FFN", "plain LoRA", "loop over experts", "sorted products", "ours"}
    assert set(rows) == {(what, side) for what in ("layer", "step") for side in sides}
    assert report["counted"] and "COUNTED, not measured" in printed and "H100" in report["basis"]

    T, D, H, size = 5 * 2 * 6, 384, 1536, 2
    floor = rows["layer", "frozen FFN"]
    forward = (D * H + H + T * D + T * H) + 2 * T * H + (D * H + D + T * D + T * H)
    backward = (D * H + T * D + T * H) + 3 * T * H + (D * H + T * D + T * H)
    assert floor["kernels"] == 6 and floor["bytes"] == size * (forward + backward)
    assert floor["flops"] == 4 * 2 * T * D * H
    assert {name: cost["kernels"] for name, cost in floor["operators"].items()} == {
        "addmm": 2, "mm": 2, "gelu": 1, "gelu_backward": 1
    }  # fmt: skip
    peak, bandwidth = report["accelerator"]["bfloat16"], report["accelerator"]["bandwidth"]
    assert peak == pytest.approx(0.81 * 989.4e12) and bandwidth == pytest.approx(0.9 * 3.35e12)
    product = max(2 * T * D * H / peak, size * (D * H + T * D + T * H) / bandwidth)
    assert floor["operators"]["mm"]["seconds"] == pytest.approx(2 * product)

    for row in rows.values():
        for groups in (row["operators"], row["modules"]):
            assert sum(cost["kernels"] for cost in groups.values()) == row["kernels"]
            assert sum(cost["bytes"] for cost in groups.values()) == pytest.approx(row["bytes"])
    assert {"blocks.*.attn", "blocks.*.mlp", "blocks.*.mlp.router", "heads.*", "loss", "optimiser"} <= set(
        rows["step", "ours"]["modules"]
    )
    attention = rows["step", "ours"]["operators"]
    assert attention["_scaled_dot_product_flash_attention"]["kernels"] == 1
    assert attention["_scaled_dot_product_flash_attention_backward"]["kernels"] == 1
    assert (
        rows["step", "frozen FFN"]["kernels"] < rows["step", "plain LoRA"]["kernels"] < rows["step", "ours"]["kernels"]
    )


def test_an_operator_of_an_extension_counts_what_it_reads_writes_and_declares(benchmarks):
    from _kernels import counting

    @torch.library.custom_op("ase_test::scaled_product", mutates_args=())
    def scaled_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 2 * a @ b

    scaled_product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
    register_flop_formula(torch.ops.ase_test.scaled_product)(lambda a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1])
    with counting() as count:
        scaled_product(torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta"))
    (kernel,) = count.kernels
    assert (kernel.operator, kernel.bytes, kernel.flops) == ("scaled_product", 4 * (15 + 35 + 21), 2 * 3 * 5 * 7)


def test_views_are_no_kernels_and_rows_are_read_and_written_where_they_are_indexed(benchmarks):
    from _kernels import counting

    x, rows = torch.empty(100, 8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    with counting() as count:
        part = x[rows]
        x.index_add_(0, rows, part)
        x.T.reshape(8, 100).unsqueeze(0)
        F.scaled_dot_product_attention(*torch.empty(3, 2, 4, 16, 8, device="meta"))
    size = 4 * 8 * 4
    q = 2 * 4 * 16 * 8 * 4
    assert [(kernel.operator, kernel.bytes) for kernel in count.kernels[:2]] == [
        ("index", 4 * 8 + 2 * size), ("index_add_", 4 * 8 + 3 * size)
    ]  # fmt: skip
    assert len(count.kernels) == 3 and count.kernels[2].flops == 4 * 2 * 4 * 16 * 16 * 8
    assert 4 * q <= count.kernels[2].bytes < 4.5 * q  # and the logarithms of the sums


def test_other_ways_to_apply_the_experts_are_the_same_function(benchmarks):
    from peers.common import Case, Experts, frozen_ffn
    from peers.plain import apply_experts, by_loop, by_sorted_products, ours

    side = ours(Case(frozen_ffn(16, 32), Experts(6, 2, 1, 4)))
    x, direction = torch.randn(2, 5, 7, 16, generator=torch.Generator().manual_seed(0))

    def result():
        leaf = x.clone().requires_grad_()
        side.module.zero_grad()
        y = side.forward(leaf)[0]
        y.backward(direction)
        return [y.detach(), leaf.grad, *(p.grad for p in side.module.parameters() if p.grad is not None)]

    expected = result()
    for adapt in (by_loop, by_sorted_products):
        apply_experts(side.module, adapt)
        for found, wanted in zip(result(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.shared_data
def test_the_layer_is_counted_as_by_the_independent_tool(benchmarks, shared_data, monkeypatch):
    """Its own bytes, FLOPs and kernels of operators, at the same peaks: 2 % in time."""
    import roofline
    from _kernels import ACCELERATORS, total

    monkeypatch.setattr(torch, "is_autocast_enabled", torch.is_autocast_enabled)  # which the tool replaces
    spec = importlib.util.spec_from_file_location("count_layer", shared_data / "tools" / "count_layer.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    from ase_dist.moe import MoEFFN

    D, H, tokens = 768, 3072, 8 * 5 * 197
    theirs = {
        "frozen FFN": tool.count(lambda: tool.FFN(D, H).requires_grad_(False), tokens, D),
        "plain LoRA": tool.count(lambda: tool.PlainLoRA(D, H, 4), tokens, D),
        "ours": tool.count(lambda: MoEFFN(tool.FFN(D, H), num_experts=16, k=3, num_shared=1, rank=4), tokens, D),
    }
    arguments = Namespace(dtype="bfloat16", images=8, tokens=197, attention="fused")
    accelerator = ACCELERATORS["h100_sxm"].sustained(compute=800 / 989.4, memory=3.0 / 3.35)
    counted = {row.side: row.kernels for row in roofline.count_layer("vit_b", "16/3/1/4", arguments)}
    for side, wanted in theirs.items():
        found = total(counted[side], accelerator, tf32=True)
        assert found.seconds == pytest.approx(wanted.seconds, rel=0.02), side
        assert found.kernels == pytest.approx(wanted.kernels, rel=0.02), side
