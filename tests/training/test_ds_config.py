"""DeepSpeed's JSON and the settings: one truth, every "auto" filled in, contradictions refused (fault 13)."""

import json
from pathlib import Path

import pytest

from ase_dist.config import load_settings
from ase_dist.training.ds_config import read_ds_config, resolve

pytestmark = pytest.mark.single_gpu

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def resolved(tree, *overrides, world=2, native_bf16=False):
    return resolve(load_settings(None, list(overrides)), tree, world=world, native_bf16=native_bf16)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve_without_any_auto_left(path):
    config = resolved(read_ds_config(path), "train.batch_size=3", "train.gradient_accumulation_steps=2")
    assert "auto" not in json.dumps(config.deepspeed)
    assert config.deepspeed["train_batch_size"] == 3 * 2 * 2
    assert config.deepspeed["train_micro_batch_size_per_gpu"] == 3
    assert str(config.zero_stage) == path.stem[1]


def test_the_shipped_files_are_the_six():
    assert [path.stem for path in SHIPPED] == ["z0", "z1", "z2", "z2_bf16", "z2_offload", "z3"]


def test_no_file_is_zero_0():
    assert resolved(read_ds_config(None)).zero_stage == 0


def test_a_value_of_the_json_becomes_the_setting():
    tree = {"gradient_accumulation_steps": 4, "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.004, "betas": [0.5, 0.6]}}}  # fmt: skip
    train = resolved(tree).settings.train
    assert (train.gradient_accumulation_steps, train.gradient_clipping, train.betas) == (4, 0.5, (0.5, 0.6))


def test_bf16_auto_follows_the_accelerator():
    tree = {"bf16": {"enabled": "auto"}}
    assert resolved(tree, native_bf16=True).deepspeed["bf16"]["enabled"] is True
    assert resolved(tree, native_bf16=False).deepspeed["bf16"]["enabled"] is False
    assert resolved(tree, "train.bf16=true").deepspeed["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("tree", "overrides", "sentence"),
    [
        (
            {"gradient_clipping": 0.5},
            ["train.gradient_clipping=1.0"],
            "train.gradient_clipping is 1.0 and the",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, ["train.batch_size=8"], "set one of them"),
        ({"bf16": {"enabled": True}}, ["train.bf16=false"], "train.bf16 is False"),
        ({"train_batch_size": 7}, [], "train_batch_size is 7, but 4 images x 1 accumulation steps x 2 ranks are 8"),
        ({"zero_optimization": {"stage": 4}}, [], "stage: got 4"),
        ({"zero_optimization": {"stage": 3}}, ["model.moe.ep_size=2"], "set model.moe.ep_size=1, or use stage 2"),
        ({"scheduler": {"type": "WarmupLR"}}, [], "'scheduler' is set by train.schedule"),
        ({"elasticity": {}}, [], "'elasticity' was removed"),
        ({"optimizer": {"type": "Lamb"}}, [], "optimizer.type: got 'Lamb'"),
        ({"optimizer": {"params": {"weightdecay": 1}}}, [], "did you mean 'weight_decay'"),
    ],
)
def test_contradictions_and_leftovers_are_one_sentence(tree, overrides, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        resolved(tree, *overrides)
    assert "\n" not in str(caught.value)


def test_the_same_value_in_both_is_no_contradiction():
    assert resolved({"gradient_clipping": 0.5}, "train.gradient_clipping=0.5").settings.train.gradient_clipping == 0.5


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is not JSON"), ("[1]", "holds a list, wanted an object"), (None, "cannot read")]
)
def test_a_file_that_is_no_json_object(text, sentence, tmp_path):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_ds_config(path)
