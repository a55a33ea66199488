"""A run from settings to summary: start, compare the ranks, build, resume, train, conclude."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch

from ase_dist import collectives
from ase_dist.agreement import on_rank_zero, raise_together
from ase_dist.config import Settings, flat
from ase_dist.data.loader import first_images
from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of, has_traceback
from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.read_config import load_settings, to_yaml
from ase_dist.tables import Table
from ase_dist.training.ds_config import ResolvedConfig, resolve
from ase_dist.training.loop.components import RunComponents, build, require_same_start
from ase_dist.training.loop.default_type import default_type
from ase_dist.training.loop.evaluate import fit_constants
from ase_dist.training.loop.trainer import Trainer, mean_label_counts, training_loss
from ase_dist.training.process import runtime
from ase_dist.training.process.folder_lock import FolderLock
from ase_dist.training.process.runtime import World
from ase_dist.training.process.watchdog import Watchdog
from ase_dist.training.record.console import FILES_ONLY, StepProgress, close_console, set_up_logging
from ase_dist.training.record.environment import environment, git_commit, harmless_ds_config
from ase_dist.training.record.logs import close_logs, open_logs
from ase_dist.training.record.metrics import Recorder
from ase_dist.training.record.monitor import Monitors
from ase_dist.training.record.reports import start_tables, summary
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint import CheckpointStore
from ase_dist.training.state.checkpoint.catalog import list_checkpoints
from ase_dist.training.state.cleaning import drop_optimizer
from ase_dist.training.state.compare_settings import compare_settings
from ase_dist.training.state.run_state import RunState
from ase_dist.versions import PACKAGES, versions_of

LOGGER = logging.getLogger("ase_dist")
LENGTH = ("epochs", "batch_size", "gradient_accumulation_steps")  # of a run without train.max_steps
TRIVIAL_IMAGES = 128  # training images that the trivial predictors are fitted on


def run(settings: Settings, ds_config: Mapping[str, Any]) -> ExitCode:
    """Train as ``settings`` and DeepSpeed's JSON say, resume where there is a checkpoint; returns the exit code.

    Raises UserError with one sentence for what the user can mend, such as a folder in which another process trains;
    SaveError and NonFiniteError as their owners do.
    """
    folder = RunFolder(settings.output)
    with FolderLock(folder.lock, folder=folder.path, doing="training", other="output=FOLDER") as lock:

        def claim() -> None:
            folder.create()
            lock.take()

        world = _start(settings, claim=claim)
        code = train(settings, ds_config, world)
        runtime.stop()
    return code


def _start(settings: Settings, *, claim: Callable[[], None]) -> World:
    train = settings.train
    return runtime.start(
        timeout=settings.guard.timeout,
        threads=train.threads,
        tf32=train.tf32,
        deterministic=train.deterministic,
        claim=claim,
    )


def dry_run(settings: Settings, ds_config: Mapping[str, Any]) -> ExitCode:
    """Build everything, take one step on one batch, log the tables; nothing is written."""
    world = _start(settings, claim=lambda: None)
    set_up_logging(rank=world.rank)
    with Watchdog(None, timeout=settings.guard.timeout) as watchdog:
        require_same_start(settings, ds_config)
        default = default_type(settings, world, RunFolder(settings.output).checkpoints)
        config = resolve(settings, ds_config, world=world.size, native_bf16=default.bf16)._replace(why_type=default.why)
        components = build(config, world, beat=watchdog.beat)
        LOGGER.info("\n%s", start_tables(components))
        watchdog.beat("one step")
        batch = next(components.train_loader).to(world.device)
        counts = mean_label_counts([batch], components.tasks, world)
        components.balancer.begin_step(1, [batch], counts, beat=watchdog.beat)
        output = components.engine(batch.images)
        by_task, total = training_loss(output, batch, components.tasks, counts, components.balancer)
        components.engine.backward(total)
        components.engine.step()
        rows = [(name, float(value.detach())) for name, value in by_task.items()]
        LOGGER.info("\n%s", Table(("task", "loss"), rows, title="one batch, forward and backward").to_text())
        components.close()
    runtime.stop()
    return ExitCode.DONE


def train(settings: Settings, ds_config: Mapping[str, Any], world: World) -> ExitCode:
    """``run`` in a process that has joined its process group."""
    with ExitStack() as closing:
        console = set_up_logging(rank=world.rank)
        closing.callback(close_console)
        folder = RunFolder(settings.output)
        watchdog = closing.enter_context(Watchdog(folder.path, timeout=settings.guard.timeout))
        require_same_start(settings, ds_config)
        default = default_type(settings, world, folder.checkpoints)
        config = resolve(settings, ds_config, world=world.size, native_bf16=default.bf16)._replace(why_type=default.why)
        raise_together(folder.create)
        raise_together(lambda: folder.refuse_used(resume=settings.resume) if world.is_first else None)
        if finished := on_rank_zero(lambda: what_is_finished(folder, config.settings)):
            LOGGER.info("%s", finished)
            return ExitCode.DONE
        closing.callback(close_logs)
        raise_together(lambda: open_logs(folder, rank=world.rank))
        closing.enter_context(_failure_in_log_files())
        components = build(config, world, beat=watchdog.beat)
        closing.callback(components.close)
        store = CheckpointStore(folder.checkpoints, keep=config.settings.checkpoint.keep)
        state = RunState(
            config.settings,
            world,
            store,
            zero_stage=config.zero_stage,
            frozen=components.frozen,
            balancer=components.balancer,
        )
        watchdog.beat("looking for a checkpoint")
        state.resume(components.engine, components.train_loader, total_steps=components.total_steps)
        raise_together(lambda: record_settings(folder, config, world) if world.is_first else None)
        recorder = raise_together(lambda: Recorder(folder.metrics, enabled=world.is_first))
        closing.callback(recorder.close)
        start_record(recorder, components, state)
        watchdog.on_silence = lambda sentence: recorder.write_end(
            step=state.step, exit=ExitCode.SILENT.name.lower(), why=sentence
        )

        watchdog.beat("starting the monitors")
        monitors = Monitors(config.deepspeed, folder, enabled=world.is_first)
        closing.callback(monitors.close)
        monitors.write_settings(flat(config.settings.model_dump(mode="json")))
        trainer = Trainer(
            components,
            state=state,
            folder=folder,
            recorder=recorder,
            progress=StepProgress("train", total=components.total_steps, start=state.step, console=console),
            watchdog=watchdog,
            monitors=monitors,
            constants={} if state.history.trivial else fit_trivial_predictors(components, beat=watchdog.beat),
        )
        LOGGER.info("\n%s", start_tables(components))
        try:
            code = trainer.train()
            watchdog.beat("the summary")
            raise_together(recorder.sync)
            raise_together(lambda: conclude(folder, components, state, code) if world.is_first else None)
        except Exception as error:
            recorder.write_end(step=state.step, exit=exit_code_of(error).name.lower(), why=describe(error))
            monitors.close(failed=True)
            raise
        recorder.write_end(step=state.step, exit=code.name.lower(), why="")
        return code


@contextmanager
def _failure_in_log_files() -> Iterator[None]:
    """Write an exception that ends the run to the log files, a bug's with its traceback; the command prints it."""
    try:
        yield
    except Exception as error:
        is_told = isinstance(error, (UserError, RunError)) and not has_traceback(error)
        LOGGER.error("the run ends: %s", describe(error), exc_info=not is_told, extra={FILES_ONLY: True})
        raise


def record_settings(folder: RunFolder, config: ResolvedConfig, world: World) -> None:
    """Write what the run was started with."""
    machine = {"device": str(world.device), "torch_threads": torch.get_num_threads()}
    folder.write_environment({**environment(), "world_size": world.size, **machine})
    folder.write_config(to_yaml(config.settings))
    folder.write_ds_config(harmless_ds_config(config.deepspeed))


def what_is_finished(folder: RunFolder, settings: Settings) -> str | None:
    """Where the run in ``folder`` is done up to the end that ``settings`` ask for: a sentence, and nothing is to do.

    None for any other run, for settings that are refused on resuming, and where the end depends on the data.
    """
    summary = folder.summary_if_done()
    if settings.resume != "auto" or summary is None or not folder.config.is_file():
        return None
    try:
        own = load_settings(folder.config)
    except UserError:  # of another version, or changed by hand
        return None
    step, train = summary.get("step"), settings.train
    same_end = train.max_steps == step
    if train.max_steps is None:
        same_end = settings.data == own.data and all(getattr(train, key) == getattr(own.train, key) for key in LENGTH)
    names, own_names = ([task.name for task in tree.chosen_tasks()] for tree in (settings, own))
    differences = compare_settings(own.model_dump(mode="json"), settings, tasks=names, saved_tasks=own_names)
    if step != summary.get("total_steps") or not same_end or differences.refused:
        return None
    unused = f" ({', '.join(differences.listed.values())}: no effect)" if differences.listed else ""
    return (
        f"step {step} of {step} is done{unused}: nothing was trained and nothing written; for more steps give "
        "train.max_steps, for another run output="
    )


def start_record(recorder: Recorder, components: RunComponents, state: RunState) -> None:
    """Remove the lines that the resumed run will write again, and write the run's start line (collective)."""
    start = state.step if state.is_saved else -1
    moe, world = components.settings.model.moe, components.world
    processes = collectives.gather_objects({"host": platform.node(), "pid": os.getpid()})
    about = {
        "tasks": [task.name for task in components.tasks],
        "task_facts": {task.name: asdict(task) for task in components.tasks},
        "data": components.settings.data.name,
        "labelled_images": components.labelled_images,
        "shared_experts": list(range(moe.num_experts - moe.num_shared, moe.num_experts)) if moe.enabled else [],
        "world": world.size,
        "ranks": processes,
        "settings": flat(components.settings.model_dump(mode="json")),
        "versions": versions_of(*PACKAGES),
        "commit": git_commit(),
        "changed": state.changes,
    }

    def write() -> None:
        recorder.truncate_after(start, evaluated=state.history.evaluated_at == start)
        recorder.write_start(step=state.step, values=about)

    raise_together(write)


def fit_trivial_predictors(components: RunComponents, *, beat: Callable[[str], None]) -> dict[str, ConstantPredictor]:
    """The predictors that ignore the image, fitted on the first training images, divided over the ranks."""
    place = {"rank": components.world.rank, "world_size": components.world.size}
    beat("fitting the trivial predictors")
    loader = first_images(components.train_loader, components.settings, limit=TRIVIAL_IMAGES, **place)
    constants = fit_constants(loader, components.tasks, device=components.world.device)
    loader.close()
    return constants


def conclude(folder: RunFolder, components: RunComponents, state: RunState, code: ExitCode) -> None:
    """Write the summary, and draw the plots of a finished run; a stopped one ends at once, without plots."""
    folder.write_summary(summary(components, state.history, step=state.step, code=code))
    if code is ExitCode.DONE:
        from ase_dist.training.record.plots import draw_all  # matplotlib would delay the start

        draw_all(folder)
        if not components.settings.checkpoint.keep_optimizer:
            for found in list_checkpoints(folder.checkpoints):
                if found.is_whole:
                    drop_optimizer(folder.checkpoints / found.name)
    LOGGER.info("the run's files are in %s", folder.path)
