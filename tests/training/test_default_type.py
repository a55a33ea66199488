"""What ``train.bf16: auto`` means: the measurement and the processor replaced, the checkpoint's choice kept."""

from pathlib import Path

import pytest
import torch

from ase_dist.read_config import load_settings
from ase_dist.training.loop import default_type as module
from ase_dist.training.loop.default_type import DefaultType, bf16_times_faster, default_type
from ase_dist.training.process.runtime import World
from ase_dist.training.state.checkpoint.manifest import MANIFEST, make_manifest
from tests.training.tiny_runs import TINY

pytestmark = pytest.mark.single_gpu


def world(device="cpu", *, native=False):
    return World(0, 1, 0, 1, torch.device(device), native)


def decide(folder, *overrides, on=None):
    return default_type(load_settings(None, [*TINY, *overrides]), on or world(), Path(folder))


@pytest.fixture
def times(monkeypatch):
    """``times(x)``: this CPU has bf16, in which products are x times as fast; one entry a measurement."""
    measured = []
    monkeypatch.setattr(module, "NARROW", 0)  # the model of these tests is

    def replace(factor):
        monkeypatch.setattr(module, "cpu_has_bf16", lambda: True)
        monkeypatch.setattr(module, "bf16_times_faster", lambda: measured.append("measured") or factor)
        return measured

    return replace


def checkpoint(folder, *, bf16):
    path = folder / "step_3"
    path.mkdir(parents=True)
    meta = {"settings": {"train": {"bf16": bf16}}}
    manifest = make_manifest(step=3, world_size=1, sequence=1, versions={}, files=[], meta=meta)
    (path / MANIFEST).write_bytes(manifest.to_bytes())
    return path


@pytest.mark.parametrize(("factor", "bf16"), [(8.0, True), (2.0, True), (1.2, False)])
def test_a_cpu_takes_bf16_where_it_is_measured_to_be_faster(factor, bf16, times, tmp_path):
    measured = times(factor)
    found = decide(tmp_path)
    assert found.bf16 is bf16 and f"{factor} times as fast" in found.why
    assert decide(tmp_path, "train.bf16=false") == DefaultType(False, "") and measured == ["measured"]


def test_a_narrow_model_stays_in_fp32_unmeasured(monkeypatch, times, tmp_path):
    measured = times(9.0)
    monkeypatch.setattr(module, "NARROW", 97)  # the FFN of the tiny model has 24 and 96
    assert decide(tmp_path) == DefaultType(False, "the model is narrow") and not measured
    monkeypatch.setattr(module, "NARROW", 96)
    assert decide(tmp_path).bf16


def test_a_cpu_without_bf16_measures_nothing(monkeypatch, times, tmp_path):
    measured = times(9.0)
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: False)
    checkpoint(tmp_path, bf16=True)
    assert decide(tmp_path) == DefaultType(False, "") and not measured


def test_an_accelerator_is_not_measured(times, tmp_path):
    measured = times(1.0)
    assert decide(tmp_path, on=world("cuda", native=True)) == DefaultType(True, "")
    assert decide(tmp_path, on=world("cuda", native=False)) == DefaultType(False, "") and not measured


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_that_goes_on_keeps_the_type_of_its_checkpoint(bf16, times, tmp_path):
    measured = times(1.0 if bf16 else 9.0)
    path = checkpoint(tmp_path / "checkpoints", bf16=bf16)
    assert decide(tmp_path / "checkpoints") == DefaultType(bf16, "as the checkpoint")
    assert decide(tmp_path / "other", f"resume={path}").bf16 is bf16
    assert not measured
    assert decide(tmp_path / "checkpoints", "resume=never").bf16 is not bf16
    (path / MANIFEST).write_text("{")  # told where it is read in earnest
    assert decide(tmp_path / "checkpoints").bf16 is not bf16


def test_a_model_that_cannot_be_built_is_told_elsewhere(times, tmp_path):
    times(9.0)
    assert decide(tmp_path, "model.moe.k=9") == DefaultType(False, "")


def test_the_measurement_is_a_ratio_of_times():
    assert 0 < bf16_times_faster() < 1000
