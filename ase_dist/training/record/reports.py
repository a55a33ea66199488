"""What a run reports: the start-up tables, the numbers of a span of steps, the results, the summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ase_dist import collectives
from ase_dist.data.dataset import labelled_text
from ase_dist.errors import ExitCode
from ase_dist.evaluation.scores import IMAGES, format_score, headline, score_of, tolerances
from ase_dist.moe import MoEFFN
from ase_dist.tables import Table
from ase_dist.tasks import Task
from ase_dist.training.loop.components import RunComponents
from ase_dist.training.loop.engine import memory_bytes
from ase_dist.training.loop.evaluate import Results
from ase_dist.training.process.runtime import World
from ase_dist.training.record.traffic import dispatch_rows, dispatch_summary
from ase_dist.training.state.history import History


def start_tables(components: RunComponents) -> str:
    """The settings, data and devices of the run that starts, and its numbers of parameters."""
    settings, world = components.settings, components.world
    train, moe = settings.train, settings.model.moe
    images = train.batch_size * train.gradient_accumulation_steps * world.size
    why = f" ({components.config.why_type})" if components.config.why_type else ""
    rows = [
        ("tasks", ", ".join(task.name for task in components.tasks)),
        (
            "data",
            f"{settings.data.name}, {len(components.train_loader.dataset)} training and "
            f"{len(components.eval_loader.dataset)} validation images at {settings.data.size} px",
        ),
        ("backbone", f"{settings.model.backbone}, weights {settings.model.pretrained}"),
        (
            "experts N/k/S/r",
            f"{moe.num_experts}/{moe.k}/{moe.num_shared}/{moe.rank}, gating {moe.gating}, "
            f"expert-parallel size {moe.ep_size}"
            if moe.enabled
            else "none",
        ),
        (
            "world",
            f"{world.size} ranks on {world.device.type}, ZeRO {components.config.zero_stage}, "
            f"{'bf16' if train.bf16 else 'fp32'}{why}, {torch.get_num_threads()} CPU threads a rank",
        ),
        ("steps", f"{components.total_steps} of {images} images"),
        ("balancing", components.balancer.describe()),
        ("output", str(settings.output)),
    ]
    if any(loader.dataset.absent for loader in (components.train_loader, components.eval_loader)):
        labelled = components.labelled_images.items()
        rows[2:2] = [(f"labelled images, {split}", labelled_text(counts)) for split, counts in labelled]
    layers = [module for module in components.engine.module.modules() if isinstance(module, MoEFFN)]
    costs = Counter(filter(None, (layer.form_cost(world.device.type) for layer in layers)))
    forms = [("LoRA experts", f"{count} layers {cost.describe()}") for cost, count in costs.items()]
    rows[-3:-3] = forms
    tables = [
        Table(("", ""), rows, title="run"),
        Table(("group", "total", "trained", "size"), components.parameters.as_rows(), title="parameters"),
    ]
    traffic = expert_traffic(components)
    if traffic:
        tables.append(Table(("", ""), dispatch_rows(traffic), title="expert parallelism, a rank's traffic"))
    return "\n".join(table.to_text() for table in tables)


def expert_traffic(components: RunComponents) -> dict[str, Any]:
    """The traffic of expert parallelism, see ``dispatch_summary``; empty at expert-parallel size 1."""
    settings = components.settings
    return dispatch_summary(components.engine.module, images=settings.train.batch_size)


class MicroStep(NamedTuple):
    """The results of one forward and backward pass, detached from the graph.

    ``labelled_t`` [tasks] is 1 where a task has a label in the step, on any rank, else 0; None: all have one.
    """

    losses: dict[str, Tensor]
    total: Tensor
    aux_loss: Tensor
    expert_counts: Tensor
    mean_gates: Tensor
    names: list[str]
    weights_t: Tensor | None = None  # of balancing; None where they are fixed
    labelled_t: Tensor | None = None


class SpanStatistics:
    """Sums over the micro-steps between two lines of the log, kept on the device and read once, at the end of the span.

    ``layers`` are the model's layers with experts, all with the same number of active experts per token. The loop adds
    the time of its steps to ``seconds``, so that evaluations do not count.
    """

    _sums: Tensor | None
    _load: Tensor | None
    _gates: Tensor | None
    _labelled: Tensor | None

    def __init__(self, tasks: Sequence[Task], world: World, *, layers: Sequence[MoEFFN]) -> None:
        self.tasks, self.world = tasks, world
        self.num_shared = layers[0].num_shared if layers else 0
        self.active = layers[0].k + self.num_shared if layers else 0
        self._clear()

    def add(self, micro: MicroStep) -> None:
        """One micro-step of this rank; no wait for the device."""
        values = [micro.total, micro.aux_loss, *(micro.losses[task.name] for task in self.tasks)]
        row = torch.stack([value.float() for value in values])
        if micro.weights_t is not None:
            row = torch.cat([row, micro.weights_t])
        self._sums = row if self._sums is None else self._sums + row
        ones_t = row.new_ones(len(self.tasks))
        labelled_t = ones_t if micro.labelled_t is None else micro.labelled_t.float()
        self._labelled = labelled_t if self._labelled is None else self._labelled + labelled_t
        load, gates = micro.expert_counts.float(), micro.mean_gates
        self._load = load if self._load is None else self._load + load
        self._gates = gates if self._gates is None else self._gates + gates
        self._micro_steps += 1
        self._images += len(micro.names)

    def take(self) -> dict[str, Any]:
        """The span's numbers over all ranks, as plain values, and begin a new span (collective).

        The loss of a task is the mean over the steps that have a label of it; it is not there where none has.
        """
        assert self._sums is not None and self._load is not None and self._gates is not None
        assert self._labelled is not None
        count = self._micro_steps * self.world.size
        sums = (collectives.all_reduce_sum(self._sums) / count).tolist()
        seconds = self.seconds
        names = [task.name for task in self.tasks]
        values: dict[str, Any] = {
            "loss": sums[0],
            "aux_loss": sums[1],
            "losses": {
                name: loss if labelled == self._micro_steps else loss * self._micro_steps / labelled
                for name, loss, labelled in zip(names, sums[2:], self._labelled.tolist(), strict=False)
                if labelled
            },
            "images_per_second": self._images * self.world.size / seconds,
            "seconds": seconds,
            "memory_bytes": memory_bytes(self.world.device),
        }
        if weights := sums[2 + len(names) :]:
            values["task_weights"] = dict(zip(names, weights, strict=True))
        if self._load.numel():
            values |= self._expert_values(count)
        self._clear()
        return values

    def _expert_values(self, count: int) -> dict[str, Any]:
        """Load [layers][tasks][N] as a share of a task's tokens, mean gates alike, shared gates [layers][tasks]."""
        assert self._load is not None and self._gates is not None
        load_LtN = collectives.all_reduce_sum(self._load)
        gates_LtN = collectives.all_reduce_sum(self._gates) / count
        tokens_Lt1 = load_LtN.sum(dim=-1, keepdim=True) / self.active  # each token counts its active experts
        shared_Lt = gates_LtN[..., gates_LtN.shape[-1] - self.num_shared :].sum(dim=-1)
        values = {"expert_load": load_LtN / tokens_Lt1, "mean_gates": gates_LtN}
        return {**values, "shared_gate": shared_Lt} if self.num_shared else values

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last ``take``."""
        return self._micro_steps == 0

    def _clear(self) -> None:
        self._sums = self._load = self._gates = self._labelled = None
        self._micro_steps = self._images = 0
        self.seconds = 0.0


def result_table(title: str, tasks: Sequence[Task], results: Results, trivial: Results, first: Results | None) -> str:
    """Each task's metric with the trivial predictor's and the first evaluation's; odsF where it was computed.

    Where tasks are scored on different numbers of images these are there too.
    """
    counts = {task.name: results[task.name].get(IMAGES) for task in tasks}
    has_counts = len({*counts.values()}) > 1
    rows = []
    for task in tasks:
        keys = dict.fromkeys((task.metric, headline(task, results[task.name])))
        for key in keys:
            score = score_of(task, key)
            name = task.metric_title if key == task.metric else f"{score.title} {score.unit}"
            arrow = "higher" if score.higher_is_better else "lower"
            others = [(found or {}).get(task.name, {}).get(key) for found in (trivial, first)]
            count = (format_score(counts[task.name]),) if has_counts else ()
            rows.append((task.title, name, arrow, *others, results[task.name][key], *count))
    header = ("task", "metric", "better", "trivial", "first", "now", *(("images",) if has_counts else ()))
    return Table(header, rows, title=title).to_text()


def summary(components: RunComponents, history: History, *, step: int, code: ExitCode) -> dict[str, Any]:
    """The contents of summary.json: results, also of the trivial predictors, sizes, times."""
    seconds = history.train_seconds
    return {
        "exit": code.name.lower(),
        "step": step,
        "total_steps": components.total_steps,
        "data": components.settings.data.name,
        "labelled_images": components.labelled_images,
        "metrics": history.latest,
        "tolerances": tolerances(components.tasks),
        "metrics_step": history.evaluated_at if history.latest else None,
        "first_metrics": history.first,
        "trivial": history.trivial,
        "best_step": history.best_step if history.latest else None,
        "parameters": components.parameters.as_dict(),
        "train_seconds": seconds,
        "images_per_second": history.images / seconds if seconds else None,
        "peak_memory_bytes": memory_bytes(components.world.device),
        "world_size": components.world.size,
        "expert_parallel": expert_traffic(components) or None,
    }
