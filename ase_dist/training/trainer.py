"""The training loop: batch, loss, backward, guard, step, log, maybe evaluate, maybe save, maybe stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ase_dist import collectives
from ase_dist.config import Settings
from ase_dist.data.batch import Batch
from ase_dist.data.loader import EvalLoader, TrainLoader
from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.models import ModelOutput
from ase_dist.tasks import Task
from ase_dist.training import guards, losses
from ase_dist.training.console import StepProgress
from ase_dist.training.evaluate import Gallery, Results, evaluate
from ase_dist.training.pictures import prediction_grid, save_png
from ase_dist.training.recorder import Recorder
from ase_dist.training.reports import SpanStatistics, result_table
from ase_dist.training.run_folder import RunFolder
from ase_dist.training.run_state import RunState
from ase_dist.training.runtime import World

LOGGER = logging.getLogger("ase_dist")


class Trainer:
    """One run, from its first or its resumed step to its last.

    ``engine`` is DeepSpeed's; ``state`` knows how to save all that a resumed run needs. ``train`` returns the exit code
    that the run ends with (see ``guards.ExitCode``).
    """

    def __init__(
        self,
        settings: Settings,
        tasks: Sequence[Task],
        world: World,
        engine: Any,
        *,
        train_loader: TrainLoader,
        eval_loader: EvalLoader,
        state: RunState,
        folder: RunFolder,
        recorder: Recorder,
        progress: StepProgress,
        constants: Mapping[str, ConstantPredictor],
        total_steps: int,
    ) -> None:
        self.settings, self.tasks, self.world, self.engine = settings, tasks, world, engine
        self.train_loader, self.eval_loader, self.state = train_loader, eval_loader, state
        self.folder, self.recorder, self.progress = folder, recorder, progress
        self.constants, self.total_steps = constants, total_steps
        self.trivial: Results = {}
        self.guard = guards.FiniteGuard(policy=settings.guard.non_finite, max_skips=settings.guard.max_skips)
        self.stop = guards.StopFlag()
        self.dog = guards.Watchdog(folder.path, timeout=settings.guard.timeout)
        moe = settings.model.moe
        active = moe.num_experts if moe.gating == "dense" else moe.k + moe.num_shared
        self.span = SpanStatistics(tasks, world, active=active, num_shared=moe.num_shared)
        self.first: Results | None = None
        self.latest: Results | None = None
        self.train_seconds = 0.0
        self.steps_done = 0

    def train(self) -> guards.ExitCode:
        """Run until the last step or until a rank is asked to stop."""
        with self.stop, self.dog, self.progress:
            if self.state.step == 0 and self.settings.eval.at_start:
                self._evaluate()
            while self.state.step < self.total_steps:
                stopping = self._step()
                self._log()
                self._maybe_evaluate()
                self._maybe_save(stopping=stopping)
                if stopping:
                    LOGGER.info("stopped by a signal at step %d, saved", self.state.step)
                    return guards.ExitCode.STOPPED
            return guards.ExitCode.DONE

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def _step(self) -> bool:
        """One optimiser step over its micro-steps; whether the ranks have agreed to stop."""
        began = time.perf_counter()
        accumulation = self.settings.train.gradient_accumulation_steps
        step = self.state.step + 1
        self.dog.beat(f"data of step {step}")
        batches = [next(self.train_loader).to(self.world.device) for _ in range(accumulation)]
        counts = torch.stack([losses.label_counts(batch.labels, self.tasks) for batch in batches]).mean(dim=0)
        counts = collectives.all_reduce_sum(counts) / self.world.size
        ballots = [self._micro_step(step, batch, counts) for batch in batches]
        self.state.step = step
        self.steps_done += 1
        self.span.seconds += time.perf_counter() - began
        self.train_seconds += time.perf_counter() - began
        return any(ballot.stop for ballot in ballots)

    def _micro_step(self, step: int, batch: Batch, counts: Tensor) -> guards.Vote:
        self.dog.beat(f"forward of step {step}")
        output: ModelOutput = self.engine(batch.images)
        by_task = losses.task_losses(output.predictions, batch.labels, self.tasks, counts)
        total = losses.weighted_sum(by_task, self.tasks, self.settings.train.loss_weights) + output.aux_loss
        ballot = guards.vote(guards.all_finite([total]), stop=self.stop.requested)
        values = {**by_task, "aux_loss": output.aux_loss}
        if self.guard.take_step(ballot, step=step, values=values, batch=batch.names):
            self.dog.beat(f"backward of step {step}")
            self.engine.backward(total)
            self.engine.step()
            self.span.add(by_task, total, output, images=len(batch.images))
        else:
            LOGGER.warning("%s; skipped", self.guard.report)
            self._contribute_nothing(batch)
        return ballot

    def _contribute_nothing(self, batch: Batch) -> None:
        """Keep DeepSpeed's count of micro-steps where gradients accumulate: zero gradients from a blank batch."""
        if self.settings.train.gradient_accumulation_steps > 1:
            output: ModelOutput = self.engine(torch.zeros_like(batch.images))
            self.engine.backward(
                0.0 * torch.stack([logits.float().sum() for logits in output.predictions.values()]).sum()
            )
            self.engine.step()

    # -----------------------------------------------------------------------------------------------------------------
    # Log, evaluate, save

    def _log(self) -> None:
        step = self.state.step
        self.progress.advance(step)
        if (step % self.settings.train.log_every and step != self.total_steps) or self.span.is_empty:
            return
        values = self.span.take()
        values |= {"epoch": self.train_loader.epoch, "lr": self.engine.get_lr()[0]}
        self.recorder.write("train", step=step, values=values)
        shown = {"loss": values["loss"], **values["losses"], "images/s": values["images_per_second"]}
        self.progress.report(step, {**shown, "GB": values["memory_bytes"] / 1e9})
        events = [("train/loss", values["loss"], step), ("train/lr", values["lr"], step)]
        events += [(f"train/{name}", value, step) for name, value in values["losses"].items()]
        self._monitor([*events, ("train/images_per_second", values["images_per_second"], step)])

    def _maybe_evaluate(self) -> None:
        every, step = self.settings.eval.every, self.state.step
        if step == self.total_steps or (every and step % every == 0):
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluate on all ranks; rank 0 records it and draws the pictures."""
        step = self.state.step
        gallery = Gallery(room=self.settings.eval.pictures if self.world.is_first else 0)
        self.engine.eval()
        with self.progress.inner("evaluate", total=len(self.eval_loader)) as advance:

            def after_batch() -> None:
                self.dog.beat(f"evaluation at step {step}")
                advance()

            results, trivial = evaluate(
                self.engine, self.eval_loader, self.tasks, device=self.world.device, gallery=gallery,
                constants={} if self.trivial else self.constants, after_batch=after_batch)  # fmt: skip
        self.engine.train()
        self.trivial = self.trivial or trivial
        self.first, self.latest = self.first or results, results
        self.recorder.write("eval", step=step, values={"metrics": results, "trivial": self.trivial})
        title = f"step {step} of {self.total_steps}"
        LOGGER.info("\n%s", result_table(title, self.tasks, results, self.trivial, self.first))
        self._monitor([(f"eval/{t.name}/{t.metric}", results[t.name][t.metric], step) for t in self.tasks])
        if gallery.images:
            grid = prediction_grid(torch.stack(gallery.images), gallery.labels, gallery.predictions, self.tasks)
            save_png(grid, self.folder.predictions / f"step_{step:06d}.png")

    def _maybe_save(self, *, stopping: bool) -> None:
        every, step = self.settings.checkpoint.every, self.state.step
        if stopping or step == self.total_steps or (every and step % every == 0):
            self.dog.beat(f"saving step {step}")
            self.state.save(self.engine, self.train_loader)

    def _monitor(self, events: list[tuple[str, float, int]]) -> None:
        """Scalars to TensorBoard, CSV or W&B, as DeepSpeed's JSON says; it writes on rank 0 only."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events(events)
