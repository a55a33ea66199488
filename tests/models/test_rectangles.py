"""Models of rectangles: positions on their grid against timm's resampling, and nothing that swaps height and width."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from ase_dist.deployment.export import write_export
from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.models import build_model
from ase_dist.models.backbone import build_backbone
from ase_dist.models.pretrained import save_backbone
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.read_config import build_settings
from ase_dist.registries import HEADS
from ase_dist.tasks import select_tasks
from tests.models.conftest import TINY_VIT, ask, head_of

pytestmark = pytest.mark.single_gpu
FAMILIES = [
    ("vit_tiny_patch16_224", 1, (32, 48)),
    ("deit_tiny_distilled_patch16_224", 2, (48, 32)),
    ("vit_small_patch14_dinov2", 1, (28, 70)),
    ("vit_small_patch14_reg4_dinov2", 5, (42, 28)),
    ("vit_base_patch16_siglip_224", 0, (16, 64)),
]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "prefix", "size"), FAMILIES)
def test_the_parts_compute_what_the_timm_model_computes(name, prefix, size):
    backbone = build_backbone(name, size=ImageSize(*size), args=TINY_VIT)
    with seeded_initialisation(0, "backbone"):
        whole = timm.create_model(name, img_size=size, num_classes=0, **TINY_VIT)
    images = draw(2, 3, *size)
    x = backbone.stem.forward_features(images)
    for block in backbone.blocks:
        x = block(x[None])[0][0]  # one stream
    assert torch.equal(backbone.norm(x), whole.forward_features(images))
    patch = backbone.patch
    assert (backbone.prefix, backbone.grid) == (prefix, (size[0] // patch, size[1] // patch))


# --- positions -------------------------------------------------------------------------------------------------------


def write(path, name, side):
    """A file of timm's weights for squares of ``side``, its positions stirred, as they are after a training."""
    net = timm.create_model(name, img_size=side, num_classes=0, **TINY_VIT)
    with torch.no_grad():
        net.pos_embed.copy_(draw(*net.pos_embed.shape))
    save_file(net.state_dict(), path)
    return net


@pytest.mark.parametrize(("name", "prefix", "size"), [*FAMILIES, ("vit_tiny_patch16_224", 1, (32, 128))])
def test_positions_of_a_square_are_resampled_as_timm_does(name, prefix, size, tmp_path):
    """The last has as many patches as the square: 2 x 8 for 4 x 4."""
    side = 4 * (14 if "patch14" in name else 16)
    net = write(tmp_path / "square.safetensors", name, side)
    backbone = build_backbone(name, size=ImageSize(*size), args=TINY_VIT, weights=str(tmp_path / "square.safetensors"))
    kept = 0 if net.no_embed_class else prefix
    expected = resample_abs_pos_embed(net.pos_embed, list(backbone.grid), [4, 4], num_prefix_tokens=kept)
    assert torch.equal(backbone.stem.pos_embed, expected)
    assert torch.equal(expected[:, :kept], net.pos_embed[:, :kept])  # those of class and register tokens
    other = build_backbone(name, size=side, args=TINY_VIT, weights=str(tmp_path / "square.safetensors"))
    assert torch.equal(other.stem.pos_embed, net.pos_embed)


@pytest.mark.parametrize("size", [(32, 128), (128, 32), (64, 64), (48, 80)], ids=str)
def test_a_backbone_trained_on_rectangles_says_its_grid(size, tmp_path):
    trained = build_backbone("vit_tiny_patch16_224", size=ImageSize(32, 128), args=TINY_VIT)
    tensors = {f"stem.{name}": tensor for name, tensor in trained.stem.state_dict().items()}
    tensors |= {f"blocks.{i}.{n}": t for i, block in enumerate(trained.blocks) for n, t in block.state_dict().items()}
    tensors |= {f"norm.{name}": tensor for name, tensor in trained.norm.state_dict().items()}
    tensors["stem.pos_embed"] = draw(*trained.stem.pos_embed.shape)
    path = tmp_path / "wide.safetensors"
    save_backbone(tensors, path, size=ImageSize(32, 128))
    backbone = build_backbone("vit_tiny_patch16_224", size=ImageSize(*size), args=TINY_VIT, weights=str(path))
    expected = resample_abs_pos_embed(tensors["stem.pos_embed"].half(), list(backbone.grid), [2, 8])
    assert torch.equal(backbone.stem.pos_embed, expected.float())


def test_the_bits_of_resampled_weights_do_not_depend_on_threads(tmp_path):
    """A run's checkpoint names the hash of its frozen backbone, and an export has other threads than a rank."""
    path, threads, found = tmp_path / "square.safetensors", torch.get_num_threads(), []
    write(path, "vit_small_patch14_dinov2", 56)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            options = {"size": ImageSize(32, 48), "args": {**TINY_VIT, "patch_size": 16}, "weights": str(path)}
            found.append(build_backbone("vit_small_patch14_dinov2", **options).stem.state_dict())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in found[0])


def test_positions_of_an_unknown_grid_are_refused(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=0, **TINY_VIT)
    path = tmp_path / "weights.safetensors"
    save_file(net.state_dict(), path)
    same = build_backbone("vit_tiny_patch16_224", size=ImageSize(32, 48), args=TINY_VIT, weights=str(path))
    assert torch.equal(same.stem.pos_embed, net.pos_embed)
    with pytest.raises(UserError, match=r"weights\.safetensors .* positions of 6 patches, which are neither a square"):
        build_backbone("vit_tiny_patch16_224", size=ImageSize(32, 64), args=TINY_VIT, weights=str(path))


@pytest.mark.parametrize("size", [(32, 128), (64, 64), (128, 32), (48, 80)], ids=str)
def test_a_model_starts_from_an_export_of_another_grid(size, settings_for, tmp_path, stirred):
    tasks = ["edge", "normals"]
    settings = settings_for(size=(32, 128), tasks=tasks)
    model = stirred(build_model(settings, select_tasks("scenes", tasks), expert_layer="plain"))
    with torch.no_grad():
        model.stem.pos_embed.copy_(draw(*model.stem.pos_embed.shape))
    facts = {"step": 1, "metrics": None, "backbone": {}}
    write_export(tmp_path / "out", model, settings, select_tasks("scenes", tasks), dtype="fp32", facts=facts)
    chosen = settings_for(size=size, tasks=tasks, init_from=str(tmp_path / "out"))
    found = build_model(chosen, select_tasks("scenes", tasks), expert_layer="plain")
    grid = [size[0] // 16, size[1] // 16]
    assert torch.equal(found.stem.pos_embed, resample_abs_pos_embed(model.stem.pos_embed, grid, [2, 8]))
    assert torch.equal(found.heads["edge"].last.weight, model.heads["edge"].last.weight)


# --- height and width ------------------------------------------------------------------------------------------------


def symmetric(head):
    """A copy of a head for the turned grid, and both with weights that know no direction."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim == 4:
                parameter.copy_((parameter + parameter.transpose(2, 3)) / 2)
            if name.endswith("linear.weight") or name.endswith("linear.bias"):  # [C s s, D] of pixel_shuffle
                scale = 4
                by_place = parameter.view(-1, scale, scale, *parameter.shape[1:])
                parameter.copy_(((by_place + by_place.transpose(1, 2)) / 2).reshape(parameter.shape))
    turned = copy.deepcopy(head)
    for module in turned.modules():
        if hasattr(module, "grid"):
            module.grid = module.grid[::-1]
        if hasattr(module, "levels"):
            module.levels = tuple(level._replace(grid=level.grid[::-1]) for level in module.levels)
    return turned


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_head_turns_with_its_grid(name):
    head = head_of(name, 12, 5, grid=(2, 5), patch=16, width=8)
    turned = symmetric(head)
    tokens = draw(2, 10, 12)
    transposed = tokens.view(2, 2, 5, 12).transpose(1, 2).reshape(2, 10, 12)
    found, wanted = ask(turned, transposed), ask(head, tokens)
    assert wanted.shape[2] * 5 == wanted.shape[3] * 2
    torch.testing.assert_close(found, wanted.transpose(2, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_a_model_of_transposed_images_gives_the_transposed_predictions(backbone, settings_for, stirred):
    """With transposed patch kernels, positions and heads; attention and experts do not see where a token lies."""
    tasks = ["semseg", "normals"]
    if backbone == "vit":
        given = settings_for(size=(32, 80), tasks=tasks)
    else:
        whole = {"backbone": "resnet18", "tune": "full", "lora_rank": 0, "head_width": 8, "moe": {"enabled": False}}
        given = build_settings({"data": {"size": [32, 80]}, "tasks": tasks, "model": whole})
    turned_settings = given.model_copy(update={"data": given.data.model_copy(update={"size": ImageSize(80, 32)})})
    chosen = select_tasks("scenes", tasks)
    model = stirred(build_model(given, chosen, expert_layer="plain")).eval()
    turned = build_model(turned_settings, chosen, expert_layer="plain").eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.ndim == 4:
            state[name] = tensor.transpose(2, 3).contiguous()
        if name == "stem.pos_embed":
            grid = tensor[:, 1:].view(1, 2, 5, -1).transpose(1, 2).reshape(1, 10, -1)
            state[name] = torch.cat([tensor[:, :1], grid], dim=1)
    turned.load_state_dict(state)
    images = draw(2, 3, 32, 80)
    with torch.no_grad():
        found, wanted = turned(images.transpose(2, 3)).predictions, model(images).predictions
    for task in tasks:
        torch.testing.assert_close(found[task], wanted[task].transpose(2, 3), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(wanted[task], wanted[task].mean(), atol=1e-2)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((448, 576), "448x576, which the 14-pixel patches of vit_small_patch14_dinov2 do not divide; take 448x574 or"),
        ((230, 224), "take 224 or 238x224"),
    ],
)  # fmt: skip
def test_a_side_that_the_patch_does_not_divide_is_one_sentence(size, sentence):
    with pytest.raises(UserError, match=r"^data\.size: ") as error:
        build_backbone("vit_small_patch14_dinov2", size=ImageSize(*size), args=TINY_VIT)
    assert sentence in str(error.value)


@pytest.mark.shared_data
def test_real_dinov2_positions_at_224_by_280(shared_weights):
    size = ImageSize(224, 280)
    backbone = build_backbone("vit_small_patch14_dinov2", size=size, weights=str(shared_weights))
    stored = load_file(shared_weights)["pos_embed"]
    side = round((stored.shape[1] - 1) ** 0.5)
    assert torch.equal(backbone.stem.pos_embed, resample_abs_pos_embed(stored, [16, 20], [side, side]).float())
