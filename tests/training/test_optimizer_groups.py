"""Who is decayed and who learns at which rate, and that runs with two rates end and resume under every ZeRO stage."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ase_dist.models import build_model, parameter_groups
from ase_dist.moe.deepspeed_compat import write_master
from ase_dist.read_config import load_settings
from ase_dist.tasks import select_tasks
from ase_dist.training.loop import engine
from ase_dist.training.loop.engine import trained_groups
from tests.training.conftest import start_world
from tests.training.tiny_runs import TINY, checkpoint, distance, same_bits, tiny_run, trained

pytestmark = pytest.mark.single_gpu

FULL = (
    "model.tune=full",
    "model.lora_rank=0",
    "model.moe.enabled=false",
    "train.backbone_lr_factor=0.1",
    "train.deterministic=true",
)


def groups_of(*overrides):
    settings = load_settings(None, [*TINY, *overrides])
    model = build_model(settings, select_tasks("scenes"), expert_layer="plain")
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds = parameter_groups(model)
    groups = trained_groups(model, settings.train)
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    return {group["name"]: (group, {kinds[names[p]] for p in group["params"]}) for group in groups}


def test_a_backbone_with_a_rate_of_its_own_has_groups_of_its_own():
    groups = groups_of(*FULL)
    assert list(groups) == ["decay", "no_decay", "backbone_decay", "backbone_no_decay"]  # the first one's is reported
    for name, (group, kinds) in groups.items():
        of_backbone = name.startswith("backbone")
        assert group["lr"] == pytest.approx(1e-4 if of_backbone else 1e-3)
        assert ("backbone" in kinds) is of_backbone and len(kinds) == (1 if of_backbone else len(kinds))
        assert group["weight_decay"] == (0.0 if name.endswith("no_decay") else 0.01)
        assert all((p.dim() <= 1) is name.endswith("no_decay") for p in group["params"])


@pytest.mark.parametrize("overrides", [(), (*FULL, "train.backbone_lr_factor=1")])
def test_one_rate_two_groups(overrides):
    assert list(groups_of(*overrides)) == ["decay", "no_decay"]


def test_nothing_trained_is_refused():
    with pytest.raises(ValueError, match="nothing is trained"):
        trained_groups(torch.nn.Linear(2, 2).requires_grad_(False), load_settings().train)


def test_a_fused_optimizer_counts_its_steps_where_the_parameter_is():
    """What a resumed run hands it must be there too: torch refuses a counter on another device."""
    weight = torch.nn.Parameter(torch.ones(3, device="meta"))
    for fused, where in ((True, "meta"), (None, "cpu")):
        optimizer = torch.optim.AdamW([weight])
        optimizer.defaults["fused"] = fused
        write_master(SimpleNamespace(optimizer=optimizer), weight, "exp_avg", torch.ones(3, device="meta"), step=5)
        assert optimizer.state[weight]["step"].device.type == where


def two_rates(rank, folder):
    """The third run as on a GPU, with torch's fused AdamW, whose step counter is a tensor beside the parameter."""
    scenes, codes = Path((folder / "scenes").read_text()), []
    for name, config, fused in (("z0", "z0", ()), ("z2", "z2", ()), ("fused", "z1", ("cpu",))):
        with mock.patch.object(engine, "FUSED", fused):
            codes.append(tiny_run(scenes, folder / name, *FULL, config=config))
            half = folder / name / "checkpoints" / "step_3"
            codes.append(tiny_run(scenes, folder / f"{name}_resumed", *FULL, f"resume={half}", config=config))
    return codes


def test_runs_with_two_rates_resume_bit_for_bit(scenes, tmp_path):
    (tmp_path / "scenes").write_text(str(scenes))
    codes, results = start_world(two_rates, tmp_path, seconds=120)()
    assert codes == [0] and results == [[0, 0, 0, 0, 0, 0]]
    for name in ("z0", "z2", "fused"):
        whole, resumed = checkpoint(tmp_path / name, 6), checkpoint(tmp_path / f"{name}_resumed", 6)
        assert same_bits(whole, resumed) == []
    assert max(distance(trained(tmp_path / "z0", 6), trained(tmp_path / "fused", 6)).values()) < 1e-5
    assert max(distance(trained(tmp_path / "z0", 6), trained(tmp_path / "z2", 6)).values()) < 1e-5
