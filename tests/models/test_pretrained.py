"""Backbone weights from files: resampled, checked by name, never unpickled beyond tensors."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from ase_dist.models import pretrained
from ase_dist.models.backbone import build_backbone

pytestmark = pytest.mark.single_gpu

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, **SMALL)


def build(source, name="vit_tiny_patch16_224", size=64, **args):
    return build_backbone(name, size=size, weights=str(source), args={**SMALL, **args})


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_reads_a_pth_file_wrapped_or_not_and_drops_the_classifier(wrap, teacher, tmp_path):
    torch.save(wrap(teacher.state_dict()), tmp_path / "w.pth")
    backbone = build(tmp_path / "w.pth")
    assert torch.equal(backbone.stem.pos_embed, teacher.pos_embed)
    assert torch.equal(backbone.blocks[1].mlp.fc2.weight, teacher.blocks[1].mlp.fc2.weight)
    assert torch.equal(backbone.norm.bias, teacher.norm.bias)


def test_half_precision_safetensors_load_as_float32(teacher, tmp_path):
    save_file({k: v.half() for k, v in teacher.state_dict().items()}, tmp_path / "w.safetensors")
    weight = build(tmp_path / "w.safetensors").blocks[0].attn.qkv.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, teacher.blocks[0].attn.qkv.weight.half().float())


def test_resamples_position_and_patch_embeddings_as_timm_does(teacher, tmp_path):
    torch.save(teacher.state_dict(), tmp_path / "w.pth")
    backbone = build(tmp_path / "w.pth", size=40, patch_size=8)
    assert torch.equal(backbone.stem.pos_embed, resample_abs_pos_embed(teacher.pos_embed, [5, 5], [4, 4]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # timm's own has other last bits with more
    expected = resample_patch_embed(teacher.patch_embed.proj.weight, [8, 8])
    torch.set_num_threads(threads)
    assert torch.equal(backbone.stem.patch_embed.proj.weight, expected)


def test_names_what_is_missing_unexpected_and_of_another_shape(teacher, tmp_path):
    state = teacher.state_dict()
    state["blocks.7.norm1.weight"] = state.pop("blocks.0.norm1.weight")
    state["norm.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: blocks.0.norm1.weight; unexpected: blocks.7.norm1.weight") as error:
        build(tmp_path / "w.pth")
    assert "of another shape: norm.weight [7] for [32]" in str(error.value) and "w.pth" in str(error.value)


def test_another_width_is_refused_before_anything_is_copied(teacher, tmp_path):
    torch.save(teacher.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not fit vit_tiny_patch16_224: it has width 32 where"):
        build_backbone("vit_tiny_patch16_224", size=64, weights=str(tmp_path / "w.pth"), args={"depth": 2})


def test_runs_no_code_of_a_pickle(tmp_path):
    class Poison:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": {"a": Poison()}}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Poison()}, protocol=2))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(ValueError, match="cannot be read as tensors alone"):
            build(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.safetensors", None, "there is no file"),
        ("w.safetensors", b"not a file of tensors", "is text .it begins with b'not a file of tensors'.*copy it again"),
        ("w.pth", b"", "is an empty file of 0 bytes"),
        ("w.bin", bytes(20), "is neither safetensors nor a file of torch.save"),
    ],
)
def test_a_bad_file_is_one_sentence(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        build(tmp_path / name)
    assert str(error.value).startswith("model.pretrained: ") and "\n" not in str(error.value)


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"model": {"epoch": 3}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        build(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.fill_(float("nan")), "is not finite"),
        (lambda w: w.new_zeros(()).expand(1 << 20, 1 << 20), "more than the file's"),
        (lambda w: w.to_sparse(), "is sparse_coo"),
        (lambda w: w.to(torch.complex64), "complex64"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8"),
        (lambda w: torch.empty_like(w, device="meta"), "on meta"),
        (lambda w: w.to(torch.int32), "of another type: norm.weight torch.int32 for torch.float32"),
    ],
)
def test_a_tensor_that_is_no_plain_finite_one_is_refused_by_name(change, words, teacher, tmp_path):
    weights = teacher.state_dict()
    torch.save({**weights, "norm.weight": change(weights["norm.weight"].clone())}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=words) as caught:
        build(tmp_path / "w.pth")
    message = str(caught.value)
    assert "w.pth" in message and "norm.weight" in message and "\n" not in message


def test_scenes_is_the_shipped_file_of_this_backbone(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    save_file(teacher.state_dict(), tmp_path / "vit_tiny_patch16_224.safetensors")
    assert torch.equal(build("scenes").stem.cls_token, teacher.cls_token)
    with pytest.raises(ValueError, match=r"no weights are shipped for vit_small_patch16_224 \(shipped: vit_tiny_pa"):
        build("scenes", name="vit_small_patch16_224")


def test_an_unreachable_hub_names_the_local_way_out(monkeypatch):
    def unreachable(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no route\nto the host")
        return real(name, **options)

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"ConnectionError: no route\); .* model.pretrained=FILE") as error:
        build("hub")
    assert "\n" not in str(error.value)


def test_hub_weights_arrive(teacher, monkeypatch):
    real = timm.create_model

    def hub(name, pretrained=False, **options):
        model = real(name, **options)
        if pretrained:
            model.load_state_dict(teacher.state_dict(), strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", hub)
    assert torch.equal(build("hub").blocks[0].norm1.weight, teacher.blocks[0].norm1.weight)
    assert torch.equal(build("hub").stem.pos_embed, teacher.pos_embed)


@pytest.mark.shared_data
@pytest.mark.parametrize("size", [518, 98])
def test_real_dinov2_weights_load_and_are_resampled(size, shared_weights):
    backbone = build_backbone("vit_small_patch14_dinov2", size=size, weights=str(shared_weights))
    stored = load_file(shared_weights)
    side = round((stored["pos_embed"].shape[1] - 1) ** 0.5)
    expected = resample_abs_pos_embed(stored["pos_embed"], [size // 14] * 2, [side] * 2).float()
    assert torch.equal(backbone.stem.pos_embed, expected)
    assert torch.equal(backbone.blocks[11].ls2.gamma, stored["blocks.11.ls2.gamma"].float())


@pytest.mark.shared_data
def test_real_dinov2_features_tell_parts_of_an_image_apart(shared_weights):
    """Two halves of different texture: patches resemble their own half more than the other, unlike random weights."""
    image = torch.zeros(1, 3, 98, 98)
    image[..., 49:] = torch.rand(1, 3, 98, 49, generator=torch.Generator().manual_seed(0)) * 4 - 2
    backbone = build_backbone("vit_small_patch14_dinov2", size=98, weights=str(shared_weights))
    with torch.no_grad():
        x = backbone.stem.forward_features(image)
        for block in backbone.blocks:
            x = block(x[None])[0][0]  # one stream
    tokens = torch.nn.functional.normalize(backbone.norm(x)[0, 1:], dim=-1).view(7, 7, -1)
    left, right = tokens[:, :3].flatten(0, 1), tokens[:, 4:].flatten(0, 1)
    assert (left @ left.T).mean() > (left @ right.T).mean() + 0.1
