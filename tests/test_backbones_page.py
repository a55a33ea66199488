"""docs/backbones.md: its settings build a model, and what it says of timm's names is so."""

import fnmatch
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

from ase_dist.errors import UserError
from ase_dist.models.backbone import build_backbone
from ase_dist.planning.flops import bare_model
from ase_dist.read_config import build_settings

pytestmark = pytest.mark.single_gpu
PAGE = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text()
REFUSED = ("vit_*_xp_*", "vit_pwee_*", "vit_dpwee_*", "vit_*_18x2_224")


def test_the_pages_settings_build_their_model():
    tree = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    assert tree["model"].pop("pretrained").endswith(".pth")
    model = bare_model(build_settings(tree))
    assert type(model.stem).__name__ == "Eva" and model.stem.patch_embed.grid_size == (28, 36)
    assert model.blocks[11].mlp.base.fc1_g.weight.is_meta


def outcomes(names):
    """By name None, or the sentence that refuses it."""
    found = {}
    for name in names:
        try:
            with torch.device("meta"):
                build_backbone(name, size=224)
            found[name] = None
        except UserError as error:
            found[name] = str(error)
    return found


def check(names):
    for name, refused in outcomes(names).items():
        expected = any(fnmatch.fnmatch(name, pattern) for pattern in REFUSED)
        assert bool(refused) == expected, f"{name}: {refused}"
        assert not refused or "FFN" in refused


def test_names_that_the_page_refuses_are_on_it():
    assert all(f"`{pattern}`" in PAGE for pattern in REFUSED)
    check(["vit_pwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256", "vit_pe_core_tiny_patch16_384"])


@pytest.mark.nightly
@pytest.mark.parametrize("module", ["vision_transformer", "deit", "eva"])
def test_all_other_names_of_timm_are_taken(module):
    check(timm.list_models(module=module))
