"""What a checkpoint costs in training steps, measured within one run of the paper's ViT-B.

    python benchmarks/checkpoint.py [--config pascal_ase_16_3_1_4] [--batch-size 1] [--saves 5] [--zero 2] [--json F]
    torchrun --nproc_per_node 2 benchmarks/checkpoint.py --ep 2

The model, the optimiser and the files are those of a run with that config, its weights random and its images
generated; steps and saves alternate, and each figure is the median over them. A save has written, flushed to the disk
and hashed everything that is trained, with its moments, and has put the folder in place (see ``CheckpointStore``).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _timing import write_report

IMAGES = 16  # rendered for training; the time of a step does not depend on their number


def main() -> None:
    """Take turns at steps and saves, print the figures, write JSON when asked."""
    arguments = _parse()
    from ase_dist.training.process import runtime

    world = runtime.start(timeout=600, threads=arguments.threads)
    with tempfile.TemporaryDirectory() as own:
        from ase_dist.collectives import gather_objects

        folder = Path(str(gather_objects(str(arguments.folder or own))[0]))  # the first rank's
        figures = measure(arguments, world, folder)
    if world.is_first:
        _print(figures, arguments)
        write_report(arguments.json, arguments, figures=figures)
    runtime.stop()


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default="pascal_ase_16_3_1_4")
    p.add_argument("--batch-size", type=int, default=1, help="images per rank and step: few, so that a step is cheap")
    p.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3))
    p.add_argument("--ep", type=int, default=1, help="expert-parallel size")
    p.add_argument("--saves", type=int, default=5)
    p.add_argument("--steps-per-save", type=int, default=2)
    p.add_argument("--threads", type=int, help="per rank; default: the physical cores shared among the ranks")
    p.add_argument("--folder", type=Path, help="where to save, on the disk to measure; default: a temporary folder")
    p.add_argument("--json", type=Path, help="write the figures here too")
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# The run


def measure(arguments: argparse.Namespace, world: Any, folder: Path) -> dict[str, Any]:
    """The figures of steps and saves in ``folder`` (collective)."""
    from ase_dist.read_config import load_settings
    from ase_dist.training.ds_config import resolve
    from ase_dist.training.loop.components import build
    from ase_dist.training.state.checkpoint import CheckpointStore
    from ase_dist.training.state.run_state import RunState

    settings = load_settings(arguments.config, [
        "data.name=scenes", f"data.scenes.train_images={IMAGES}", "data.scenes.val_images=1", f"data.root={folder}",
        "data.workers=0", "data.cache_in_memory=true", f"train.batch_size={arguments.batch_size}",
        "model.pretrained=none", f"model.moe.ep_size={arguments.ep}", f"output={folder / 'run'}",
        "monitor.tensorboard=false",
    ])  # fmt: skip
    config = resolve(settings, {"zero_optimization": {"stage": arguments.zero}}, world=world.size,
                     native_bf16=world.native_bf16)  # fmt: skip
    parts = build(config, world, beat=lambda doing: None)
    store = CheckpointStore(folder / "run" / "checkpoints", keep=2)
    state = RunState(
        parts.settings, world, store, zero_stage=arguments.zero, frozen=parts.frozen, balancer=parts.balancer
    )
    step_seconds, save_seconds = [], []
    _one_step(parts, state)  # allocates moments and whatever is done once
    for _ in range(arguments.saves):
        step_seconds += [_timed(lambda: _one_step(parts, state)) for _ in range(arguments.steps_per_save)]
        save_seconds.append(_timed(lambda: state.save(parts.engine, parts.train_loader)))
    size = sum(path.stat().st_size for path in (store.folder / f"step_{state.step}").iterdir())
    parts.close()
    step, save = statistics.median(step_seconds), statistics.median(save_seconds)
    return {
        "config": arguments.config, "ranks": world.size, "device": str(world.device), "zero": arguments.zero,
        "ep": arguments.ep, "batch_size": arguments.batch_size, "image_size": parts.settings.data.size.written,
        "trained_parameters": parts.parameters.as_dict()["all"]["trained"], "bytes": size, "step_seconds": step,
        "save_seconds": save, "steps_per_save": save / step, "slowest_save_seconds": max(save_seconds),
    }  # fmt: skip


def _one_step(parts: Any, state: Any) -> None:
    from ase_dist.training.loop.trainer import mean_label_counts, training_loss

    batch = next(parts.train_loader).to(parts.world.device)
    counts = mean_label_counts([batch], parts.tasks, parts.world)
    _, total = training_loss(parts.engine(batch.images), batch, parts.tasks, counts, parts.balancer)
    parts.engine.backward(total)
    parts.engine.step()
    state.advance(images=len(batch.images) * parts.world.size)


def _timed(work: Callable[[], None]) -> float:
    """Seconds until all ranks are through, work on the device included."""
    from deepspeed.accelerator import get_accelerator

    from ase_dist.collectives import barrier

    get_accelerator().synchronize()
    barrier()
    began = time.perf_counter()
    work()
    get_accelerator().synchronize()
    barrier()
    return time.perf_counter() - began


def _print(figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    megabytes = figures["bytes"] / 1e6
    print(
        f"{figures['config']} at {figures['image_size']} px, {figures['batch_size']} images a rank, "
        f"{figures['ranks']} ranks on {figures['device']}, ZeRO {figures['zero']}, ep {figures['ep']}"
    )
    print(f"trained        {figures['trained_parameters']:,} parameters, checkpoint {megabytes:.0f} MB")
    print(f"step           {figures['step_seconds']:.2f} s, median of {arguments.saves * arguments.steps_per_save}")
    print(f"save           {figures['save_seconds']:.2f} s, median of {arguments.saves} "
          f"(slowest {figures['slowest_save_seconds']:.2f} s)")  # fmt: skip
    print(f"save / step    {figures['steps_per_save']:.2f}")


if __name__ == "__main__":
    main()
