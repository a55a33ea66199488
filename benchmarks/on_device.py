"""The layer and the training step measured on the device that is here, beside what ``roofline.py`` counts for it.

    python benchmarks/on_device.py FOLDER [--quick]
    torchrun --nproc_per_node 2 benchmarks/on_device.py FOLDER --only experts [--quick]

A part of ``on_gpu.sh``, which says what runs before. Writes ``measured.json`` and ``on_gpu.md`` into FOLDER, the second
with the counted figures in columns of their own, and takes over what is in FOLDER: ``experts.json`` (of the second
command: gather and all-to-all against data parallelism over all ranks) and ``tests_*.txt``, the ends of test runs.

Every side takes its turn in every repetition after two that are not counted; a time is the median, with the device
synchronised before and after. Peak memory is that of one step beyond what was held before. "checkpoint stall" is the
time that a save takes, by ``checkpoint.py``. Compiled sides, which take longest, come last and tell how many graph
breaks there were. The files are written after every case: a run that is ended early has what it measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint
import expert_parallel
import roofline
import torch
from _kernels import ACCELERATORS, Accelerator, Kernel, total
from _timing import MB, peak_bytes, write_report
from deepspeed.accelerator import get_accelerator
from peers.common import Case, Experts, Side, frozen_ffn
from peers.plain import PlainLoRA, apply_experts, by_loop, by_sorted_products, frozen, ours
from roofline import FLOOR, LOOP, LORA, OURS, SORTED, TASKS
from torch import Tensor

from ase_dist.files import write_atomic
from ase_dist.models import build_model
from ase_dist.tables import Table
from ase_dist.tasks import select_tasks
from ase_dist.training.loop import losses
from ase_dist.training.process import runtime

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Measure, and on the first rank write what was measured."""
    arguments = _parse()
    world = runtime.start(timeout=300, threads=None)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.only == "experts":
        rows = measure_experts(world.device, arguments)
        if world.is_first:
            write_atomic(arguments.folder / "experts.json", json.dumps({"ranks": world.size, "rows": rows}) + "\n")
        runtime.stop()
        return
    accelerator = named_accelerator(world.device)
    experts = arguments.folder / "experts.json"
    report: dict[str, Any] = {
        "device": device_name(world.device),
        "counted_for": accelerator.name,
        "layer": [],
        "step": [],
        "checkpoint": [],
        "experts": json.loads(experts.read_text()) if experts.is_file() else None,
        "tests": {
            path.stem.removeprefix("tests_"): last_line(path) for path in sorted(arguments.folder.glob("tests_*.txt"))
        },
    }
    given = (world.device, accelerator, arguments)
    for name, what, cases in (
        ("step", "step", measure_steps(*given)),
        ("layer", "layer", measure_layers(*given)),
        ("checkpoint", "checkpoint", measure_checkpoint(world, arguments)),
        ("step, compiled", "step", measure_steps(*given, compile_sides=True)),
        ("layer, compiled", "layer", measure_layers(*given, compile_sides=True)),
    ):
        began = time.perf_counter()
        for rows in cases:
            report[what] += rows
            write_report(arguments.folder / "measured.json", arguments, **report)
            write_atomic(arguments.folder / "on_gpu.md", as_markdown(report, quick=arguments.quick))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    print(as_markdown(report, quick=arguments.quick))
    runtime.stop()


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="where the results go")
    p.add_argument("--only", choices=("experts",), help="expert parallelism alone, over all ranks of the launcher")
    p.add_argument(
        "--quick", action="store_true", help="tiny shapes: shows that everything runs, says nothing of speed"
    )
    p.add_argument("--repeats", type=int, default=10)
    arguments = p.parse_args()
    if arguments.quick:
        arguments.repeats = 1
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# The device


def device_name(device: torch.device) -> str:
    """The card's name, or the kind of device."""
    name = getattr(getattr(torch, device.type), "get_device_name", None)
    return str(name(device)) if name is not None else device.type


def named_accelerator(device: torch.device) -> Accelerator:
    """What the counted figures are priced for: the card of that name where its peaks are known, else an H100."""
    words = set(device_name(device).upper().replace("-", " ").split())
    matches = {
        key: words & set(accelerator.name.upper().replace("-", " ").split()[1:])
        for key, accelerator in ACCELERATORS.items()
    }
    best = max(matches, key=lambda key: len(matches[key]))
    return ACCELERATORS[best if matches[best] else "h100_sxm"]


def timed(sides: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each side."""
    synchronize = get_accelerator().synchronize
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):
        for name, side in sides.items():
            synchronize()
            began = time.perf_counter()
            side()
            synchronize()
            if repeat > 1 or repeats == 1:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def peak_megabytes(step: Callable[[], object], device: torch.device, *, quick: bool) -> float | None:
    """The most that ``step`` holds beyond what was held before; not on a quick run of a CPU, where asking is slow."""
    if device.type == "cpu":
        return None if quick else peak_bytes(step) / MB
    accelerator = get_accelerator()
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    before = accelerator.memory_allocated()
    step()
    accelerator.synchronize()
    return float(accelerator.max_memory_allocated() - before) / MB


def compiled(function: Callable[..., Any], *, quick: bool) -> Callable[..., Any]:
    """``function`` compiled; on quick runs traced only, which takes no compiler's time."""
    return torch.compile(function, backend="aot_eager" if quick else "inductor")  # type: ignore[no-any-return]


def graph_breaks() -> int:
    """How many there were since the last question."""
    from torch._dynamo.utils import counters

    count = sum(counters["graph_break"].values())
    counters.clear()
    return count


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def measure_layers(
    device: torch.device, accelerator: Accelerator, arguments: argparse.Namespace, *, compile_sides: bool = False
) -> Iterator[list[dict]]:
    """Forward + backward of every side, case by case; of ours and the floor compiled instead where that is wanted."""
    shapes = {"vit_s": (384, 1536)} if arguments.quick else roofline.SHAPES
    images, tokens = (1, 6) if arguments.quick else (8, roofline.TOKENS)
    experts = ("16/3/1/4",) if arguments.quick else ("16/3/1/4", "64/12/4/1", "256/4/0/16")
    for (shape, (width, hidden)), text, (name, dtype) in itertools.product(shapes.items(), experts, DTYPES.items()):
        roofline.SHAPES[shape] = (width, hidden)
        sides = _layer_sides(width, hidden, text, dtype, device)
        x = torch.randn(TASKS, images * tokens, width, device=device, dtype=dtype)
        if compile_sides:
            torch.compiler.reset()  # other sizes than those before are no reason to compile for all sizes
            counted: dict[str, list[Kernel]] = {}
            shown = {
                f"{side}, compiled": Side(sides[side].module, compiled(sides[side].forward, quick=arguments.quick))
                for side in (FLOOR, OURS)
            }
        else:
            given = Namespace(dtype=name, images=images, tokens=tokens, attention="fused")
            counted = {side.side: side.kernels for side in roofline.count_layer(shape, text, given)}
            shown = sides
        steps = {side: built.step(x) for side, built in {FLOOR: sides[FLOOR], **shown}.items()}
        facts = {"shape": shape, "experts": text, "dtype": name}
        yield [facts | row for row in _rows(steps, FLOOR, shown, counted, accelerator, device, name, arguments)]


def _layer_sides(width: int, hidden: int, text: str, dtype: torch.dtype, device: torch.device) -> dict[str, Side]:
    case = Case(frozen_ffn(width, hidden, dtype).to(device), Experts.parse(text))
    lora = PlainLoRA(case.base, rank=4)
    sides = {FLOOR: frozen(case), LORA: Side(lora, lambda x: (lora(x), None)), OURS: ours(case), SORTED: ours(case)}
    apply_experts(sides[SORTED].module, by_sorted_products)
    if case.experts.count <= 64:  # a loop over more takes longer than all else
        sides[LOOP] = ours(case)
        apply_experts(sides[LOOP].module, by_loop)
    return sides


def _rows(
    steps: dict[str, Callable[[], None]],
    base: str,
    shown: Iterable[str],
    counted: dict[str, list[Kernel]],
    accelerator: Accelerator,
    device: torch.device,
    dtype: str,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """What was measured of the ``shown`` of ``steps`` and, where it was counted, what was counted."""
    graph_breaks()
    seconds = timed(steps, repeats=arguments.repeats)
    breaks, rows = graph_breaks(), []
    for side in shown:
        row: dict[str, Any] = {"side": side, "ms": 1e3 * seconds[side], "ratio": seconds[side] / seconds[base]}
        if side in counted:
            sustained = accelerator.sustained(compute=0.81, memory=0.9)
            cost = total(counted[side], sustained, tf32=dtype == "bfloat16")
            row |= {"counted_ms": 1e3 * cost.seconds, "counted_kernels": cost.kernels}
        row["peak_mb"] = peak_megabytes(steps[side], device, quick=arguments.quick)
        rows.append(row | ({"graph_breaks": breaks} if side == f"{OURS}, compiled" else {}))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The step


def measure_steps(
    device: torch.device, accelerator: Accelerator, arguments: argparse.Namespace, *, compile_sides: bool = False
) -> Iterator[list[dict]]:
    """The five-task step of ours, of plain LoRA and of neither, by type; of ours compiled instead where wanted."""
    quick = arguments.quick
    given = Namespace(images=1 if quick else 8, size=64 if quick else 224, depth=1 if quick else None,
                      head="linear" if quick else "pup",
                      attention="fused", dtype="")  # fmt: skip
    shape = "tiny" if quick else "vit_b"
    for name, dtype in list(DTYPES.items())[1 if quick else 0 :]:  # a CPU takes seconds for a step in bf16
        given.dtype = name
        settings_of = {
            side: found for side, (found, adapt) in roofline.step_sides(shape, given).items() if adapt is None
        }
        if compile_sides:
            torch.compiler.reset()  # other sizes than those before are no reason to compile for all sizes
            counted: dict[str, list[Kernel]] = {}
            compile_blocks = partial(compiled, quick=quick)
            shown = {
                f"{OURS}, compiled": _step_side(settings_of[OURS], device, dtype, given, compile_blocks=compile_blocks)
            }
            steps = {LORA: _step_side(settings_of[LORA], device, dtype, given), **shown}
        else:
            counted = {side.side: side.kernels for side in roofline.count_step(shape, given)}
            steps = shown = {side: _step_side(found, device, dtype, given) for side, found in settings_of.items()}
        facts = {"shape": shape, "experts": "16/3/1/4", "dtype": name}
        yield [facts | row for row in _rows(steps, LORA, shown, counted, accelerator, device, name, arguments)]


def _step_side(
    settings: Any,
    device: torch.device,
    dtype: torch.dtype,
    given: Namespace,
    *,
    compile_blocks: Callable[[Any], Any] | None = None,
) -> Callable[[], None]:
    tasks = select_tasks("scenes")
    model = build_model(settings, tasks, expert_layer="plain").to(device, dtype)
    if compile_blocks is not None:
        for block in model.blocks:
            block.forward = compile_blocks(block.forward)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images = torch.randn(given.images, 3, given.size, given.size, device=device)
    labels = {task.name: _label(task, given).to(device) for task in tasks}

    def step() -> None:
        counts = losses.label_counts(labels, tasks)
        output = model(images)
        by_task = losses.task_losses(output.predictions, labels, tasks, counts)
        (losses.weighted_sum(by_task, tasks, {}) + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _label(task: Any, given: Namespace) -> Tensor:
    shape = (given.images, given.size, given.size)
    if task.kind in {"normals", "depth"}:
        return torch.rand(given.images, task.channels, given.size, given.size)
    return torch.randint(0, 2, shape, dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Expert parallelism, checkpoints


def measure_experts(device: torch.device, arguments: argparse.Namespace) -> list[dict]:
    """One layer's forward + backward by each dispatch over all ranks, against data parallelism (collective)."""
    ranks = torch.distributed.get_world_size()
    quick = arguments.quick
    given = Namespace(ranks=ranks, images=1, layers=2, experts=16, k=3, shared=1, rank=4, repeats=arguments.repeats,
                      without_deepspeed=True)  # fmt: skip
    shapes = {"tiny": (48, 96)} if quick else expert_parallel.SHAPES
    expert_parallel.SHAPES.update(shapes)
    return [vars(row) for shape in shapes for row in expert_parallel.measure_shape(shape, given, device=device)]


def measure_checkpoint(world: Any, arguments: argparse.Namespace) -> Iterator[list[dict]]:
    """``checkpoint.py``'s figures of this rank alone."""
    import tempfile

    given = Namespace(config="scenes" if arguments.quick else "pascal_ase_16_3_1_4", batch_size=1, zero=2, ep=1,
                      saves=1 if arguments.quick else 3, steps_per_save=1 if arguments.quick else 2)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        yield [checkpoint.measure(given, world, Path(folder))]


# ---------------------------------------------------------------------------------------------------------------------
# Output


def last_line(path: Path) -> str:
    """What a test run said in the end."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else "nothing"


def as_markdown(report: dict[str, Any], *, quick: bool) -> str:
    """Tables of everything, measured and counted in columns of their own."""
    where = f"{report['device']}, torch {torch.__version__}"
    warning = " A quick run at tiny size: its times say nothing." if quick else ""
    parts = [f"# Measured on {where}\n\nCounted columns are for {report['counted_for']}, never measured.{warning}\n"]
    columns = ("side", "type", "ms", "ratio", "peak MB", "graph breaks", "counted ms", "counted kernels")
    for what, base in (("layer", FLOOR), ("step", LORA)):
        groups = dict.fromkeys((row["shape"], row["experts"]) for row in report[what])
        for shape, experts in groups:
            rows = [row for row in report[what] if (row["shape"], row["experts"]) == (shape, experts)]
            keys = ("side", "dtype", "ms", "ratio", "peak_mb", "graph_breaks", "counted_ms", "counted_kernels")
            table = Table(columns, [[row.get(key) for key in keys] for row in rows])
            parts.append(f"## {what}, {shape}, {experts}, ratio over {base}\n\n{table.to_markdown()}")
    if report["experts"]:
        rows = [(r["shape"], r["side"], r["step_ms"], r["step_ratio"], r["bytes_sent"] / MB)
                for r in report["experts"]["rows"]]  # fmt: skip
        table = Table(("shape", "side", "ms", "ratio", "MB sent"), rows)
        parts.append(f"## experts over {report['experts']['ranks']} ranks, one layer\n\n{table.to_markdown()}")
    for figures in report["checkpoint"]:
        stall = f"{figures['save_seconds']:.3f} s, {figures['steps_per_save']:.2f} steps of {figures['config']}"
        parts.append(f"## checkpoint stall\n\na save of {figures['bytes'] / MB:.0f} MB takes {stall}\n")
    if report["tests"]:
        parts.append("## tests\n\n" + Table(("tests", "result"), list(report["tests"].items())).to_markdown())
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    main()
