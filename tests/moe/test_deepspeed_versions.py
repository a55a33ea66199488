"""What the seam makes up for in other versions of DeepSpeed than the installed one; .ci/lowest has a real one."""

import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import pytest

from ase_dist.moe import deepspeed_compat

pytestmark = pytest.mark.single_gpu

IS_NEW = tuple(map(int, version("deepspeed").split("+")[0].split(".")[:3])) >= (0, 19, 8)


class Zero:
    """The parts of DeepSpeed's ZeRO optimisers that decide whether a step is taken."""

    def __init__(self):
        self.check_grad_overflow = False
        self.overflow = False
        self.found = True  # by check_overflow

    def check_overflow(self):
        self.overflow = self.found

    def _overflow_check_and_loss_scale_update(self):
        return self.overflow


@pytest.fixture(params=["knows norms", "does not"])
def engine(request, monkeypatch):
    """A function of the stage; the optimiser's module is one from 0.19.8 on, or an older one."""
    module = ModuleType("some_zero")
    if request.param == "knows norms":
        module.is_invalid_grad_norm = lambda norm: False
    monkeypatch.setitem(sys.modules, "some_zero", module)
    monkeypatch.setattr(Zero, "__module__", "some_zero")
    return lambda stage: SimpleNamespace(
        old=request.param == "does not",
        optimizer=Zero(),
        zero_optimization=lambda: stage > 0,
        zero_optimization_stage=lambda: stage,
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_old_stages_1_and_2_are_told_to_look(engine, stage):
    made = engine(stage)
    deepspeed_compat.skip_non_finite_zero_steps(made)
    assert made.optimizer.check_grad_overflow is made.old


def test_old_stage_3_looks_first(engine):
    made = engine(3)
    deepspeed_compat.skip_non_finite_zero_steps(made)
    assert made.optimizer._overflow_check_and_loss_scale_update() is made.old
    made.optimizer.found = False
    assert made.optimizer._overflow_check_and_loss_scale_update() is False


def test_without_zero_nothing_is_touched(engine):
    made = engine(0)
    before = dict(vars(made.optimizer))
    deepspeed_compat.skip_non_finite_zero_steps(made)
    assert vars(made.optimizer) == before


def test_the_installed_zero_is_one_or_the_other():
    """A renamed function would make every version look old: harmless, but twice the work."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    assert all(hasattr(module, "is_invalid_grad_norm") is IS_NEW for module in (stage3, stage_1_and_2))


MUON = """
import sys
import torch
from deepspeed.runtime import compiler
from ase_dist.moe import deepspeed_compat
deepspeed_compat.import_muon()
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer  # imports Muon, were it not there
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert "torch._inductor.compile_fx" not in sys.modules
assert compiler.compile() is torch.compile
"""


@pytest.mark.skipif(not IS_NEW, reason="older DeepSpeed prepares Muon when it is imported itself")
def test_muon_is_imported_without_inductor():
    subprocess.run([sys.executable, "-c", MUON], check=True, timeout=120)


def test_deepspeed_is_imported_without_mlflow_which_stays_importable(tmp_path):
    (tmp_path / "mlflow.py").write_text("print('MLflow')")
    program = """
        import sys
        from ase_dist.moe.deepspeed_compat import import_deepspeed
        assert import_deepspeed() is sys.modules["deepspeed"] is import_deepspeed()
        print("DeepSpeed")
        import mlflow
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert said.split()[-2:] == ["DeepSpeed", "MLflow"] and said.count("MLflow") == 1
