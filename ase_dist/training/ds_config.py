"""DeepSpeed's JSON: read, checked against the settings, every "auto" filled in.

A value given in both the JSON and the settings must be the same. A value given only in the JSON becomes the setting.
Hugging Face's templates are accepted: some of their "auto" are filled from the settings (``SHARED_KEYS``,
train_batch_size), some mean DeepSpeed's default (``AUTO_IS_DEFAULT``), a scheduler with only "auto" leaves the schedule
to the settings, and fp16 "auto" is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from ase_dist.config import Settings, TrainSettings
from ase_dist.errors import UserError, describe, did_you_mean, file_error
from ase_dist.json_files import read_object
from ase_dist.read_config import override_settings
from ase_dist.training.record.environment import MONITORS
from ase_dist.training.record.run_folder import RunFolder

FOLDER = Path(__file__).parents[1] / "ds_configs"  # a link to the checkout's folder, files in an installed package
AUTO = "auto"
ZERO_STAGES = (0, 1, 2, 3)
DEFAULT_STAGE = 0
BF16_STAGE = 1  # stage 0 in bf16 waits for the device for every trained tensor (0.19.8); 1 divides float32 copies too

# settings of train.* and their keys in the JSON
SHARED_KEYS: dict[str, tuple[str, ...]] = {
    "batch_size": ("train_micro_batch_size_per_gpu",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("gradient_clipping",),
    "bf16": ("bf16", "enabled"),
    "optimizer": ("optimizer", "type"),
    "lr": ("optimizer", "params", "lr"),
    "weight_decay": ("optimizer", "params", "weight_decay"),
    "adam.betas": ("optimizer", "params", "betas"),
    "adam.eps": ("optimizer", "params", "eps"),
    "sgd.momentum": ("optimizer", "params", "momentum"),
    "sgd.nesterov": ("optimizer", "params", "nesterov"),
}
OPTIMIZERS = {"AdamW": "adamw", "Adam": "adam", "SGD": "sgd"}  # DeepSpeed's names and those of train.optimizer
OPTIMIZER_KEYS = {
    "adamw": ("lr", "weight_decay", "betas", "eps"),
    "adam": ("lr", "weight_decay", "betas", "eps"),
    "sgd": ("lr", "weight_decay", "momentum", "nesterov"),
}
REMOVED = ("elasticity", "nebula", "compression_training", "amp")  # hard errors in deepspeed 0.19
# keys of zero_optimization whose "auto" Hugging Face computes from its model's width; here DeepSpeed's default holds
AUTO_IS_DEFAULT = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
)
READ_HERE = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
    "bf16",
    "fp16",
    "zero_optimization",
    "optimizer",
    "scheduler",
    "data_types",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "mlflow",
    "steps_per_print",
)
SECTIONS = ("bf16", "fp16", "zero_optimization", "optimizer", "tensorboard", "csv_monitor", "wandb", "mlflow")


class ResolvedConfig(NamedTuple):
    """The run's final settings, and the JSON for ``deepspeed.initialize`` without any "auto".

    ``why_type`` says what decided ``train.bf16``, where that needs saying.
    """

    settings: Settings
    deepspeed: dict[str, Any]
    why_type: str = ""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage 0 to 3."""
        return int(self.deepspeed["zero_optimization"]["stage"])


def shipped_ds_configs() -> list[str]:
    """Names of DeepSpeed's JSONs that come with the package: z2 and others."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_ds_config(path: str | Path | None) -> dict[str, Any]:
    """The JSON of a file, or of a shipped one by its name, as a dictionary; empty without a path (ZeRO 0, in bf16 1).

    Raises UserError for a missing or malformed file.
    """
    if path is None:
        return {}
    names = shipped_ds_configs()
    is_shipped = str(path) in names and not Path(path).is_file()
    try:
        return read_object(FOLDER / f"{path}.json" if is_shipped else path)
    except OSError as error:
        known = f"{did_you_mean(str(path), names)} (shipped: {', '.join(names)})"
        raise file_error(error, f"--deepspeed_config: cannot read {str(path)!r} ({error.strerror}){known}") from None
    except UserError as error:
        raise UserError(f"--deepspeed_config: {error}") from None


def own_ds_config(run: RunFolder) -> dict[str, Any]:
    """The JSON that a run was started with, from its folder: what its settings decide, and so may change, is left out.

    Raises UserError where there is none that can be read.
    """
    try:
        tree = read_object(run.ds_config)
    except (OSError, UserError) as error:
        raise file_error(
            error, f"{run.ds_config}: cannot be read ({describe(error)}); give --deepspeed_config"
        ) from None
    for *section, key in (
        *SHARED_KEYS.values(),
        ("train_batch_size",),
        ("tensorboard",),
        ("csv_monitor",),
        ("mlflow",),
    ):
        branch = _get(tree, tuple(section))
        if isinstance(branch, dict):
            branch.pop(key, None)
    return tree


def resolve(settings: Settings, ds_config: Mapping[str, Any], *, world: int, native_bf16: bool) -> ResolvedConfig:
    """Merge settings and JSON for ``world`` ranks, every "auto" filled in.

    Raises UserError where they contradict each other, where a key is misspelt, was removed from DeepSpeed or would
    disable the guard against NaN, and where ZeRO stage and expert-parallel size cannot be combined.
    """
    tree = deepcopy(dict(ds_config))
    _drop_auto(tree)
    _check_keys(tree)
    values = {name: _shared_value(name, path, settings.train, tree) for name, path in SHARED_KEYS.items()}
    if values["bf16"] == AUTO:
        values["bf16"] = native_bf16
    try:
        settings = override_settings(settings, {f"train.{name}": value for name, value in values.items()})
    except UserError as error:
        raise UserError(f"DeepSpeed JSON against the settings: {error}") from None
    train = settings.train
    tree.pop("optimizer", None)  # built here, so that experts and decay have their groups
    tree["train_micro_batch_size_per_gpu"] = values["batch_size"]
    tree["gradient_accumulation_steps"] = values["gradient_accumulation_steps"]
    tree["gradient_clipping"] = values["gradient_clipping"]
    tree.setdefault("bf16", {})["enabled"] = values["bf16"]
    total = train.batch_size * train.gradient_accumulation_steps * world
    if tree.get("train_batch_size", AUTO) not in (AUTO, total):
        raise UserError(
            f"DeepSpeed JSON: train_batch_size is {tree['train_batch_size']}, but {train.batch_size} images x "
            f'{train.gradient_accumulation_steps} accumulation steps x {world} ranks are {total}; write "auto"'
        )
    tree["train_batch_size"] = total
    _fill_zero(tree, settings)
    monitor, folder = settings.monitor, str(settings.output)  # a monitor's section in the JSON is left as it is
    if monitor.tensorboard:
        tree.setdefault("tensorboard", {"enabled": True, "output_path": folder, "job_name": "tensorboard"})
    if monitor.csv:
        tree.setdefault("csv_monitor", {"enabled": True, "output_path": folder, "job_name": "csv"})
    if monitor.wandb:
        tree.setdefault("wandb", {"enabled": True, "project": monitor.project})
    if monitor.mlflow:
        tree.setdefault("mlflow", {"enabled": True, "experiment": monitor.project})
    tree.setdefault("steps_per_print", 2**31)  # the training loop logs instead
    # DeepSpeed's default waits for the device twice in a micro-step, for a number that nothing prints
    tree.setdefault("timers", {"throughput": {"enabled": False}})
    _check_filled(tree)
    return ResolvedConfig(settings, tree)


def _drop_auto(tree: dict[str, Any]) -> None:
    """Remove each "auto" that means DeepSpeed's default, or what the settings decide anyway."""
    for key in ("bf16", "fp16"):
        if tree.get(key) == AUTO:
            tree[key] = {"enabled": AUTO}
    if _get(tree, ("fp16", "enabled")) == AUTO:
        del tree["fp16"]  # bf16 or float32 here, as train.bf16 says
    params = _get(tree, ("scheduler", "params"))
    asks_for_nothing = isinstance(params, dict) and bool(params) and all(value == AUTO for value in params.values())
    if asks_for_nothing or tree.get("scheduler") == AUTO:
        del tree["scheduler"]  # train.schedule and train.warmup_steps
    if isinstance(tree.get("zero_optimization"), dict):
        for key in AUTO_IS_DEFAULT:
            if tree["zero_optimization"].get(key) == AUTO:
                del tree["zero_optimization"][key]


def _check_keys(tree: dict[str, Any]) -> None:
    """Refuse keys that DeepSpeed 0.19 removed, that the settings decide, or that would weaken the guard against NaN."""
    for key, value in tree.items():
        if key in REMOVED:
            raise UserError(f"DeepSpeed JSON: {key!r} was removed from DeepSpeed in 0.19; take it out")
        if key not in READ_HERE and (near := get_close_matches(key, READ_HERE, n=1, cutoff=0.85)):
            raise UserError(f"DeepSpeed JSON: there is no key {key!r}, did you mean {near[0]!r}?")
        if key in SECTIONS and not isinstance(value, dict):
            raise UserError(f"DeepSpeed JSON: {key}: got {value!r}, wanted an object such as {{...}}")
    if "scheduler" in tree:
        raise UserError("DeepSpeed JSON: 'scheduler' is set by train.schedule and train.warmup_steps; take it out")
    if odd := sorted(tree.get("mlflow", {}).keys() - MONITORS["mlflow"]):
        raise UserError(f"DeepSpeed JSON: mlflow: got {odd[0]!r}, wanted {' and '.join(MONITORS['mlflow'])}")
    _name_optimizer(tree.get("optimizer", {}))
    if _get(tree, ("fp16", "enabled")):  # its loss scale skips steps whose gradients are finite
        raise UserError("DeepSpeed JSON: fp16: not supported here, a step is skipped for what is finite; use bf16")
    for path in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if _get(tree, path) is False:
            raise UserError(f"DeepSpeed JSON: {'.'.join(path)}: the guard against NaN needs it to be true")


def _name_optimizer(optimizer: dict[str, Any]) -> None:
    """Replace the type by ``train.optimizer``'s name, where there is one; UserError for what cannot be used here."""
    kind, params = optimizer.get("type", AUTO), optimizer.get("params", {})
    if not isinstance(params, dict):
        raise UserError(f"DeepSpeed JSON: optimizer.params: got {params!r}, wanted an object such as {{...}}")
    if kind == "Adam":  # which DeepSpeed takes for AdamW, unless told otherwise
        if not isinstance(params.get("adam_w_mode"), bool):
            raise UserError(
                'DeepSpeed JSON: optimizer.type: got "Adam" without adam_w_mode, which DeepSpeed takes for AdamW; '
                'write "AdamW", or add "adam_w_mode": false to its params'
            )
        kind = "AdamW" if params.pop("adam_w_mode") else "Adam"
    if kind != AUTO:
        if kind not in list(OPTIMIZERS):
            raise UserError(
                f"DeepSpeed JSON: optimizer.type: got {kind!r}, wanted one of {list(OPTIMIZERS)} "
                "(or no optimizer section)"
            )
        optimizer["type"] = OPTIMIZERS[kind]
    names = (
        [name for keys in OPTIMIZER_KEYS.values() for name in keys]
        if kind == AUTO
        else OPTIMIZER_KEYS[OPTIMIZERS[kind]]
    )
    for key in params:
        if key not in names:
            raise UserError(f"DeepSpeed JSON: optimizer.params has no {key!r}{did_you_mean(key, names)}")


def _shared_value(name: str, path: tuple[str, ...], train: TrainSettings, tree: dict[str, Any]) -> Any:
    """The value of a setting that settings and JSON may both give."""
    *section, field = name.split(".")
    branch = getattr(train, section[0]) if section else train
    here = getattr(branch, field)
    there = _get(tree, path)
    if there is None or there == AUTO:
        return here
    there = tuple(there) if isinstance(there, list) else there
    if field in branch.model_fields_set and here not in (AUTO, there):
        raise UserError(
            f"train.{name} is {here} and the DeepSpeed JSON says {'.'.join(path)} = {there}; "
            'set one of them, or write "auto" in the JSON'
        )
    return there


def _fill_zero(tree: dict[str, Any], settings: Settings) -> None:
    zero = tree.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", BF16_STAGE if settings.train.bf16 else DEFAULT_STAGE)
    if stage not in ZERO_STAGES:
        raise UserError(f"DeepSpeed JSON: zero_optimization.stage: got {stage!r}, wanted one of {ZERO_STAGES}")
    moe = settings.model.moe
    if stage == 3 and moe.enabled and moe.ep_size > 1:
        raise UserError(
            f"model.moe.ep_size is {moe.ep_size} with ZeRO stage 3: DeepSpeed refuses its MoE layers there, and ZeRO-3 "
            "shards the experts itself; set model.moe.ep_size=1, or use stage 2"
        )
    if stage == 2 and moe.enabled:  # what DeepSpeed demands of stage 2 with experts
        for key in ("contiguous_gradients", "reduce_scatter"):
            if zero.setdefault(key, True) is not True:
                raise UserError(f"DeepSpeed JSON: zero_optimization.{key}: experts under stage 2 need it to be true")
    if settings.train.optimizer == "sgd" and stage > 0:
        tree.setdefault("zero_allow_untested_optimizer", True)  # DeepSpeed's word for what is none of its own
    if isinstance(zero.get("offload_optimizer"), dict):
        tree.setdefault("zero_force_ds_cpu_optimizer", False)


def _check_filled(tree: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in tree.items():
        if value == AUTO:
            raise UserError(
                f'DeepSpeed JSON: {prefix}{key}: "auto" is filled in for what train.* names only; '
                "write a value, or leave it out"
            )
        if isinstance(value, Mapping):
            _check_filled(value, f"{prefix}{key}.")


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
