"""The convolutional rows: norms without batch statistics, every way of sharing against its formula, the interface."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ase_dist.models import build_model, parameter_table
from ase_dist.models.multitask_resnet import MultiTaskResNet
from ase_dist.models.names import named_tensors
from ase_dist.models.resnet import build_resnet
from ase_dist.models.sharing import NDDR, CrossStitch, MTANTrunk, ParallelTrunk, SharedTrunk
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

PLAIN = {"tune": "full", "lora_rank": 0, "moe": {"enabled": False}}
TASKS = ["semseg", "edge", "normals"]


def settings_for(*, tasks=TASKS, size=32, seed=0, **model):
    chosen = {"backbone": "resnet18", "head": "linear", **PLAIN, **model}
    return build_settings({"seed": seed, "tasks": tasks, "data": {"size": size}, "model": chosen})


def resnet(**options):
    settings = settings_for(**options)
    return build_model(settings, select_tasks("scenes", settings.tasks))


def parts(weights="none"):
    return build_resnet("resnet18", weights=weights, args={}, seed=0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sharing", ["shared", "mtan", "nddr", "cross_stitch"])
def test_every_sharing_predicts_every_task_and_trains_every_weight(sharing):
    model = resnet(sharing=sharing)
    assert isinstance(model, MultiTaskResNet)
    output = model(draw(2, 3, 32, 32))
    shapes = {name: tuple(logits.shape) for name, logits in output.predictions.items()}
    assert shapes == {"semseg": (2, 21, 16, 16), "edge": (2, 1, 16, 16), "normals": (2, 3, 16, 16)}
    assert output.aux_loss == 0 and output.expert_counts.shape == output.mean_gates.shape == (0, 3, 0)
    with torch.no_grad():  # residual branches start at zero; move them, so that gradients go everywhere
        for parameter in model.parameters():
            parameter.add_(0.05 * draw(*parameter.shape, seed=1))
    sum(p.square().mean() for p in model(draw(2, 3, 32, 32)).predictions.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("sharing", ["shared", "mtan", "nddr", "cross_stitch"])
def test_an_image_predicts_the_same_alone_and_among_others(sharing):
    model, images = resnet(sharing=sharing).double(), draw(3, 3, 32, 32).double()
    together, alone = model(images).predictions, model(images[1:2]).predictions
    for task in TASKS:
        torch.testing.assert_close(together[task][1:2], alone[task], rtol=1e-9, atol=1e-12)


def test_without_norms_it_is_timms_dilated_resnet():
    reference = timm.create_model("resnet18", output_stride=8, num_classes=0)
    trunk = SharedTrunk(parts(), num_tasks=2)
    for module in [*reference.modules(), *trunk.modules()]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.GroupNorm):
                setattr(module, name, nn.Identity())
    weights = dict(zip(trunk.state_dict(), reference.state_dict().values(), strict=True))
    trunk.load_state_dict(weights)
    got = trunk(draw(1, 3, 64, 64))
    assert len(got) == 2 and got[0].shape == (1, 512, 8, 8)
    torch.testing.assert_close(got[1], reference.forward_features(draw(1, 3, 64, 64)))


def test_pretrained_statistics_are_folded(tmp_path):
    reference = timm.create_model("resnet18", output_stride=8).eval()
    with torch.no_grad():
        for name, buffer in reference.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(draw(*buffer.shape, seed=3).abs() + 0.1)
    save_file(reference.state_dict(), tmp_path / "r18.safetensors")
    trunk = SharedTrunk(parts(str(tmp_path / "r18.safetensors")), num_tasks=1)
    assert not list(trunk.buffers())
    torch.testing.assert_close(trunk(draw(2, 3, 64, 64))[0], reference.forward_features(draw(2, 3, 64, 64)), rtol=1e-3,
                               atol=1e-4)  # fmt: skip


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "r34.safetensors")
    with pytest.raises(ValueError, match="does not fit resnet18; unexpected"):
        parts(str(tmp_path / "r34.safetensors"))


def test_cross_stitch_by_its_formula():
    unit, features = CrossStitch(4, 3), [draw(2, 4, 3, 3, seed=i) for i in range(3)]
    torch.testing.assert_close(unit(features)[0], 0.9 * features[0] + 0.05 * features[1] + 0.05 * features[2])
    with torch.no_grad():
        unit.weight.copy_(draw(3, 3, 4))
    got = unit(features)
    for t in range(3):
        for c in range(4):
            wanted = sum(unit.weight[t, s, c] * features[s][:, c] for s in range(3))
            torch.testing.assert_close(got[t][:, c], wanted)


def test_nddr_by_its_formula():
    unit, features = NDDR(4, 2), [draw(2, 4, 3, 3, seed=i) for i in range(2)]
    start = [0.9 * features[0] + 0.1 * features[1], 0.1 * features[0] + 0.9 * features[1]]
    for got, mixed, norm in zip(unit(features), start, unit.norms, strict=True):
        torch.testing.assert_close(got, norm(mixed).relu())


def test_units_begin_alike_whatever_their_task():
    trunk = ParallelTrunk(parts(), 2, unit=CrossStitch)
    a, b = trunk(draw(1, 3, 32, 32))
    torch.testing.assert_close(a, b)  # equal networks, shares that sum to 1


def test_mtan_step_by_step():
    base, trunk, images = parts(), MTANTrunk(parts(), 2), draw(1, 3, 32, 32)
    got = trunk(images)
    for task in range(2):
        x, kept = base.stem(images), None
        for i, stage in enumerate(base.stages):
            u, x = stage[0](x), stage(x)
            mask = trunk.masks[i][task]
            if kept is not None and kept.shape[-1] != u.shape[-1]:
                kept = nn.functional.max_pool2d(kept, 2)
            seen = u if kept is None else torch.cat([u, kept], dim=1)
            masked = x * torch.sigmoid(mask.norm2(mask.expand(mask.norm1(mask.squeeze(seen)).relu())))
            kept = trunk.keep[i](masked) if i < 3 else None
        torch.testing.assert_close(got[task], masked)


def test_one_task_needs_no_units():
    alone, stitched = resnet(tasks=["edge"]), resnet(tasks=["edge"], sharing="cross_stitch")
    torch.testing.assert_close(*(m(draw(1, 3, 32, 32)).predictions["edge"] for m in (alone, stitched)))


def test_a_subset_of_tasks_and_the_seed():
    model = resnet()
    images = draw(1, 3, 32, 32)
    assert list(model(images, tasks=["edge"]).predictions) == ["edge"]
    assert torch.equal(model(images, tasks=["edge"]).predictions["edge"], model(images).predictions["edge"])
    assert torch.equal(resnet()(images).predictions["edge"], model(images).predictions["edge"])
    assert not torch.equal(resnet(seed=1)(images).predictions["edge"], model(images).predictions["edge"])
    with pytest.raises(ValueError, match="did you mean 'edge'"):
        model(images, tasks=["edges"])


def test_sizes_are_counted_by_what_they_are_for():
    shared, mtan, nddr = (parameter_table(resnet(sharing=name)) for name in ("shared", "mtan", "nddr"))
    assert 11.1e6 < shared.groups["backbone"].trained < 11.2e6 and shared.groups["sharing"].total == 0
    assert mtan.groups["backbone"].total == shared.groups["backbone"].total and mtan.groups["sharing"].total > 0
    assert nddr.groups["backbone"].total == 3 * shared.groups["backbone"].total
    assert named_tensors(resnet()).keys() == resnet().state_dict().keys()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tune": "adapters"}, "model.tune: got adapters for resnet18, wanted full"),
        ({"moe": {"enabled": True}}, "model.moe.enabled"),
        ({"lora_rank": 4}, "model.lora_rank"),
        ({"size": 36}, "data.size: got 36"),
        ({"pretrained": "scenes"}, "no weights are shipped for resnet18"),
        ({"backbone_args": {"widths": 3}}, "model.backbone_args"),
        ({"backbone": "vit_tiny_patch16_224", "sharing": "mtan"}, "model.sharing: got 'mtan'"),
    ],
)
def test_what_does_not_fit_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        resnet(**options)
