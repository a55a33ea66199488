"""The decoded form of each kind, against the definition at single pixels."""

import pytest
import torch
from torch.nn import functional as F

from ase_dist.evaluation.decode import decode, unit_vectors

from .conftest import TASK_OF_KIND

pytestmark = pytest.mark.single_gpu


def logits_of(task, *, dtype=torch.float32):
    return torch.randn(2, task.channels, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_classes_are_the_highest_logit(device):
    logits = logits_of(TASK_OF_KIND["classes"]).to(device)
    ids = decode(TASK_OF_KIND["classes"], logits)
    assert ids.dtype == torch.uint8 and ids.shape == (2, 5, 6)
    assert int(ids[1, 2, 3]) == max(range(7), key=lambda c: float(logits[1, c, 2, 3]))


@pytest.mark.parametrize("kind", ["mask", "edges"])
def test_probabilities_are_one_sigmoid_in_float32(kind, device):
    logits = logits_of(TASK_OF_KIND[kind], dtype=torch.bfloat16).to(device)
    probability = decode(TASK_OF_KIND[kind], logits)
    assert probability.dtype == torch.float32 and probability.shape == (2, 5, 6)
    torch.testing.assert_close(probability, 1 / (1 + torch.exp(-logits[:, 0].float())))


def test_normals_have_unit_length_and_the_logits_direction(device):
    logits = logits_of(TASK_OF_KIND["normals"]).to(device)
    normals = decode(TASK_OF_KIND["normals"], logits)
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(2, 5, 6, device=device))
    torch.testing.assert_close(normals * logits.norm(dim=1, keepdim=True), logits)


def test_depth_is_what_the_head_says(device):
    logits = logits_of(TASK_OF_KIND["depth"]).to(device)
    assert torch.equal(decode(TASK_OF_KIND["depth"], logits), logits)


@pytest.mark.parametrize("kind", TASK_OF_KIND)
def test_logits_are_resized_before_they_are_decoded(kind, device):
    task = TASK_OF_KIND[kind]
    logits = logits_of(task).to(device)
    larger = F.interpolate(logits, size=(11, 9), mode="bilinear", align_corners=False)
    assert torch.equal(decode(task, logits, size=(11, 9)), decode(task, larger))


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"human_parts: got logits \[2, 3, 4, 4\], wanted \[B, 7, H, W\]"):
        decode(TASK_OF_KIND["classes"], torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("dim", [0, 1])
def test_unit_vectors_are_torchs(dim):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 1e3
    x[..., 0] = 0
    torch.testing.assert_close(unit_vectors(x, dim=dim), torch.nn.functional.normalize(x, dim=dim))
    assert unit_vectors(x, dim=dim)[..., 0].eq(0).all()
