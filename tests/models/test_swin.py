"""Swin transformers: taken apart they are timm's, with every adapter and expert too; levels, sizes, files, refusals."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resize_rel_pos_bias_table

from ase_dist.deployment.export import write_export
from ase_dist.errors import UserError
from ase_dist.image_size import ImageSize
from ase_dist.models import build_model
from ase_dist.models.backbone import build_backbone
from ase_dist.models.families import embed
from ase_dist.models.heads import Level
from ase_dist.models.level_heads import _onto
from ase_dist.models.pretrained import save_backbone
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.moe import MoEFFN
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SMALL = {"embed_dim": 16, "depths": (1, 2, 2), "num_heads": (1, 2, 2), "window_size": 4}
SWIN = {"backbone": V1, "backbone_args": SMALL, "head": "linear"}
TASKS = ("semseg", "human_parts", "saliency", "edge", "normals")


def timm_model(name, size, **args):
    with seeded_initialisation(0, "backbone"):
        return timm.create_model(name, img_size=size, num_classes=0, drop_path_rate=0.0, **args)


@pytest.mark.parametrize(
    ("name", "args", "size", "grid"),
    [
        (V1, SMALL, (64, 64), (4, 4)),
        (V1, SMALL, (44, 72), (3, 5)),  # neither windows nor mergings divide the grids 11x18, 6x9, 3x5
        (V2, {**SMALL, "window_size": 3}, (44, 72), (3, 5)),
        (V2, {**SMALL, "pretrained_window_sizes": (4, 4, 2)}, (64, 64), (4, 4)),
        ("swin_s3_tiny_224", {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}, (112, 112), (4, 4)),
    ],
)
def test_the_parts_compute_what_the_timm_model_computes(name, args, size, grid):
    backbone, whole = build_backbone(name, size=size, args=args), timm_model(name, size, **args).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = embed(backbone.stem.double(), images, blocks=len(backbone.blocks)).tokens_BPD
    x_tBPD = torch.stack([x, 2 * x])
    for block, tokens in zip(backbone.blocks, backbone.block_tokens, strict=True):
        x_tBPD, _ = block.double()(x_tBPD, None, None, True)
        assert x_tBPD.shape[2] == tokens
    features = backbone.norm.double()(x_tBPD[0]).unflatten(1, backbone.grid)
    torch.testing.assert_close(features, whole.forward_features(images), rtol=1e-12, atol=1e-12)
    assert backbone.grid == grid and backbone.width == features.shape[-1]


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("moe", [{}, {"enabled": False}, {"every_n_blocks": 2}])
def test_untouched_adapters_give_the_timm_models_features(name, moe, model_for, images):
    model = model_for(**{**SWIN, "backbone": name}, size=64, moe=moe, lora_task_rank=2, tasks=["edge", "normals"])
    seen = []
    model.heads["edge"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.double()(images(2, 64).double())
    wanted = timm_model(name, 64, **SMALL).double().forward_features(images(2, 64).double())
    torch.testing.assert_close(seen[0].unflatten(1, (4, 4)), wanted, rtol=1e-9, atol=1e-9)


def test_lora_is_on_attention_mergings_and_ffns_and_experts_count_blocks_over_all_stages(model_for):
    model = model_for(**SWIN, size=64, moe={"every_n_blocks": 2})
    assert [block.has_moe for block in model.blocks] == [False, True, False, True, False]
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoEFFN)]
    assert [layer.dim for layer in layers] == [32, 64]
    adapted = {name.removesuffix(".lora_A") for name, _ in model.named_parameters() if name.endswith(".lora_A")}
    linears = {f"blocks.{i}.{name}" for i in range(5) for name in ("attn.qkv", "attn.proj")}
    linears |= {f"blocks.{i}.mlp.{name}" for i in (0, 2, 4) for name in ("fc1", "fc2")}
    assert adapted == linears | {f"blocks.{i}.downsample.reduction" for i in (1, 3)}


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        (V1, {"moe": {"every_n_blocks": 2, "aux_losses": {}}}),
        (V2, {"moe": {"every_n_blocks": 2, "aux_losses": {}}}),
        (V1, {"moe": {"enabled": False}, "task_embedding": False}),  # the pairs of tasks alone make streams differ
    ],
)
def test_one_pass_equals_a_pass_per_task(backbone, options, model_for, stirred, gradients):
    model = stirred(model_for(**{**SWIN, "backbone": backbone}, size=(44, 72), lora_task_rank=2, **options))
    pixels = torch.randn(2, 3, 44, 72, generator=torch.Generator().manual_seed(2))
    together = model(pixels)
    wanted = gradients(model, sum(p.square().mean() for p in together.predictions.values()))
    alone = [model(pixels, tasks=(task,)) for task in TASKS]
    for index, (task, output) in enumerate(zip(TASKS, alone, strict=True)):
        torch.testing.assert_close(output.predictions[task], together.predictions[task], rtol=1e-4, atol=1e-5)
        assert torch.equal(output.expert_counts[:, 0], together.expert_counts[:, index])
    got = gradients(model, sum(p.square().mean() for output in alone for p in output.predictions.values()))
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=2e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("losses", [{"mutual_information": 0.1}, {"cv_squared": 0.1, "switch": 0.2, "z": 0.01}])
def test_layers_with_other_numbers_of_tokens_finish_together_as_each_alone(losses, model_for, stirred, images):
    model = stirred(model_for(**SWIN, size=64, moe={"aux_losses": losses}))
    alone = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda layer, _, output: alone.append(layer.finish(output[1])))
    found = model(images(2, 64))
    assert [int(counts[0].sum()) for _, counts, _ in alone] == [3 * 2 * n for n in model.block_tokens]
    assert torch.equal(found.expert_counts, torch.stack([counts for _, counts, _ in alone]))
    torch.testing.assert_close(found.mean_gates, torch.stack([gates for _, _, gates in alone]))
    torch.testing.assert_close(found.aux_loss, sum(loss for loss, _, _ in alone))


def test_predictions_end_where_the_image_ends(model_for):
    """Of 112 pixels the last stage sees 4x4 cells of 32: its last column and row are padding by half."""
    args = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    model = model_for(**{**SWIN, "backbone_args": args}, size=112, tasks=["edge"])
    whole = []
    model.heads["edge"].register_forward_hook(lambda *call: whole.append(call[-1]))
    predicted = model(torch.randn(1, 3, 112, 112)).predictions["edge"]
    assert whole[0].shape[-2:] == (16, 16) and torch.equal(predicted, whole[0][..., :14, :14])
    model = model_for(**{**SWIN, "backbone_args": args}, size=(100, 64), tasks=["edge"])
    assert model(torch.randn(1, 3, 100, 64)).predictions["edge"].shape[-2:] == (100, 64)  # 12.5 cells of the head


def test_heads_read_the_four_stages(model_for):
    """hrnet gets timm's own features of every stage, and a colour per cell comes out where it went in."""
    args = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 1, 1)}
    for size, grids in (
        ((64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ((112, 112), [(28,) * 2, (14,) * 2, (7,) * 2, (4,) * 2]),
    ):
        model = model_for(**{**SWIN, "backbone_args": args, "head": "hrnet"}, size=size, tasks=["edge"]).double()
        head, seen = model.heads["edge"], []
        assert [(level.grid, level.stride) for level in head.levels] == list(zip(grids, (4, 8, 16, 32), strict=True))
        head.register_forward_pre_hook(lambda _, args, seen=seen: seen.extend(args[0]))
        pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).double()
        assert model(pixels).predictions["edge"].shape[-2:] == grids[0]
        wanted = timm_model(V1, size, **args).double().forward_intermediates(pixels, norm=True, intermediates_only=True)
        for tokens, feature in zip(seen, wanted, strict=True):
            torch.testing.assert_close(tokens, feature.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-9)
    model = model_for(**{**SWIN, "backbone_args": args, "head": "hrnet"}, size=64, levels=[2, 4])
    assert model.levels == (3, 5) and [level.width for level in model.heads["edge"].levels] == [32, 128]


def test_a_padded_level_meets_the_finest_cell_by_cell():
    """Columns numbered by their pixel: of 4 cells of 32 pixels those of the first 112 pixels, as 28 cells of 4."""
    coarse, fine = Level(1, (4, 4), 32), Level(1, (28, 28), 4)
    centres = (torch.arange(4.0) * 32 + 16).expand(1, 1, 4, 4)
    found = _onto(fine, centres, coarse)[0, 0, 0]
    inside = torch.arange(28) * 4 + 2.0
    torch.testing.assert_close(found[4:], inside[4:])  # the first cells lie before the first centre


def test_drop_path_is_timms_over_all_stages_and_checkpointing_repeats_it(model_for, images, gradients):
    found = []
    for mode in ("none", "recompute"):
        model = model_for(**SWIN, size=64, drop_path=0.4, checkpoint_activations=mode, tasks=["edge", "normals"])
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
        torch.manual_seed(5)
        found.append(gradients(model.train(), model(images(2, 64)).predictions["edge"].square().mean()))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-7, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Weights and refusals


@pytest.mark.parametrize("kind", ["timm", "original", "half"])
def test_a_file_of_another_window_fits_after_timms_resizing(kind, tmp_path):
    args = {**SMALL, "depths": (1, 1), "num_heads": (1, 2)}
    torch.manual_seed(0)
    teacher = timm.create_model(V1, img_size=64, num_classes=7, **args)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    if kind == "original":  # the merging stands at the end of a stage there
        state = {name.replace("layers.1.downsample", "layers.0.downsample"): x for name, x in state.items()}
    if kind == "half":
        state = {name: value.half() for name, value in state.items()}
    save_file(state, tmp_path / "w.safetensors")
    same = build_backbone(V1, size=64, args=args, weights=str(tmp_path / "w.safetensors"))
    fc1 = teacher.layers[1].blocks[0].mlp.fc1.weight
    torch.testing.assert_close(same.blocks[1].mlp.fc1.weight, fc1, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        same.blocks[1].downsample.reduction.weight, teacher.layers[1].downsample.reduction.weight, rtol=1e-3, atol=1e-4
    )
    other = build_backbone(V1, size=(40, 64), args={**args, "window_size": 6}, weights=str(tmp_path / "w.safetensors"))
    teacher.set_input_size((40, 64), window_size=6)
    for block, timms in zip(other.blocks, (teacher.layers[0].blocks[0], teacher.layers[1].blocks[0]), strict=True):
        table = timms.attn.relative_position_bias_table
        torch.testing.assert_close(block.attn.relative_position_bias_table, table, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (V1, {"size": 66}, ["data.size: got 66", "4-pixel patches", "take 64 or 68"]),
        (V1, {"args": {"window_size": 0}}, ["model.backbone_args", "window_size"]),
        (V1, {"args": {"dynamic_img_size": True}}, ["model.backbone_args", "strict_img_size", "data.size"]),
        (V1, {"args": {"img_size": 64}}, ["model.backbone_args.img_size", "data.size"]),
        (V1, {"args": {"patch_size": (4, 8)}}, ["patches of 4x8", "square"]),
        (V1 + ".nonsense", {}, ["'nonsense'", "ms_in1k"]),
        (V1, {"weights": "nothing.pth"}, ["model.pretrained", "nothing.pth"]),
        (V1, {"weights": "scenes"}, ["model.pretrained", "no weights are shipped"]),
    ],
)
def test_refuses_in_one_sentence(name, options, words):
    with pytest.raises(UserError) as error:
        build_backbone(name, **{"size": 64, **options, "args": {**SMALL, **options.get("args", {})}})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_model_that_a_user_has_registered_may_have_other_blocks_and_is_refused(monkeypatch):
    class Block(timm.models.swin_transformer.SwinTransformerBlock):
        pass

    monkeypatch.setattr(timm.models.swin_transformer, "SwinTransformerBlock", Block)
    with pytest.raises(UserError, match="has Blocks, wanted Swin's blocks"):
        build_backbone(V1, size=64, args=SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# From one run to the next


@pytest.mark.parametrize("name", [V1, V2])
def test_a_trained_backbone_is_saved_under_timms_names(name, tmp_path, images):
    settings = {"backbone": name, "weights": "none", "args": SMALL, "size": 64}
    trained = build_backbone(settings.pop("backbone"), **settings, seed=3)
    tensors = {f"stem.{n}": p for n, p in trained.stem.named_parameters()}
    tensors |= {f"blocks.{i}.{n}": p for i, block in enumerate(trained.blocks) for n, p in block.named_parameters()}
    tensors |= {f"norm.{n}": p for n, p in trained.norm.named_parameters()} | {
        "heads.edge.linear.weight": torch.ones(1)
    }
    save_backbone({n: p.detach() for n, p in tensors.items()}, tmp_path / "w.safetensors", size=ImageSize(64, 64))
    net = timm_model(name, 64, **SMALL)
    net.load_state_dict({n: p.float() for n, p in load_file(tmp_path / "w.safetensors").items()}, strict=True)
    again = build_backbone(name, size=64, args=SMALL, weights=str(tmp_path / "w.safetensors"))
    for block, other in zip(trained.blocks, again.blocks, strict=True):
        for got, wanted in zip(other.parameters(), block.parameters(), strict=True):
            assert torch.equal(got, wanted.half().float())


def test_a_run_starts_from_an_export_of_another_size_with_its_pairs_of_tasks(settings_for, stirred, tmp_path):
    """64 x 24 pixels have windows of 4x4, 4x3, 4x2 cells, 64 x 64 of 4x4 throughout."""
    chosen = {**SWIN, "lora_task_rank": 2, "moe": {"every_n_blocks": 2}}
    first = settings_for(**chosen, size=(64, 24), tasks=["edge", "normals"])
    tasks = select_tasks("scenes", first.tasks)
    source = stirred(build_model(first, tasks, expert_layer="plain"))
    facts = {"step": 1, "metrics": None, "backbone": {}}
    write_export(tmp_path / "out", source, first, tasks, dtype="fp32", facts=facts)
    second = settings_for(**chosen, size=64, tasks=["normals", "saliency"], init_from=str(tmp_path / "out"))
    model = build_model(second, select_tasks("scenes", second.tasks), expert_layer="plain")
    assert [block.window for block in source.blocks] == [(4, 4), (4, 3), (4, 3), (4, 2), (4, 2)]
    for old, new in zip(source.blocks, model.blocks, strict=True):
        assert torch.equal(new.attn.qkv.base.weight, old.attn.qkv.base.weight)
        assert torch.equal(new.attn.qkv.lora_tasks.B[0], old.attn.qkv.lora_tasks.B[1])
        assert not new.attn.qkv.lora_tasks.B[1].any(), "saliency is new"
        table = old.attn.relative_position_bias_table
        if old.window != new.window:
            options = {"new_window_size": (4, 4), "new_bias_shape": (49, table.shape[1]), "old_window_size": old.window}
            table = resize_rel_pos_bias_table(table, **options)
        torch.testing.assert_close(new.attn.relative_position_bias_table, table)
    assert torch.equal(model.blocks[3].downsample.reduction.lora_A, source.blocks[3].downsample.reduction.lora_A)
