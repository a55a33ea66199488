"""The typed tree of settings, and what a resumed run does where a setting differs.

The types check names, values and ranges; the module that uses a value checks the rest. ``read_config`` reads a tree
from files and the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ase_dist import typed_yaml
from ase_dist.description import DataSetDescription, described
from ase_dist.errors import UserError
from ase_dist.files import expand_user
from ase_dist.image_size import ImageSize
from ase_dist.registries import AUGMENTATIONS, BALANCINGS, GATINGS, HEADS
from ase_dist.tasks import DataSet, Delta, OfferedTasks, Task, find_data_set, join_tasks, select_tasks

LARGEST_INPUT = 1 << 14  # side in pixels

# Settings that were renamed or moved. The old dotted keys work for one more version, with a warning.
ALIASES = {
    "data.train_images": "data.scenes.train_images",
    "data.val_images": "data.scenes.val_images",
    "data.scene_size": "data.scenes.size",
    "data.scene_seed": "data.scenes.seed",
    "data.augment": "data.augmentation",
    "train.betas": "train.adam.betas",
    "train.eps": "train.adam.eps",
    "train.poly_power": "train.poly.power",
}


UserPath = Annotated[
    Path,
    BeforeValidator(lambda path: expand_user(path) if isinstance(path, str) else path),
    PlainSerializer(  # ./~ is a folder of that name, ~ is the home folder
        lambda path: f"./{path}" if str(path).startswith("~") else str(path), return_type=str, when_used="json"
    ),
]
PathOrName = Annotated[str, AfterValidator(lambda text: expand_user(text) if text else text)]


SizeSetting = Annotated[
    ImageSize,
    PlainValidator(ImageSize.read),
    PlainSerializer(lambda size: size.written),
    typed_yaml.WrittenAs(int | tuple[int, int]),
]
Beta = Annotated[float, Field(ge=0, lt=1)]

# The presets that ``data.augment``, true or false before there were presets, meant.
_AUGMENT_PRESETS = dict.fromkeys(("true", "yes", "on"), "astmt") | dict.fromkeys(("false", "no", "off"), "none")


class Section(BaseModel):
    """A branch of the tree: unknown keys are errors, and values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class SceneSettings(Section):
    """The generated data set; for ``data.name=scenes`` only."""

    train_images: int = Field(480, ge=1, description="how many images to render for training")
    val_images: int = Field(64, ge=1, description="how many images to render for validation")
    size: Annotated[SizeSetting, AfterValidator(lambda size: size.within(32, 4096))] = Field(
        ImageSize(224, 224), description="pixels of the rendered images: a square's side, or height x width"
    )
    seed: int = Field(0, ge=0, description="another seed is another data set")


class SetSettings(Section):
    """One of several data sets that are mixed; what is not here is the same for all of them."""

    name: str = Field(min_length=1, description="as data.name")
    called: str | None = Field(
        None, pattern=r"^[A-Za-z]\w{0,31}$", description="what tables and tasks call it; null: by its name"
    )
    root: UserPath | None = Field(None, description="the data folder; below data.root where that is given")
    description: DataSetDescription | None = Field(None, description="as data.description")
    tasks: tuple[str, ...] | None = Field(None, description="null: all tasks of the data set")
    as_: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,63}$")]] = Field(
        default_factory=dict, alias="as", description="what the run calls some of its tasks"
    )
    weight: float | None = Field(
        None, gt=0, description="share of the training images, relative to the others'; null: by its number of images"
    )
    split: Literal["both", "train", "val"] = Field("both", description="what it is for")

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name.rstrip("_"): value for name, value in write(self).items()}

    @model_validator(mode="before")
    @classmethod
    def _name_after_description(cls, values: Any) -> Any:
        return _named_after_description(values)

    @property
    def title(self) -> str:
        """What tables and tasks call the set."""
        return self.called or re.sub(r"\W+", "_", self.name.rpartition(":")[2]).strip("_0123456789") or "data"

    @property
    def data_set(self) -> DataSet:
        """As DataSettings's."""
        return described(self.description) if self.description is not None else find_data_set(self.name)


class DataSettings(Section):
    """Which images are read, from where, and at which size."""

    name: str = Field(
        "scenes", description="scenes, pascal_context, nyud, a dataset.yaml or its folder, or package.module:NAME"
    )
    root: UserPath | None = Field(None, description="the data folder, unpacked or packed; scenes are made there")
    description: DataSetDescription | None = Field(None, description="what a dataset.yaml says; read from the file")
    sets: tuple[SetSettings, ...] = Field((), description="several data sets to mix, in the place of name")
    size: Annotated[SizeSetting, AfterValidator(lambda size: size.within(16, LARGEST_INPUT))] = Field(
        ImageSize(224, 224), description="pixels that the model sees: a square's side, or height x width as 448x576"
    )
    partial: bool = Field(False, description="accept images that have no label files of some of the tasks")
    augmentation: Annotated[
        str,
        BeforeValidator(lambda value: _AUGMENT_PRESETS.get(str(value).lower(), value)),
        AfterValidator(AUGMENTATIONS.checked),
    ] = Field("eigen", description="what training images are changed by at random: eigen, astmt, atrc, mtan or none")
    workers: int = Field(0, ge=0, description="loader processes per rank; 0 loads in the training process")
    cache_in_memory: bool = Field(False, description="keep decoded images and labels after their first reading")
    limit_train: int | None = Field(None, ge=1, description="use only the first images of the training list")
    limit_val: int | None = Field(None, ge=1, description="use only the first images of the validation list")
    scenes: SceneSettings = SceneSettings()

    @model_validator(mode="before")
    @classmethod
    def _name_after_description(cls, values: Any) -> Any:
        return _named_after_description(values)

    @model_validator(mode="after")
    def _name_after_sets(self) -> DataSettings:
        titles = [each.title for each in self.sets]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise UserError(f"sets: two are called {twice[0]!r}; give each a name of its own with called:")
        if len({each.weight is None for each in self.sets}) > 1:
            raise UserError("sets: some have a weight and others none; give a weight to all of them, or to none")
        if self.sets and self.description is not None:
            raise UserError("sets: with several data sets each has its own description; leave data.description out")
        if self.sets:
            object.__setattr__(self, "name", "+".join(titles))  # the model is frozen
        return self

    def joined_tasks(self) -> tuple[dict[str, Task], ...]:
        """For each of ``sets``, the run's rows of its tasks by its own names; UserError as ``tasks.join_tasks``."""
        return join_tasks(
            OfferedTasks(each.title, select_tasks(each.data_set, each.tasks, data_name=each.title), each.as_)
            for each in self.sets
        )

    def of_set(self, each: SetSettings) -> DataSettings:
        """The settings of one of ``sets`` as those of a run that has no other."""
        root = each.root if self.root is None else self.root / (each.root or "")
        own = {"name": each.name, "root": root, "description": each.description, "sets": ()}
        return self.model_copy(update=own)

    def only_set(self, title: str) -> SetSettings:
        """The one of ``sets`` that is called ``title``, with the names that its tasks have among all of them."""
        every = zip(self.sets, self.joined_tasks(), strict=True)
        found, joined = next((each, joined) for each, joined in every if each.title == title)
        names = {own: task.name for own, task in joined.items()}
        return found.model_copy(update={"as_": names, "split": "both"})

    @property
    def data_set(self) -> DataSet:
        """The data set: its tasks and what reads it; of several sets their tasks together.

        Raises UserError where there is none of that name.
        """
        if self.sets:
            tasks = {task.name: task for joined in self.joined_tasks() for task in joined.values()}
            return DataSet(tasks, reader="ase_dist.data.mixed:MixedDataset")
        return described(self.description) if self.description is not None else find_data_set(self.name)


def _named_after_description(values: Any) -> Any:
    if isinstance(values, dict) and isinstance(description := values.get("description"), dict):
        return {**values, "name": description.get("name", "data")}
    return values


class MoESettings(Section):
    """The mixture-of-experts layers; N/k/S/r of the paper is num_experts/k/num_shared/rank."""

    enabled: bool = Field(True, description="false builds the same model with plain LoRA in the FFNs")
    num_experts: int = Field(16, ge=1, description="N, shared ones included")
    k: int = Field(3, ge=0, description="routed experts active per token")
    num_shared: int = Field(1, ge=0, description="S, the experts that every token uses")
    rank: int = Field(4, ge=1, description="r of each LoRA expert")
    alpha: float | None = Field(None, gt=0, description="LoRA scale is alpha / rank; null means alpha = rank")
    experts: Literal["lora", "ffn"] = Field("lora", description="LoRA on the base FFN, or whole FFNs in its place")
    hidden: int | None = Field(None, ge=1, description="hidden width of an ffn expert; null: the base's over k + S")
    adapt: tuple[Literal["fc1", "gate", "up", "fc2", "bypass"], ...] = Field(
        ("fc1", "fc2"),
        description="what LoRA experts adapt: either linear of the FFN, of a gated one's fc1 also gate or up alone, or "
        "the FFN as a whole (bypass)",
    )
    gating: Annotated[str, AfterValidator(GATINGS.checked)] = Field(
        "ase", description="how gates follow from router logits: ase, naive, topk, renormalised, separate or dense"
    )
    dispatch: Literal["auto", "local", "all_to_all", "gather"] = Field(
        "auto", description="how tokens and experts meet across ranks: tokens sent, experts gathered, or the cheaper"
    )
    ep_size: int = Field(1, ge=1, description="ranks that the routed experts of a layer are divided over")
    every_n_blocks: int = Field(1, ge=1, description="a MoE layer in every n-th block; plain LoRA in the others")
    shared_logit_warmup: int = Field(0, ge=0, description="steps over which the shared logits grow from 0 to full size")
    aux_losses: dict[Literal["mutual_information", "cv_squared", "switch", "z"], float] = Field(
        {"mutual_information": 0.005}, description="router regularisers and their weights"
    )


class ModelSettings(Section):
    """The backbone, its adapters and the heads."""

    backbone: str = Field(
        "vit_base_patch16_224", description="a ViT (DINOv2, DINOv3, EVA, ...) or Swin of timm by name, or resnet18"
    )
    backbone_args: dict[str, Any] = Field(default_factory=dict, description="passed to timm's constructor")
    pretrained: PathOrName = Field("none", description="'none', 'hub', 'scenes' (shipped), a file, hf://owner/name")
    sharing: Literal["shared", "mtan", "nddr", "cross_stitch"] = Field(
        "shared", description="ResNets only: how the tasks share features"
    )
    init_from: PathOrName | None = Field(
        None, description="the folder of an exported model to start from, backbone included; or hf://owner/name"
    )
    tune: Literal["adapters", "full"] = Field("adapters", description="full trains the backbone's own weights too")
    lora_rank: int = Field(4, ge=0, description="rank of the LoRA on the linears outside the experts; 0: none")
    lora_alpha: float | None = Field(None, gt=0, description="its scale is lora_alpha / lora_rank; null means 1")
    lora_task_rank: int = Field(
        0, ge=0, description="rank of a further LoRA for each task on the same linears (MTLoRA); 0: none"
    )
    task_embedding: bool = Field(True, description="add a trained vector of the task to its tokens")
    head: Annotated[str, AfterValidator(HEADS.checked)] = Field(
        "pup", description="on the last level: pup, pup_linear or linear; on several: dpt, hrnet or multi_level"
    )
    head_width: int = Field(256, ge=1, description="channels inside the convolutions of a head")
    head_args: dict[str, Any] = Field(default_factory=dict, description="of the head, such as {readout: add} for dpt")
    levels: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        None, description="which blocks or stages a head on several levels reads, from 1; null: evenly over the depth"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="probability that a block is left out, in the last block")
    checkpoint_activations: Literal["none", "recompute", "offload"] = Field(
        "none", description="recompute blocks in the backward pass; offload keeps their inputs on the host"
    )
    moe: MoESettings = MoESettings()

    @model_validator(mode="after")
    def _has_shared_lora(self) -> ModelSettings:
        if self.lora_task_rank and not self.lora_rank:
            raise ValueError(
                f"lora_task_rank is {self.lora_task_rank} and lora_rank 0; a task's LoRA stands beside a shared one, "
                "give lora_rank 1 or more"
            )
        return self


class AdamSettings(Section):
    """The moments of ``train.optimizer=adamw`` and ``adam``."""

    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the first and the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")


class SgdSettings(Section):
    """The momentum of ``train.optimizer=sgd``; the defaults are M3ViT's."""

    momentum: float = Field(0.9, ge=0, lt=1, description="share of the last step that is added to the gradient")
    nesterov: bool = Field(False, description="look ahead along the momentum, which must not be 0")

    @model_validator(mode="after")
    def _has_momentum(self) -> SgdSettings:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true with a momentum of 0; give it momentum, or leave nesterov out")
        return self


class PolySettings(Section):
    """The learning rate of ``train.schedule=poly``."""

    power: float = Field(0.9, gt=0, description="the rate is lr * (1 - step / steps) ** power")


class BalancingSettings(Section):
    """What multiplies the tasks' losses in addition to ``train.loss_weights``; see docs/balancing.md."""

    method: Annotated[str, AfterValidator(BALANCINGS.checked)] = Field(
        "fixed",
        description="fixed; from losses: uncertainty, dwa, gls, imtl_l, rlw, famo; from gradients: gradnorm, mgda, "
        "pcgrad, cagrad, imtl_g, nash_mtl, aligned_mtl, upgrad",
    )
    every: int = Field(1, ge=1, description="steps between two updates of the weights")
    on: Literal["parameters", "representation"] = Field(
        "parameters",
        description="whose gradients are compared: of the weights that tasks share, or of the tokens that heads get",
    )
    lr: float | None = Field(
        None, gt=0, description="of what the method learns; null: train.lr, for famo and gradnorm their papers' 0.025"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="of the method, such as {c: 0.4} for cagrad")


class TrainSettings(Section):
    """The optimisation. DeepSpeed's JSON may have "auto" for what is set here."""

    max_steps: int | None = Field(None, ge=1, description="optimiser steps; null: follows from epochs")
    epochs: float | None = Field(40, gt=0, description="used where max_steps is not given")
    batch_size: int = Field(8, ge=1, description="images per device and micro-step")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-steps in an optimiser step")
    gradient_clipping: float = Field(1.0, ge=0, description="global gradient norm; 0 switches clipping off")
    bf16: Literal["auto"] | bool = Field(
        "auto",
        description="auto: where the accelerator has it natively, on CPUs where it is measured to be faster",
    )
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="adamw, adam, or sgd with momentum")
    lr: float = Field(5e-4, gt=0, description="the highest learning rate")
    backbone_lr_factor: float = Field(1.0, gt=0, description="share of lr for a backbone that is trained whole")
    min_lr_ratio: float = Field(0.01, ge=0, le=1, description="the cosine ends at this share of lr")
    weight_decay: float = Field(0.01, ge=0, description="of weight matrices; adam and sgd add it to the gradient")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    schedule: Literal["cosine", "poly", "constant"] = Field("cosine", description="how the learning rate falls")
    loss_weights: dict[str, float] = Field(default_factory=dict, description="per task; default: the task table's")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics")
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; null: physical cores over local ranks")
    compile: bool = Field(False, description="torch.compile the blocks")
    tf32: bool = Field(
        False, description="GPUs multiply float32 in TF32, in products and convolutions: faster, 3 digits"
    )
    deterministic: bool = Field(
        False, description="GPUs use only algorithms that give the same bits in every run, which takes longer"
    )
    adam: AdamSettings = AdamSettings()
    sgd: SgdSettings = SgdSettings()
    poly: PolySettings = PolySettings()
    balancing: BalancingSettings = BalancingSettings()

    @property
    def moments(self) -> int:
        """How many float32 values the optimiser keeps of a trained one."""
        return 2 if self.optimizer != "sgd" else int(self.sgd.momentum > 0)


class EvalSettings(Section):
    """When to evaluate, and how much to draw."""

    every: int = Field(0, ge=0, description="steps between two evaluations; 0: at the start and the end only")
    at_start: bool = Field(True, description="evaluate once before the first step")
    batch_size: int | None = Field(None, ge=1, description="images per device; null: as in training")
    pictures: int = Field(8, ge=0, description="validation images drawn into predictions/")
    edge_ods: bool = Field(False, description="score edges by their boundary F-measure (odsF) too, which takes longer")
    delta: Delta = Field(
        "delta_m", description="gains over a reference: delta_m, one score a task, or LibMTL's delta_p, over all scores"
    )
    gradient_conflict_every: int = Field(
        0, ge=0, description="steps between two measurements of the cosines between tasks' gradients; 0: none"
    )


class CheckpointSettings(Section):
    """How often to save, and how many to keep."""

    every: int = Field(0, ge=0, description="steps between two checkpoints; 0: at the end only")
    keep: int = Field(2, ge=1, description="how many of the newest are kept, in addition to the best")
    keep_optimizer: bool = Field(True, description="false: a run that is done keeps weights alone and cannot go on")


class GuardSettings(Section):
    """What to do when something breaks in a run."""

    non_finite: Literal["stop", "skip"] = Field("stop", description="at a loss or gradient that is not finite")
    max_skips: int = Field(10, ge=1, description="skip: at most this many steps in a row")
    timeout: float = Field(1800.0, gt=0, description="seconds that a collective may take")


class MonitorSettings(Section):
    """Where settings, scalars and pictures go in addition to metrics.jsonl and the run's folder."""

    tensorboard: bool = Field(True, description="TensorBoard files in the run's folder")
    csv: bool = Field(False, description="CSV files of the scalars in the run's folder")
    wandb: bool = Field(False, description="Weights & Biases")
    mlflow: bool = Field(False, description="MLflow: MLFLOW_TRACKING_URI, or files in the run's folder")
    project: str = Field("ase_dist", description="the project in Weights & Biases, the experiment in MLflow")


class Settings(Section):
    """All settings of a run."""

    output: UserPath = Field(Path("runs/scenes"), description="the folder of the run")
    resume: PathOrName = Field("auto", description="auto | never | the path of a checkpoint")
    seed: int = Field(0, ge=0, description="of initial weights, order of images, augmentation and dropout")
    tasks: tuple[str, ...] | None = Field(None, description="null: all tasks of the data set")
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()
    monitor: MonitorSettings = MonitorSettings()

    def chosen_tasks(self) -> tuple[Task, ...]:
        """The rows of ``tasks`` in the table of the data set. Raises UserError where it has no such task."""
        return select_tasks(self.data.data_set, self.tasks, data_name=self.data.name)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

OnResume = Literal["refused", "listed", "ignored"]

# What a resumed run does where a setting differs from the checkpoint's. "refused": it would change the meaning of the
# weights, which weights exist, or which data are seen in which order. "listed": it takes effect from the resumed step
# on, and the log says so. "ignored": it does not change the computation. ``tasks`` is refused for another set only.
ON_RESUME: dict[str, OnResume] = {
    "output": "ignored",
    "resume": "ignored",
    "seed": "refused",
    "tasks": "refused",
    "data.name": "refused",
    "data.root": "listed",  # a folder may have moved
    "data.description": "refused",  # or listed, by its own keys: ``description.differences``
    "data.sets": "refused",  # or listed, by their own keys: ``compare_settings``
    "data.size": "refused",
    "data.partial": "listed",
    "data.augmentation": "listed",
    "data.workers": "listed",
    "data.cache_in_memory": "listed",
    "data.scenes.train_images": "refused",
    "data.scenes.val_images": "listed",
    "data.scenes.size": "refused",
    "data.scenes.seed": "refused",
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
    "model.lora_task_rank": "refused",
    "model.task_embedding": "refused",
    "model.head": "refused",
    "model.head_width": "refused",
    "model.head_args": "refused",
    "model.levels": "refused",
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
    "train.optimizer": "refused",
    "train.lr": "listed",
    "train.backbone_lr_factor": "listed",
    "train.min_lr_ratio": "listed",
    "train.weight_decay": "listed",
    "train.adam.betas": "listed",
    "train.adam.eps": "listed",
    "train.sgd.momentum": "listed",
    "train.sgd.nesterov": "listed",
    "train.warmup_steps": "listed",
    "train.schedule": "listed",
    "train.poly.power": "listed",
    "train.loss_weights": "listed",
    "train.balancing.method": "listed",  # another one begins without any state
    "train.balancing.every": "listed",
    "train.balancing.on": "listed",
    "train.balancing.lr": "listed",
    "train.balancing.args": "listed",
    "train.log_every": "listed",
    "train.threads": "listed",
    "train.compile": "listed",
    "train.tf32": "listed",
    "train.deterministic": "listed",
    "eval.every": "listed",
    "eval.at_start": "listed",
    "eval.batch_size": "listed",
    "eval.pictures": "listed",
    "eval.delta": "listed",
    "eval.edge_ods": "listed",
    "eval.gradient_conflict_every": "listed",
    "checkpoint.every": "listed",
    "checkpoint.keep": "listed",
    "checkpoint.keep_optimizer": "listed",
    "guard.non_finite": "listed",
    "guard.max_skips": "listed",
    "guard.timeout": "listed",
    "monitor.tensorboard": "ignored",
    "monitor.csv": "ignored",
    "monitor.wandb": "ignored",
    "monitor.mlflow": "ignored",
    "monitor.project": "ignored",
}


# ---------------------------------------------------------------------------------------------------------------------
# The tree's keys


def type_of(key: str) -> Any:
    """The annotation of a setting, a section or a dictionary's entry by dotted key; Any where there is none."""
    return typed_yaml.annotation_at(Settings, ALIASES.get(key, key).split(".") if key else [])


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field is a branch of the tree. (To Python 3.10 dict[str, float] is a type, too, but no class.)"""
    return isinstance(annotation, type(Section)) and issubclass(annotation, Section)


def setting_keys(section: type[Section] = Settings, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, sections left out."""
    keys = []
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
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
