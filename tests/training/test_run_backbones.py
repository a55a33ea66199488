"""Each family of vision transformers: a step on two ranks, resumed to the same bits, exported, and as programs."""

import math

import pytest
import torch

import ase_dist
from ase_dist.deployment.export import export_run
from ase_dist.deployment.programs import deploy
from ase_dist.models import build_model
from tests.training.conftest import start_world
from tests.training.tiny_runs import checkpoint, losses, same_bits, tiny_run, tiny_settings

pytestmark = pytest.mark.single_gpu
# name: backbone, more of its arguments, image size, the format that is tried beside .pt2
FAMILIES = {
    "dinov3": ("vit_small_patch16_dinov3_qkvb", "", "32x48"),
    "dinov3_gated": ("vit_small_plus_patch16_dinov3", "", "32x48"),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", "", "28x42"),
    "qk_norm": ("vit_base_patch16_224", "qk_norm: true", "32"),
}
SHORT = (
    "tasks=[semseg, normals]",
    "model.lora_rank=2",
    "train.max_steps=2",
    "train.warmup_steps=0",
    "train.batch_size=1",
    "checkpoint.every=1",
    "eval.every=0",
    "eval.pictures=0",
)


def overrides(family):
    name, more, size = FAMILIES[family]
    args = f"{{embed_dim: 32, depth: 2, num_heads: 2, {more}}}"
    return (*SHORT, f"model.backbone={name}", f"model.backbone_args={args}", f"data.size={size}")


def train(rank, folder):
    codes = []
    for family in FAMILIES:
        run = folder / family
        codes.append(tiny_run(folder / "scenes", run, *overrides(family), config="z1"))
        resume = (f"resume={run / 'checkpoints/step_1'}",)
        codes.append(tiny_run(folder / "scenes", folder / f"{family}_again", *overrides(family), *resume, config="z1"))
    return codes


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    (folder / "scenes").symlink_to(scenes)
    codes, results = start_world(train, folder, size=2, seconds=300)()
    assert codes == [0, 0] and results[0] == [0] * (2 * len(FAMILIES))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_resumes_and_exports(family, runs, tmp_path):
    found = losses(runs / family)
    assert all(math.isfinite(value) for step in found.values() for value in step.values())
    assert not same_bits(checkpoint(runs / family, 2), checkpoint(runs / f"{family}_again", 2))
    export_run(runs / family, tmp_path / "out")
    model = ase_dist.load(tmp_path / "out")
    formats = ["pt2", "onnx"] if family == "dinov3" else ["pt2"]
    assert max(deploy(model, tmp_path / "out", formats=formats).values()) < 1e-4


def test_a_new_run_of_another_size_starts_from_an_export(runs, tmp_path):
    export_run(runs / "dinov3", tmp_path / "out")
    settings = tiny_settings(
        runs / "scenes", tmp_path, *overrides("dinov3"), f"model.init_from={tmp_path / 'out'}", "data.size=48"
    )
    new = build_model(settings, settings.chosen_tasks(), expert_layer="plain").state_dict()
    old = ase_dist.load(tmp_path / "out").model.state_dict()
    same = [name for name in new if torch.equal(new[name], old[name])]
    assert {name for name in new if name.startswith(("stem.", "blocks."))} <= set(same)
