"""Files of weights as people have them: any suffix, prefix, wrapper and family; what is none, or fits not, by name."""

import argparse
import io
import json
import logging
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ase_dist.errors import UserError
from ase_dist.models import pretrained
from ase_dist.models.backbone import build_backbone
from ase_dist.models.weight_files import read_tensors
from ase_dist.models.weight_names import find_network, to_timm

pytestmark = pytest.mark.single_gpu

NAME, SMALL = "vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(seed=0, name=NAME, **args):
    torch.manual_seed(seed)
    return timm.create_model(name, **{"img_size": 32, "num_classes": 0, **SMALL, **args})


@pytest.fixture(scope="module")
def teacher():
    """A ViT none of whose tensors is as another one starts."""
    model = vit(num_classes=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture
def read(tmp_path):
    """Loads a file into a fresh ViT and gives its state dict."""

    def load(path, name=NAME, **args):
        model = vit(seed=1, name=name, **args)
        pretrained.load(model, str(path), name=name)
        return model.state_dict()

    return load


def refused(read, path, **args):
    with pytest.raises(UserError) as caught:
        read(path, **args)
    message = str(caught.value)
    assert message.startswith("model.pretrained: ") and "\n" not in message and not message.endswith(".")
    return message


def same(got, wanted):
    assert all(torch.equal(got[name], wanted[name].float()) for name in got) and got


def saved(path, tree, *, form="zip"):
    if form == "safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in tree.items()}, path)
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=form == "zip")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# By content


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["w", "w.bin", "w.ckpt", "w.pth.tar", "w.PTH", "w.pth", "w.safetensors", "w.txt"])
def test_a_file_is_read_by_its_content_and_never_by_its_suffix(name, form, teacher, read, tmp_path):
    same(read(saved(tmp_path / name, teacher, form=form)), teacher)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_numbers_become_float32(kind, teacher, read, tmp_path):
    stored = {name: tensor.to(kind) for name, tensor in teacher.items()}
    for form in ("zip", "safetensors"):
        got = read(saved(tmp_path / form, stored, form=form))
        same(got, stored)
        assert {tensor.dtype for tensor in got.values()} == {torch.float32}


def test_what_training_scripts_save_beside_the_weights_is_no_obstacle(teacher, read, tmp_path):
    beside = {"args": argparse.Namespace(lr=0.1, names=["a"]), "best": np.float64(0.5), "epoch": 3, "rng": None}
    momenta = {0: {"exp_avg": torch.zeros(3)}}
    tree = {**beside, "optimizer": {"state": momenta, "param_groups": [{"lr": 1}]}, "model": teacher}
    for form in ("zip", "legacy"):
        same(read(saved(tmp_path / form, tree, form=form)), teacher)


class Hyper:
    """What Lightning and configuration libraries put into a checkpoint."""


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_objects_are_refused_by_name_with_the_way_out(form, teacher, read, tmp_path):
    path = saved(tmp_path / "last.ckpt", {"state_dict": teacher, "hyper_parameters": Hyper()}, form=form)
    said = refused(read, path)
    assert f"{__name__}.Hyper" in said and "weights_only=False" in said and "save_file" in said and "any code" in said


def test_the_conversion_on_the_page_works(teacher, read, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "last.ckpt", {"state_dict": teacher, "hyper_parameters": Hyper()})
    exec(code, {})
    same(read(tmp_path / "last.safetensors"), teacher)


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return file.getvalue()


FOREIGN = {
    "empty": (b"", "an empty file of 0 bytes.*download"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 86\n",
        "pointer of Git LFS.*git lfs pull",
    ),
    "html": (b"\n<!DOCTYPE html>\n<html></html>", "a web page.*'resolve'"),
    "html in capitals": (b"<HTML><body>", "a web page"),
    "error of a bucket": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "a web page"),
    "text": (b"Entry not found", "is text .*b'Entry not found'"),
    "json": (b'{"error": "not found"}', "JSON text, but no index"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "gzip archive.*unpack"),
    "tar": (b"a".ljust(257, b"\0") + b"ustar\0" + bytes(300), "a tar archive.*unpack"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(9), "HDF5 file.*PyTorch"),
    "npz": (npz(), "NumPy arrays.*model.pretrained=hub"),
    "zip": (zipped(**{"a.txt": "a"}), "zip archive of 1 files.*unpack"),
    "torchscript": (zipped(**{"m/data.pkl": "", "m/code/a.py": ""}), "TorchScript.*torch.jit.load"),
    "half a zip": (b"PK\x03\x04" + bytes(40), "cut short or damaged.*download"),
    "a zip whose names are no text": (
        zipped(**{"\u00e9": ""}).replace("\u00e9".encode(), b"\xff\xfe"),
        "cut short or damaged",
    ),
    "a zip of a later version": (
        zipped(a="").replace(b"PK\1\2\x14\3\x14\0", b"PK\1\2\x14\3\xff\0"),
        "cut short or damaged",
    ),
    "gguf": (b"GGUF\3\0\0\0", "GGUF"),
    "zeros": (bytes(4000), "neither safetensors nor a file of torch.save"),
    "half a pickle": (pickle.dumps({"a": 1}, protocol=2)[:-3], "cannot be read.*cut short"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_what_is_no_file_of_weights_is_named(name, suffix, read, tmp_path):
    content, words = FOREIGN[name]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    said = refused(read, path)
    assert re.search(words, said), said
    assert str(path) in said


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.02])
def test_a_file_that_is_cut_short_is_one_sentence(form, share, teacher, read, tmp_path):
    path = saved(tmp_path / "w", teacher, form=form)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    said = refused(read, path)
    assert "cut short" in said
    if form == "safetensors" and share == 0.5:
        assert f"{len(whole) // 2:,} bytes of {len(whole):,}" in said


def test_pipes_and_missing_files_are_refused_at_once(read, tmp_path):
    (tmp_path / "weights.pt").touch()
    assert "weights.pth, did you mean 'weights.pt'?; wanted" in refused(read, tmp_path / "weights.pth")
    assert "there is no file" in refused(read, tmp_path / "nowhere" / "w.pth")
    (tmp_path / "w").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="got a device"):
        read(tmp_path / "w")


# ---------------------------------------------------------------------------------------------------------------------
# Folders and shards


def shards(folder, tensors, **other):
    folder.mkdir(exist_ok=True)
    names, places = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {**places, **other}})
    )
    return folder


def test_shards_are_read_by_their_index_or_folder(teacher, read, tmp_path):
    folder = shards(tmp_path / "w", teacher)
    same(read(folder), teacher)
    same(read(folder / "model.safetensors.index.json"), teacher)
    assert "one of 2 shards" in refused(read, folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "2 shards, of which 1 are missing, first model-00002" in refused(read, folder)


@pytest.mark.parametrize("file", ["../w.pth", "/etc/passwd", "a/b", 3])
def test_an_index_names_files_beside_it_only(file, teacher, read, tmp_path):
    assert "wanted a file beside it" in refused(read, shards(tmp_path / "w", teacher, more=file))


def test_an_index_that_lists_what_its_shard_lacks_is_refused(teacher, read, tmp_path):
    folder = shards(tmp_path / "w", teacher, more="model-00001-of-00002.safetensors")
    assert "lacks 'more'" in refused(read, folder)


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("export.json", "model.init_from"),
        ("manifest.json", "checkpoint of a run"),
        ("latest", "zero_to_fp32"),
        (".metadata", "dcp_to_torch"),
        ("README.md", "wanted one file of weights in it, got none"),
    ],
)
def test_another_folder_is_named(mark, words, read, tmp_path):
    (tmp_path / mark).write_text("{}")
    assert words in refused(read, tmp_path)


def test_of_several_files_in_a_folder_one_must_be_named(teacher, read, tmp_path):
    saved(tmp_path / "a.pth", teacher)
    same(read(tmp_path), teacher)
    saved(tmp_path / "b.ckpt", teacher)
    assert "several: a.pth, b.ckpt; name one" in refused(read, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Prefixes and wrappers

PREFIXES = ("module", "_orig_mod", "backbone", "encoder", "base_encoder", "teacher", "student", "model", "some_name")
OUTER = ("state_dict", "model", "model_ema", "teacher", "student", "params", "state_dict_ema", "anything")


def nested(tensors, prefix, wrappers):
    tree = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    for wrapper in wrappers:
        tree = {wrapper: tree, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    return tree


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.lists(st.sampled_from(PREFIXES), max_size=4).map(lambda words: "".join(f"{word}." for word in words)),
    wrappers=st.lists(st.sampled_from(OUTER), max_size=3),
    compiled=st.booleans(),
    beside=st.booleans(),
)
def test_any_prefix_under_any_wrapper_is_stripped(prefix, wrappers, compiled, beside, teacher, tmp_path):
    stored = dict(teacher)
    if compiled:  # each block, as train.compile does
        stored = {re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name): tensor for name, tensor in stored.items()}
    tree = nested(stored, prefix, wrappers)
    if beside and prefix.replace("_orig_mod.", ""):
        inner = tree
        for wrapper in reversed(wrappers):
            inner = inner[wrapper]
        inner["decode_head.conv.weight"], inner["neck.norm.weight"] = torch.zeros(3), torch.zeros(7)
    found = find_network(read_tensors(saved(tmp_path / "w", tree)), vit().state_dict().keys())
    got = {name: tensor for name, tensor in found.weights.items() if not name.startswith("head.")}
    assert got.keys() == vit().state_dict().keys() and all(torch.equal(got[name], teacher[name]) for name in got)


def other(tensors):
    return {name: -tensor for name, tensor in tensors.items()}


COPIES = {
    "DINO": lambda t: {"student": nested(other(t), "module.backbone.", []), "teacher": nested(t, "backbone.", [])},
    "DINO's heads too": lambda t: {
        "teacher": {**nested(t, "backbone.", []), "head.mlp.0.weight": torch.zeros(3)},
        "student": {**nested(other(t), "backbone.", []), "head.mlp.0.weight": torch.zeros(3)},
    },
    "timm": lambda t: {"state_dict": other(t), "state_dict_ema": t},
    "DeiT": lambda t: {"model": other(t), "model_ema": t, "optimizer": {}},
    "Lightning's average": lambda t: {"state_dict": {**nested(other(t), "net.", []), **nested(t, "ema_net.", [])}},
    "I-JEPA": lambda t: {"encoder": nested(other(t), "module.", []), "target_encoder": nested(t, "module.", [])},
    "MoCo v3": lambda t: {"state_dict": nested(t, "module.base_encoder.", [])
                          | nested(other(t), "module.momentum_encoder.", [])},
    "momenta by name": lambda t: {"model": t, "optimizer": {"exp_avg": other(t)}},
}  # fmt: skip


@pytest.mark.parametrize("kind", COPIES)
def test_of_several_copies_the_documented_one_is_taken(kind, teacher, read, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ase_dist"):
        same(read(saved(tmp_path / "w", COPIES[kind](teacher))), teacher)
    said = caplog.text
    assert "took what is under" in said
    assert ("copies of the same network" in said) == (kind != "momenta by name")


def test_a_prefix_that_some_names_lack_is_stripped_from_the_others(teacher, read, tmp_path):
    bare = ("pos_embed", "cls_token", "norm.weight")
    stored = {name if name in bare else f"module.{name}": tensor for name, tensor in teacher.items()}
    same(read(saved(tmp_path / "w", stored)), teacher)


def test_parts_of_the_pretraining_and_classifiers_are_left_out_and_told(teacher, read, tmp_path, caplog):
    beside = {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 5, 16)}
    beside |= {f"decoder_blocks.0.{name[9:]}": t for name, t in teacher.items() if name.startswith("blocks.0.")}
    beside |= {"decoder_norm.weight": torch.zeros(16), "decoder_pred.weight": torch.zeros(3, 16)}
    with caplog.at_level(logging.INFO, "ase_dist"):
        same(read(saved(tmp_path / "mae", {"model": {**teacher, **beside}})), teacher)
    assert re.search(r"left out \d+ tensors of .*decoder_blocks.*head", caplog.text)
    beit = {**teacher, "lm_head.weight": torch.zeros(8, 32), "mask_token": torch.zeros(1, 1, 32)}
    same(read(saved(tmp_path / "beit", beit)), teacher)


def test_positions_and_patches_that_are_resampled_are_told(teacher, read, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ase_dist"):
        got = read(saved(tmp_path / "w", teacher), img_size=64, patch_size=8)
    assert got["pos_embed"].shape[1] == 65
    assert "patch_embed.proj.weight from [32, 3, 16, 16] to [32, 3, 8, 8]" in caplog.text
    assert "pos_embed from [1, 5, 32] to [1, 65, 32]" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Other families


def with_registers(state):
    """Meta's names: one position for the class token, which timm has added to it; registers by another name."""
    stored = dict(state)
    place = torch.randn(1, 1, 32)
    stored["register_tokens"] = stored.pop("reg_token")
    stored["pos_embed"] = torch.cat([place, stored["pos_embed"]], dim=1)
    stored["cls_token"] = stored["cls_token"] - place
    return {**stored, "mask_token": torch.zeros(1, 32)}


def test_meta_dinov2_with_registers(read, tmp_path):
    args = {"name": "vit_small_patch14_reg4_dinov2", "img_size": 28}
    state = vit(**args).state_dict()
    got = read(saved(tmp_path / "w", {"teacher": nested(with_registers(state), "backbone.", [])}), **args)
    assert all(torch.allclose(got[name], state[name], atol=1e-6) for name in state)


def test_meta_swiglu():
    stored = {
        "blocks.0.mlp.w12.weight": torch.ones(4, 2),
        "blocks.0.mlp.w3.bias": torch.ones(2),
        "norm.bias": torch.ones(2),
    }
    assert to_timm(stored).keys() == {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias", "norm.bias"}


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_with_registers", "dinov3", "dinov3_gated"])
@pytest.mark.parametrize("prefix", ["", "model.module."])
def test_weights_of_transformers_compute_the_same(family, prefix, tmp_path):
    transformers = pytest.importorskip("transformers")
    kinds = {
        "vit": ("ViT", NAME, 16, {"intermediate_size": 128}),
        "dinov2": ("Dinov2", "vit_small_patch14_dinov2", 14, {}),
        "dinov2_with_registers": (
            "Dinov2WithRegisters",
            "vit_small_patch14_reg4_dinov2",
            14,
            {"num_register_tokens": 4},
        ),
        "dinov3": (
            "DINOv3ViT",
            "vit_small_patch16_dinov3_qkvb",
            16,
            {"num_register_tokens": 4, "intermediate_size": 128},
        ),
        "dinov3_gated": (
            "DINOv3ViT",
            "vit_small_plus_patch16_dinov3_qkvb",
            16,
            {"num_register_tokens": 4, "intermediate_size": 128, "use_gated_mlp": True, "hidden_act": "silu"},
        ),
    }
    kind, name, patch, more = kinds[family]
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 2 * patch,
        "patch_size": patch,
    }
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**size, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "hf")  # under the names that files on the hub have
    stored = {f"{prefix}{key}": tensor for key, tensor in read_tensors(tmp_path / "hf" / "model.safetensors").items()}
    own = vit(seed=1, name=name, img_size=2 * patch).eval()
    pretrained.load(own, str(saved(tmp_path / "w", stored)), name=name)
    image = torch.randn(1, 3, 2 * patch, 2 * patch)
    with torch.no_grad():
        wanted, got = model(image).last_hidden_state, own.forward_features(image)
    assert torch.allclose(got, wanted, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit

REG = "vit_small_patch14_reg4_dinov2"
MISFITS = {
    "width": ({"embed_dim": 64}, {}, r"width 64 where the model has 32; set model.backbone to one of that size"),
    "depth": ({"depth": 3}, {}, r"depth 3 where the model has 2"),
    "size of timm's": ({"embed_dim": 384, "depth": 2, "num_heads": 6}, {}, r"width 384 .* such as vit_small_patch16_"),
    "registers": (
        {"reg_tokens": 4, "no_embed_class": True},
        {},
        r"register tokens 4 where the model has 0; .* 4 registers",
    ),
    "no registers": ({}, {"reg_tokens": 4}, r"register tokens 0 where the model has 4; .* with no registers"),
    "layer scales": ({"init_values": 1e-5}, {}, r"it has layer scales where the model has none.*init_values: 1e-5"),
    "no layer scales": ({}, {"init_values": 1e-5}, r"it lacks layer scales.*init_values: null"),
    "no bias": ({"qkv_bias": False}, {}, r"lacks biases of queries.*qkv_bias: false"),
    "norms of queries": ({"qk_norm": True}, {}, r"norms of queries and keys where .*{qk_norm: true"),
    "norm before": ({"pre_norm": True}, {}, r"norm before the blocks where .*{pre_norm: true"),
    "FFN": ({"mlp_ratio": 2}, {}, r"FFNs of 64 where the model has 128"),
    "channels": ({"in_chans": 1}, {}, r"images of 1 where the model has 3; take weights for RGB images"),
    "no class token": ({"class_token": False, "global_pool": "avg"}, {}, r"lacks a class token"),
    "average pooling": ({"global_pool": "avg"}, {}, r"lacks a norm after the blocks; .*global_pool: avg"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_says_what_has_what_and_what_to_try(case, read, tmp_path):
    has, wants, words = MISFITS[case]
    said = refused(read, saved(tmp_path / "w.pth", vit(**has).state_dict()), **wants)
    assert f"w.pth does not fit {NAME}: it " in said and re.search(words, said), said


def test_another_kind_of_network_is_named(read, tmp_path):
    resnet = saved(tmp_path / "w", timm.create_model("resnet18", num_classes=0).state_dict())
    assert re.search(r"no blocks.0 and is of another kind of network \(bn1", refused(read, resnet))
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 1, 1))
    assert "another kind of network" in refused(read, saved(tmp_path / "s", swin.state_dict()))
    with_lora = {"blocks.0.attn.qkv.lora_A": torch.ones(3), **vit().state_dict()}
    assert "adapters; if it is one of this package's, export it" in refused(read, saved(tmp_path / "l", with_lora))


def test_an_advice_that_is_followed_works(read, teacher, tmp_path):
    """``global_pool: avg`` is told for weights that were tuned under average pooling."""
    path = saved(tmp_path / "w", vit(global_pool="avg", num_classes=3).state_dict())
    build_backbone(NAME, size=32, weights=str(path), args={**SMALL, "global_pool": "avg"})
    with pytest.raises(UserError, match="global_pool: avg"):
        build_backbone(NAME, size=32, weights=str(path), args=SMALL)


def test_a_wrong_tag_of_timm_is_one_sentence():
    with pytest.raises(UserError, match=r"no weights 'augreg_in1' of vit_tiny_patch16_224.*did you mean") as caught:
        build_backbone("vit_tiny_patch16_224.augreg_in1", size=32, weights="hub")
    assert "\n" not in str(caught.value)
