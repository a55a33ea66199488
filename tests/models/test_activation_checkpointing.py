"""Checkpointed blocks: the same numbers, fewer of them kept."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from ase_dist.models.activation_checkpointing import checkpoint_block
from ase_dist.models.blocks import TaskBlock

pytestmark = pytest.mark.single_gpu

MODES = ["recompute", "offload"]


def total(output):
    return sum(p.square().mean() for p in output.predictions.values()) + output.aux_loss


@pytest.mark.parametrize("layer", ["plain", "deepspeed"])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients_are_those_of_none(mode, layer, model_for, stirred, images, gradients):
    options = {"layer": layer, "drop_path": 0.5, "moe": {"every_n_blocks": 2}}
    plain, kept = (stirred(model_for(checkpoint_activations=m, **options)).train() for m in ("none", mode))
    torch.manual_seed(5)
    expected = plain(images())
    torch.manual_seed(5)
    got = kept(images())
    assert all(torch.equal(expected.predictions[t], got.predictions[t]) for t in expected.predictions)
    assert torch.equal(expected.aux_loss, got.aux_loss) and torch.equal(expected.mean_gates, got.mean_gates)
    assert torch.equal(expected.expert_counts, got.expert_counts) and got.expert_counts.dtype == torch.int64
    assert got.expert_counts.grad_fn is None
    torch.rand(3)  # the recomputation draws from the state of its forward pass, not from what follows it
    after = torch.get_rng_state()
    a, b = gradients(plain, total(expected)), gradients(kept, total(got))
    assert torch.equal(after, torch.get_rng_state())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_is_repeated_in_the_second_run(mode, model_for, stirred, images, gradients):
    found = []
    for m in ("none", mode):
        model = stirred(model_for(checkpoint_activations=m, tasks=["saliency"]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(images())
        found.append(gradients(model, total(output)))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_a_first_block_whose_input_needs_no_gradient_learns_without_a_warning(mode, model_for, images, gradients):
    model = model_for(checkpoint_activations=mode, task_embedding=False)
    assert "blocks.0.attn.qkv.lora_B" in gradients(model, total(model(images())))


def test_keeps_only_the_blocks_input(images, model_for):
    def saved(mode):
        sizes = []
        model = model_for(checkpoint_activations=mode, tasks=["saliency"], head="linear")
        pack = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images())
        return sum(sizes)

    assert saved("recompute") < 0.5 * saved("none")


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_frozen_block_passes_its_gradient_on(mode):
    block = checkpoint_block(TaskBlock(Block(16, 2)).requires_grad_(False), mode)
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    block(x)[0].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_offload_of_a_frozen_block_falls_back_to_recompute(monkeypatch):
    seen = []
    monkeypatch.setattr("fairscale.nn.checkpoint_wrapper", lambda module, offload_to_cpu: seen.append(offload_to_cpu))
    checkpoint_block(nn.Linear(2, 2), "offload")
    checkpoint_block(nn.Linear(2, 2).requires_grad_(False), "offload")
    assert seen == [True, False]


def test_refuses_another_word():
    with pytest.raises(ValueError, match=r"got 'ofload', wanted one of .* did you mean 'offload'"):
        checkpoint_block(nn.Linear(2, 2), "ofload")
