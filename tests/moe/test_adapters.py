"""What was trained, without its model: names, files, cards, other shards, and every model that it does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ase_dist.models.names import named_tensors
from ase_dist.moe import (
    ASEMoE,
    MoEFFN,
    TaskFFN,
    adapter_state,
    global_state,
    load_adapter_state,
    load_adapters,
    save_adapters,
    set_tasks,
)
from ase_dist.moe.sharding import Shard
from tests.moe.conftest import FFN, randomise
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu

OPTIONS = {"num_experts": 5, "k": 2, "num_shared": 1, "rank": 2, "num_tasks": 2}


class Model(nn.Module):
    """The three ways in which the layer stands in a model, and tensors that are none of its business."""

    def __init__(self, *, seed=0, experts="lora", **options):
        super().__init__()
        options = {**OPTIONS, "experts": experts, "hidden": 6, **options}
        self.first = TaskFFN(MoEFFN(FFN(seed=seed), **options))
        self.blocks = nn.ModuleList([MoEFFN(FFN(seed=seed), **options), ASEMoE(FFN(seed=seed), **options)])
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        for block in (self.first, *self.blocks):
            y = block(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if block is self.first else block(x)[0]
            x = x + y
        return x


def trained(**options):
    model = Model(**options)
    for i, layer in enumerate(module for module in model.modules() if isinstance(module, MoEFFN)):
        randomise(layer, seed=i)
    set_tasks(model, [0, 1])
    return model


def tokens():
    return torch.randn(2, 3, 4, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("experts", ["lora", "ffn"])
def test_a_file_brings_the_function_into_another_model(tmp_path, experts):
    model, other = trained(experts=experts), Model(experts=experts)
    set_tasks(other, [0, 1])
    if experts == "ffn":  # experts start as copies of a base, which is no adapter
        assert not torch.equal(other(tokens()), model(tokens()))
    save_adapters(model, tmp_path / "new" / "adapters.safetensors")
    head = other.head.weight.clone()
    load_adapters(other, tmp_path / "new" / "adapters.safetensors")
    assert torch.equal(other(tokens()), model(tokens()))
    assert torch.equal(other.head.weight, head)


def test_names_are_those_of_a_checkpoint_and_values_are_copies():
    model = trained()
    state, named = adapter_state(model), named_tensors(model)
    assert {name for name in state if name.startswith("first.")} == {
        "first.router.weight",
        *(f"first.{fc}.{ab}.{i}" for fc in ("fc1", "fc2") for ab in ("A", "B") for i in range(5)),
    }
    for name, tensor in state.items():
        assert torch.equal(tensor, named[name.replace("first.", "first.layer.")])
        tensor.zero_()
    assert torch.equal(adapter_state(model)["blocks.1.fc2.B.3"], global_state(model.blocks[1])["fc2.B"][3])
    assert adapter_state(model)["first.router.weight"].any()


@pytest.mark.parametrize("wrapper", [lambda m: nn.ModuleDict({"module": m}), torch.compile], ids=["module", "compile"])
def test_a_wrapped_model_has_the_same_names(wrapper):
    model = trained()
    assert adapter_state(wrapper(model)).keys() == adapter_state(model).keys()


def test_a_layer_alone_is_a_model():
    one, other = MoEFFN(FFN(), **OPTIONS), MoEFFN(FFN(), **OPTIONS)
    randomise(one)
    load_adapter_state(other, adapter_state(one))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"gating": "naive"}, ["first", "gating", "ase", "naive"]),
        ({"alpha": 4.0}, ["scale is 1.0 there and 2.0 here"]),
        ({"num_experts": 6}, ["num_experts is 5 there and 6 here"]),
        ({"num_tasks": 3}, ["num_tasks is 2 there and 3 here"]),
        ({"rank": 3}, ["first", "fc1.A", "(5, 2, 12)", "(5, 3, 12)"]),
        ({"experts": "ffn"}, ["experts is lora there and ffn here"]),
        ({"adapt": ("fc1",)}, ["adapt"]),
    ],
)
def test_a_model_with_other_settings_is_refused_and_left_alone(tmp_path, options, parts, one_sentence):
    save_adapters(trained(), tmp_path / "a.safetensors")
    other = Model(**options)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"there and|got|lacks") as raised:
        load_adapters(other, tmp_path / "a.safetensors")
    one_sentence(raised, *parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_another_model_and_no_model_at_all(tmp_path, one_sentence):
    save_adapters(trained(), tmp_path / "a.safetensors")
    lacks, without = nn.ModuleDict({"first": MoEFFN(FFN(), **OPTIONS)}), nn.Linear(3, 3)
    for action, parts in [
        (lambda: load_adapters(lacks, tmp_path / "a.safetensors"), ["2 layers differ", "'blocks.0'", "the file"]),
        (lambda: load_adapter_state(lacks, adapter_state(trained())), ["blocks.0", "the model lacks"]),
        (lambda: load_adapter_state(lacks, {}), ["21 names differ", "the state lacks"]),
        (lambda: adapter_state(without), ["Linear without a MoEFFN"]),
    ]:
        with pytest.raises(ValueError, match=r"got|wanted") as raised:
            action()
        one_sentence(raised, *parts)


def test_files_that_are_no_adapters(tmp_path, one_sentence):
    path = tmp_path / "a.safetensors"
    save_adapters(trained(), path)
    tensors, card = load_file(path), json.dumps({"format": "ase_dist adapters", "version": 2, "layers": {}})
    (tmp_path / "short").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text").write_text("hello")
    save_file(tensors, tmp_path / "bare")
    save_file(tensors, tmp_path / "nested", {"card": "[" * 100_000})
    save_file(tensors, tmp_path / "list", {"card": "[1]"})
    save_file(tensors, tmp_path / "newer", {"card": card})
    for name in ("short", "text", "bare", "nested", "list", "newer", "missing"):
        with pytest.raises(ValueError, match=r"wanted|version 2") as raised:
            load_adapters(Model(), tmp_path / name)
        one_sentence(raised, tmp_path / name)


def _in_a_world(rank, folder):
    """Experts of one process in shards of two ranks, and back, with padding (5 routed on 2 ranks)."""
    import torch.distributed as dist

    options = {**OPTIONS, "num_experts": 6}
    layer = MoEFFN(FFN(), shard=Shard(5, index=rank, count=2), **options)
    layer.share_experts(dist.group.WORLD, "gather")
    model = nn.ModuleDict({"ffn": TaskFFN(layer)})
    load_adapters(model, folder / "whole.safetensors")
    save_adapters(model, folder / "again.safetensors")


@pytest.mark.multi_gpu
def test_a_sharded_model_takes_and_gives_the_same_file(tmp_path):
    whole = nn.ModuleDict({"ffn": TaskFFN(MoEFFN(FFN(), **{**OPTIONS, "num_experts": 6}))})
    randomise(whole["ffn"].layer)
    save_adapters(whole, tmp_path / "whole.safetensors")
    assert start_world(_in_a_world, tmp_path, size=2)().codes == [0, 0]
    one, again = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "again.safetensors")
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
