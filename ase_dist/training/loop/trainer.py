"""The training loop: batch, loss, backward, step, guard, log, maybe evaluate, maybe save, maybe stop."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ase_dist import collectives
from ase_dist.agreement import RankError, raise_together
from ase_dist.cores import share_of_cores
from ase_dist.data.batch import Batch
from ase_dist.errors import ExitCode, RunError, UserError, describe, exit_code_of, file_error
from ase_dist.evaluation.constant import ConstantPredictor
from ase_dist.evaluation.metrics import EdgeOds
from ase_dist.models import ModelOutput
from ase_dist.moe import MoEFFN
from ase_dist.tasks import Task
from ase_dist.training.balancing.balancer import Balancer
from ase_dist.training.loop import losses
from ase_dist.training.loop.components import RunComponents
from ase_dist.training.loop.conflict import gradient_conflict, same_random_state
from ase_dist.training.loop.evaluate import Gallery, evaluate
from ase_dist.training.process.finite import FiniteGuard, NonFiniteError, Vote, all_finite, vote
from ase_dist.training.process.runtime import World
from ase_dist.training.process.signals import StopFlag
from ase_dist.training.process.watchdog import Watchdog
from ase_dist.training.record.appending import RecordError, recording
from ase_dist.training.record.console import StepProgress
from ase_dist.training.record.logs import log_failure
from ase_dist.training.record.metrics import Recorder
from ase_dist.training.record.monitor import Monitors, writer_errors_told_once
from ase_dist.training.record.reports import MicroStep, SpanStatistics, result_table
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint import SaveError
from ase_dist.training.state.run_state import RunState

LOGGER = logging.getLogger("ase_dist")
EXPERT_MAPS = {"expert_load": "Share of tokens", "mean_gates": "Mean gate"}  # of the monitors' pictures
AGREED_ERRORS = (NonFiniteError, SaveError, RankError)  # every rank raises them, so no peer is lost


class Trainer:
    """One run, from its first or its resumed step to its last.

    ``state`` saves all that a resumed run needs. ``constants`` are the trivial predictors, empty where they were
    evaluated already. ``train`` returns the run's exit code.

    Where records (numbers, pictures, logs) cannot be written on a rank, as on a full disk, or its loader processes have
    died, all ranks save and end after the step, with RankError. Where a rank cannot read its images, no rank begins the
    step: all save the step before and end with what that rank could not read.
    """

    def __init__(
        self,
        components: RunComponents,
        *,
        state: RunState,
        folder: RunFolder,
        recorder: Recorder,
        progress: StepProgress,
        watchdog: Watchdog,
        monitors: Monitors,
        constants: Mapping[str, ConstantPredictor],
    ) -> None:
        settings, tasks, world, engine = components.settings, components.tasks, components.world, components.engine
        self.settings, self.tasks, self.world, self.engine = settings, tasks, world, engine
        self.train_loader, self.eval_loader = components.train_loader, components.eval_loader
        self.balancer = components.balancer
        self.state, self.folder, self.recorder, self.progress = state, folder, recorder, progress
        self.constants, self.total_steps = constants, components.total_steps
        self.guard = FiniteGuard(policy=settings.guard.non_finite, max_skips=settings.guard.max_skips)
        self.stop = StopFlag()
        self.watchdog = watchdog
        layers = [module for module in engine.module.modules() if isinstance(module, MoEFFN)]
        self.monitors = monitors
        self.span = SpanStatistics(tasks, world, layers=layers)
        self.stopping = False  # agreed upon by all ranks
        self._applied = True  # whether the optimiser has taken the last step
        self._experts: dict[str, Tensor] = {}  # load and gates of the last record, for the monitors' pictures
        self._record_error: RecordError | None = None  # the first of this rank
        self._unread: Exception | None = None  # what this rank could not read of its images
        self._routers = [layer.router for layer in layers]
        self._num_shared = layers[0].num_shared if layers else 0

    def train(self) -> ExitCode:
        """Run until the last step or until a rank is asked to stop."""
        with self.stop, self.progress, writer_errors_told_once():
            try:
                self._warm_shared_logits(self.state.step)  # as the last step left them, for an evaluation at the start
                self._save_and_evaluate()
                while self.state.step < self.total_steps and not self.stopping:
                    self._step()
                    self._log()
                    self._save_and_evaluate()
            except Exception as error:
                if self.world.size > 1 and not isinstance(error, AGREED_ERRORS):
                    if isinstance(error, RuntimeError):  # as torch's are where a peer is lost
                        step = self.state.step
                        LOGGER.error("rank %d ends at step %d: %s", self.world.rank, step, self._suspects())
                    self.watchdog.force_exit_on_close()
                raise
            raise_together(self._raise_failure)
        if self.stopping:
            LOGGER.info(
                "stopped by a signal at step %d, saved; the same command goes on from there, or: %s",
                self.state.step,
                resume_command(self.folder, self.world),
            )
        return ExitCode.STOPPED if self.stopping else ExitCode.DONE

    def _save_and_evaluate(self) -> None:
        """Do what is due. Save first, so a failing evaluation loses nothing; its results are saved afterwards."""
        self._maybe_save()
        is_start = self.state.step == 0 and self.settings.eval.at_start
        if (is_start or self._evaluation_is_due()) and not self.stopping:
            self._evaluate()
        self._maybe_save()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Note an error of writing records, which stops all ranks at the end of the step (see ``_must_stop``)."""
        try:
            yield
        except RecordError as error:
            self._record_error = self._record_error or error

    def _must_stop(self) -> bool:
        """Whether this rank was asked to stop, cannot write its records or read its images."""
        self._record_error = self._record_error or self.monitors.failure or log_failure()
        errors = (self._record_error, self._unread, self._loader_failure())
        return self.stop.requested or any(error is not None for error in errors)

    def _loader_failure(self) -> UserError | RunError | None:
        return self.train_loader.failure or self.eval_loader.failure

    def _raise_failure(self) -> None:
        """Raise what has stopped this rank, other than a signal, now that the last step is saved."""
        self._must_stop()
        error = self._record_error
        if error is not None:
            raise RecordError(
                f"{error}; step {self.state.step} is saved: with room on the disk the same command goes on from there",
                exit_code=error.exit_code,
            )
        if self._unread is not None:
            if exit_code_of(self._unread) is ExitCode.FAILED:
                raise self._unread
            raise file_error(
                self._unread,
                f"{describe(self._unread)}; step {self.state.step} is saved: the same command goes on from there",
            )
        failure = self._loader_failure()
        if failure is not None and self.stopping:  # else the last step had come and its evaluation is whole
            raise failure

    def _suspects(self) -> str:
        """Which other rank looks dead, for the log; waits a moment, as one that has just died still looks alive."""
        deadline = time.monotonic() + self.watchdog.patience
        seen = ("dead", "no sign of life")
        while not any(words in (found := self.watchdog.suspects()) for words in seen) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def _step(self) -> None:
        """One optimiser step: batches, losses and backward passes of its micro-steps, guard; its time is counted."""
        began = time.perf_counter()
        step = self.state.step + 1
        self.watchdog.beat(f"data of step {step}")
        accumulation, before = self.settings.train.gradient_accumulation_steps, self.train_loader.state_dict()
        epoch = self.train_loader.epoch
        batches: list[Batch] = []
        try:
            batches += (next(self.train_loader).to(self.world.device) for _ in range(accumulation))
        except Exception as error:  # of any kind: the other ranks are waiting to hear of it
            self._unread = error
        self.watchdog.beat(f"label counts of step {step}")  # they wait for all ranks, so a rank without data is behind
        counts = mean_label_counts(batches, self.tasks, self.world)
        is_unread = self._unread is not None
        ballot = vote(torch.full((), self._applied, device=self.world.device), stop=self._must_stop(), unread=is_unread)
        if is_unread or (self.world.size > 1 and ballot.unread):
            self.train_loader.load_state_dict(before)
            self.stopping = True
            return
        self._warm_shared_logits(step)
        conflict_seconds = self._maybe_measure_conflict(step, batches[0], counts)
        self.balancer.begin_step(step, batches, counts, beat=self.watchdog.beat)

        micro_steps = []
        for batch in batches:
            self.watchdog.beat(f"forward of step {step}")
            output: ModelOutput = self.engine(batch.images)
            by_task, total = training_loss(output, batch, self.tasks, counts, self.balancer)
            self.watchdog.beat(f"backward of step {step}")
            self.engine.backward(nan_if_nonfinite(total))
            self.engine.step()
            by_task = {name: loss.detach() for name, loss in by_task.items()}
            numbers = (total.detach(), output.aux_loss.detach(), output.expert_counts, output.mean_gates)
            labelled_t = counts.sum(dim=1) > 0
            micro_steps.append(MicroStep(by_task, *numbers, batch.names, self.balancer.weights_t, labelled_t))
        if self.engine.was_step_applied():
            self.watchdog.beat(f"balancing after step {step}")
            micro_losses = [micro.losses for micro in micro_steps]
            self.balancer.end_step(step, micro_losses, epoch_ends=self.train_loader.epoch != epoch)

        self._finish_step(step, micro_steps, ballot)
        self.state.advance(images=sum(len(batch.images) for batch in batches) * self.world.size)
        seconds = time.perf_counter() - began - conflict_seconds
        self.span.seconds += seconds
        self.state.history.train_seconds += seconds

    def _warm_shared_logits(self, step: int) -> None:
        """Step 1 has shared logits of 0, the step after the warm-up and all later ones their full size."""
        steps = self.settings.model.moe.shared_logit_warmup
        if steps and self.settings.model.moe.enabled:
            for router in self._routers:
                router.scale_shared_logits(min(1.0, max(0.0, (step - 1) / steps)))

    def _maybe_measure_conflict(self, step: int, batch: Batch, counts: Tensor) -> float:
        """At every step that is due, on its first micro-step, by a pass of its own; the seconds that it took.

        The engine's output will not do: DeepSpeed 0.19.8 takes any backward pass through it for the step's.
        """
        every = self.settings.eval.gradient_conflict_every
        if not every or (step > 1 and step % every):
            return 0.0
        began = time.perf_counter()
        self.watchdog.beat(f"gradient conflict of step {step}")
        with same_random_state(self.world.device):  # the step that follows is the same with and without this one
            output: ModelOutput = self.engine.module(batch.images)
        by_task = losses.task_losses(output.predictions, batch.labels, self.tasks, counts)
        conflict = gradient_conflict(by_task, self.engine.module)
        with self._recording():
            self.recorder.write("conflict", step=step, values=conflict)
        return time.perf_counter() - began

    def _finish_step(self, step: int, micro_steps: Sequence[MicroStep], ballot: Vote) -> None:
        """Count the step, or report it as skipped, or raise NonFiniteError; note whether a rank is to stop.

        Every ZeRO stage decides by a norm that all ranks have added up, so they decide alike; the vote of the next step
        checks it.
        """
        if ballot.finite != self._applied:
            raise RuntimeError(f"the ranks disagree whether the optimiser has taken step {step - 1}")
        self._applied = bool(self.engine.was_step_applied())
        values = {} if self._applied else self._suspicious_values(micro_steps)
        names = [name for micro in micro_steps for name in micro.names]
        if self.guard.take_step(self._applied, step=step, values=values, batch=names):
            for micro in micro_steps:
                self.span.add(micro)
        else:
            LOGGER.warning("%s; skipped", self.guard.report)
        self.stopping = ballot.stop

    def _suspicious_values(self, micro_steps: Sequence[MicroStep]) -> dict[str, Tensor]:
        """This rank's losses of a step not taken, and the gradient as NaN only where every rank's losses are finite."""
        rows = [{**micro.losses, "aux_loss": micro.aux_loss} for micro in micro_steps]
        values = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        is_finite = bool(all_finite(values.values()))
        if not collectives.any_rank(not is_finite, self.world.device):
            values["gradient"] = torch.tensor(math.nan)
        return values

    # -----------------------------------------------------------------------------------------------------------------
    # Log, evaluate, save

    def _log(self) -> None:
        """Write a line of metrics; also before each checkpoint, so that a resumed run writes the same lines."""
        step = self.state.step
        self.progress.advance(step)
        due = step % self.settings.train.log_every == 0 or self._save_is_due() or self._evaluation_is_due()
        if not due or self.span.is_empty:
            return
        values = self.span.take()
        values |= {"epoch": self.train_loader.epoch, "lr": self.engine.get_lr()[0]}
        if kept := self.balancer.count_kept():
            values["kept_weights"] = kept
        with self._recording():
            self.recorder.write("train", step=step, values=values)
        shown = {"loss": values["loss"], **values["losses"], "images/s": values["images_per_second"]}
        self.progress.report(step, {**shown, "GB": values["memory_bytes"] / 1e9})
        events = [("train/loss", values["loss"], step), ("train/lr", values["lr"], step)]
        events += [(f"train/{name}", value, step) for name, value in values["losses"].items()]
        events += [(f"train/weight/{name}", value, step) for name, value in values.get("task_weights", {}).items()]
        events.append(("train/images_per_second", values["images_per_second"], step))
        self.monitors.write_scalars(events)
        self._experts = {key: values[key] for key in EXPERT_MAPS if key in values}

    def _evaluation_is_due(self) -> bool:
        every, step = self.settings.eval.every, self.state.step
        due = step == self.total_steps or bool(every and step and step % every == 0)
        return due and self.state.history.evaluated_at != step

    def _evaluate(self) -> None:
        """Evaluate on all ranks, unless one is asked to stop; rank 0 records it and draws the pictures."""
        step, history = self.state.step, self.state.history
        gallery = Gallery(limit=self.settings.eval.pictures if self.world.is_first else 0)
        workers = share_of_cores(self.world.local_size)  # that count boundaries while the model runs
        self.engine.eval()
        # the checkpoint of this step is written already, so the random state must stay as it is in there
        with (
            same_random_state(self.world.device),
            self.progress.inner("evaluate", total=len(self.eval_loader)) as advance,
        ):

            def go_on(error: Exception | None) -> bool:
                self._unread = error
                self.watchdog.beat(f"evaluation at step {step}")
                advance()
                self.stopping = collectives.any_rank(self._must_stop(), self.world.device)
                return not self.stopping

            evaluation = evaluate(
                self.engine,
                self.eval_loader.until_error(),
                self.tasks,
                device=self.world.device,
                gallery=gallery,
                constants={} if history.trivial else self.constants,
                go_on=go_on,
                edge_ods=EdgeOds(workers=workers) if self.settings.eval.edge_ods else None,
                dataset=self.eval_loader.dataset,
            )
        self.engine.train()
        if evaluation is None:
            return
        history.trivial = history.trivial or evaluation.trivial
        self.state.add_results(evaluation.results, self.tasks)
        self._report_evaluation(gallery)

    def _report_evaluation(self, gallery: Gallery) -> None:
        step, history = self.state.step, self.state.history
        results = history.latest
        assert results is not None
        with self._recording():
            self.recorder.write("eval", step=step, values={"metrics": results, "trivial": history.trivial})
        title = f"step {step} of {self.total_steps}"
        LOGGER.info("\n%s", result_table(title, self.tasks, results, history.trivial, history.first))
        events = [(f"eval/{t.name}/{t.metric}", results[t.name][t.metric], step) for t in self.tasks]
        self.monitors.write_scalars(events)
        if gallery.images:
            from ase_dist.pictures.grid import prediction_grid, save_png  # matplotlib would delay the start

            grid = prediction_grid(torch.stack(gallery.images), gallery.labels, gallery.predictions, self.tasks)
            with self._recording(), recording(self.folder.prediction(step)):
                save_png(grid, self.folder.prediction(step))
            self.monitors.write_picture("predictions", grid, step)
        if self._experts and self.monitors.take_pictures:
            from ase_dist.training.record.plots import draw_experts

            maps = {EXPERT_MAPS[key]: value.float().cpu().numpy() for key, value in self._experts.items()}
            picture = draw_experts(maps, titles=[task.title for task in self.tasks], num_shared=self._num_shared)
            self.monitors.write_picture("experts", picture, step)

    def _maybe_save(self) -> None:
        if self._save_is_due() and not self.state.is_saved:
            self.watchdog.beat(f"saving step {self.state.step}")
            self.state.save(self.engine, self.train_loader)

    def _save_is_due(self) -> bool:
        """Also after the best evaluation so far, whose weights would be lost with the next step."""
        every, step = self.settings.checkpoint.every, self.state.step
        is_best = self.state.history.best_step == step
        periodic = step == self.total_steps or is_best or bool(every and step % every == 0)
        return self.stopping or (step > 0 and periodic)


def mean_label_counts(batches: Sequence[Batch], tasks: Sequence[Task], world: World) -> Tensor:
    """What the losses of every micro-step of every rank divide by (collective); see ``losses.label_counts``.

    A rank without batches has counts of 0.
    """
    counts = torch.zeros(len(tasks), 2, device=world.device)
    if batches:
        counts = torch.stack([losses.label_counts(batch.labels, tasks) for batch in batches]).mean(dim=0)
    return collectives.all_reduce_sum(counts) / world.size


def training_loss(
    output: ModelOutput, batch: Batch, tasks: Sequence[Task], counts: Tensor, balancer: Balancer
) -> tuple[dict[str, Tensor], Tensor]:
    """Each task's loss, and their sum with the weights of ``balancer`` and the routers' auxiliary loss."""
    by_task = losses.task_losses(output.predictions, batch.labels, tasks, counts)
    return by_task, balancer.weighted_sum(by_task) + output.aux_loss


def nan_if_nonfinite(total: Tensor) -> Tensor:
    """``total``; where it is not finite no gradient is either, so that no ZeRO stage takes the step on any rank.

    A NaN in a label can leave the gradient finite (the sign of NaN is 0), and asking before the backward pass would
    make the device wait for the host in every step.
    """
    finite = total.detach().isfinite()
    return total * torch.ones_like(total).masked_fill(
        ~finite, math.nan
    )  # ``where`` would copy its numbers from the host


def resume_command(folder: RunFolder, world: World) -> str:
    """The command that continues the run in ``folder`` by its own settings, on as many ranks."""
    nodes = world.size // world.local_size
    launcher = "torchrun" + (f" --nnodes {nodes}" if nodes > 1 else "") + f" --nproc_per_node {world.local_size}"
    return f"{'python' if world.size == 1 else launcher} -m ase_dist train --resume {shlex.quote(str(folder.path))}"
