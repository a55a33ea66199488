"""Frozen weights are known again where another processor or torch rounds them otherwise, and others are not taken."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ase_dist.models import build_model
from ase_dist.read_config import load_settings
from ase_dist.training.state.frozen import PERIOD, FrozenWeights

pytestmark = pytest.mark.single_gpu

OVERRIDES = ["model.backbone=vit_tiny_patch16_224", "model.backbone_args={embed_dim: 48, depth: 3, num_heads: 3}",
             "model.pretrained=none"]  # fmt: skip


def frozen():
    settings = load_settings("scenes", OVERRIDES)
    model = build_model(settings, settings.chosen_tasks(), expert_layer="plain")
    return FrozenWeights.of(model, settings.model.backbone), model


def print_sketch():
    found, _ = frozen()
    print(json.dumps(found))  # noqa: T201


@pytest.fixture(scope="module")
def weights():
    return frozen()


def compared(weights, change):
    """What the weights are found to be after ``change`` of the frozen tensors, by name, and back."""
    before, model = weights
    frozen_tensors = {name: p for name, p in sorted(model.named_parameters()) if not p.requires_grad}
    kept = {name: p.detach().clone() for name, p in frozen_tensors.items()}
    with torch.no_grad():
        change(frozen_tensors)
        found = FrozenWeights.of(model, before.name).compare(before)
        for name, p in frozen_tensors.items():
            p.copy_(kept[name])
    return found


def by_rounding(tensors):
    generator = torch.Generator().manual_seed(0)
    for p in tensors.values():
        p.mul_(1 + 2.0**-23 * torch.randn(p.shape, generator=generator))


def by_some_last_bits_of_half_precision(tensors):
    """Positions of a file in half precision are resampled in float32, and rounded to it again."""
    generator = torch.Generator().manual_seed(0)
    for p in tensors.values():
        is_near_a_tie = torch.rand(p.shape, generator=generator) < 2e-3
        p.mul_(torch.where(is_near_a_tie, 1 + 2.0**-11, 1.0))


def nothing(tensors):
    pass


def in_half_precision(tensors):
    for p in tensors.values():
        p.copy_(p.half())


def trained_a_little(tensors):
    generator = torch.Generator().manual_seed(0)
    for p in tensors.values():
        p.add_(1e-3 * p.std() * torch.randn(p.shape, generator=generator))


def one_bias(tensors):
    next(p for name, p in tensors.items() if name.endswith("fc1.bias")).fill_(1e-3)


def one_norm(tensors):
    next(p for name, p in tensors.items() if name.endswith("norm1.weight")).mul_(1.001)


def turned(tensors):
    p = next(p for name, p in tensors.items() if name.endswith("fc2.weight"))
    p.copy_(p.flip(0))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (nothing, "same"),
        (by_rounding, "rounded"),
        (by_some_last_bits_of_half_precision, "rounded"),
        *((change, "other") for change in (in_half_precision, trained_a_little, one_bias, one_norm, turned)),
    ],
)
def test_rounding_is_told_from_other_weights(change, found, weights):
    assert compared(weights, change) == found


def test_what_is_compared(weights):
    one, _ = weights
    others = (one._replace(sha256="0", sketch=None), one._replace(sha256="0", sketch=one.sketch[1:]))
    others += (one._replace(name="another"), one._replace(sha256="0", sketch=[(float("nan"), 0.0)] * len(one.sketch)))
    assert {one.compare(other) for other in others} == {"other"}
    assert one.compare(one._replace(sha256="0")) == "rounded"
    wide = torch.nn.Linear(PERIOD, 3).requires_grad_(False)  # longer than the signs
    sketch = FrozenWeights.of(wide, "").sketch
    norm = float(wide.weight.double().norm())  # in float32 a norm of so many is off by 1e-6
    assert sketch[1][0] == pytest.approx(norm, rel=1e-8) and abs(sketch[1][1]) < 5


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_other_vector_instructions_give_the_same_weights(instructions, weights):
    """ATen's code for a processor without AVX2 rounds the initialisation of a transformer otherwise."""
    program = "from tests.training.test_frozen import print_sketch; print_sketch()"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    name, sha256, sketch = json.loads(done.stdout.decode().splitlines()[-1])
    here, there = weights[0], FrozenWeights(name, sha256, sketch)
    assert here.compare(there) == there.compare(here) == ("same" if sha256 == here.sha256 else "rounded")
