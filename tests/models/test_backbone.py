"""Any timm ViT by name, taken apart: put together again it is the timm model; what is no plain ViT is refused."""

import pytest
import timm
import torch

from ase_dist.errors import UserError
from ase_dist.models.backbone import build_backbone
from ase_dist.models.resnet import build_resnet
from ase_dist.models.seeded import seeded_initialisation

pytestmark = pytest.mark.single_gpu

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = [
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
]


@pytest.mark.parametrize(("name", "size", "prefix"), FAMILIES)
def test_the_parts_compute_what_the_timm_model_computes(name, size, prefix, images):
    backbone = build_backbone(name, size=size, args=SMALL)
    with seeded_initialisation(0, "backbone"):
        whole = timm.create_model(name, img_size=size, num_classes=0, **SMALL)
    x = backbone.stem.forward_features(images(2, size))
    assert x.shape == (2, prefix + backbone.grid[0] * backbone.grid[1], backbone.width)
    for block in backbone.blocks:
        x = block(x)
    assert torch.equal(backbone.norm(x), whole.forward_features(images(2, size)))
    assert (backbone.prefix, backbone.grid, backbone.width) == (prefix, (size // backbone.patch,) * 2, 32)


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
        ("swin_tiny_patch4_window7_224", {}, ["not a plain vision transformer", "such as vit_tiny_patch16"]),
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
        ("vit_small_patch16_18x2_224", {"args": SMALL}, ["ParallelThingsBlock", "pre-norm"]),
        ("vit_base_patch16_rpn_224", {"args": SMALL}, ["ResPostBlock"]),
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
