"""Expert parallelism: each dispatch against plain data parallelism and against DeepSpeed's own MoE, in one run.

    python benchmarks/expert_parallel.py [--ranks 2] [--images 1] [--repeats 9] [--json out.json]

Starts its own gloo processes with one thread each. Every side has the same frozen FFNs, LoRA rank and tokens, the same
allocator settings, and takes its turn in every repetition; a time is the slowest rank's, a figure the median.

- data parallel: every rank has all experts; their gradients are all-reduced after backward, which is timed with it
- gather, all_to_all, auto: the routed experts are shared by all ranks, so that no gradient of theirs is left to reduce
- DeepSpeed MoE: deepspeed.moe.layer.MoE over the same ranks with N LoRA experts and top-k, nothing dropped. An expert
  there maps the FFN's input to its output, so each is the whole (shared, frozen) FFN with its own pairs on fc1 and fc2,
  and a token runs through k of them; it has no shared experts and one router. One of ours acts on k + S.

Gradients of routers and shared experts are reduced alike everywhere and left out. Bytes are those that a rank sends per
step, mean of the ranks: counted at the collectives, and for the all-reduce (a ring's) and DeepSpeed by their shapes.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _ranks import on_ranks
from _timing import write_report

SHAPES = {"vit_s": (384, 1536), "vit_b": (768, 3072)}
TOKENS, TASKS = 197, 5
FP32 = 4
SIDES = ("data parallel", "gather", "all_to_all", "auto", "DeepSpeed MoE")


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in ms per layer, bytes per rank, layer and step."""

    shape: str
    side: str
    dispatch: str
    forward_ms: float
    step_ms: float
    forward_ratio: float
    step_ratio: float
    bytes_sent: float


def main() -> None:
    """Run the ranks, print the table, write JSON when asked."""
    arguments = _parse()
    rows = [Row(**row) for row in on_ranks(arguments.ranks, _measure_all, arguments)]
    _print(rows, arguments)
    write_report(arguments.json, arguments, rows=[asdict(row) for row in rows])


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    p.add_argument("--images", type=int, default=1, help="per rank; each is 197 tokens for each of 5 tasks")
    p.add_argument("--layers", type=int, default=2, help="in a row, so that gather can fetch ahead; figures are of one")
    p.add_argument("--experts", type=int, default=16)
    p.add_argument("--k", type=int, default=3)
    p.add_argument("--shared", type=int, default=1)
    p.add_argument("--rank", type=int, default=4, help="of each LoRA expert")
    p.add_argument("--repeats", type=int, default=9, help="after one that is not counted")
    p.add_argument("--without-deepspeed", action="store_true", help="leave DeepSpeed's MoE out")
    p.add_argument("--json", type=Path, help="write the figures here too")
    arguments = p.parse_args()
    if arguments.ranks < 2 or arguments.experts % arguments.ranks:
        p.error(f"--ranks: got {arguments.ranks}, wanted 2 or more that divide the {arguments.experts} experts, "
                "as DeepSpeed demands")  # fmt: skip
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# A rank


def _measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every shape's rows (collective)."""
    from ase_dist.moe import deepspeed_compat

    deepspeed_compat.skip_cpu_communication_build()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return [asdict(row) for shape in arguments.shapes for row in measure_shape(shape, arguments)]


def measure_shape(shape: str, arguments: argparse.Namespace, *, device: str | Any = "cpu") -> list[Row]:
    """All sides of one shape on this rank's ``device``, in turn in every repetition (collective)."""
    import torch

    dim, hidden = SHAPES[shape]
    names = SIDES[:-1] if arguments.without_deepspeed else SIDES
    sides = {name: _build(name, dim, hidden, arguments) for name in names}
    for side in sides.values():
        for layer in side.layers:
            layer.to(device)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(TASKS, arguments.images * TOKENS, dim, generator=generator).to(device)
    direction = torch.randn(x.shape, generator=generator).to(device)
    for side in sides.values():
        side.step(x, direction)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            times[name].append(_slowest(side.step(x, direction)))
    medians = {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in times.items()}
    base = medians["data parallel"]
    rows = []
    for name, side in sides.items():
        forward, step = medians[name]
        scale = 1e3 / arguments.layers
        rows.append(Row(shape, name, side.dispatch, forward * scale, step * scale, forward / base[0], step / base[1],
                        _mean(side.bytes_sent) / arguments.layers))  # fmt: skip
    return rows


def _slowest(seconds: tuple[float, float]) -> tuple[float, float]:
    from ase_dist import collectives

    every: list[Any] = collectives.gather_objects(seconds)
    return max(pair[0] for pair in every), max(pair[1] for pair in every)


def _mean(value: float) -> float:
    from ase_dist import collectives

    every: list[Any] = collectives.gather_objects(value)
    return float(statistics.mean(every))


# ---------------------------------------------------------------------------------------------------------------------
# The sides


class Side:
    """Layers in a row, what must happen after their backward pass, and the bytes of the last step."""

    def __init__(self, layers: list[Any], *, dispatch: str, reduce: Callable[[], float],
                 uncounted: Callable[[], float]) -> None:  # fmt: skip
        self.layers, self.dispatch, self.bytes_sent = layers, dispatch, 0.0
        self._reduce, self._uncounted = reduce, uncounted

    def step(self, x: Any, direction: Any) -> tuple[float, float]:
        """Seconds of the forward pass, and of forward, backward and the experts' reduction (collective)."""
        import torch
        from deepspeed.accelerator import get_accelerator

        from ase_dist import collectives

        synchronize = get_accelerator().synchronize
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)
        x = x.clone().requires_grad_()
        synchronize()
        collectives.barrier()
        with collectives.count_traffic() as traffic:
            began = time.perf_counter()
            y, losses = x, []
            for layer in self.layers:
                y, loss, *_ = layer(y)
                losses.append(loss)
            synchronize()
            forward = time.perf_counter() - began
            total = sum(losses)
            torch.autograd.backward([y, total], [direction, torch.ones_like(total)])
            reduced = self._reduce()
            synchronize()
            seconds = time.perf_counter() - began
        self.bytes_sent = traffic.total + reduced + self._uncounted()
        return forward, seconds


def _build(name: str, dim: int, hidden: int, arguments: argparse.Namespace) -> Side:
    bases = [_frozen_ffn(dim, hidden, seed=i) for i in range(arguments.layers)]
    if name == "DeepSpeed MoE":
        return _deepspeed(bases, dim, arguments)
    return _ours(name, bases, arguments)


def _ours(name: str, bases: list[Any], arguments: argparse.Namespace) -> Side:
    """Layers as the engine sets them up, in a group of their own: a group's layers share one prefetcher."""
    import torch.distributed as dist

    from ase_dist.moe import MoEFFN
    from ase_dist.moe.sharding import Shard

    count = 1 if name == "data parallel" else arguments.ranks
    shard = Shard(arguments.experts - arguments.shared, index=dist.get_rank() % count, count=count)
    layers = [
        MoEFFN(base, num_experts=arguments.experts, k=arguments.k, num_shared=arguments.shared, rank=arguments.rank,
               num_tasks=TASKS, seed=i, shard=shard)
        for i, base in enumerate(bases)
    ]  # fmt: skip
    group = dist.new_group()
    tokens = TASKS * TOKENS * arguments.images
    dispatch = "local" if count == 1 else layers[0].layer_shape().cheaper(tokens) if name == "auto" else name
    for i, layer in enumerate(layers):
        layer.sync_statistics = True
        _fill(layer.routed.tensors(), shard, seed=i)
        if count > 1:
            layer.share_experts(group, dispatch)
    reduce = (lambda: _all_reduce_experts(layers)) if count == 1 else (lambda: 0.0)
    return Side(layers, dispatch=dispatch, reduce=reduce, uncounted=lambda: 0.0)


def _fill(tensors: dict[str, Any], shard: Any, *, seed: int) -> None:
    """Random pairs, the same experts on every topology: LoRA's B starts at zero, with which no gate has a gradient."""
    import torch

    with torch.no_grad():
        for number, tensor in enumerate(tensors.values()):
            for slot, expert in enumerate(shard.ids):
                generator = torch.Generator().manual_seed(seed * 10000 + number * 1000 + expert)
                tensor[slot].normal_(std=0.02, generator=generator)


def _all_reduce_experts(layers: list[Any]) -> float:
    """Average the experts' gradients over the ranks in one flat buffer; the bytes that a ring sends."""
    import torch

    from ase_dist import collectives

    parameters = [p for layer in layers for p in layer.routed.parameters()]
    total = collectives.all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters])) / collectives.world_size()
    parts = total.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    size = collectives.world_size()
    return 2 * (size - 1) / size * total.numel() * FP32


def _deepspeed(bases: list[Any], dim: int, arguments: argparse.Namespace) -> Side:
    """DeepSpeed's layers; their bytes are 4 all-to-alls of [N, capacity, D], the capacity read at the gate."""
    from deepspeed.moe.layer import MoE

    layers, capacities = [], {}
    for i, base in enumerate(bases):
        layer = MoE(dim, _lora_ffn(base, arguments.rank, seed=i), num_experts=arguments.experts,
                    ep_size=arguments.ranks, k=arguments.k, drop_tokens=False, use_rts=False,
                    top2_2nd_expert_sampling=False)  # fmt: skip
        layer.set_deepspeed_parallelism()

        def note(gate: Any, given: Any, result: Any, i: int = i) -> None:
            capacities[i] = int(result[1])

        layer.deepspeed_moe.gate.register_forward_hook(note)
        layers.append(layer)
    away = (arguments.ranks - 1) / arguments.ranks * arguments.experts * dim * FP32
    return Side(layers, dispatch="padded all_to_all", reduce=lambda: 0.0,
                uncounted=lambda: 4 * away * sum(capacities.values()))  # fmt: skip


def _frozen_ffn(dim: int, hidden: int, *, seed: int) -> Any:
    """A ViT's FFN with the same weights on all ranks and sides."""
    import torch
    from timm.layers import Mlp

    base = Mlp(dim, hidden).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in base.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return base


def _lora_ffn(base: Any, rank: int, *, seed: int) -> Any:
    """``base`` with LoRA pairs on both linears, as DeepSpeed's expert; copies of it share the base."""
    import torch
    from torch import nn

    from ase_dist.ops.lowrank import lowrank_linear

    class LoRAFFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.ParameterList(
                torch.empty(shape).normal_(std=0.02, generator=generator)
                for linear in (base.fc1, base.fc2)
                for shape in ((rank, linear.in_features), (linear.out_features, rank))
            )

        def forward(self, x: Any) -> Any:
            a1, b1, a2, b2 = self.pairs
            h = base.act(lowrank_linear(x, base.fc1.weight, base.fc1.bias, a1, b1))
            return lowrank_linear(h, base.fc2.weight, base.fc2.bias, a2, b2)

    generator = torch.Generator().manual_seed(seed)
    return LoRAFFN()


# ---------------------------------------------------------------------------------------------------------------------


def _print(rows: list[Row], arguments: argparse.Namespace) -> None:
    from ase_dist.tables import Table

    tokens = TASKS * TOKENS * arguments.images
    title = (f"per layer, {arguments.ranks} ranks, {tokens} tokens each, N/k/S/r {arguments.experts}/{arguments.k}/"
             f"{arguments.shared}/{arguments.rank}, float32, median of {arguments.repeats}")  # fmt: skip
    columns = ("shape", "side", "dispatch", "forward ms", "fwd+bwd ms", "forward ratio", "fwd+bwd ratio", "MB sent")
    cells = [(r.shape, r.side, r.dispatch, r.forward_ms, r.step_ms, r.forward_ratio, r.step_ratio, r.bytes_sent / 1e6)
             for r in rows]  # fmt: skip
    print(Table(columns, cells, title=title).to_text())


if __name__ == "__main__":
    main()
