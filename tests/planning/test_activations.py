"""What a step keeps for its backward pass, predicted from shapes, against what autograd keeps of a real one."""

import pytest
import torch

from ase_dist.models import build_model
from ase_dist.planning.activations import measure_activations
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks
from ase_dist.training.loop import losses

pytestmark = pytest.mark.single_gpu

RESNET = {"backbone": "resnet18", "backbone_args": {}, "tune": "full", "lora_rank": 0, "moe": {"enabled": False}}
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_args": {"embed_dim": 32, "depth": 3, "num_heads": 2}}


def settings_for(**model):
    return build_settings({"data": {"size": 32}, "model": {**VIT, "head_width": 8, **model}})


def kept_by_autograd(settings):
    """Bytes of the storages saved by one image's step in float32, weights and the image aside."""
    tasks = select_tasks("scenes")
    model, image = build_model(settings, tasks, expert_layer="plain"), torch.rand(1, 3, 32, 32)
    known = {t.untyped_storage().data_ptr() for t in [image, *model.parameters(), *model.buffers()]}
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address comes twice
        return tensor

    labels = {task.name: torch.ones(1, 32, 32, dtype=torch.uint8) for task in tasks}
    labels["normals"] = torch.ones(1, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        losses.task_losses(model(image).predictions, labels, tasks, torch.ones(5, 2))
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in known)


@pytest.mark.parametrize("model", [{}, {"moe": {"enabled": False}}, {"tune": "full", "head": "linear"}, RESNET,
                                   {"head": "dpt"}, {"head": "hrnet", "levels": [1, 3]}])  # fmt: skip
def test_the_prediction_is_what_autograd_keeps(model):
    chosen = settings_for(**model)
    predicted = measure_activations(chosen, width=4)
    assert predicted.kept("none") == pytest.approx(kept_by_autograd(chosen), rel=0.02)


def test_checkpointing_keeps_one_block_and_the_inputs_of_all():
    sizes = measure_activations(settings_for(), width=4)
    assert sizes.inputs == 3 * 4 * (5 * 5 * 32)  # five tasks, five tokens
    assert sizes.blocks / 3 <= sizes.largest_block < 1.05 * sizes.blocks / 3
    assert sizes.kept("recompute") == sizes.largest_block + sizes.inputs + sizes.rest
    assert sizes.kept("offload") == sizes.kept("recompute") - sizes.inputs
    assert sizes.levels == 0
    several = measure_activations(settings_for(head="hrnet", levels=[1, 2, 3]), width=4)
    assert several.levels == 2 * 4 * (5 * 5 * 32)  # the last comes out of the norm and is no block's input
    assert several.kept("offload") == several.kept("recompute") - several.inputs + several.levels
    half = measure_activations(settings_for(), width=2)
    assert 0.5 <= half.kept("none") / sizes.kept("none") < 0.75
