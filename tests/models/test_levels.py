"""Features of several levels: which ones, that they are timm's, for the streams asked for, and nothing else changes."""

import pytest
import timm
import torch

from ase_dist.deployment.export import write_export
from ase_dist.errors import UserError
from ase_dist.models import build_model
from ase_dist.models.heads import Level, LevelsHead
from ase_dist.models.level_heads import HRNetHead
from ase_dist.models.levels import chosen_levels, spread
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.read_config import build_settings
from ase_dist.registries import HEADS
from ase_dist.tasks import select_tasks
from tests.models.conftest import TINY_VIT

pytestmark = pytest.mark.single_gpu

TASKS = ("semseg", "human_parts", "saliency", "edge", "normals")
SEVERAL = ("dpt", "hrnet", "multi_level")
DEEP = {**TINY_VIT, "depth": 4}


class SeenHead(LevelsHead):
    """Keeps what it gets."""

    def __init__(self, levels, channels, *, width, prefix=False):
        super().__init__(levels)
        self.reads_prefix = prefix
        self.linear = torch.nn.Linear(levels[-1].width, channels)
        self.seen = []

    def forward(self, tokens):
        self.seen.append([x.detach() for x in tokens])
        x = self.linear(self.normalised(tokens)[-1])[:, -(self.levels[-1].grid[0] * self.levels[-1].grid[1]) :]
        return x.unflatten(1, self.levels[-1].grid).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def pair(monkeypatch):
    """``pair`` is a head on two levels."""
    monkeypatch.setitem(HEADS, "pair", type("Pair", (HRNetHead,), {"num_levels": 2}))


@pytest.fixture
def seen(monkeypatch):
    """``seen`` is a head then."""
    monkeypatch.setitem(HEADS, "seen", SeenHead)


@pytest.mark.parametrize(
    ("count", "wanted", "numbers"),
    [(12, 4, (3, 6, 9, 12)), (24, 4, (6, 12, 18, 24)), (40, 4, (10, 20, 30, 40)), (8, 4, (2, 4, 6, 8)),
     (4, 4, (1, 2, 3, 4)), (2, 4, (1, 1, 2, 2)), (12, 1, (12,)), (7, 3, (3, 5, 7))],
)  # fmt: skip
def test_levels_are_spread_over_the_depth(count, wanted, numbers):
    assert spread(count, wanted) == numbers


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"head": "dpt", "levels": [0, 1, 2, 4]}, r"^model.levels: got \[0, 1, 2, 4\], wanted ascending numbers of b"),
        ({"head": "hrnet", "levels": [1, 3]}, r"the last one, 4, among them, such as \[2, 4\]"),
        ({"head": "hrnet", "levels": [3, 1, 4]}, r"ascending"),
        ({"head": "hrnet", "levels": [2, 5]}, r"the last one, 4"),
        ({"head": "dpt", "levels": [2, 4]}, r"^model.levels: got 2, wanted 4 for the head 'dpt'"),
        ({"levels": [2, 4]}, r"the head 'pup' reads the last level alone; .*one of \['dpt', 'hrnet'"),
        ({"head": "dpt", "head_args": {"readout": "projekt"}}, r"^model.head_args.readout: got .*mean 'project'"),
        ({"head": "dpt", "head_args": {"redout": "add"}}, r"^model.head_args: got 'redout', but .*mean 'readout'"),
        ({"head": "pup", "head_args": {"grid": [1, 2]}}, r"^model.head_args: got 'grid', but .* takes none"),
        ({"head": "dpt", "head_width": 1}, r"^model.head_width: got 1, wanted 2 or more"),
    ],
)  # fmt: skip
def test_a_wrong_choice_is_one_sentence(model, words, model_for):
    with pytest.raises(UserError, match=words):
        model_for(backbone_args=DEEP, **model)


def test_a_readout_needs_a_token_to_read(model_for):
    with pytest.raises(UserError, match=r"^model.head_args.readout: got 'add', but the backbone has no class token"):
        model_for(backbone="vit_base_patch16_siglip_224", head="dpt", head_args={"readout": "add"})


@pytest.mark.parametrize("levels", [[], "all", [1.5, 2]])
def test_a_list_of_no_numbers_is_refused(levels):
    with pytest.raises(UserError, match=r"model\.levels"):
        build_settings({"model": {"head": "dpt", "levels": levels}})


@pytest.mark.parametrize(
    ("backbone", "size"), [("vit_tiny_patch16_224", (32, 48)), ("vit_small_patch14_reg4_dinov2", (28, 42))]
)
@pytest.mark.parametrize("prefix", [False, True])
def test_untouched_the_levels_are_timms(backbone, size, prefix, model_for, seen):
    """Those of ``forward_intermediates`` without its norm, but for the last, which is ``forward_features``."""
    options = {"backbone": backbone, "size": size, "backbone_args": DEEP, "tasks": ["edge", "normals"]}
    model = model_for(head="seen", levels=[1, 3, 4], head_args={"prefix": prefix}, **options)
    with seeded_initialisation(0, "backbone"):
        plain = timm.create_model(backbone, img_size=size, num_classes=0, **DEEP)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    wanted = plain.forward_intermediates(
        images, indices=[0, 2], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    wanted = [torch.cat([others, cells], dim=1) for cells, others in wanted] + [plain.forward_features(images)]
    model(images)
    count = plain.num_prefix_tokens
    for task in ("edge", "normals"):
        (found,) = model.heads[task].seen
        assert [level.prefix for level in model.heads[task].levels] == [count] * 3
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y if prefix else y[:, count:], rtol=1e-5, atol=1e-5)


def test_levels_are_computed_once_and_for_the_streams_asked_for(model_for, stirred, images, seen):
    model = stirred(model_for(head="seen", backbone_args=DEEP))
    rows = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    everything = model(images())
    output = model(images(), tasks=["edge", "semseg"])
    assert rows == [5] * 4 + [2] * 4
    for task in ("edge", "semseg"):
        torch.testing.assert_close(output.predictions[task], everything.predictions[task], rtol=1e-4, atol=1e-5)
        whole, part = model.heads[task].seen
        assert len(part) == 4 and all(x.shape == (2, 4, 32) for x in part)
        for x, y in zip(whole, part, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert [len(model.heads[task].seen) for task in TASKS] == [2, 1, 1, 2, 1]


@pytest.mark.parametrize("name", SEVERAL)
def test_one_pass_equals_a_pass_per_task(name, model_for, stirred, images, gradients):
    model = stirred(model_for(head=name, backbone_args=DEEP, moe={"aux_losses": {}}))
    loss_of = lambda predictions: sum(p.square().mean() for p in predictions.values())  # noqa: E731
    expected = gradients(model, loss_of(model(images()).predictions))
    got = gradients(model, sum(loss_of(model(images(), tasks=(task,)).predictions) for task in TASKS))
    assert got.keys() == expected.keys()
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", SEVERAL)
def test_everything_is_trained_and_counted_as_of_the_head(name, model_for, stirred, images, gradients):
    from ase_dist.models import parameter_groups

    args = {"readout": "project"} if name == "dpt" else {}
    model = stirred(model_for(head=name, head_args=args, tune="full", backbone_args=DEEP))
    output = model(images())
    got = gradients(model, sum(p.square().mean() for p in output.predictions.values()) + output.aux_loss)
    assert got.keys() == dict(model.named_parameters()).keys()
    assert all(grad.abs().sum() > 0 for grad in got.values())
    groups = parameter_groups(model)
    assert all((group == "head") == key.startswith("heads.") for key, group in groups.items())


def test_keep_tasks_keeps_the_levels(model_for, stirred, images):
    model = stirred(model_for(head="dpt", head_args={"readout": "add"}, backbone_args=DEEP))
    wanted = model(images()).predictions
    model.keep_tasks(["normals", "edge"])
    found = model(images()).predictions
    assert list(found) == ["normals", "edge"]
    for task, logits in found.items():
        torch.testing.assert_close(logits, wanted[task], rtol=1e-4, atol=1e-5)


def test_a_resnets_head_reads_the_last_stage_alone(model_for):
    resnet = {"backbone": "resnet18", "backbone_args": {}, "tune": "full", "lora_rank": 0, "moe": {"enabled": False}}
    with pytest.raises(UserError, match=r"^model.head: got 'hrnet', which reads several levels"):
        model_for(head="hrnet", **resnet)


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [({"levels": [2, 4]}, True), ({"levels": None}, True), ({"levels": [1, 4]}, False), ({"head": "pup"}, False)],
)
def test_an_exported_head_is_taken_where_it_reads_the_same_levels(wanted, taken, settings_for, stirred, tmp_path):
    """Two blocks of four: null is 2 and 4 for a head that asks for two."""
    options = {"tasks": ["edge"], "backbone_args": DEEP}
    settings = settings_for(head="pair", levels=[2, 4], **options)
    tasks = select_tasks("scenes", ["edge"])
    model = stirred(build_model(settings, tasks, expert_layer="plain"))
    write_export(
        tmp_path / "out", model, settings, tasks, dtype="fp32", facts={"step": 1, "metrics": None, "backbone": {}}
    )
    chosen = settings_for(init_from=str(tmp_path / "out"), **{"head": "pair", **options, **wanted})
    found = build_model(chosen, tasks, expert_layer="plain")
    assert torch.equal(found.blocks[0].attn.qkv.lora_B, model.blocks[0].attn.qkv.lora_B)
    assert torch.equal(found.heads["edge"].last.weight, model.heads["edge"].last.weight) is taken


def test_what_a_head_must_know_of_a_level():
    settings = build_settings({"model": {"head": "hrnet", "levels": [2, 4, 12]}})
    assert chosen_levels(settings.model, 12, unit="blocks") == (2, 4, 12)
    assert Level(width=96, grid=(7, 9), stride=32).prefix == 0
