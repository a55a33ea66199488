"""Settings and DeepSpeed's JSON agree or are refused; no "auto" is left."""

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ase_dist.read_config import load_settings
from ase_dist.training.ds_config import read_ds_config, resolve, shipped_ds_configs
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def settle(tree, *overrides, world=2, native_bf16=False):
    return resolve(load_settings(None, overrides), tree, world=world, native_bf16=native_bf16)


def refusal(tree, *overrides, world=2):
    with pytest.raises(ValueError) as caught:
        settle(tree, *overrides, world=world)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_ones_are_the_promised_ones():
    assert {path.stem for path in SHIPPED} == {"z0", "z1", "z2", "z3", "z2_offload", "z2_bf16"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_auto_of_a_shipped_json_is_filled(path):
    config = settle(read_ds_config(path), "train.batch_size=3", "train.gradient_accumulation_steps=4")
    assert "auto" not in json.dumps(config.deepspeed)
    assert config.zero_stage == int(path.stem[1])
    assert config.deepspeed["train_batch_size"] == 3 * 4 * 2
    assert config.deepspeed["gradient_clipping"] == config.settings.train.gradient_clipping
    assert config.settings.train.bf16 is (path.stem == "z2_bf16")


HF_COMMON = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
             "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW",
                  "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR",
                  "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip
HF_ZERO = {
    2: {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True,
        "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": "auto",
        "contiguous_gradients": True},
    3: {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("stage", HF_ZERO)
def test_the_templates_of_hugging_face_are_accepted(stage):
    """As in its documentation of DeepSpeed; the settings fill them, and DeepSpeed accepts what is left."""
    options = ("train.lr=3e-4", "train.batch_size=4", "train.gradient_accumulation_steps=2", "train.bf16=false")
    config = settle({**HF_COMMON, "zero_optimization": HF_ZERO[stage]}, *options)
    assert "auto" not in json.dumps(config.deepspeed)
    assert not {"fp16", "scheduler", "optimizer"} & config.deepspeed.keys()
    assert (config.zero_stage, config.deepspeed["train_batch_size"], config.settings.train.lr) == (stage, 16, 3e-4)
    default = DeepSpeedZeroConfig(stage=stage)
    found = DeepSpeedZeroConfig(**config.deepspeed["zero_optimization"])
    assert found.reduce_bucket_size == default.reduce_bucket_size
    assert found.param_persistence_threshold == default.param_persistence_threshold


@pytest.mark.parametrize(
    "tree",
    [
        {"fp16": "auto"},
        {"fp16": {"enabled": "auto"}},
        {"fp16": {"enabled": False, "loss_scale": 0}},
        {"bf16": "auto"},
        {"scheduler": "auto"},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_min_lr": "auto"}}},
    ],
)
def test_an_auto_that_asks_for_nothing_changes_nothing(tree):
    with_it, without = settle(tree), settle({})
    assert with_it.settings == without.settings
    kept = {key: value for key, value in with_it.deepspeed.items() if key != "fp16"}
    assert kept == without.deepspeed


@pytest.mark.parametrize("native", [True, False])
def test_bf16_follows_the_accelerator_unless_it_is_said(native):
    auto = {"bf16": {"enabled": "auto"}}
    assert settle(auto, native_bf16=native).settings.train.bf16 is native
    assert settle(auto, "train.bf16=true", native_bf16=native).deepspeed["bf16"]["enabled"] is True
    assert settle({}, "train.bf16=false", native_bf16=native).deepspeed["bf16"]["enabled"] is False


def test_without_a_json_it_is_zero_0_and_in_bf16_zero_1():
    """DeepSpeed's stage 0 in bf16 waits for the device for every trained tensor; who asks for it gets it."""
    assert settle(read_ds_config(None)).zero_stage == 0
    assert settle(read_ds_config(None), native_bf16=True).zero_stage == 1
    assert settle({"bf16": {"enabled": True}}).zero_stage == 1
    assert settle({"zero_optimization": {"overlap_comm": True}}, "train.bf16=true").zero_stage == 1
    assert settle({"zero_optimization": {"stage": 0}}, "train.bf16=true").zero_stage == 0


def test_the_throughput_timer_waits_for_the_device_where_it_is_asked_for():
    def timer(tree):
        config = DeepSpeedConfig({"train_batch_size": 1, **{k: v for k, v in tree.items() if k == "timers"}})
        return config.timers_config.enabled

    assert not timer(settle({}).deepspeed)
    assert timer(settle({"timers": {"throughput": {"enabled": True}}}).deepspeed)


def test_what_stands_in_the_json_alone_becomes_the_setting():
    tree = {
        "gradient_clipping": 0.3,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"eps": 1e-6, "betas": [0.8, 0.9], "weight_decay": "auto"}},
    }
    train = settle(tree).settings.train
    assert (train.gradient_clipping, train.gradient_accumulation_steps) == (0.3, 2)
    assert (train.adam.eps, train.adam.betas, train.weight_decay) == (
        1e-6,
        (0.8, 0.9),
        load_settings(None).train.weight_decay,
    )
    assert "optimizer" not in settle(tree).deepspeed, "groups of experts and of decay are built here"


def test_the_same_value_in_both_is_no_contradiction():
    assert settle({"gradient_clipping": 0.5}, "train.gradient_clipping=0.5").settings.train.gradient_clipping == 0.5


def test_resolving_twice_is_resolving_once():
    """The written config.yaml with the same JSON gives the same run."""
    tree = read_ds_config(ROOT / "ds_configs" / "z2_bf16.json")
    once = settle(tree)
    assert resolve(once.settings, tree, world=2, native_bf16=False) == once


def test_the_json_that_was_given_is_left_alone():
    tree = {"bf16": {"enabled": "auto"}}
    settle(tree)
    assert tree == {"bf16": {"enabled": "auto"}}


def test_the_monitor_writes_into_the_run_folder():
    tree = settle({}, "output=here", "monitor.csv=true", "monitor.wandb=true", "monitor.mlflow=true").deepspeed
    assert tree["tensorboard"]["output_path"] == tree["csv_monitor"]["output_path"] == "here"
    assert tree["wandb"]["project"] == tree["mlflow"]["experiment"] == "ase_dist"
    assert "tensorboard" not in settle({}, "monitor.tensorboard=false").deepspeed


@pytest.mark.parametrize(
    ("tree", "overrides", "words"),
    [
        ({"mlflow": {"enabled": True, "uri": "x"}}, [], "mlflow: got 'uri', wanted enabled and experiment"),
        ({"gradient_clipping": 0.5}, ["train.gradient_clipping=1"], "train.gradient_clipping is 1.0 and the DeepSpeed"),
        ({"train_micro_batch_size_per_gpu": 4}, ["train.batch_size=8"], "train.batch_size is 8"),
        ({"bf16": {"enabled": True}}, ["train.bf16=false"], "train.bf16 is False"),
        ({"optimizer": {"params": {"lr": 1.0}}}, ["train.lr=0.5"], "optimizer.params.lr = 1.0"),
        ({"train_batch_size": 7}, ["train.batch_size=4"], "train_batch_size is 7, but 4 images x 1"),
        ({"optimizer": {"type": "Adam"}}, [], 'takes for AdamW; write "AdamW", or add "adam_w_mode": false'),
        ({"optimizer": {"type": "Lion"}}, [], "optimizer.type: got 'Lion', wanted one of "),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}}, [], "optimizer.params has no 'betas'"),
        ({"optimizer": {"type": "AdamW"}}, ["train.optimizer=sgd"], "optimizer.type = adamw"),
        ({"optimizer": {"params": {"learning_rate": 1}}}, [], "optimizer.params has no 'learning_rate'"),
        ({"optimizer": {"params": 3}}, [], "optimizer.params: got 3"),
        ({"scheduler": {"type": "WarmupLR"}}, [], "'scheduler' is set by train.schedule"),
        ({"elasticity": {}}, [], "'elasticity' was removed from DeepSpeed in 0.19"),
        ({"zero_optimisation": {"stage": 2}}, [], "did you mean 'zero_optimization'?"),
        ({"zero_optimization": 2}, [], "zero_optimization: got 2, wanted an object"),
        ({"zero_optimization": {"stage": 4}}, [], "stage: got 4, wanted one of (0, 1, 2, 3)"),
        ({"zero_optimization": {"stage": "2"}}, [], "stage: got '2'"),
        ({"zero_optimization": {"stage": 3}}, ["model.moe.ep_size=2"], "set model.moe.ep_size=1, or use stage 2"),
        ({"zero_optimization": {"stage": 2, "reduce_scatter": False}}, [], "reduce_scatter: experts under stage 2"),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, [], 'sub_group_size: "auto" is filled'),
        ({"zero_optimization": {"stage": "auto"}}, [], "stage: got 'auto', wanted one of"),
        ({"zero_optimization": {"offload_optimizer": {"device": "auto"}}}, [], 'offload_optimizer.device: "auto" is'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_min_lr": "auto"}}},
            [],
            "'scheduler' is set by train.schedule",
        ),
        ({"optimizer": "auto"}, [], "optimizer: got 'auto', wanted an object"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, [], "the guard against NaN needs it"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, [], "the guard against NaN needs it"),
        ({"fp16": {"enabled": True}}, [], "fp16: not supported here"),
        ({"bf16": True}, [], "bf16: got True, wanted an object"),
        ({"gradient_accumulation_steps": 0}, [], "train.gradient_accumulation_steps: got 0"),
        ({"optimizer": {"params": {"eps": "small"}}}, [], "train.adam.eps: got 'small'"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(tree, overrides, words):
    assert words in refusal(tree, *overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"),
        ("", "ds.json: the file is empty"),
        ("{'a': 1}", "ds.json: not JSON"),
        ('{"a": 1, "a": 2}', "ds.json: the key 'a' stands twice"),
        ("[1]", "holds a list, wanted an object"),
    ],
)
def test_files_that_are_no_json(text, words, tmp_path):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_ds_config(path)
    assert words in str(caught.value)


def test_a_shipped_file_has_a_name():
    assert shipped_ds_configs() == [path.stem for path in SHIPPED]
    for path in SHIPPED:
        assert read_ds_config(path.stem) == json.loads(path.read_text())
    with pytest.raises(ValueError, match=r"did you mean 'z2_offload'\? \(shipped: z0, z1,"):
        read_ds_config("z2_ofload")


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "z2").write_text('{"zero_optimization": {"stage": 1}}')
    assert read_ds_config("z2") == {"zero_optimization": {"stage": 1}}
