"""What every method of balancing costs: a training step with it over one with fixed weights, taking turns in one run.

    python benchmarks/balancing.py [--config scenes] [--methods famo upgrad] [--every 1] [--batch-size 4] [--zero 0]
        [--repeats 5] [--threads 1] [--json out.json] [--plot out.png] [KEY=VALUE ...]

All sides train one model: the step of the training loop with its own ``Balancer``, on generated scenes. With
``--every N`` a side takes N steps in its turn, of which one is due. Gradient methods are measured on the shared
parameters, and the first of them on the representation too. The ratio is the median over repetitions of a side's step
over that with fixed weights in the same repetition.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _timing import Times, Watch, drawing, interleaved, median, prepare, ratio, write_report

from ase_dist.registries import BALANCINGS
from ase_dist.tables import Table

FIXED = "fixed"


def main() -> None:
    """Measure, print the table, write JSON and plot when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of settings")
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--methods", nargs="+", default=[name for name in BALANCINGS if name != FIXED])
    parser.add_argument("--every", type=int, default=1, help="steps between two updates of the weights")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        taken = measure(arguments, Path(folder))
    fixed = taken[FIXED]
    rows = [
        {"method": name, "step_ms": 1000 * median(times, "step") / arguments.every,
         "ratio": ratio(times, fixed, "step"), "processor_ratio": ratio(times, fixed, "processor")}
        for name, times in taken.items()
    ]  # fmt: skip
    cells = [(row["method"], *(f"{row[key]:.2f}" for key in ("step_ms", "ratio", "processor_ratio"))) for row in rows]
    title = f"{arguments.config}, {arguments.batch_size} images, weights every {arguments.every} steps"
    print(Table(("method", "step, ms", "of fixed", "of fixed, processor"), cells, title=title).to_text())
    write_report(arguments.json, arguments, rows=rows)
    if arguments.plot is not None:
        with drawing(arguments.plot, panels=1, height=0.3 * len(rows) + 1.2) as (ax,):
            ax.barh([row["method"] for row in rows], [row["ratio"] for row in rows], color="#0072b2")
            ax.axvline(1, color="#666666", linestyle="--")
            ax.invert_yaxis()
            ax.set_xlabel("a step over one with fixed weights")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[Times]]:
    """The times of every side, by name, the fixed weights first."""
    from ase_dist.read_config import load_settings, override_settings
    from ase_dist.training.balancing.balancer import Balancer
    from ase_dist.training.ds_config import resolve
    from ase_dist.training.loop.components import build
    from ase_dist.training.process import runtime

    images = 2 * arguments.batch_size
    settings = load_settings(arguments.config, [
        "data.name=scenes", f"data.scenes.train_images={images}", "data.scenes.val_images=1", f"data.root={folder}",
        "data.cache_in_memory=true", f"train.batch_size={arguments.batch_size}", f"output={folder / 'run'}",
        "monitor.tensorboard=false", *arguments.overrides,
    ])  # fmt: skip
    world = runtime.start(timeout=settings.guard.timeout, threads=arguments.threads)
    config = resolve(settings, {"zero_optimization": {"stage": arguments.zero}}, world=1, native_bf16=world.native_bf16)
    parts = build(config, world, beat=lambda doing: None)
    sides = {name: {"train.balancing.method": name} for name in [FIXED, *arguments.methods]}
    by_gradients = [name for name in arguments.methods if BALANCINGS[name].uses_gramian]
    for name in by_gradients[:1]:
        sides[f"{name} on representation"] = {**sides[name], "train.balancing.on": "representation"}
    model = parts.engine.module
    calls = {}
    for name, changes in sides.items():
        changed = override_settings(settings, {**changes, "train.balancing.every": arguments.every})
        calls[name] = _steps(parts, Balancer(changed, parts.tasks, model, world.device), arguments.every)
    try:
        return interleaved(calls, arguments.repeats)
    finally:
        parts.close()
        runtime.stop()


def _steps(parts: Any, balancer: Any, count: int) -> Callable[[], Times]:
    """``count`` steps as ``Trainer._step`` takes them, the first of them due."""
    from ase_dist.training.loop.trainer import mean_label_counts, training_loss

    def take() -> Times:
        batches = [next(parts.train_loader).to(parts.world.device) for _ in range(count)]
        watch = Watch()
        for number, batch in enumerate(batches, start=1):
            counts = mean_label_counts([batch], parts.tasks, parts.world)
            balancer.begin_step(number, [batch], counts, beat=lambda doing: None)
            output = parts.engine(batch.images)
            by_task, total = training_loss(output, batch, parts.tasks, counts, balancer)
            parts.engine.backward(total)
            parts.engine.step()
            losses = [{name: loss.detach() for name, loss in by_task.items()}]
            balancer.end_step(number, losses, epoch_ends=number == count)
        return watch.stop()

    return take


if __name__ == "__main__":
    main()
