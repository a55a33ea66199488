"""Every ``train.optimizer`` steps as torch's at every ZeRO stage, resumes bit for bit, and knows no ranks."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from torch import nn

from ase_dist.commands.main import main
from ase_dist.moe import deepspeed_compat
from ase_dist.planning.plan import make_plans
from ase_dist.read_config import load_settings
from ase_dist.training.ds_config import resolve
from ase_dist.training.loop.engine import build_optimizer
from ase_dist.training.process import runtime
from tests.training.conftest import start_world
from tests.training.tiny_runs import (
    checkpoint,
    distance,
    ds_config,
    load_and_save,
    said,
    same_bits,
    tiny_run,
    tiny_settings,
    trained,
)

SGD = ("train.optimizer=sgd", "train.lr=0.02", "train.weight_decay=0.1", "train.deterministic=true")
NESTEROV = (*SGD, "train.sgd.nesterov=true")
ADAM = ("train.optimizer=adam", "train.weight_decay=0.1", "train.lr=0.02")
ADAMW = ("train.optimizer=adamw", "train.weight_decay=0.1", "train.lr=0.02")
KINDS = {"sgd": SGD, "nesterov": NESTEROV, "adam": ADAM, "adamw": ADAMW}
STAGES = ("z0", "z1", "z2", "z2_offload", "z3", "z3_offload")  # ZeRO-3 last: it replaces torch's linear
STEPS = 4


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def batch(step):
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(step))


def torchs_own(kind):
    """Weights after some steps of torch's optimiser in float64 on one process: the slow and obvious version."""
    model = small_model().double()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
        "nesterov": lambda: torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups, lr=0.02),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.02),
    }[kind]()
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step).double()).square().mean().backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def through_engine(kind, config):
    """The largest relative difference to ``torchs_own`` of any weight."""
    import deepspeed

    settings = load_settings(
        None, ["train.gradient_clipping=0", "train.batch_size=7", "train.bf16=false", *KINDS[kind]]
    )
    resolved = resolve(settings, ds_config(config), world=1, native_bf16=False)
    model = small_model()
    optimizer = build_optimizer(model, resolved, SimpleNamespace(device=torch.device("cpu"), rank=0))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=resolved.deepspeed, dist_init_required=False
    )
    for step in range(STEPS):
        engine.backward(engine(batch(step)).square().mean())
        engine.step()
    wanted = torchs_own(kind)
    found = {n: deepspeed_compat.read_master(engine, p, "weight").double() for n, p in model.named_parameters()}
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def one_process(rank, folder):
    scenes, found = Path((folder / "scenes").read_text()), {}
    runtime.start(timeout=60, threads=1)
    for config in STAGES[:4]:
        found |= {f"{kind} {config}": through_engine(kind, config) for kind in KINDS}
    half = folder / "sgd" / "checkpoints" / "step_3"
    tiny_run(scenes, folder / "sgd", *SGD, config="z0")
    tiny_run(scenes, folder / "sgd_resumed", *SGD, f"resume={half}", config="z0")
    for config in ("z1", "z2_offload"):
        load_and_save(scenes, half, folder / f"sgd_to_{config}", *SGD, config=config)
    found["as adamw"] = said(scenes, folder / "other", "train.deterministic=true", f"resume={half}")
    tiny_run(scenes, folder / "adam", *ADAM, "train.lr=1e-3", config="z2")
    half = folder / "adam" / "checkpoints" / "step_3"
    tiny_run(scenes, folder / "adam_resumed", *ADAM, "train.lr=1e-3", f"resume={half}", config="z2")
    for config in STAGES[4:]:
        found |= {f"{kind} {config}": through_engine(kind, config) for kind in KINDS}
    load_and_save(scenes, folder / "sgd" / "checkpoints" / "step_3", folder / "sgd_to_z3", *SGD, config="z3")
    return found


def two_processes(rank, folder):
    """Experts divided over both: the same batches, from the start and from the other world's checkpoint."""
    scenes, one = Path((folder / "scenes").read_text()), Path((folder / "one").read_text())
    two = (*SGD, "train.batch_size=2", "model.moe.ep_size=2")
    tiny_run(scenes, folder / "sgd", *two, config="z2")
    tiny_run(scenes, folder / "sgd_on", *two, f"resume={one / 'sgd' / 'checkpoints' / 'step_3'}", config="z1")
    return []


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for folder in (one, two):
        (folder / "scenes").write_text(str(scenes))
    (two / "one").write_text(str(one))
    codes, results = start_world(one_process, one, seconds=240)()
    assert codes == [0]
    codes, _ = start_world(two_processes, two, size=2, seconds=240)()
    assert codes == [0, 0]
    return one, two, results[0]


@pytest.mark.single_gpu
@pytest.mark.parametrize("config", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_torchs(runs, kind, config):
    assert runs[2][f"{kind} {config}"] < 2e-6


@pytest.mark.single_gpu
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_three_steps_and_three_are_six(runs, name):
    whole, resumed = checkpoint(runs[0] / name, 6), checkpoint(runs[0] / f"{name}_resumed", 6)
    assert same_bits(whole, resumed) == []
    kinds = {key.partition("/")[0] for key in whole} - {"random"}
    assert kinds == ({"weight", "momentum_buffer"} if name == "sgd" else {"weight", "exp_avg", "exp_avg_sq"})
    for kind in kinds:
        assert any(tensor.abs().max() > 0 for key, tensor in whole.items() if key.startswith(f"{kind}/"))


@pytest.mark.single_gpu
@pytest.mark.parametrize("config", ["z1", "z2_offload", "z3"])
def test_another_stage_loads_the_momentum_by_name(runs, config):
    assert same_bits(trained(runs[0] / "sgd", 3), trained(runs[0] / f"sgd_to_{config}", 3)) == []


@pytest.mark.single_gpu
def test_another_optimizer_is_refused_by_name(runs):
    assert "train.optimizer is 'sgd' there and 'adamw' here" in runs[2]["as adamw"]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["sgd", "sgd_on"])
def test_divided_experts_take_the_same_steps(runs, name):
    assert max(distance(trained(runs[1] / name, 6), trained(runs[0] / "sgd", 6)).values()) < 2e-5


@pytest.mark.single_gpu
def test_the_plan_counts_what_the_optimizer_keeps(scenes, tmp_path):
    """ZeRO 1 on one rank: a float32 copy of what is trained in bf16, and the moments."""
    held = {}
    for name, overrides in {**KINDS, "plain": (*SGD, "train.sgd.momentum=0")}.items():
        settings = tiny_settings(scenes, tmp_path, "train.bf16=true", *overrides)
        _, (plan,) = make_plans(settings, world=1, ep_sizes=[1], stages=[1], bandwidth=1e9, flops=1e12)
        held[name] = plan.optimizer / plan.trained
    assert held == {"sgd": 8, "nesterov": 8, "adam": 12, "adamw": 12, "plain": 4}


def test_the_commands_of_its_page_are_right(capsys):
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^```bash\n(.*?)\n```$", page, re.M | re.S)
    assert main([*shlex.split(command)[3:], "--print-config"]) == 0
    train = yaml.safe_load(capsys.readouterr().out)["train"]
    assert (train["optimizer"], train["sgd"]) == ("sgd", {"momentum": 0.9, "nesterov": False})


def test_deepspeeds_json_may_name_it():
    def chosen(kind, **params):
        tree = {"optimizer": {"type": kind, "params": {"lr": "auto", **params}}, "zero_optimization": {"stage": 1}}
        config = resolve(load_settings(), tree, world=1, native_bf16=False)
        return config.settings.train, config.deepspeed

    sgd, tree = chosen("SGD", momentum=0.8, nesterov=True)
    assert (sgd.optimizer, sgd.sgd.momentum, sgd.sgd.nesterov) == ("sgd", 0.8, True)
    assert tree["zero_allow_untested_optimizer"] is True and "optimizer" not in tree
    assert chosen("Adam", adam_w_mode=False)[0].optimizer == "adam"
    assert chosen("Adam", adam_w_mode=True)[0].optimizer == chosen("AdamW")[0].optimizer == "adamw"
    with pytest.raises(ValueError, match=r"train\.sgd: .*nesterov is true with a momentum of 0"):
        load_settings(None, ["train.sgd.momentum=0", "train.sgd.nesterov=true"])


def test_deepspeeds_adam_on_the_host_decays_as_it_is_told(monkeypatch):
    """Where there is a compiler and a GPU the offloaded one is DeepSpeed's, which decays as AdamW unless told."""
    made = []
    monkeypatch.setattr(deepspeed_compat, "has_compiler", lambda: True)
    for kind in ("adam", "adamw"):
        resolved = resolve(load_settings(None, KINDS[kind]), ds_config("z2_offload"), world=1, native_bf16=False)
        world = SimpleNamespace(device=torch.device("cuda"), rank=0)
        with mock.patch("deepspeed.ops.adam.DeepSpeedCPUAdam", lambda groups, **options: made.append(options)):
            build_optimizer(small_model(), resolved, world)
    assert [options["adamw_mode"] for options in made] == [False, True]
