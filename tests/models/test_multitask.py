"""The multi-task model: all streams in one pass equal one pass per task, and untouched it is the timm model."""

import pytest
import timm
import torch

from ase_dist.models.multitask import TaskEmbedding
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.moe import MoEFFN
from ase_dist.moe.layer import finish_layers
from tests.models.conftest import TINY_VIT
from tests.moe.conftest import FFN

pytestmark = pytest.mark.single_gpu

TASKS = ("semseg", "human_parts", "saliency", "edge", "normals")


def loss_of(predictions):
    return sum(p.square().mean() for p in predictions.values())


@pytest.mark.parametrize("gating", ["ase", "naive", "dense"])
@pytest.mark.parametrize("layer", ["plain", "deepspeed"])
def test_one_pass_equals_a_pass_per_task(layer, gating, model_for, stirred, images, gradients):
    model = stirred(model_for(layer=layer, moe={"gating": gating, "aux_losses": {}}))
    together = model(images())
    expected = gradients(model, loss_of(together.predictions))
    alone = [model(images(), tasks=(task,)) for task in TASKS]
    for index, (task, output) in enumerate(zip(TASKS, alone, strict=True)):
        torch.testing.assert_close(output.predictions[task], together.predictions[task], rtol=1e-4, atol=1e-5)
        assert torch.equal(output.expert_counts[:, 0], together.expert_counts[:, index])
        torch.testing.assert_close(output.mean_gates[:, 0], together.mean_gates[:, index])
    got = gradients(model, sum(loss_of(output.predictions) for output in alone))
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_subset_runs_in_the_order_asked_for(model_for, stirred, images):
    model = stirred(model_for())
    everything = model(images())
    output = model(images(), tasks=["edge", "semseg"])
    assert list(output.predictions) == ["edge", "semseg"] and output.expert_counts.shape == (2, 2, 4)
    torch.testing.assert_close(output.predictions["edge"], everything.predictions["edge"], rtol=1e-4, atol=1e-5)
    assert torch.equal(output.expert_counts, everything.expert_counts[:, [3, 0]])


def test_only_the_streams_asked_for_are_computed(model_for, images):
    seen = []
    model = model_for()
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    model.stem.patch_embed.register_forward_pre_hook(lambda _, args: seen.append("stem"))
    model(images())
    model(images(), tasks=["edge"])
    assert seen == ["stem", 5, "stem", 1]


@pytest.mark.parametrize("moe", [{}, {"enabled": False}, {"every_n_blocks": 2}, {"gating": "topk", "num_shared": 0}])
def test_untouched_adapters_give_the_timm_models_features(moe, model_for, images):
    model = model_for(moe=moe, head="linear")
    with seeded_initialisation(0, "backbone"):
        plain = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY_VIT)
    features = plain.forward_features(images())[:, 1:]
    for task in TASKS:
        got = model(images()).predictions[task]
        torch.testing.assert_close(got, model.heads[task](features), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "size"), [("vit_small_patch14_dinov2", 42), ("deit_tiny_distilled_patch16_224", 48)]
)
def test_other_backbones_and_odd_sizes(backbone, size, model_for, images):
    output = model_for(backbone=backbone, size=size)(images(1, size))
    assert output.predictions["semseg"].shape == (1, 21, 48, 48)
    tokens = 10 if "14" in backbone else 11
    assert (output.expert_counts.sum(-1) == 3 * tokens).all()


def test_statistics_are_of_the_gates(model_for, stirred, images):
    output = stirred(model_for())(images())
    assert output.expert_counts.shape == output.mean_gates.shape == (2, 5, 4)
    tokens = 2 * (1 + 4)
    assert (output.expert_counts[..., 3] == tokens).all(), "the shared one sees every token"
    torch.testing.assert_close(output.mean_gates.sum(-1), torch.ones(2, 5))
    assert not output.mean_gates.requires_grad and output.aux_loss.requires_grad


def test_without_experts_the_statistics_are_empty(model_for, images):
    output = model_for(moe={"enabled": False}, layer="deepspeed")(images())
    assert output.expert_counts.shape == (0, 5, 0) and output.aux_loss == 0


def test_without_a_task_embedding_the_streams_differ_by_router_alone(model_for, images):
    model = model_for(task_embedding=False)
    assert model.task_embedding is None
    assert not any("task_embedding" in name for name, _ in model.named_parameters())
    counts = model(images()).expert_counts
    assert not torch.equal(counts[0, 0], counts[0, 1])


def test_equal_streams_are_computed_once(model_for, images, gradients):
    model = model_for(task_embedding=False, moe={"enabled": False}, lora_rank=0, tune="full")
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    together = model(images()).predictions
    got = gradients(model, loss_of(together))
    alone = [model(images(), tasks=[task]).predictions for task in TASKS]
    assert seen == [1] * 6
    for task, predictions in zip(TASKS, alone, strict=True):
        torch.testing.assert_close(predictions[task], together[task])
    expected = gradients(model, sum(loss_of(predictions) for predictions in alone))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "own",
    [{"moe": {}}, {"lora_task_rank": 2, "lora_rank": 2}, {"task_embedding": True}],
    ids=["experts", "lora", "embedding"],
)
def test_streams_with_a_part_of_the_tasks_own_are_computed_each(own, model_for, images):
    model = model_for(**{"task_embedding": False, "moe": {"enabled": False}, **own})
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    model(images())
    assert seen == [5]


def test_the_task_embedding_is_added_once_per_stream():
    embedding = TaskEmbedding(3, 4)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(embedding(x, [0, 1, 2]), x.expand(3, -1, -1, -1))
    with torch.no_grad():
        embedding.weight.normal_()
    got = embedding(x, [2, 0])
    assert torch.equal(got[0], x + embedding.weight[2]) and torch.equal(got[1], x + embedding.weight[0])


def test_images_follow_the_weights_precision(model_for, images):
    model = model_for().bfloat16()
    output = model(images())
    assert output.predictions["edge"].dtype == torch.bfloat16 and output.mean_gates.dtype == torch.float32


@pytest.mark.parametrize(
    ("tasks", "words"),
    [(["edges"], "no task 'edges'.*did you mean 'edge'"), ([], "at least one"), (["edge", "edge"], "at most once")],
)
def test_refuses_wrong_tasks(tasks, words, model_for, images):
    with pytest.raises(ValueError, match=words):
        model_for()(images(), tasks=tasks)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe": {"experts": "ffn"}},
        {"moe": {"enabled": False}, "head": "linear"},
        {"checkpoint_activations": "recompute"},
        {"checkpoint_activations": "offload"},
    ],
)
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_everything_stays_on_the_device_of_the_images(device, options, model_for, images, fake_device):
    model = model_for(**options).bfloat16()  # torch's shape rule for grouped_mm refuses float32 (2.14)
    with fake_device(model, images(), device) as inputs:
        output = model(inputs, tasks=["normals", "semseg"])
        tensors = [*output.predictions.values(), *output[1:]]
        assert {tensor.device.type for tensor in tensors} == {device}
        if device == "meta" or torch.cuda.is_available():
            (loss_of(output.predictions) + output.aux_loss).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert grads and {grad.device.type for grad in grads} == {device}


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_the_fake_device_catches_a_tensor_left_on_the_cpu(device, model_for, images, fake_device):
    model = model_for(head="linear")
    model.task_embedding.register_forward_hook(lambda _, inputs, output: output.cpu())
    with (
        fake_device(model, images(), device) as inputs,
        pytest.raises(RuntimeError, match=r"same device|different devices"),
    ):
        model(inputs)


def test_a_model_that_keeps_some_tasks_predicts_them_as_before_and_holds_no_others(model_for, stirred, images):
    model = stirred(model_for(tasks=["semseg", "edge", "normals"])).eval()
    wanted = model(images(), tasks=["normals", "semseg"])
    model.keep_tasks(["normals", "semseg"])
    found = model(images())
    assert list(found.predictions) == list(model.task_names) == ["normals", "semseg"] == list(model.heads)
    for name, logits in wanted.predictions.items():
        torch.testing.assert_close(found.predictions[name], logits)
    torch.testing.assert_close(found.mean_gates, wanted.mean_gates)
    assert model.task_embedding.weight.shape[0] == model.blocks[0].mlp.router.weight.shape[0] == 2
    with pytest.raises(ValueError, match="no task 'edge'"):
        model(images(), tasks=["edge"])


def test_layers_of_equal_settings_are_finished_at_once_and_others_one_by_one():
    layers = [MoEFFN(FFN(seed=seed), num_experts=4, k=1, num_tasks=2, rank=2, seed=seed) for seed in (0, 1)]
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    for weight in (0.005, 0.5):
        layers[1].aux_losses = {"mutual_information": weight, "z": 1.0} if weight == 0.5 else layers[0].aux_losses
        whole = [layer(x) for layer in layers]
        loss, counts, gates = finish_layers(layers, [layer.with_sums(x)[1] for layer in layers])
        torch.testing.assert_close(loss, whole[0].aux_loss + whole[1].aux_loss)
        assert torch.equal(counts, torch.stack([each.expert_counts for each in whole]))
        torch.testing.assert_close(gates, torch.stack([each.mean_gates for each in whole]))
