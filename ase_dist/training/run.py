"""A run from settings to summary: start, agree, build, train, conclude."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from ase_dist import __version__, collectives
from ase_dist.config import MonitorSettings, Settings, settings_hash, to_yaml
from ase_dist.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_train_loader, data_fingerprint
from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.models import ParameterTable, build_model, parameter_table
from ase_dist.tasks import Task, select_tasks
from ase_dist.training import engine as engines
from ase_dist.training import losses, runtime
from ase_dist.training.checkpoint import CheckpointStore
from ase_dist.training.console import StepProgress, set_up_logging, table
from ase_dist.training.ds_config import ResolvedConfig, resolve
from ase_dist.training.evaluate import fit_constants
from ase_dist.training.guards import ExitCode
from ase_dist.training.plots import draw_all
from ase_dist.training.recorder import Recorder
from ase_dist.training.run_folder import RunFolder
from ase_dist.training.run_state import RunState
from ase_dist.training.runtime import World
from ase_dist.training.trainer import Trainer

LOGGER = logging.getLogger("ase_dist")
TRIVIAL_IMAGES = 256  # training images that the trivial predictors are fitted on


class Parts(NamedTuple):
    """What a run is built of, before its first step."""

    config: ResolvedConfig
    tasks: tuple[Task, ...]
    world: World
    train_loader: TrainLoader
    eval_loader: EvalLoader
    engine: Any
    parameters: ParameterTable
    backbone: dict[str, str]
    total_steps: int

    @property
    def settings(self) -> Settings:
        """The settings as they hold, DeepSpeed's JSON included."""
        return self.config.settings


def run(settings: Settings, ds_config: Mapping[str, Any]) -> ExitCode:
    """Train as ``settings`` and DeepSpeed's JSON say, resume where there is a checkpoint; returns the exit code.

    Raises ValueError with one sentence for what the user can mend, SaveError and NonFiniteError as their owners do.
    """
    world = runtime.start(timeout=settings.guard.timeout, threads=settings.train.threads)
    console = set_up_logging(rank=world.rank)
    config = resolve(settings, ds_config, world=world.size, native_bf16=world.native_bf16)
    folder = _open_folder(config.settings, world)
    parts = build(config, world)
    store = CheckpointStore(folder.checkpoints, keep=config.settings.checkpoint.keep)
    state = RunState(config.settings, world, store, zero_stage=config.zero_stage, backbone=parts.backbone)
    state.resume(parts.engine, parts.train_loader)
    if world.is_first:
        folder.write_config(to_yaml(config.settings))
        folder.write_ds_config(config.deepspeed)
        folder.write_environment(
            {"world_size": world.size, "device": str(world.device), "torch_threads": torch.get_num_threads()}
        )
    trainer = _trainer(parts, state, folder, console)
    _log_start(parts)
    code = trainer.train()
    if world.is_first:
        _conclude(trainer, parts, code)
    _close(parts, trainer)
    return code


def dry_run(settings: Settings, ds_config: Mapping[str, Any]) -> ExitCode:
    """Build everything, take one step on one batch, log the tables; nothing is written."""
    world = runtime.start(timeout=settings.guard.timeout, threads=settings.train.threads)
    set_up_logging(rank=world.rank)
    settings = settings.model_copy(update={"monitor": MonitorSettings(tensorboard=False)})
    config = resolve(settings, ds_config, world=world.size, native_bf16=world.native_bf16)
    parts = build(config, world)
    _log_start(parts)
    batch = next(parts.train_loader).to(world.device)
    output = parts.engine(batch.images)
    counts = collectives.all_reduce_sum(losses.label_counts(batch.labels, parts.tasks)) / world.size
    by_task = losses.task_losses(output.predictions, batch.labels, parts.tasks, counts)
    parts.engine.backward(
        losses.weighted_sum(by_task, parts.tasks, config.settings.train.loss_weights) + output.aux_loss
    )
    parts.engine.step()
    rows = [(name, float(value)) for name, value in by_task.items()]
    LOGGER.info("\n%s", table("one batch, forward and backward", ("task", "loss"), rows))
    _close(parts, None)
    return ExitCode.DONE


def build(config: ResolvedConfig, world: World) -> Parts:
    """Data, model and engine of a run, agreed upon by all ranks."""
    settings = config.settings
    tasks = select_tasks(settings.data.name, settings.tasks)
    runtime.seed_everything(settings.seed, rank=world.rank)
    train_loader = build_train_loader(settings, tasks, rank=world.rank, world_size=world.size)
    eval_loader = build_eval_loader(settings, tasks, rank=world.rank, world_size=world.size)
    _agree(settings, train_loader, eval_loader)
    model = build_model(settings, tasks, expert_layer="plain" if config.zero_stage == 3 else "deepspeed")
    parameters = parameter_table(model)
    backbone = {"name": settings.model.backbone, "sha256": frozen_digest(model)}
    steps = total_steps(settings, train_loader)
    engine = engines.initialize(model, config, world, total_steps=steps)
    return Parts(config, tasks, world, train_loader, eval_loader, engine, parameters, backbone, steps)


def total_steps(settings: Settings, loader: TrainLoader) -> int:
    """Optimiser steps of the run: ``train.max_steps``, or as many as ``train.epochs`` take."""
    train = settings.train
    if train.max_steps is not None:
        return train.max_steps
    if train.epochs is None:
        raise ValueError("train: neither max_steps nor epochs is set; set one of them")
    return max(1, math.ceil(train.epochs * loader.steps_per_epoch / train.gradient_accumulation_steps))


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 over the model's frozen tensors, by which a checkpoint knows the backbone it belongs to."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_folder(settings: Settings, world: World) -> RunFolder:
    """Rank 0 makes the folder and the others use it; an error is the same sentence on all ranks."""
    if world.is_first:
        try:
            RunFolder(settings.output).refuse_used(resume=settings.resume)
            problem = ""
        except ValueError as error:
            problem = str(error)
    else:
        problem = ""
    for found in collectives.gather_objects(problem):
        if found:
            raise ValueError(found)
    folder = RunFolder(settings.output)
    folder.open_logs(rank=world.rank)
    return folder


def _agree(settings: Settings, train_loader: TrainLoader, eval_loader: EvalLoader) -> None:
    """Refuse to start where a rank has other settings, another version or other data."""
    mine = {
        "settings": settings_hash(settings),
        "ase_dist": __version__,
        "torch": torch.__version__,
        "training data": data_fingerprint(train_loader.dataset),
        "validation data": data_fingerprint(eval_loader.dataset),
    }
    for rank, theirs in enumerate(collectives.gather_objects(mine)):
        odd = [name for name in mine if theirs[name] != mine[name]]  # type: ignore[index]
        if odd:
            raise ValueError(f"rank {collectives.rank()} and rank {rank} differ in {', '.join(odd)}; start all alike")


def _trainer(parts: Parts, state: RunState, folder: RunFolder, console: Console | None) -> Trainer:
    settings = parts.settings
    recorder = Recorder(folder.path, enabled=parts.world.is_first)
    recorder.truncate_after(state.step)
    moe = settings.model.moe
    shared = list(range(moe.num_experts - moe.num_shared, moe.num_experts)) if moe.enabled else []
    names = [task.name for task in parts.tasks]
    about = {"tasks": names, "data": settings.data.name, "shared_experts": shared, "world": parts.world.size}
    recorder.write("run", step=state.step, values=about)
    return Trainer(
        settings,
        parts.tasks,
        parts.world,
        parts.engine,
        train_loader=parts.train_loader,
        eval_loader=parts.eval_loader,
        state=state,
        folder=folder,
        recorder=recorder,
        progress=StepProgress("train", total=parts.total_steps, start=state.step, console=console),
        constants=_constants(parts),
        total_steps=parts.total_steps,
    )


def _constants(parts: Parts) -> dict[str, ConstantPredictor]:
    """The trivial predictors, fitted on the first training images, which all ranks share among them."""
    data = parts.settings.data
    limit = min(data.limit_train or TRIVIAL_IMAGES, TRIVIAL_IMAGES)
    settings = parts.settings.model_copy(update={"data": data.model_copy(update={"limit_train": limit})})
    loader = build_eval_loader(settings, parts.tasks, rank=parts.world.rank, world_size=parts.world.size, split="train")
    constants = fit_constants(loader, parts.tasks, device=parts.world.device)
    loader.close()
    return constants


def _log_start(parts: Parts) -> None:
    settings, world = parts.settings, parts.world
    train, moe = settings.train, settings.model.moe
    images = train.batch_size * train.gradient_accumulation_steps * world.size
    rows = [
        ("tasks", ", ".join(task.name for task in parts.tasks)),
        ("data", f"{settings.data.name}, {len(parts.train_loader.dataset)} training and "
                 f"{len(parts.eval_loader.dataset)} validation images at {settings.data.size} px"),
        ("backbone", f"{settings.model.backbone}, weights {settings.model.pretrained}"),
        ("experts N/k/S/r", f"{moe.num_experts}/{moe.k}/{moe.num_shared}/{moe.rank}, gating {moe.gating}, "
                            f"expert-parallel size {moe.ep_size}" if moe.enabled else "none"),
        ("world", f"{world.size} ranks on {world.device.type}, ZeRO {parts.config.zero_stage}, "
                  f"{'bf16' if train.bf16 else 'fp32'}, {torch.get_num_threads()} CPU threads a rank"),
        ("steps", f"{parts.total_steps} of {images} images"),
        ("output", settings.output),
    ]  # fmt: skip
    LOGGER.info("\n%s", table("run", ("", ""), rows))
    LOGGER.info("\n%s", table("parameters", ("group", "total", "trained", "size"), parts.parameters.as_rows()))


def _conclude(trainer: Trainer, parts: Parts, code: ExitCode) -> None:
    """Rank 0: summary.json, the plots and the last table."""
    images = trainer.steps_done * parts.settings.train.batch_size * parts.settings.train.gradient_accumulation_steps
    trainer.folder.write_summary(
        {
            "exit": code.name.lower(),
            "step": trainer.state.step,
            "total_steps": parts.total_steps,
            "data": parts.settings.data.name,
            "metrics": trainer.latest,
            "first_metrics": trainer.first,
            "trivial": trainer.trivial,
            "parameters": parts.parameters.as_dict(),
            "train_seconds": trainer.train_seconds,
            "images_per_second": images * parts.world.size / trainer.train_seconds if trainer.train_seconds else None,
            "peak_memory_bytes": engines.memory_bytes(parts.world.device),
            "world_size": parts.world.size,
        }
    )
    draw_all(trainer.folder.path)
    LOGGER.info("summary, plots and predictions are in %s", trainer.folder.path)


def _close(parts: Parts, trainer: Trainer | None) -> None:
    parts.train_loader.close()
    parts.eval_loader.close()
    if trainer is not None:
        trainer.recorder.close()
    runtime.stop()
