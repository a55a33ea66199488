"""DINOv3 and EVA under task streams: LoRA on every linear, checkpointing, FLOPs, and weights in Meta's names."""

import functools

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import checkpoint_filter_fn

from ase_dist.errors import UserError
from ase_dist.models.backbone import build_backbone
from ase_dist.models.lora import LoRALinear, merge_lora
from ase_dist.planning.flops import count_flops
from tests.models.conftest import TINY_VIT
from tests.models.test_backbone import put_together

pytestmark = pytest.mark.single_gpu
EVAS = [
    ("vit_small_patch16_dinov3_qkvb", (32, 48), {}),
    ("vit_small_plus_patch16_dinov3", (32, 48), {"dynamic_img_size": True}),
    ("eva02_base_patch14_224", (28, 42), {}),
    ("vit_small_patch16_rope_mixed_ape_224", (48, 32), {}),
    ("eva02_enormous_patch14_clip_224", (28, 28), {}),
]


def step(model, size):
    """Predictions and all gradients, drop path drawn from a seed."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()))
    output = model(images)
    (sum(p.square().mean() for p in output.predictions.values()) + output.aux_loss).backward()
    return output.predictions, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "size", "args"), EVAS)
def test_everything_trained_learns_and_checkpointing_changes_no_bit(name, size, args, model_for, stirred):
    options = {"backbone": name, "backbone_args": TINY_VIT | args, "size": size, "lora_rank": 2, "drop_path": 0.3}
    adapted = stirred(model_for(**options))
    predictions, gradients = step(adapted, size)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    places = {name.split(".")[-2] for name in gradients if name.endswith("lora_A") and ".attn." in name}
    separate = name.startswith("eva02_base")
    assert places == ({"q_proj", "k_proj", "v_proj", "proj"} if separate else {"qkv", "proj"})
    for mode in ("recompute", "offload"):
        again, recomputed = step(stirred(model_for(**options, checkpoint_activations=mode)), size)
        assert all(torch.equal(again[task], predictions[task]) for task in predictions)
        close = {name: torch.allclose(recomputed[name], gradients[name], rtol=1e-5) for name in gradients}
        assert all(close.values()), close


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "eva02_base_patch14_224"])
def test_lora_in_attention_is_what_it_is_merged_to(name, model_for, stirred):
    """timm's attention with biases of q and v would pass over LoRA on qkv."""
    size = (28, 42) if "patch14" in name else (32, 48)
    model = stirred(model_for(backbone=name, backbone_args=TINY_VIT, size=size, lora_rank=2)).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(images).predictions
        for block in model.blocks:
            assert any(isinstance(module, LoRALinear) for module in block.attn.modules())
        merge_lora(model)
        after = model(images).predictions
    for task in before:
        torch.testing.assert_close(after[task], before[task], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "ffn"), [("vit_small_patch16_dinov3", 2), ("vit_small_plus_patch16_dinov3", 3)])
def test_the_flops_of_a_block_are_those_of_its_products(name, ffn, settings_for):
    args = {"embed_dim": 32, "num_heads": 2}
    options = {"backbone": name, "size": 48, "lora_rank": 0, "moe": {"enabled": False}, "tune": "full"}
    two, one = (
        count_flops(settings_for(**options, backbone_args={**args, "depth": depth})).forward for depth in (2, 1)
    )
    hidden = timm.create_model(name, num_classes=0, **args, depth=1).blocks[0].mlp.fc2.in_features
    tokens, tasks = 9 + 5, 5
    products = 2 * tokens * (4 * 32 * 32 + ffn * 32 * hidden) + 4 * tokens * tokens * 32
    assert two - one == tasks * products


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def meta_names(model):
    """Random weights of timm's DINOv3 ``model`` in a file of Meta's: their names, buffers and parts of pretraining."""
    generator = torch.Generator().manual_seed(7)
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    if hasattr(model.blocks[0].mlp, "fc1_g"):
        names |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    state = {}
    for own, tensor in model.state_dict().items():
        if not own.endswith(("q_bias", "v_bias")):
            name = functools.reduce(lambda name, pair: name.replace(*pair), names.items(), own)
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.2
    width, depth = model.embed_dim, len(model.blocks)
    has_biases = model.blocks[0].attn.q_bias is not None
    for i in range(depth):
        bias = torch.randn(3 * width, generator=generator) if has_biases else torch.zeros(3 * width)
        state[f"blocks.{i}.attn.qkv.bias"] = bias
        mask = torch.ones(3 * width)
        mask[width : 2 * width] = 0
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    state["mask_token"] = torch.randn(1, width)
    state["rope_embed.periods"] = torch.rand(width // model.blocks[0].attn.num_heads // 4)
    return state


DINOV3S = [
    ("vit_small_patch16_dinov3", 48),
    ("vit_small_patch16_dinov3_qkvb", (32, 48)),
    ("vit_small_plus_patch16_dinov3", 32),
    ("vit_huge_plus_patch16_dinov3_qkvb", (48, 32)),
    ("vit_7b_patch16_dinov3", 32),
]


@pytest.mark.parametrize(("name", "size"), DINOV3S)
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_metas_names_give_what_timms_filter_gives(name, size, prefix, tmp_path):
    whole = timm.create_model(name, img_size=size, num_classes=0, **TINY_VIT).eval()
    state = meta_names(whole)
    save_file({f"{prefix}{key}": tensor for key, tensor in state.items()}, tmp_path / "w.safetensors")
    whole.load_state_dict(checkpoint_filter_fn(state, whole))
    backbone = build_backbone(name, size=size, args=TINY_VIT, weights=str(tmp_path / "w.safetensors"))
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(put_together(backbone, images), whole.forward_features(images), rtol=1e-6, atol=1e-6)
    if whole.blocks[0].attn.q_bias is not None:
        query, key, value = state["blocks.1.attn.qkv.bias"].chunk(3)
        own = backbone.blocks[1].attn
        assert torch.equal(own.q_bias, query) and torch.equal(own.v_bias, value)
        assert key.any() and not own.k_bias.any()


def test_biases_for_which_a_model_has_no_place_are_refused(tmp_path):
    state = meta_names(timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, **TINY_VIT))
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"biases of queries, keys and values.*qkv_bias: true"):
        build_backbone("vit_small_patch16_dinov3", size=32, args=TINY_VIT, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_base_patch14_224"])
def test_timms_names_and_those_of_a_trained_backbone_fit(name, tmp_path):
    """EVA-02's positions are resampled from its own grid to the new one."""
    patch = 14 if "patch14" in name else 16
    whole = timm.create_model(name, img_size=3 * patch, num_classes=10, **TINY_VIT)
    save_file(whole.state_dict(), tmp_path / "timm.safetensors")
    size = (3 * patch, 4 * patch)
    first = build_backbone(name, size=size, args=TINY_VIT, weights=str(tmp_path / "timm.safetensors"))
    own = dict(first.stem.state_dict())
    own |= {
        f"blocks.{i}.{key}": value for i, block in enumerate(first.blocks) for key, value in block.state_dict().items()
    }
    own |= {f"norm.{key}": value for key, value in first.norm.state_dict().items()}
    assert torch.equal(own["blocks.1.attn.proj.weight"], whole.blocks[1].attn.proj.weight)
    save_file(own, tmp_path / "own.safetensors", metadata={"patch_grid": "3x4"})
    second = build_backbone(name, size=size, args=TINY_VIT, weights=str(tmp_path / "own.safetensors"), seed=1)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    assert torch.equal(put_together(second, images), put_together(first, images))
