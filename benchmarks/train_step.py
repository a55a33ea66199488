"""The full five-task training step of a ViT: one pass for all tasks, against a pass per task and against no experts.

    python benchmarks/train_step.py [--shapes vit_s vit_b] [--batch 1] [--json out.json] [--plot out.png]

Sides, of the same backbone, heads, tasks, images, losses and AdamW, taking turns in every repetition:

- ase_16_3_1_4: the model of that row, all tasks in one pass
- a pass per task: the same model called once per task, a backward pass after each, as peers train
- a pass per task, torch: the same by torch's own operators, as peers write them: products as torch.nn.Linear computes
  them, and the heads' images enlarged before they are convolved
- mtl_vit_lora: the row with LoRA in place of the experts
- mtl_vit_lora, torch: the same by torch's own operators
- neither: no experts and no LoRA; heads and task embedding alone are trained

A step is a batch of generated scenes (cached), forward, losses, backward and optimiser. The ratio to plain LoRA is the
median over repetitions of the ratio in the same repetition. The parts of a step are timed operator by operator, in a
repetition of their own: forward operators by the module that they run in, backward ones by the module whose graph they
run for; inside a layer of experts a product of both full widths belongs to the base FFN. ``--ranks 2`` averages the
gradients over so many processes, started here, which is the communication.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from _parts import PARTS, Parts
from _ranks import on_ranks
from _timing import MB, Times, Watch, drawing, interleaved, median, peak_bytes, prepare, ratio, write_report
from torch import nn

from ase_dist import collectives
from ase_dist.baselines import apply_baseline
from ase_dist.config import Settings
from ase_dist.data.batch import Batch
from ase_dist.data.loader import build_train_loader
from ase_dist.models import build_model
from ase_dist.ops import doubled_conv, products
from ase_dist.read_config import build_settings, override_settings
from ase_dist.registries import HEADS
from ase_dist.tables import Table
from ase_dist.tasks import Task, select_tasks
from ase_dist.training.loop import losses

BACKBONES = {"vit_s": "vit_small_patch16_224", "vit_b": "vit_base_patch16_224", "tiny": "vit_tiny_patch16_224"}
OURS, LOOP, LORA, NEITHER = "ase_16_3_1_4", "a pass per task", "mtl_vit_lora", "neither"
PLAIN = ", torch"  # what follows the name of a side by torch's own operators


@dataclass(frozen=True)
class Row:
    """One line: images/s, milliseconds and ratios, megabytes, and milliseconds by part."""

    shape: str
    side: str
    images_per_second: float
    step_ms: float
    ratio_to_lora: float
    processor_ratio: float
    peak_mb: float
    trained: int
    parts_ms: dict[str, float]


def main() -> None:
    """Measure both shapes, print tables and verdicts, write JSON and plot when asked."""
    arguments = _parse()
    prepare(1 if arguments.ranks > 1 else arguments.threads)
    rows = on_ranks(arguments.ranks, _measure_all, arguments) if arguments.ranks > 1 else _measure_all(arguments)
    _report([Row(**row) for row in rows], arguments)


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", choices=BACKBONES, default=["vit_s", "vit_b"])
    p.add_argument("--batch", type=int, default=1, help="images a step and rank")
    p.add_argument("--size", type=int, default=224, help="side of the images")
    p.add_argument("--depth", type=int, default=12, help="blocks of the backbone")
    p.add_argument("--head", default="pup", choices=list(HEADS))
    p.add_argument("--head-width", type=int, default=256)
    p.add_argument("--repeats", type=int, default=5, help="after one that is not counted, each after a step of its own")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks (train.compile)")
    p.add_argument("--json", type=Path, help="write the figures here too")
    p.add_argument("--plot", type=Path, help="draw the parts")
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# The sides


@contextmanager
def torchs_own_operators() -> Iterator[None]:
    """While open, no product and no convolution takes a way of ours."""
    never = {"return_value": False}
    with mock.patch.object(products, "_by_onednn", **never), mock.patch.object(doubled_conv, "_by_taps", **never):
        yield


class Side:
    """A model, its optimiser, and how it takes a step."""

    def __init__(self, settings: Settings, batches: Iterator[Batch], *, per_task: bool = False, plain: bool = False,
                 model: nn.Module | None = None) -> None:  # fmt: skip
        self.tasks = select_tasks("scenes")
        self.model = model or _model(settings, self.tasks)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.per_task, self.plain, self.batches = per_task, plain, batches

    def step(self, parts: Parts | None = None) -> Times:
        """One optimiser step; ``parts`` hears what is going on."""
        with torchs_own_operators() if self.plain else nullcontext():
            return self._step(parts)

    def _step(self, parts: Parts | None) -> Times:
        enter: Callable[[str], None] = (lambda name: None) if parts is None else parts.enter
        watch = Watch()
        enter("data")
        batch = next(self.batches)
        enter("loss")
        counts = losses.label_counts(batch.labels, self.tasks)
        for tasks, rows in self._passes():
            enter("other")
            output = self.model(batch.images, tasks=[task.name for task in tasks])
            enter("loss")
            by_task = losses.task_losses(output.predictions, batch.labels, tasks, counts[rows])
            total = losses.weighted_sum(by_task, tasks, {}) + output.aux_loss
            enter("backward")
            total.backward()
        watch.forward_done()
        enter("communication")
        if dist.is_initialized():
            self._average()
        enter("optimiser")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        enter("other")
        return watch.stop()

    def _passes(self) -> list[tuple[tuple[Task, ...], slice]]:
        if not self.per_task:
            return [(self.tasks, slice(None))]
        return [((task,), slice(i, i + 1)) for i, task in enumerate(self.tasks)]

    def _average(self) -> None:
        grads = [p.grad for p in self.trained if p.grad is not None]
        total = collectives.all_reduce_sum(torch.cat([grad.flatten() for grad in grads])) / collectives.world_size()
        for grad, mean in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def _model(settings: Settings, tasks: tuple[Task, ...]) -> nn.Module:
    model = build_model(settings, tasks, expert_layer="plain")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_B", "_b")):  # at zero, A and the gates would have no gradient
                parameter.normal_(std=0.02, generator=generator)
    if settings.train.compile:
        for block in model.blocks:
            block.compile()
    return model


def _settings(shape: str, arguments: argparse.Namespace, folder: str) -> Settings:
    model = {"backbone": BACKBONES[shape], "head": arguments.head, "head_width": arguments.head_width,
             "backbone_args": {"depth": arguments.depth}}  # fmt: skip
    scenes = {"size": max(64, arguments.size), "train_images": 2 * arguments.batch, "val_images": 1}
    data = {"size": arguments.size, "cache_in_memory": True, "root": folder, "scenes": scenes}
    return build_settings({"data": data, "model": model,
                           "train": {"batch_size": arguments.batch, "compile": arguments.compile}})  # fmt: skip


def _row_of(settings: Settings, name: str) -> Settings:
    tree: dict[str, Any] = settings.model_dump()
    apply_baseline(tree, name, lr=settings.train.lr, output=settings.output)
    return build_settings(tree)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [asdict(row) for shape in arguments.shapes for row in _measure(shape, arguments)]


def _measure(shape: str, arguments: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(shape, arguments, folder)
        tasks = select_tasks("scenes")
        with closing(build_train_loader(settings, tasks, rank=0, world_size=1)) as loader:
            experts = _row_of(settings, OURS)
            ours, lora = Side(experts, loader), Side(_row_of(settings, LORA), loader)
            bare = override_settings(_row_of(settings, LORA), ["model.lora_rank=0"])
            sides = {
                OURS: ours,
                LOOP: Side(experts, loader, per_task=True, model=ours.model),
                LOOP + PLAIN: Side(experts, loader, per_task=True, plain=True, model=ours.model),
                LORA: lora,
                LORA + PLAIN: Side(_row_of(settings, LORA), loader, plain=True, model=lora.model),
                NEITHER: Side(bare, loader),
            }
            taken = interleaved({name: side.step for name, side in sides.items()}, arguments.repeats, before=1)
            peaks = {name: peak_bytes(side.step) for name, side in sides.items()}
            parts = {name: _parts(side) for name, side in sides.items()}
    return [_row(shape, name, sides[name], taken, peaks[name], parts[name], arguments) for name in sides]


def _parts(side: Side) -> dict[str, float]:
    with Parts(side.model) as parts:
        side.step(parts)
    return parts.seconds


def _row(shape: str, name: str, side: Side, taken: dict[str, list[Times]], peak: int, parts: dict[str, float],
         arguments: argparse.Namespace) -> Row:  # fmt: skip
    times = taken[name]
    step = median(times, "step")
    return Row(shape, name, arguments.batch / step, 1e3 * step, ratio(times, taken[LORA], "step"),
               ratio(times, taken[LORA], "processor"), peak / MB, sum(p.numel() for p in side.trained),
               {part: 1e3 * seconds for part, seconds in parts.items()})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _report(rows: list[Row], arguments: argparse.Namespace) -> None:
    for shape in dict.fromkeys(row.shape for row in rows):
        group = [row for row in rows if row.shape == shape]
        title = (f"{shape}, {arguments.batch} image(s) of {arguments.size} a step, five tasks, {arguments.head} heads, "
                 f"float32, {arguments.threads} threads, {arguments.ranks} rank(s)")  # fmt: skip
        columns = ("side", "images/s", "step ms", "over plain LoRA", "processor", "peak MB", "trained")
        cells = [
            (r.side, r.images_per_second, r.step_ms, r.ratio_to_lora, r.processor_ratio, r.peak_mb, r.trained)
            for r in group
        ]
        print(Table(columns, cells, title=title).to_text())
        parts = [(r.side, *(r.parts_ms[part] for part in PARTS)) for r in group]
        print(Table(("side", *PARTS), parts, title="ms by part").to_text())
        ratios = {row.side: row.ratio_to_lora for row in group}
        for suffix, which in (("", "with the same operators"), (PLAIN, "with torch's own operators")):
            share, gain = ratios[OURS] / ratios[LORA + suffix], ratios[LOOP + suffix] / ratios[OURS]
            print(f"{shape}, {which}: {share:.3g} of plain LoRA (at most 1.15), {gain:.3g} times faster than a pass "
                  "per task (at least 1.2)")  # fmt: skip
        print()
    write_report(arguments.json, arguments, rows=[asdict(row) for row in rows])
    if arguments.plot:
        _draw(rows, arguments.plot)


def _draw(rows: list[Row], path: Path) -> None:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    with drawing(path, panels=len(shapes), height=2.8) as axes:
        for ax, shape in zip(axes, shapes, strict=True):
            group = [row for row in rows if row.shape == shape]
            left = [0.0] * len(group)
            for part in PARTS:
                widths = [row.parts_ms[part] for row in group]
                ax.barh([row.side for row in group], widths, left=left, label=part)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            ax.invert_yaxis()
            ax.set(title=shape, xlabel="ms by part")
        axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    main()
