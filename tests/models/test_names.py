"""Global names: one scheme for checkpoints and exports, and what in it depends on the order of the tasks."""

import pytest
import torch

from ase_dist.models import build_model
from ase_dist.models.names import named_tensors, task_order, trained_entries
from ase_dist.moe import MoEFFN
from ase_dist.moe.sharding import Shard
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

TASKS = ["semseg", "edge", "normals"]
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
       "head_width": 8, "moe": {"num_experts": 4, "k": 2, "rank": 2}}  # fmt: skip
RESNET = {"backbone": "resnet18", "head": "linear", "tune": "full", "lora_rank": 0, "moe": {"enabled": False}}
MODELS = {
    "lora experts": VIT,
    "ffn experts": {**VIT, "moe": {**VIT["moe"], "experts": "ffn", "hidden": 8}},
    "trained whole": {**VIT, "tune": "full"},
    "no experts": {**VIT, "moe": {"enabled": False}},
    **{sharing: {**RESNET, "sharing": sharing} for sharing in ("shared", "mtan", "nddr", "cross_stitch")},
}


def build(name, tasks, *, seed=0, layer="plain"):
    settings = build_settings({"seed": seed, "tasks": tasks, "data": {"size": 32}, "model": MODELS[name]})
    return build_model(settings, select_tasks("scenes", tasks), expert_layer=layer)


def stir(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for entry in trained_entries(model):
            entry.tensor.add_(0.1 * torch.randn(entry.tensor.shape, generator=generator))
    return model


def parts_of(model):
    """What a checkpoint holds of a model: {global name: tensor}."""
    return {
        name: part.detach().clone()
        for entry in trained_entries(model)
        for name, part in entry.split(entry.tensor).items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_another_order_of_the_tasks_is_the_same_model(name):
    """Tensors by position, names by position and blocks of channels: each task's predictions tell."""
    tasks = ["normals", "semseg", "edge"]  # not its own inverse
    source, target = stir(build(name, TASKS)).double(), build(name, tasks).double()
    parts, order = parts_of(source), task_order(tasks, TASKS)
    with torch.no_grad():
        for entry in trained_entries(target):
            entry.tensor.copy_(entry.reordered(entry.join([parts[n] for n in entry.names_of(order)]), order))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        expected, got = source(images).predictions, target(images).predictions
    assert all(torch.allclose(got[task], expected[task], atol=1e-9, rtol=1e-9) for task in TASKS)
    assert {n for entry in trained_entries(target) for n in entry.names_of(order)} == parts.keys()


@pytest.mark.parametrize("name", MODELS)
def test_what_depends_on_the_number_of_tasks_is_known_to(name):
    """A tensor that grows with the tasks has an axis of them, a name that comes with a task its number."""
    two, three = build(name, TASKS[:2]), build(name, TASKS)
    shapes = {path: entry.part_shape for entry in trained_entries(two) for path in entry.names}
    for entry in trained_entries(three):
        if entry.path.startswith("heads.") or entry.is_stacked:
            continue
        if entry.path not in shapes:
            assert entry.task_positions, entry.path
        elif entry.part_shape != shapes[entry.path]:
            grown = [i for i, (a, b) in enumerate(zip(entry.part_shape, shapes[entry.path], strict=True)) if a != b]
            assert entry.task_axes == tuple(grown), entry.path


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_and_exports_share_their_names(name):
    model = stir(build(name, TASKS))
    trained, named = parts_of(model), named_tensors(model)
    assert trained.keys() <= named.keys() and all(torch.equal(named[n], trained[n]) for n in trained)
    assert sum(t.numel() for t in named.values()) == sum(p.numel() for p in model.parameters())
    deepspeed = named_tensors(build(name, TASKS, layer="deepspeed"))
    assert {n: t.shape for n, t in deepspeed.items()} == {n: t.shape for n, t in named.items()}


def test_every_rank_knows_the_names_of_all_experts():
    whole = build("lora experts", TASKS)
    everyone = {n for entry in trained_entries(whole) for n in entry.names}
    held = []
    for index in range(2):
        model = build("lora experts", TASKS)
        for block in model.blocks:
            options = {"num_experts": 4, "k": 2, "rank": 2, "num_tasks": 3, "shard": Shard(3, index=index, count=2)}
            block.mlp = MoEFFN(block.mlp.base, **options)
        entries = trained_entries(model)
        assert {n for entry in entries for n in entry.all_names} == everyone
        held += [n for entry in entries if entry.is_sharded for n in entry.names]
    routed = {
        n for entry in trained_entries(whole) for n in entry.names[:3] if entry.is_stacked and len(entry.names) == 3
    }
    assert sorted(held) == sorted(routed)


def test_a_buffer_that_is_saved_has_a_name():
    model = build("shared", TASKS)
    model.heads["edge"].register_buffer("kept", torch.ones(2))
    model.heads["edge"].register_buffer("passing", torch.ones(2), persistent=False)
    named = named_tensors(model)
    assert torch.equal(named["heads.edge.kept"], torch.ones(2)) and "heads.edge.passing" not in named
