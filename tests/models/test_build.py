"""From settings to a model: what is trained, where experts and LoRA sit, names, seeds, sizes."""

import pytest
import torch
from deepspeed.moe.layer import MoE

from ase_dist.models import MultiTaskViT, build_model, parameter_groups, parameter_table
from ase_dist.models.lora import LoRALinear
from ase_dist.moe import ASEMoE, MoEFFN
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu


def total(output):
    return sum(p.square().mean() for p in output.predictions.values()) + output.aux_loss


def loras(module):
    return {name for name, child in module.named_modules() if isinstance(child, LoRALinear)}


def test_adapters_train_everything_but_the_pretrained_weights(model_for, stirred, images, gradients):
    model = stirred(model_for())
    got = set(gradients(model, total(model(images()))))
    groups = parameter_groups(model)
    assert got == {name for name, group in groups.items() if group != "backbone"}
    assert got == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"norm.weight", "stem.pos_embed", "blocks.0.norm1.weight"} <= groups.keys() - got


@pytest.mark.parametrize("moe", [{}, {"enabled": False}, {"adapt": ["fc1"]}])
def test_full_trains_everything(moe, model_for, stirred, images, gradients):
    model = stirred(model_for(tune="full", moe=moe))
    got = gradients(model, total(model(images())))
    assert got.keys() == dict(model.named_parameters()).keys()
    assert all(grad.abs().sum() > 0 for grad in got.values())


def test_full_without_lora_is_a_plain_multi_task_vit(model_for):
    model = model_for(tune="full", lora_rank=0, moe={"enabled": False}, task_embedding=False)
    table = parameter_table(model)
    assert table.all.trained == table.all.total == table.groups["backbone"].total + table.groups["head"].total
    assert not loras(model)


def test_experts_in_every_nth_block_and_lora_elsewhere(model_for):
    model = model_for(moe={"every_n_blocks": 2})
    assert [block.has_moe for block in model.blocks] == [False, True]
    assert loras(model.blocks[0]) == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert loras(model.blocks[1]) == {"attn.qkv", "attn.proj"}


@pytest.mark.parametrize(
    ("adapt", "free"), [(["fc1"], {"fc2"}), (["fc2"], {"fc1"}), (["fc1", "fc2"], set()), (["bypass"], set())]
)
def test_a_linear_without_experts_under_a_moe_layer_gets_lora(adapt, free, model_for, stirred, images, gradients):
    model = stirred(model_for(moe={"adapt": adapt}))
    assert loras(model.blocks[0].mlp) == {f"base.{name}" for name in free}
    got = gradients(model, total(model(images())))
    assert all(f"blocks.0.mlp.base.{name}.lora_A" in got for name in free)


def test_layers_of_the_kind_asked_for(model_for):
    assert all(isinstance(block.mlp, MoEFFN) for block in model_for().blocks)
    assert all(isinstance(block.mlp, ASEMoE | MoE) for block in model_for(layer="deepspeed").blocks)


def test_both_kinds_of_layer_compute_the_same(model_for, stirred, images):
    plain, deepspeed = stirred(model_for()), stirred(model_for(layer="deepspeed"))
    a, b = plain(images()), deepspeed(images())
    assert all(torch.equal(a.predictions[task], b.predictions[task]) for task in a.predictions)


@pytest.mark.parametrize("layer", ["plain", "deepspeed"])
def test_no_name_contains_the_word_that_deepspeed_looks_for(layer, model_for):
    for moe in ({}, {"experts": "ffn"}, {"enabled": False}):
        assert not [name for name in model_for(layer=layer, moe=moe).state_dict() if "expert" in name]


def test_every_tensor_follows_from_the_seed(model_for):
    def state(seed):
        torch.manual_seed(seed + 100)
        return model_for(seed=seed).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    same = {name for name in first if torch.equal(first[name], other[name])}
    assert all(len(first[name].unique()) == 1 for name in same), "what does not vary is constant: norms, zeros"


def test_a_task_has_the_same_head_whatever_the_other_tasks(model_for):
    alone, all_tasks = model_for(tasks=["edge"]), model_for()
    assert torch.equal(alone.heads["edge"].last.weight, all_tasks.heads["edge"].last.weight)
    assert torch.equal(alone.blocks[0].attn.qkv.lora_A, all_tasks.blocks[0].attn.qkv.lora_A)


def test_ffn_experts_take_the_place_of_the_base(model_for, stirred, images, gradients):
    model = stirred(model_for(moe={"experts": "ffn", "k": 1}))
    assert not [name for name, _ in model.named_parameters() if ".mlp.base." in name]
    got = gradients(model, total(model(images())))
    assert "blocks.1.mlp.routed.fc1_weight" in got


def test_settings_that_contradict_each_other_name_the_backbone(model_for):
    with pytest.raises(ValueError, match=r"model.moe on vit_tiny_patch16_224: k: got 9"):
        model_for(moe={"k": 9})


def test_dinov2_giants_gated_ffn_takes_experts(model_for, stirred, images, gradients):
    """Its size in a few blocks: packed SwiGLU, the gate first; LoRA goes where there are no experts."""
    args = {"depth": 2, "embed_dim": 48, "num_heads": 2}
    options = {"backbone": "vit_giant_patch14_dinov2", "backbone_args": args, "size": 28}
    model = stirred(model_for(**options, moe={"adapt": ("gate", "fc2")}))
    layer = model.blocks[1].mlp
    assert layer.base.fc1.out_features == 2 * layer.base.fc2.in_features
    got = gradients(model, total(model(images(1, 28))))
    assert "blocks.1.mlp.routed.gate_A" in got and "blocks.1.mlp.routed.fc2_B" in got


def test_a_gated_ffn_works_without_experts(model_for, stirred, images, gradients):
    model = stirred(model_for(backbone="vit_giant_patch14_dinov2", size=28, moe={"enabled": False}))
    assert {"mlp.fc1", "mlp.fc2"} <= loras(model.blocks[0])
    assert "blocks.0.mlp.fc1.lora_B" in gradients(model, total(model(images(1, 28))))


def paper(**moe):
    tree = {"model": {"backbone": "vit_base_patch16_224", "moe": moe}}
    settings = build_settings(tree)
    with torch.device("meta"):
        return build_model(settings, select_tasks("pascal_context"), expert_layer="plain")


def test_vit_b_with_five_pup_heads_has_the_papers_parameters():
    """103.5 M, the 104 M of the paper's MTL-ViT row; 16/3/1/4 on fc1 and fc2 of every second block is its 107."""
    plain = parameter_table(paper(enabled=False)).groups
    assert round((plain["backbone"].total + plain["head"].total) / 1e6, 1) == 103.5
    ase = parameter_table(paper(num_experts=16, k=3, num_shared=1, rank=4, every_n_blocks=2))
    assert round(ase.all.total / 1e6) == 107
    assert isinstance(paper(enabled=False), MultiTaskViT)
