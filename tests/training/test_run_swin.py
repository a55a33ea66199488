"""Runs on a Swin transformer: two ranks that share experts are one, resumed bit for bit, exported, as programs."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest

import ase_dist
from ase_dist.deployment.export import export_run
from ase_dist.deployment.programs import deploy
from ase_dist.read_config import load_settings
from ase_dist.training.loop import run
from ase_dist.training.process import runtime
from tests.training.conftest import start_world
from tests.training.tiny_runs import (
    TINY,
    checkpoint,
    close,
    distance,
    ds_config,
    losses,
    said,
    same_bits,
    tiny_run,
    trained,
)

pytestmark = pytest.mark.multi_gpu

SWIN = (
    "model.backbone=swin_tiny_patch4_window7_224",
    "model.backbone_args={embed_dim: 8, depths: [1, 2], num_heads: [1, 2], window_size: 3}",
    "model.lora_task_rank=2",
    "model.moe.every_n_blocks=2",
    "tasks=[semseg, normals]",
    "data.size=28x36",
    "train.deterministic=true",
    "train.max_steps=3",
    "checkpoint.every=2",
)
EXPERTS = (*SWIN, "model.moe.every_n_blocks=1", "model.moe.ep_size=2")


def two(rank, folder):
    """Experts in every block, sharded, at ZeRO 2, and again from step 2; then without any at ZeRO 3 and in bf16."""
    scenes = Path((folder / "scenes").read_text())
    half = "train.batch_size=2"
    tiny_run(scenes, folder / "two", *EXPERTS, half, config="z2")
    step_2 = f"resume={folder / 'two/checkpoints/step_2'}"
    tiny_run(scenes, folder / "resumed", *EXPERTS, half, step_2, config="z2")
    v2 = "model.backbone=swinv2_tiny_window8_256"
    none = ("model.moe.enabled=false", "model.checkpoint_activations=recompute", "train.max_steps=1")
    return [
        said(scenes, folder / "other", *EXPERTS, half, step_2, "model.lora_task_rank=1", config="z2"),
        tiny_run(scenes, folder / "bf16", *SWIN, half, v2, *none, "train.bf16=true", config="z2_bf16"),
        tiny_run(scenes, folder / "z3", *SWIN, half, v2, *none, config="z3"),
    ]


def one(rank, folder):
    """The same global batches in one process; the tasks' order turned round when it is resumed."""
    scenes = Path((folder / "scenes").read_text())
    tiny_run(scenes, folder / "one", *EXPERTS, "model.moe.ep_size=1")
    step_2, turned = f"resume={folder / 'two/checkpoints/step_2'}", "tasks=[normals, semseg]"
    tiny_run(scenes, folder / "turned", *EXPERTS, "model.moe.ep_size=1", step_2, turned)
    short = [each for each in TINY if not each.startswith(("model.backbone=", "model.backbone_args", "model.head"))]
    place = f"data.root={next(scenes.glob('scenes-*'))}"
    small = "model.backbone_args={embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}"
    chosen = [
        *short,
        place,
        small,
        "data.workers=0",
        "train.max_steps=1",
        "checkpoint.every=0",
        f"output={folder / 'config'}",
    ]
    run.train(load_settings("pascal_swin_t", chosen), ds_config("z0"), runtime.start(timeout=60, threads=1))


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swin")
    (folder / "scenes").write_text(str(scenes))
    for worker, size in ((two, 2), (one, 1)):
        (folder / "rendezvous").unlink(missing_ok=True)
        ended = start_world(worker, folder, size=size, seconds=300)()
        assert ended.codes == [0] * size
        if worker is two:
            (folder / "said").write_text(str(ended.results[0][0]))
            assert ended.results[0][1:] == [0, 0]
    return folder


def test_two_ranks_that_share_experts_are_one_and_resume_bit_for_bit(folder):
    assert close(losses(folder / "two"), losses(folder / "one"), rel=1e-5)
    assert max(distance(trained(folder / "two", 3), trained(folder / "one", 3)).values()) < 1e-5
    assert same_bits(checkpoint(folder / "two", 3), checkpoint(folder / "resumed", 3)) == []
    assert any(name.endswith("attn.qkv.lora_tasks.B") for name in trained(folder / "two", 3))
    assert all(math.isfinite(value) for name in ("bf16", "z3") for value in losses(folder / name)[1].values())
    assert "model.lora_task_rank" in (folder / "said").read_text()


def test_the_pairs_of_tasks_are_resumed_by_name(folder):
    turned, whole = losses(folder / "turned"), losses(folder / "two")
    assert close(turned, {3: whole[3]}, rel=1e-5)


def test_the_config_of_mtloras_comparison_trains(folder):
    (step,) = losses(folder / "config").values()
    assert {"semseg", "human_parts", "saliency", "normals"} <= step.keys() and all(map(math.isfinite, step.values()))


def test_a_run_exports_as_programs_of_several_tasks_and_of_one(folder, tmp_path):
    export_run(folder / "one", tmp_path / "out")
    model = ase_dist.load(tmp_path / "out")
    assert max(deploy(model, tmp_path / "out", formats=["pt2"]).values()) < 1e-4
    if find_spec("onnxruntime"):
        assert max(deploy(model, tmp_path / "out", formats=["onnx"], tasks=["normals"]).values()) < 1e-4
