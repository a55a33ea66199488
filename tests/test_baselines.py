"""The baselines of the comparison: each builds, and changes what its name says and nothing else."""

import pytest

from ase_dist.baselines import baselines
from ase_dist.config import setting_keys
from ase_dist.models import build_model
from ase_dist.read_config import load_settings
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

MAY_CHANGE = {"output", "train.lr", "train.backbone_lr_factor"}


def value(settings, key):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


@pytest.mark.parametrize("name", baselines())
def test_a_baseline_builds_and_changes_the_model_alone(name):
    base, settings = load_settings(), load_settings(baseline=name)
    changed = {key for key in setting_keys() if value(base, key) != value(settings, key)}
    assert changed <= MAY_CHANGE | {key for key in setting_keys() if key.startswith("model.")}
    assert settings.train.lr == pytest.approx(base.train.lr * baselines()[name].lr_factor)
    assert settings.train.backbone_lr_factor == baselines()[name].backbone_lr_factor
    model = build_model(settings, select_tasks("scenes", ("semseg", "edge")), expert_layer="plain")
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_names_of_expert_baselines_are_their_numbers():
    for name in baselines():
        numbers = name.rsplit("_", 4)[1:]
        if len(numbers) == 4 and all(part.isdigit() for part in numbers):
            moe = load_settings(baseline=name).model.moe
            assert [moe.num_experts, moe.k, moe.num_shared, moe.rank] == [int(part) for part in numbers]


def test_settings_after_a_baseline_win_and_pascal_configs_take_baselines_too():
    settings = load_settings("pascal_ase_16_3_1_4", ["model.moe.k=5", "train.lr=1e-3"], baseline="naive_16_3_1_4")
    assert (settings.model.moe.gating, settings.model.moe.k, settings.train.lr) == ("naive", 5, 1e-3)
    assert settings.model.backbone == "vit_base_patch16_224"
    assert str(settings.output) == "runs/pascal_ase_16_3_1_4_naive_16_3_1_4"


def test_a_baseline_that_is_not_there():
    with pytest.raises(ValueError, match="did you mean 'mtan'"):
        load_settings(baseline="mtann")


@pytest.mark.parametrize(("line", "folder"), [("", "runs/scenes_mtl_vit"), ("output: runs/mine/", "runs/mine_mtl_vit")])
def test_a_baseline_has_a_folder_of_its_own_whatever_the_config_names(line, folder, tmp_path):
    (tmp_path / "c.yaml").write_text(f"seed: 1\n{line}\n")
    assert str(load_settings(tmp_path / "c.yaml", baseline="mtl_vit").output) == folder
