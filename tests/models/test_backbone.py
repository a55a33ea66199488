"""ViTs of timm by name, taken apart: put together again each is the timm model; what is none of them is refused."""

import pytest
import timm
import torch

from ase_dist.errors import UserError
from ase_dist.models.backbone import build_backbone
from ase_dist.models.families import embed
from ase_dist.models.resnet import build_resnet
from ase_dist.models.seeded import seeded_initialisation

pytestmark = pytest.mark.single_gpu

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VITS = [  # name, image size, prefix tokens, what is special
    ("vit_tiny_patch16_224", 48, 1),
    ("vit_tiny_patch16_224", 80, 1),
    ("deit_tiny_patch16_224", 32, 1),
    ("deit_tiny_distilled_patch16_224", 32, 2),
    ("deit3_small_patch16_224", 32, 1),
    ("vit_small_patch14_dinov2", 42, 1),
    ("vit_small_patch14_reg4_dinov2", 28, 5),
    ("vit_base_patch16_siglip_224", 32, 0),
    ("vit_base_patch16_clip_224", 32, 1),
    ("vit_mini_patch8_128", 24, 1),
    ("vit_base_patch16_rpn_224", 32, 0),  # norms after the branches, average pooling
    ("vit_small_patch16_dinov3", 48, 5),
    ("vit_small_plus_patch16_dinov3_qkvb", (32, 48), 5),  # SwiGLU, biases of q and v
    ("eva02_base_patch14_224", (28, 42), 1),  # separate q, k and v, a norm in the FFN, learned and rotary positions
    ("eva02_enormous_patch14_clip_224", 28, 1),  # norms after the branches
    ("vit_small_patch16_rope_mixed_ape_224", (48, 32), 1),  # rotary positions of each block
    ("vit_pe_spatial_tiny_patch16_512", 32, 1),  # a norm before the blocks
]
OPTIONS = [
    {"qk_norm": True, "norm_layer": "rmsnorm"},
    {"scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1},
    {"pre_norm": True, "final_norm": False, "reg_tokens": 2, "no_embed_class": True},
    {"global_pool": "map", "class_token": False},
    {"attn_layer": "diff", "dynamic_img_size": True, "pos_embed": "none"},
]


def put_together(backbone, images):
    """[B, P, D] of the parts, as one stream of a single task."""
    x_BPD, ropes = embed(backbone.stem, images, blocks=len(backbone.blocks))
    x_tBPD = x_BPD[None]
    for block, rope in zip(backbone.blocks, ropes, strict=True):
        x_tBPD = block(x_tBPD, rope=rope)[0]
    return backbone.norm(x_tBPD[0])


def whole_and_parts(name, size, args):
    """timm's model and the parts of ours, with the same weights, none of them 0 or 1."""
    whole = timm.create_model(name, img_size=size, num_classes=0, **args)
    backbone = build_backbone(name, size=size, args=args)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with torch.no_grad():
        names = {**backbone.stem.state_dict()}
        for i, block in enumerate(backbone.blocks):
            names |= {f"blocks.{i}.{key}": value for key, value in block.state_dict().items()}
        names |= {f"norm.{key}": value for key, value in backbone.norm.state_dict().items()}
        state = whole.state_dict()
        for key, value in names.items():
            gamma = key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
            value.copy_(state.get(key, state.get(gamma)))
    return whole.double(), backbone


@pytest.mark.parametrize(
    ("name", "size", "prefix", "args"),
    [*((*vit, {}) for vit in VITS), *(("vit_tiny_patch16_224", 48, None, options) for options in OPTIONS)],
)
def test_the_parts_compute_what_the_timm_model_computes(name, size, prefix, args):
    whole, backbone = whole_and_parts(name, size, {**SMALL, **args})
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = whole.forward_features(images)
    for module in (backbone.stem, *backbone.blocks, backbone.norm):
        module.double()
    found = put_together(backbone, images)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert backbone.grid == (height // backbone.patch, width // backbone.patch) and backbone.width == 32
    assert found.shape[1] == backbone.prefix + backbone.grid[0] * backbone.grid[1]
    assert prefix in (None, backbone.prefix)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_seed_gives_the_timm_models_weights_and_bits(name, images):
    backbone = build_backbone(name, size=32, args=SMALL)
    with seeded_initialisation(0, "backbone"):
        whole = timm.create_model(name, img_size=32, num_classes=0, **SMALL)
    assert torch.equal(put_together(backbone, images(2, 32)), whole.forward_features(images(2, 32)))


def test_keeps_no_parameter_that_only_a_classifier_uses():
    backbone = build_backbone("vit_base_patch16_siglip_224", size=32, args=SMALL)
    stem = {name.split(".")[0] for name, _ in backbone.stem.named_parameters()}
    assert stem == {"patch_embed", "pos_embed"}


def test_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_backbone("vit_tiny_patch16_224", size=32, args=SMALL, seed=3)
    expected = torch.rand(1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(1), expected), "the global generator was left where it was"
    second = build_backbone("vit_tiny_patch16_224", size=32, args=SMALL, seed=3)
    other = build_backbone("vit_tiny_patch16_224", size=32, args=SMALL, seed=4)
    weight = [b.blocks[1].attn.qkv.weight for b in (first, second, other)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])


def test_drop_path_grows_over_the_blocks():
    backbone = build_backbone("vit_tiny_patch16_224", size=32, args=SMALL, drop_path=0.2)
    assert isinstance(backbone.blocks[0].drop_path1, torch.nn.Identity)
    assert backbone.blocks[1].drop_path2.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet50", {}, ["model.backbone", "'resnet50'", "not a plain vision transformer", "vit_"]),
        ("vit_bas_patch16_224", {}, ["no model that timm knows", "vit_base_patch16_224"]),
        ("deit_base_distiled_patch16_224", {}, ["deit_base_distilled_patch16_224"]),
        ("vit_tiny_patch16_224", {"size": 100}, ["data.size", "got 100", "take 96 or 112"]),
        ("vit_small_patch14_dinov2", {"size": 224 + 7}, ["take 224 or 238"]),
        ("vit_tiny_patch16_224", {"args": {"img_size": 64}}, ["model.backbone_args.img_size", "data.size"]),
        ("vit_tiny_patch16_224", {"args": {"heads": 3}}, ["model.backbone_args", "heads"]),
        ("vit_tiny_patch16_224", {"args": {"num_heads": 5}}, ["model.backbone_args", "divisible"]),
        ("vit_tiny_patch16_224", {"args": {"depth": "many"}}, ["model.backbone_args", "'depth': 'many'", "TypeError"]),
        ("vit_tiny_patch16_224", {"args": {"act_layer": "relux"}}, ["model.backbone_args", "relux", "KeyError"]),
        ("vit_tiny_patch16_224", {"args": {"patch_size": 0}}, ["model.backbone_args", "ZeroDivisionError"]),
        ("vit_tiny_patch16_224", {"args": {"mlp_ratio": -1}}, ["model.backbone_args", "negative dimension"]),
        ("vit_tiny_patch16_224", {"args": {"pos_embed": "x"}}, ["model.backbone_args", "no reason given"]),
        (
            "vit_small_patch16_224.nonsense",
            {},
            ["model.backbone", "'nonsense'", "augreg_in1k"],
        ),
        ("vit_small_patch16_224.augreg_in1", {}, ["did you mean 'augreg_in1k'?"]),
        ("vit_tiny_patch16_224", {"args": {"patch_drop_rate": 0.5}}, ["patch_drop_rate"]),
        ("vit_tiny_patch16_dinov3", {}, ["no model that timm knows", "vit_tiny_patch16_dinov3_qkvb"]),
        ("vit_small_patch16_dinov3", {"size": 40}, ["data.size", "got 40", "16-pixel patches"]),
        ("vit_small_patch16_dinov3", {"args": {"patch_drop_rate": 0.5}}, ["patch_drop_rate"]),
        ("vit_small_patch16_18x2_224", {"args": SMALL}, ["ParallelThingsBlock", "several FFNs side by side"]),
        ("vit_pwee_patch16_reg1_gap_256", {"args": {"depth": 2}}, ["ParallelScalingBlock", "part of the linears"]),
        ("beit_base_patch16_224", {}, ["not a plain vision transformer"]),
    ],
)
def test_refuses_in_one_sentence(name, options, words):
    with pytest.raises(ValueError) as error:
        build_backbone(name, **{"size": 32, **options})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_tag_of_weights_that_timm_knows_is_taken():
    assert build_backbone("vit_small_patch16_224.augreg_in1k", size=32, args={**SMALL, "num_heads": 2}).width == 32


def test_a_bug_in_a_constructor_keeps_its_traceback(monkeypatch):
    """Of timm's, where the model fails without the user's arguments too; of a user's model, whatever it raises."""

    def broken(*_, **__):
        _, _ = (1, 2, 3)

    with monkeypatch.context() as patch:
        patch.setattr(timm.models.vision_transformer.Block, "__init__", broken)
        with pytest.raises(ValueError, match="too many values to unpack") as error:
            build_backbone("vit_tiny_patch16_224", size=32, args=SMALL)
    assert type(error.value) is ValueError

    def vit_of_a_user(pretrained=False, *, width=32, **kwargs):
        return broken() if width > 32 else None

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "vit_of_a_user", vit_of_a_user)
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        build_backbone("vit_of_a_user", size=32, args={"width": 64})
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"block": "x"}, "model.backbone_args: got .* which resnet18 does not take"),
        ({"in_chans": 4}, "model.backbone_args.in_chans: this follows from the images"),
        ({"output_stride": 16}, "model.backbone_args.output_stride: this follows from"),
    ],
)
def test_a_resnet_refuses_in_one_sentence_too(args, words):
    with pytest.raises(UserError, match=words):
        build_resnet("resnet18", weights="none", args=args, seed=0)
