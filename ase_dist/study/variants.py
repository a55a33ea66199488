"""The studies by name, and the variants that each compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ase_dist.baselines import baselines
from ase_dist.errors import UserError, did_you_mean
from ase_dist.image_size import ImageSize
from ase_dist.registries import BALANCINGS, HEADS
from ase_dist.study.presets import Preset


@dataclass(frozen=True)
class Variant:
    """One line of a study's table: a baseline, with ``changes`` of settings by dotted key.

    ``tasks`` are all of the data set where None; ``x`` is the position on the study's axis, where that has numbers;
    variants of one ``group`` are joined by a line or have one colour. A run starts from the export of that of ``after``
    with the same seed, where there is one.
    """

    name: str
    label: str
    baseline: str
    changes: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    x: float | None = None
    group: str = ""
    after: Variant | None = None


@dataclass(frozen=True)
class Study:
    """A question of the paper: its title, its variants, their references, the axis of its plots.

    ``reference`` names one variant for each set of tasks, to which Delta_m of the others is relative. All are compared
    with their reference, and the two of each pair of ``contrasts`` with each other. ``heat_map`` is the variant whose
    expert activation is drawn.
    """

    title: str
    variants: Callable[[Preset], list[Variant]]
    reference: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...] = ()
    axis: str = ""
    heat_map: str | None = None


SWIN_T = tuple(name for name in baselines() if name.startswith("swin_t_"))
TABLE = tuple(name for name in baselines() if name != "ase_128_24_8_1" and name not in SWIN_T)
FINE_GRAINED = ("ase_16_3_1_4", "ase_32_6_2_2", "ase_64_12_4_1", "ase_128_24_8_1")
EVIDENCE = ("mtl_vit_lora", "lora_moe_16_4_0_4", "naive_16_3_1_4", *FINE_GRAINED[:3])
ADAPTIVE = (("ase_16_3_1_4", "naive_16_3_1_4"),)
TOP_K = (3, 4, 5, 6, 7)
ROUTER_SIZES = (16, 32, 64, 128, 256)
CONFLICT_MEASUREMENTS = 10  # over a run
BALANCING_WINDOWS = 20  # of dynamic weight averaging, over a run


def _of_baseline(name: str, **options: Any) -> Variant:
    return Variant(name, baselines()[name].label, name, **options)


def _naive_vs_ase(preset: Preset) -> list[Variant]:
    """LoRA-MoE, naive and ASE on two tasks and on all, with the gradient conflict on the shared expert measured."""
    every = max(1, preset.steps // CONFLICT_MEASUREMENTS)
    measured = {"eval.gradient_conflict_every": every}
    variants = []
    for tasks, suffix in ((preset.pair, f"{len(preset.pair)} tasks"), (None, "all tasks")):
        for baseline in ("lora_moe_16_4_0_4", "naive_16_3_1_4", "ase_16_3_1_4"):
            changes = {} if baseline.startswith("lora") else measured
            name = f"{baseline}_{'pair' if tasks else 'all'}"
            variants.append(
                Variant(name, f"{baselines()[baseline].label}, {suffix}", baseline, changes, tasks, group=suffix)
            )
    return variants


def _evidence(preset: Preset) -> list[Variant]:
    """No experts, routed experts, and shared ones of each kind and grain, with the gradient conflict on the shared."""
    measured = {"eval.gradient_conflict_every": max(1, preset.steps // CONFLICT_MEASUREMENTS)}
    return [
        _of_baseline(name, changes=measured if baselines()[name].model["moe"].get("num_shared") else {})
        for name in EVIDENCE
    ]


def _transition(preset: Preset) -> list[Variant]:
    """From one task to all: the first tenth of a run whose backbone was tuned to the first task of the pair before."""
    first = Variant("first_task", f"MTL-ViT on {preset.pair[0]} alone", "mtl_vit", tasks=preset.pair[:1])
    steps = max(1, preset.steps // 10)
    changes = {"train.max_steps": steps, "train.schedule": "constant", "eval.every": max(1, steps // 5)}
    return [
        _of_baseline(name, changes=changes, after=first)
        for name in ("lora_moe_16_4_0_4", "naive_16_3_1_4", "ase_16_3_1_4")
    ]


def _topk(preset: Preset) -> list[Variant]:
    """ASE with k routed experts and a shared one, against LoRA-MoE with the same number of active experts."""
    variants = []
    for k in TOP_K:
        base = {"model.moe.k": k + 1}
        variants.append(
            Variant(
                f"lora_moe_k{k}",
                f"LoRA-MoE 16/{k + 1}/0/4",
                "lora_moe_16_4_0_4",
                base,
                x=k,
                group="LoRA-MoE, k + 1 routed",
            )
        )
        variants.append(
            Variant(
                f"ase_k{k}",
                f"ASE 16/{k}/1/4",
                "ase_16_3_1_4",
                {"model.moe.k": k},
                x=k,
                group="ASE, k routed + 1 shared",
            )
        )
    return variants


def _fine_grained(preset: Preset) -> list[Variant]:
    fine = [_of_baseline(name, x=float(name.split("_")[1]), group="ASE") for name in FINE_GRAINED]
    return [_of_baseline("lora_moe_16_4_0_4", group="LoRA-MoE"), *fine]


def _router_cost(preset: Preset) -> list[Variant]:
    """N experts of rank 1, a sixteenth of them shared and three sixteenths active: only the router's share grows."""
    return [
        Variant(
            f"n{n}",
            f"ASE {n}/{3 * n // 16}/{n // 16}/1",
            "ase_16_3_1_4",
            {
                "model.moe.num_experts": n,
                "model.moe.k": 3 * n // 16,
                "model.moe.num_shared": n // 16,
                "model.moe.rank": 1,
            },
            x=n,
            group="rank 1",
        )
        for n in ROUTER_SIZES
    ]


def _shared_logit_floor(preset: Preset) -> list[Variant]:
    """The shared logits scaled up from 0 over a part of the run, against none scaled."""
    shares = (0.0, 0.1, 0.3, 0.6)
    return [
        Variant(
            f"warmup_{round(100 * share)}",
            f"shared logits held down for {share:.0%} of the run",
            "ase_16_3_1_4",
            {"model.moe.shared_logit_warmup": round(share * preset.steps)},
            x=100 * share,
            group="ASE 16/3/1/4",
        )
        for share in shares
    ]


def _balancing(preset: Preset) -> list[Variant]:
    """Every way to weigh the tasks' losses, on the same model."""
    window = max(1, preset.steps // BALANCING_WINDOWS)  # an epoch may be longer than the run
    changes = {"dwa": {"train.balancing.args": {"window": window}}}
    return [
        Variant(
            name,
            "fixed weights" if name == "fixed" else name.replace("_", "-"),
            "ase_16_3_1_4",
            {"train.balancing.method": name, **changes.get(name, {})},
            group="16/3/1/4",
        )
        for name in BALANCINGS
    ]


def _norm_ablation(preset: Preset) -> list[Variant]:
    labels = {
        "ase": "joint softmax over the active",
        "renormalised": "softmax over all, renormalised",
        "separate": "separate softmaxes",
        "naive": "shared gate 1",
    }
    return [
        Variant(gating, label, "ase_16_3_1_4", {"model.moe.gating": gating}, group="16/3/1/4")
        for gating, label in labels.items()
    ]


def _heads(preset: Preset) -> list[Variant]:
    """Every head on the same model."""
    return [Variant(name, name, "ase_16_3_1_4", {"model.head": name}, group="16/3/1/4") for name in HEADS]


def _resolution(preset: Preset) -> list[Variant]:
    return [
        Variant(
            f"{baseline}_{size}",
            f"{baselines()[baseline].label}, {size} px",
            baseline,
            {"data.size": size},
            x=ImageSize.read(size).height,
            group=baselines()[baseline].label,
        )
        for baseline in ("mtl_vit_lora", "ase_16_3_1_4")
        for size in preset.sizes
    ]


STUDIES: dict[str, Study] = {
    "table1": Study(
        "The paper's table",
        lambda preset: [_of_baseline(name) for name in TABLE],
        ("stl_resnet18",),
        heat_map="ase_16_3_1_4",
    ),
    "naive_vs_ase": Study(
        "Naive against adaptive shared experts",
        _naive_vs_ase,
        ("lora_moe_16_4_0_4_pair", "lora_moe_16_4_0_4_all"),
        contrasts=(("ase_16_3_1_4_pair", "naive_16_3_1_4_pair"), ("ase_16_3_1_4_all", "naive_16_3_1_4_all")),
        heat_map="ase_16_3_1_4_all",
    ),
    "evidence": Study(
        "Shared experts, naive and adaptive",
        _evidence,
        ("lora_moe_16_4_0_4",),
        contrasts=ADAPTIVE,
        heat_map="ase_16_3_1_4",
    ),
    "transition": Study(
        "From one task to all", _transition, ("lora_moe_16_4_0_4",), contrasts=ADAPTIVE, heat_map="ase_16_3_1_4"
    ),
    "topk": Study("Active experts", _topk, ("lora_moe_k3",), axis="routed experts active per token, k"),
    "fine_grained": Study(
        "Finer experts",
        _fine_grained,
        ("lora_moe_16_4_0_4",),
        axis="experts N, at constant N x rank up to 64",
        heat_map="ase_64_12_4_1",
    ),
    "router_cost": Study("The router's cost", _router_cost, ("n16",), axis="experts N"),
    "shared_logit_floor": Study(
        "Shared logits held near zero at the start",
        _shared_logit_floor,
        ("warmup_0",),
        axis="share of the run over which they grow from 0, %",
        heat_map="warmup_30",
    ),
    "mtlora": Study(
        "Swin-T: LoRA, a LoRA for each task, experts",
        lambda preset: [_of_baseline(name) for name in SWIN_T],
        ("swin_t_stl",),
        heat_map="swin_t_ase_16_3_1_4",
    ),
    "balancing": Study("How the tasks' losses are balanced", _balancing, ("fixed",)),
    "norm_ablation": Study("How gates are normalised", _norm_ablation, ("naive",)),
    "heads": Study("Heads on the last level and on several", _heads, ("pup",)),
    "resolution": Study("Image size", _resolution, ("mtl_vit_lora_{smallest}",), axis="image side, pixels"),
}


def find_study(name: str) -> Study:
    """The study of that name; UserError with the nearest one if there is none."""
    if name not in STUDIES:
        raise UserError(f"study: there is no {name!r}{did_you_mean(name, STUDIES)} (studies: {', '.join(STUDIES)})")
    return STUDIES[name]


def references(study: Study, preset: Preset, variants: Sequence[Variant]) -> dict[str, str]:
    """For each variant the name of its reference: the one with the same tasks."""
    names = [name.format(smallest=preset.sizes[0]) for name in study.reference]
    by_tasks = {variant.tasks: variant.name for variant in variants if variant.name in names}
    return {variant.name: by_tasks[variant.tasks] for variant in variants}
