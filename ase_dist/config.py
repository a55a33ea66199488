"""The one tree of settings: typed, read from YAML, overridden by ``key=value`` on the command line.

The owner of a value validates what needs more than its type; this module checks names, types and ranges. Reading it
imports no torch, so that ``--help`` and ``--print-config`` are immediate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ase_dist.baselines import apply_baseline
from ase_dist.errors import UserError, did_you_mean, first_problem
from ase_dist.registries import GATINGS, HEADS
from ase_dist.tasks import select_tasks

CONFIG_FOLDER = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "scenes"


class Section(BaseModel):
    """A branch of the tree: unknown keys are errors, values cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataSettings(Section):
    """Which images are read, from where, and at which size."""

    name: str = Field("scenes", description="one of ase_dist.tasks.DATA_SETS")
    root: Path | None = Field(None, description="the data folder, unpacked or packed; for scenes where they are made")
    size: int = Field(224, ge=16, description="side in pixels of the square that the model sees")
    augment: bool = True
    workers: int = Field(0, ge=0, description="loader processes per rank; 0 loads in the training process")
    cache_in_memory: bool = Field(False, description="keep decoded images and labels after their first reading")
    train_images: int = Field(480, ge=1, description="scenes only: how many to render for training")
    val_images: int = Field(64, ge=1, description="scenes only: how many to render for validation")
    scene_size: int = Field(224, ge=32, description="scenes only: side in pixels of the rendered images")
    scene_seed: int = Field(0, ge=0, description="scenes only: another seed is another data set")
    limit_train: int | None = Field(None, ge=1, description="use only the first images of the training list")
    limit_val: int | None = Field(None, ge=1, description="use only the first images of the validation list")


class MoESettings(Section):
    """The mixture-of-experts layers; N/k/S/r of the paper is num_experts/k/num_shared/rank."""

    enabled: bool = Field(True, description="false builds the same model with plain LoRA in the FFNs")
    num_experts: int = Field(16, ge=1, description="N, shared ones included")
    k: int = Field(3, ge=0, description="routed experts active per token")
    num_shared: int = Field(1, ge=0, description="S")
    rank: int = Field(4, ge=1, description="r of each LoRA expert")
    alpha: float | None = Field(None, gt=0, description="LoRA scale is alpha / rank; None means alpha = rank")
    experts: Literal["lora", "ffn"] = "lora"
    hidden: int | None = Field(None, ge=1, description="hidden width of an ffn expert; None: the base's over k + S")
    adapt: tuple[Literal["fc1", "fc2", "bypass"], ...] = ("fc1", "fc2")
    gating: Annotated[str, AfterValidator(GATINGS.checked)] = "ase"
    dispatch: Literal["auto", "local", "all_to_all", "gather"] = "auto"
    ep_size: int = Field(1, ge=1)
    every_n_blocks: int = Field(1, ge=1, description="a MoE layer in every n-th block; plain LoRA in the others")
    shared_logit_warmup: int = Field(0, ge=0, description="steps over which the shared logits grow from 0 to full size")
    aux_losses: dict[Literal["mutual_information", "cv_squared", "switch", "z"], float] = Field(
        {"mutual_information": 0.005}, description="router regularisers and their weights"
    )


class ModelSettings(Section):
    """The backbone, its adapters and the heads."""

    backbone: str = Field("vit_base_patch16_224", description="any timm vision transformer by name, or resnet18")
    backbone_args: dict[str, Any] = Field(default_factory=dict, description="passed to timm's constructor")
    pretrained: str = Field("none", description="'none', 'hub', 'scenes' (shipped) or a .safetensors/.pth file")
    sharing: Literal["shared", "mtan", "nddr", "cross_stitch"] = Field(
        "shared", description="ResNets only: how the tasks share features"
    )
    init_from: str | None = Field(None, description="the folder of an exported model to start from, backbone included")
    tune: Literal["adapters", "full"] = Field("adapters", description="full trains the backbone's own weights too")
    lora_rank: int = Field(4, ge=0, description="rank of the LoRA on the linears outside the experts; 0: none")
    lora_alpha: float | None = Field(None, gt=0)
    task_embedding: bool = True
    head: Annotated[str, AfterValidator(HEADS.checked)] = "pup"
    head_width: int = Field(256, ge=1, description="channels inside the convolutions of a head")
    drop_path: float = Field(0.0, ge=0, lt=1)
    checkpoint_activations: Literal["none", "recompute", "offload"] = "none"
    moe: MoESettings = MoESettings()


class TrainSettings(Section):
    """The optimisation; what DeepSpeed's JSON also names may stand there as "auto"."""

    max_steps: int | None = Field(None, ge=1, description="optimiser steps; None: follows from epochs")
    epochs: float | None = Field(40, gt=0, description="used where max_steps is not given")
    batch_size: int = Field(8, ge=1, description="images per device and micro-step")
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_clipping: float = Field(1.0, ge=0, description="global gradient norm; 0 switches clipping off")
    bf16: Literal["auto"] | bool = Field("auto", description="auto: where the accelerator has it natively")
    lr: float = Field(5e-4, gt=0)
    backbone_lr_factor: float = Field(1.0, gt=0, description="share of lr for a backbone that is trained whole")
    min_lr_ratio: float = Field(0.01, ge=0, le=1, description="the cosine ends at this share of lr")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    poly_power: float = Field(0.9, gt=0)
    loss_weights: dict[str, float] = Field(default_factory=dict, description="per task; default: the task table's")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics")
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; None: physical cores over local ranks")
    compile: bool = Field(False, description="torch.compile the blocks")


class EvalSettings(Section):
    """When to evaluate, and how much to draw."""

    every: int = Field(0, ge=0, description="steps between two evaluations; 0: at the start and the end only")
    at_start: bool = Field(True, description="evaluate once before the first step")
    batch_size: int | None = Field(None, ge=1, description="images per device; None: as in training")
    pictures: int = Field(8, ge=0, description="validation images drawn into predictions/")
    edge_ods: bool = Field(False, description="score edges by their boundary F-measure (odsF) too, which takes longer")
    gradient_conflict_every: int = Field(
        0, ge=0, description="steps between two measurements of the cosines between tasks' gradients; 0: none"
    )


class CheckpointSettings(Section):
    """How often to save, and how many to keep."""

    every: int = Field(0, ge=0, description="steps between two checkpoints; 0: at the end only")
    keep: int = Field(2, ge=1, description="how many of the newest are kept, the best beside them")


class GuardSettings(Section):
    """What to do when something breaks in a run."""

    non_finite: Literal["stop", "skip"] = "stop"
    max_skips: int = Field(10, ge=1, description="skip: at most this many steps in a row")
    timeout: float = Field(1800.0, gt=0, description="seconds that a collective may take")


class MonitorSettings(Section):
    """DeepSpeed's monitor: where scalars go beside metrics.jsonl."""

    tensorboard: bool = True
    csv: bool = False
    wandb: bool = False
    project: str = "ase_dist"


class Settings(Section):
    """Everything that a run is made of."""

    output: Path = Path("runs/scenes")
    resume: str = Field("auto", description="auto | never | the path of a checkpoint")
    seed: int = Field(0, ge=0)
    tasks: tuple[str, ...] | None = Field(None, description="None: all tasks of the data set")
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()
    monitor: MonitorSettings = MonitorSettings()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

OnResume = Literal["refused", "listed", "ignored"]

# What a resumed run does about a setting that is not the checkpoint's. "refused": it would change what the weights
# mean, which of them exist, or which data are seen in which order. "listed": it is honoured from the resumed step on,
# and the log says so. "ignored": it changes nothing that is computed. ``tasks`` is refused for another set only.
ON_RESUME: dict[str, OnResume] = {
    "output": "ignored",
    "resume": "ignored",
    "seed": "refused",
    "tasks": "refused",
    "data.name": "refused",
    "data.root": "listed",  # a folder may have moved
    "data.size": "refused",
    "data.augment": "listed",
    "data.workers": "listed",
    "data.cache_in_memory": "listed",
    "data.train_images": "refused",
    "data.val_images": "listed",
    "data.scene_size": "refused",
    "data.scene_seed": "refused",
    "data.limit_train": "refused",
    "data.limit_val": "listed",
    "model.backbone": "refused",
    "model.backbone_args": "refused",
    "model.pretrained": "listed",  # a file may have moved; the frozen weights are compared by their hash
    "model.sharing": "refused",
    "model.init_from": "listed",  # as model.pretrained
    "model.tune": "refused",
    "model.lora_rank": "refused",
    "model.lora_alpha": "refused",
    "model.task_embedding": "refused",
    "model.head": "refused",
    "model.head_width": "refused",
    "model.drop_path": "listed",
    "model.checkpoint_activations": "listed",
    "model.moe.enabled": "refused",
    "model.moe.num_experts": "refused",
    "model.moe.k": "refused",
    "model.moe.num_shared": "refused",
    "model.moe.rank": "refused",
    "model.moe.alpha": "refused",
    "model.moe.experts": "refused",
    "model.moe.hidden": "refused",
    "model.moe.adapt": "refused",
    "model.moe.gating": "refused",
    "model.moe.dispatch": "listed",
    "model.moe.ep_size": "listed",
    "model.moe.every_n_blocks": "refused",
    "model.moe.shared_logit_warmup": "listed",
    "model.moe.aux_losses": "listed",
    "train.max_steps": "listed",
    "train.epochs": "listed",
    "train.batch_size": "listed",
    "train.gradient_accumulation_steps": "listed",
    "train.gradient_clipping": "listed",
    "train.bf16": "listed",
    "train.lr": "listed",
    "train.backbone_lr_factor": "listed",
    "train.min_lr_ratio": "listed",
    "train.weight_decay": "listed",
    "train.betas": "listed",
    "train.eps": "listed",
    "train.warmup_steps": "listed",
    "train.schedule": "listed",
    "train.poly_power": "listed",
    "train.loss_weights": "listed",
    "train.log_every": "listed",
    "train.threads": "listed",
    "train.compile": "listed",
    "eval.every": "listed",
    "eval.at_start": "listed",
    "eval.batch_size": "listed",
    "eval.pictures": "listed",
    "eval.edge_ods": "listed",
    "eval.gradient_conflict_every": "listed",
    "checkpoint.every": "listed",
    "checkpoint.keep": "listed",
    "guard.non_finite": "listed",
    "guard.max_skips": "listed",
    "guard.timeout": "listed",
    "monitor.tensorboard": "ignored",
    "monitor.csv": "ignored",
    "monitor.wandb": "ignored",
    "monitor.project": "ignored",
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_settings(
    config: str | Path | None = None, overrides: Iterable[str] = (), *, row: str | None = None
) -> Settings:
    """Read a shipped config by name or a YAML file by path, change it into ``row``, then apply ``key=value`` overrides.

    Raises UserError with one sentence: the key, what was got, what was wanted, and the nearest right name.
    """
    path = find_config(config or DEFAULT_CONFIG)
    tree = _read_yaml(path)
    if row is not None:
        apply_baseline(tree, row, lr=build_settings(tree).train.lr)
    return _overridden(tree, overrides)


def override_settings(settings: Settings, overrides: Iterable[str]) -> Settings:
    """``settings`` with ``key=value`` overrides applied in order; UserError as ``load_settings``."""
    return _overridden(settings.model_dump(mode="json"), overrides)


def build_settings(tree: Mapping[str, Any]) -> Settings:
    """Validate a plain dictionary as a tree of settings; UserError names the first wrong key."""
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None
    select_tasks(settings.data.name, settings.tasks)
    return settings


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(config: str | Path) -> Path:
    """The file of a shipped config's name or of a path; UserError if there is neither."""
    path = Path(config)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    shipped = CONFIG_FOLDER / f"{config}.yaml"
    if shipped.is_file():
        return shipped
    names = shipped_configs()
    raise UserError(
        f"--config: no file and no shipped config {str(config)!r}{did_you_mean(str(config), names)} "
        f"(shipped: {', '.join(names)})"
    )


def to_yaml(settings: Settings) -> str:
    """The whole tree as YAML, defaults included; reading it back gives equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise UserError(f"{path}: the file is empty, wanted settings such as 'seed: 0'")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got a {type(tree).__name__} at the top, wanted keys such as 'seed: 0'")
    return tree


def _overridden(tree: dict[str, Any], overrides: Iterable[str]) -> Settings:
    for override in overrides:
        key, value = _parse_override(override)
        _set(tree, key, value)
    return build_settings(tree)


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"{override!r}: wanted key=value, such as train.lr=1e-4")
    return key.strip().split("."), _parse_value(key, text)


def _parse_value(key: str, text: str) -> Any:
    """A YAML value; in YAML 1.1 '1e-4' is a string, and a bare list such as [a,b] is what it looks like."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: {text!r} is not a YAML value; quote it, or write lists as [a,b]") from None
    return value


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        branch = tree.setdefault(key, {})
        if not isinstance(branch, dict):
            raise UserError(f"{'.'.join(keys)}: {key!r} is a value, not a section")
        tree = branch
    tree[keys[-1]] = value


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation as one sentence."""
    problem = first_problem(error)
    if problem.kind == "extra_forbidden":
        *path, name = problem.keys
        section = _section(path)
        names = section.model_fields if section is not None else {}
        return f"{problem.where}: there is no such setting{did_you_mean(name, names) or _elsewhere(name)}"
    if problem.kind == "value_error":  # of a registry, which says all that is to be said
        return f"{problem.where}: {problem.why}"
    return f"{problem.where}: got {problem.got!r}; {problem.why}"


def _section(path: list[str]) -> type[Section] | None:
    section: type[Section] = Settings
    for name in path:
        field = section.model_fields.get(name)
        if field is None or not _is_section(field.annotation):
            return None
        section = field.annotation
    return section


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field is a branch of the tree. (To Python 3.10 dict[str, float] is a type, too, but no class.)"""
    return isinstance(annotation, type(Section)) and issubclass(annotation, Section)


def _elsewhere(name: str) -> str:
    """Where in the tree a setting of this name does exist, as the tail of an error."""
    found = [key for key in setting_keys() if key.rsplit(".", 1)[-1] == name]
    return f", did you mean {found[0]!r}?" if found else ""


def setting_keys(section: type[Section] = Settings, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, sections left out."""
    keys = []
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            keys += setting_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as one mapping by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
