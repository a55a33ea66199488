"""A run from settings to summary: start, agree, build, resume, train, conclude."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from ase_dist.config import MonitorSettings, Settings, to_yaml
from ase_dist.data.loader import first_images
from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.tables import Table
from ase_dist.training.ds_config import resolve
from ase_dist.training.loop.components import RunComponents, build, raise_together, require_same_start
from ase_dist.training.loop.evaluate import fit_constants
from ase_dist.training.loop.trainer import Trainer, mean_label_counts, training_loss
from ase_dist.training.process import runtime
from ase_dist.training.process.guards import ExitCode
from ase_dist.training.process.runtime import World
from ase_dist.training.record import environment
from ase_dist.training.record.console import StepProgress, close_console, set_up_logging
from ase_dist.training.record.logs import close_logs, open_logs
from ase_dist.training.record.metrics import Recorder
from ase_dist.training.record.reports import start_tables, summary
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint import CheckpointStore
from ase_dist.training.state.run_state import RunState

LOGGER = logging.getLogger("ase_dist")
TRIVIAL_IMAGES = 128  # training images that the trivial predictors are fitted on


def run(settings: Settings, ds_config: Mapping[str, Any]) -> ExitCode:
    """Train as ``settings`` and DeepSpeed's JSON say, resume where there is a checkpoint; returns the exit code.

    Raises UserError with one sentence for what the user can mend, SaveError and NonFiniteError as their owners do.
    """
    world = runtime.start(timeout=settings.guard.timeout, threads=settings.train.threads)
    code = train(settings, ds_config, world)
    runtime.stop()
    return code


def dry_run(settings: Settings, ds_config: Mapping[str, Any]) -> ExitCode:
    """Build everything, take one step on one batch, log the tables; nothing is written."""
    world = runtime.start(timeout=settings.guard.timeout, threads=settings.train.threads)
    set_up_logging(rank=world.rank)
    quiet = settings.model_copy(update={"monitor": MonitorSettings(tensorboard=False)})
    require_same_start(quiet, ds_config)
    components = build(resolve(quiet, ds_config, world=world.size, native_bf16=world.native_bf16), world)
    LOGGER.info("\n%s", start_tables(components))
    _take_one_step(components)
    components.close()
    runtime.stop()
    return ExitCode.DONE


def train(settings: Settings, ds_config: Mapping[str, Any], world: World) -> ExitCode:
    """``run`` in a process that has joined its world."""
    with ExitStack() as closing:
        console = set_up_logging(rank=world.rank)
        closing.callback(close_console)
        require_same_start(settings, ds_config)
        config = resolve(settings, ds_config, world=world.size, native_bf16=world.native_bf16)
        folder = _open_folder(config.settings, world)
        closing.callback(close_logs)
        components = build(config, world)
        closing.callback(components.close)
        store = CheckpointStore(folder.checkpoints, keep=config.settings.checkpoint.keep)
        state = RunState(config.settings, world, store, zero_stage=config.zero_stage, backbone=components.backbone)
        state.resume(components.engine, components.train_loader)
        _write_surroundings(folder, components)
        trainer = _trainer(components, state, folder, console)
        closing.callback(trainer.recorder.close)
        LOGGER.info("\n%s", start_tables(components))
        code = trainer.train()
        _conclude(folder, components, state, code)
        return code


def _open_folder(settings: Settings, world: World) -> RunFolder:
    """The folder, once the first rank has seen that it may be used."""
    folder = RunFolder(settings.output)
    raise_together(folder.create)
    raise_together(lambda: folder.refuse_used(resume=settings.resume) if world.is_first else None)
    open_logs(folder, rank=world.rank)
    return folder


def _write_surroundings(folder: RunFolder, components: RunComponents) -> None:
    """The first rank: the settings as they hold, DeepSpeed's JSON, the machine."""
    if components.world.is_first:
        folder.write_config(to_yaml(components.settings))
        folder.write_ds_config(components.config.deepspeed)
        folder.write_environment(
            {
                **environment.environment(),
                "world_size": components.world.size,
                "device": str(components.world.device),
                "torch_threads": torch.get_num_threads(),
            }
        )


def _trainer(components: RunComponents, state: RunState, folder: RunFolder, console: Console | None) -> Trainer:
    return Trainer(
        components.settings,
        components.tasks,
        components.world,
        components.engine,
        train_loader=components.train_loader,
        eval_loader=components.eval_loader,
        state=state,
        folder=folder,
        recorder=_recorder(components, state, folder),
        progress=StepProgress("train", total=components.total_steps, start=state.step, console=console),
        constants={} if state.history.trivial else _constants(components),
        total_steps=components.total_steps,
    )


def _recorder(components: RunComponents, state: RunState, folder: RunFolder) -> Recorder:
    """metrics.jsonl without the lines that will be written again, and a line that says what it is about."""
    recorder = Recorder(folder.metrics, enabled=components.world.is_first)
    start = state.step if state.is_saved else -1
    recorder.truncate_after(start, evaluated=state.history.evaluated_at == start)
    moe = components.settings.model.moe
    shared = list(range(moe.num_experts - moe.num_shared, moe.num_experts)) if moe.enabled else []
    names = [task.name for task in components.tasks]
    about = {
        "tasks": names,
        "data": components.settings.data.name,
        "shared_experts": shared,
        "world": components.world.size,
    }
    recorder.write("run", step=state.step, values=about)
    return recorder


def _constants(components: RunComponents) -> dict[str, ConstantPredictor]:
    """The trivial predictors, fitted on the first training images, which all ranks share among them."""
    place = {"rank": components.world.rank, "world_size": components.world.size}
    loader = first_images(components.train_loader, components.settings, limit=TRIVIAL_IMAGES, **place)
    constants = fit_constants(loader, components.tasks, device=components.world.device)
    loader.close()
    return constants


def _conclude(folder: RunFolder, components: RunComponents, state: RunState, code: ExitCode) -> None:
    """The first rank: summary.json, and the plots unless whoever stopped the run is waiting."""
    if components.world.is_first:
        folder.write_summary(summary(components, state.history, step=state.step, code=code))
        if code is ExitCode.DONE:
            from ase_dist.training.record.plots import draw_all  # matplotlib would delay the start

            draw_all(folder)
        LOGGER.info("the run's files are in %s", folder.path)


def _take_one_step(components: RunComponents) -> None:
    batch = next(components.train_loader).to(components.world.device)
    counts = mean_label_counts([batch], components.tasks, components.world)
    output = components.engine(batch.images)
    by_task, total = training_loss(output, batch, components.tasks, counts, components.settings.train.loss_weights)
    components.engine.backward(total)
    components.engine.step()
    rows = [(name, float(value.detach())) for name, value in by_task.items()]
    LOGGER.info("\n%s", Table(("task", "loss"), rows, title="one batch, forward and backward").to_text())
