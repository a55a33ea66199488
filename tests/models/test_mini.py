"""The small backbone of the default config."""

import pytest
import timm
import torch

from ase_dist.models import mini

pytestmark = pytest.mark.single_gpu


def test_fits_into_five_megabytes_at_half_precision():
    model = timm.create_model("vit_mini_patch8_128", num_classes=0)
    assert model.embed_dim == 160 and len(model.blocks) == 8 and model.patch_embed.grid_size == (16, 16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count > 2.3e6 and 2 * count < 5.0e6


def test_is_a_timm_model_like_others():
    assert "vit_mini_patch8_128" in timm.list_models(module="mini")
    assert mini.vit_mini_patch8_128(num_classes=7)(torch.zeros(1, 3, 128, 128)).shape == (1, 7)
    assert timm.create_model("vit_mini_patch8_128", img_size=64, num_classes=0)(torch.zeros(1, 3, 64, 64)).shape == (
        1,
        160,
    )
