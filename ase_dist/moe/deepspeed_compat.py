"""The one module that knows DeepSpeed's internals: groups, parameter tags, optimiser groups, start-up quirks.

Written for deepspeed 0.19.4 and newer, tried with 0.19.4 and 0.19.8.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ase_dist.collectives import all_reduce_sum
from ase_dist.errors import UserError


def import_deepspeed() -> ModuleType:
    """The package ``deepspeed`` without MLflow; its autotuner, unused here, would load that for a second."""
    if "mlflow" in sys.modules or "deepspeed" in sys.modules:
        return import_module("deepspeed")
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        return import_module("deepspeed")
    finally:
        del sys.modules["mlflow"]


def group_name(ep_size: int) -> str:
    """The key under which DeepSpeed keeps the groups of an expert-parallel size."""
    return f"ep_size_{ep_size}"


def tag_routed(parameters: Iterable[nn.Parameter], *, ep_size: int) -> None:
    """Mark parameters as sharded over expert-parallel ranks: reduced over the expert-data-parallel group only."""
    for parameter in parameters:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name(ep_size)  # type: ignore[attr-defined]


def is_routed(parameter: nn.Parameter) -> bool:
    """Whether ``tag_routed`` has marked this parameter."""
    return not getattr(parameter, "allreduce", True)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter in parts and gathers it for each use."""
    return hasattr(parameter, "ds_id")


def expert_parallel_group(ep_size: int, *, data_before_expert: bool = False) -> dist.ProcessGroup:
    """DeepSpeed's expert-parallel group that this rank belongs to, made on first demand (collective)."""
    from deepspeed.utils import groups

    if group_name(ep_size) not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
    return groups._get_expert_parallel_group(group_name(ep_size))


def expert_data_group(ep_size: int) -> dist.ProcessGroup:
    """DeepSpeed's group of the ranks with the same routed experts as this one, made with ``expert_parallel_group``."""
    from deepspeed.utils import groups

    return groups._get_expert_data_parallel_group(group_name(ep_size))


def optimizer_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split named parameter groups so that routed experts have groups of their own, as ZeRO wants them.

    Each incoming group needs its own ``name``: with equal names DeepSpeed would merge the experts' settings.
    """
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names), names
    split = split_params_into_different_moe_groups_for_optimizer([dict(group) for group in groups])
    return [group for group in split if group["params"]]


def require_expert_groups(routed: Iterable[nn.Parameter], *, ep_size: int) -> None:
    """To be called in ``set_deepspeed_parallelism``: does the optimiser of ``deepspeed.initialize`` suit experts?

    At ZeRO 1 and 2 and in bf16 it must have them in groups of their own: a UserError says how, in place of DeepSpeed's
    assertion later on. Elsewhere they only have to be if the stage is to be changed: a warning where ranks share them.
    """
    caller: Any = sys._getframe(2).f_locals.get("self")  # the engine, which does not pass itself (0.19.8)
    optimizer = getattr(caller, "client_optimizer", None)
    if caller is None or not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed makes its own, and the groups
        return
    ours = set(map(id, routed))
    mixed = any(id(p) in ours for group in optimizer.param_groups if not group.get("moe") for p in group["params"])
    if not mixed:
        return
    advice = (
        f"give {type(optimizer).__name__} the groups of ase_dist.moe.optimizer_groups([{{'name': 'all', 'params': "
        "[p for p in model.parameters() if p.requires_grad]}])"
    )
    stage = caller.zero_optimization_stage()
    if stage in (1, 2) or caller.bfloat16_enabled():
        raise UserError(
            f"optimizer: its groups hold routed experts and other parameters together, and at ZeRO {stage}"
            f"{' in bf16' if caller.bfloat16_enabled() else ''} experts need groups of their own; {advice}"
        )
    if ep_size > 1:
        warnings.warn(
            f"optimizer: its groups hold routed experts of {ep_size} ranks and other parameters together, which fails "
            f"at every ZeRO stage but {stage}; {advice}",
            stacklevel=2,
        )


def skip_cpu_communication_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory op (minutes, and used for inference only) on a CPU host.

    A private table, read once when the process group is made; where it has moved, the op is built as before.
    """
    import deepspeed.ops

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False


def import_muon() -> None:
    """Import DeepSpeed's Muon, as ZeRO does at every start, without the preparations for compiling it.

    They load the whole of torch's inductor, which takes 1.5 s, for an optimiser that this package does not offer. Where
    the names have moved, ZeRO imports it as before.
    """
    from deepspeed.runtime import compiler

    prepare = getattr(compiler, "compile", None)
    if prepare is None:
        return
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with suppress(ImportError):
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = prepare


def has_compiler() -> bool:
    """Whether DeepSpeed could build its C++ ops here."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++")) and shutil.which("ninja") is not None


# ---------------------------------------------------------------------------------------------------------------------
# Monitors

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")  # sections of the JSON


def without_monitors(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON without monitors; pydantic's ValidationError for a section that DeepSpeed would refuse."""
    from deepspeed.monitor.config import get_monitor_config

    get_monitor_config({name: config[name] for name in MONITORS if name in config})
    return {name: section for name, section in config.items() if name not in (*MONITORS, "mlflow")}


def open_monitor(name: str, section: Mapping[str, Any]) -> Any:
    """DeepSpeed's own monitor of a section, on rank 0: its ``write_events`` takes [(name, value, step)]."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config({name: dict(section)}))


# ---------------------------------------------------------------------------------------------------------------------
# Weights and moments in float32, at every ZeRO stage

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW


def moments(engine: Any) -> tuple[str, ...]:
    """The tensors that the engine's optimiser keeps of each trained parameter: SGD's momentum, or ``MOMENTS``."""
    return ("momentum_buffer",) if isinstance(_basic(engine), torch.optim.SGD) else MOMENTS


class Fragment(NamedTuple):
    """This rank's part of one trained parameter in float32.

    ``master`` is the tensor that the optimiser steps, and the key of its state: the parameter itself, a copy of it, or
    a flat partition of many. Seen flat, its ``numel`` values from ``start`` are the parameter's values from ``offset``.
    """

    master: Tensor
    start: int
    offset: int
    numel: int


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the parameter, also where ZeRO-3 has left only a part of it here."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_in_engine(parameter: Tensor) -> bool:
    """Whether a DeepSpeed optimiser at ZeRO 1 to 3 has the parameter, so that what is copied into it is lost."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_dp_group")


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it ``parameters`` that ZeRO 3 has divided are whole, to be read (collective over their ranks)."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        yield
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(divided, modifier_rank=None):
        yield


def read_master(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """The whole ``"weight"`` or moment (``moments``) of a trained parameter, float32, zeros before the first step.

    Collective over the ranks among which ZeRO has divided the parameter: for a routed expert those that replicate it.
    """
    if kind == "weight":
        from deepspeed.utils import safe_get_full_fp32_param

        weight: Tensor | None = safe_get_full_fp32_param(parameter)
        if weight is not None:  # ZeRO 1 to 3
            return weight
    # Of the moments DeepSpeed's safe_get_full_optimizer_state knows nothing before the first step, and nothing of
    # routed experts at any time (0.19.8: "exp_avg not found in optimizer state fragment").
    shape = full_shape(parameter)
    buffer = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
    fragment = _fragment(engine.optimizer, parameter)
    if fragment is not None:
        source = fragment.master if kind == "weight" else _basic(engine).state[fragment.master].get(kind)
        if source is not None:
            part = source.detach().view(-1)[fragment.start : fragment.start + fragment.numel]
            buffer[fragment.offset : fragment.offset + fragment.numel].copy_(part)
    group = _partition_group(parameter)
    if group is not None:
        dist.all_reduce(buffer, group=group)
    return buffer.view(shape)


def write_master(engine: Any, parameter: Tensor, kind: str, value: Tensor, *, step: int) -> None:
    """Set the whole weight (the model's own too) or moment to ``value``; ``step`` is Adam's count of steps.

    DeepSpeed's safe_set_full_fp32_param and safe_set_full_optimizer_state do not suffice (0.19.8): moments cannot be
    set before the first step, and ZeRO 3 fails where the ranks do not divide a parameter's size.
    """
    fragment = _fragment(engine.optimizer, parameter)
    with torch.no_grad():
        if kind == "weight":
            _set_model_weight(parameter, value)
        if fragment is None:
            return
        target = fragment.master.data
        if kind != "weight":
            basic = _basic(engine)
            state = basic.state[fragment.master]
            if isinstance(basic, (torch.optim.Adam, torch.optim.AdamW)):  # a fused one counts where the parameter is
                where = fragment.master.device if basic.defaults["fused"] else None
                state["step"] = torch.full((), float(step), device=where)
            elif not isinstance(basic, torch.optim.SGD):  # which does not count; DeepSpeed's Adam counts in an int
                state["step"] = step
            if kind not in state:
                state[kind] = torch.zeros_like(fragment.master.data)
            target = state[kind]
        part = value.reshape(-1)[fragment.offset : fragment.offset + fragment.numel]
        target.view(-1)[fragment.start : fragment.start + fragment.numel].copy_(part)


def undo_trial_step(engine: Any) -> None:
    """Take back what ZeRO 0 in bf16 does to make room for the moments: a step with gradients of zero.

    It decays the weights and counts as a step (``FP16_UnfusedOptimizer.initialize_optimizer_states``), so that a
    resumed run, and one at any other stage, would not be the same.
    """
    groups = zip(
        getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=True
    )
    if engine.zero_optimization():
        return
    with torch.no_grad():
        for models, masters in groups:
            for model, master in zip(models, masters, strict=True):
                master.copy_(model)
                _basic(engine).state.pop(master, None)


def skip_non_finite_zero_steps(engine: Any) -> None:
    """Let ZeRO 1 to 3 of DeepSpeed before 0.19.8 skip a step whose gradients are not finite, in every precision.

    Those versions look for such gradients in fp16 only (stages 1 and 2 in bf16 too); newer ones see them by the norm.
    """
    zero = engine.optimizer
    if not engine.zero_optimization() or hasattr(sys.modules[type(zero).__module__], "is_invalid_grad_norm"):
        return
    if engine.zero_optimization_stage() < 3:
        zero.check_grad_overflow = True
        return
    update_scale = zero._overflow_check_and_loss_scale_update

    def check_first() -> bool:
        zero.check_overflow()
        return bool(update_scale())

    zero._overflow_check_and_loss_scale_update = check_first


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of the engine


def restore_counters(engine: Any, counters: Mapping[str, int], *, last_epoch: int) -> None:
    """Set the engine's counts and put its schedule, a LambdaLR, at ``last_epoch``."""
    for name in COUNTERS:
        setattr(engine, name, counters[name])
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = last_epoch
    rates = [base * factor(last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler._last_lr = rates
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def device_kind() -> str:
    """The kind of device that DeepSpeed runs on: "cpu", "cuda", ..."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name())


def device_random_state() -> Tensor:
    """The random state of this rank's accelerator; empty on a CPU, whose generator is torch's own."""
    from deepspeed.accelerator import get_accelerator

    return torch.empty(0, dtype=torch.uint8) if device_kind() == "cpu" else get_accelerator().get_rng_state().cpu()


def restore_device_random_state(state: Tensor) -> None:
    """Set what ``device_random_state`` gave on the same kind of device; nothing for an empty one."""
    from deepspeed.accelerator import get_accelerator

    if len(state):
        get_accelerator().set_rng_state(state)


def _basic(engine: Any) -> torch.optim.Optimizer:
    """The torch optimiser under DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _fragment(optimizer: Any, parameter: Tensor) -> Fragment | None:
    """Where this rank keeps its part of ``parameter``; None where it has none."""
    if is_partitioned(parameter):
        group, start, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = numel * dist.get_rank(optimizer.dp_process_group)
        real = max(0, min(numel, full_shape(parameter).numel() - offset))  # the last part is padded
        return Fragment(optimizer.fp32_partitioned_groups_flat[group], start, offset, real)
    if hasattr(parameter, "_dp_group"):  # ZeRO-1, ZeRO-2 and the sharded bf16 optimiser
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        partitions = getattr(optimizer, "single_partition_of_fp32_groups", None)
        partitions = optimizer.fp32_groups_flat_partition if partitions is None else partitions
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(partitions[mapping.param_group_index], here.start, there.start, here.numel)
    for models, masters in zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
    ):
        for model, master in zip(models, masters, strict=True):  # ZeRO-0 in bf16 or fp16
            if model is parameter:
                return Fragment(master, 0, 0, parameter.numel())
    return Fragment(parameter, 0, 0, parameter.numel())  # ZeRO-0 in fp32


def _partition_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks among which ZeRO has divided the parameter; None where each has all of it."""
    if is_partitioned(parameter):
        return parameter.ds_process_group  # type: ignore[attr-defined]
    return getattr(parameter, "_dp_group", None)


def _set_model_weight(parameter: Tensor, value: Tensor) -> None:
    if not is_partitioned(parameter):
        parameter.copy_(value)
        return
    group, own = _partition_group(parameter), parameter.ds_tensor  # type: ignore[attr-defined]
    padded = torch.zeros(own.numel() * dist.get_world_size(group), dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.reshape(-1)
    own.copy_(padded.chunk(dist.get_world_size(group))[dist.get_rank(group)])


# ---------------------------------------------------------------------------------------------------------------------
# One wait for the device in a step: the gradient norm, which decides whether the step is taken


def use_true_gradient_norm(engine: Any) -> None:
    """Let ZeRO 0 clip by the norm of all experts, and skip a step that is not finite on some rank; one wait a step.

    DeepSpeed's own norm there (0.19.8) is the mean of the ranks' norms in fp32, where NaN would go into every
    parameter, and in bf16 that of everything but the experts, after a wait for every trained tensor. The other stages
    compute the true one and skip. The engine reads ``overflow`` of its optimiser, counts such a step as skipped and
    leaves the schedule where it is. ``engine.get_global_grad_norm()`` gives the norm afterwards.
    """
    optimizer = engine.optimizer
    is_bf16 = engine.bfloat16_enabled()
    if engine.zero_optimization() or engine.fp16_enabled() or (is_bf16 and not hasattr(optimizer, "fp32_groups")):
        return
    step = _step_in_bf16 if is_bf16 else partial(_step_in_fp32, take_step=optimizer.step)
    engine.clip_fp32_gradients = lambda: None  # done in the step

    def decide_and_step(self: Any, closure: None = None) -> None:
        norm = global_gradient_norm(engine.module)
        bad = all_reduce_sum((~norm.isfinite()).float())
        self._global_grad_norm, ranks = torch.stack([norm, bad]).tolist()
        engine._global_grad_norm = self._global_grad_norm
        self.overflow = ranks > 0
        if self.overflow:
            self.zero_grad(set_to_none=True)
            return
        factor = None
        if engine.gradient_clipping() > 0:
            factor = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
        step(self, factor)

    decide_and_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # it calls the step that is, so no warning
    optimizer.step = MethodType(decide_and_step, optimizer)


def _step_in_fp32(optimizer: torch.optim.Optimizer, factor: Tensor | None, *, take_step: Callable[[], Any]) -> None:
    if factor is not None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
    take_step()


def _step_in_bf16(wrapper: Any, factor: Tensor | None) -> None:
    """The step of DeepSpeed's ``FP16_UnfusedOptimizer``, whose float32 copies torch's optimiser updates."""
    masters = [master for group in wrapper.fp32_groups for master in group]
    models = [model for group in wrapper.fp16_groups for model in group]
    for master, model in zip(masters, models, strict=True):
        master.grad = torch.zeros_like(master) if model.grad is None else model.grad.to(master.dtype)
    if factor is not None:
        torch._foreach_mul_([master.grad for master in masters], factor)
    wrapper.optimizer.step()
    for master in masters:
        master.grad = None
    torch._foreach_copy_([model.data for model in models], [master.data for master in masters])


def wait_once_in_a_step(engine: Any) -> None:
    """Let ZeRO 1 to 3 wait for the device once in a step, for the norm (deepspeed 0.19.8; others are left as they are).

    As shipped they copy a constant to the device for each group of parameters, judge the norm again for each group that
    they clip, and in bf16 look into every gradient first, though NaN and infinity show in the norm.
    """
    zero = engine.optimizer
    module = sys.modules[type(zero).__module__]
    if not engine.zero_optimization() or not hasattr(module, "is_invalid_grad_norm"):
        return
    if not isinstance(module.is_invalid_grad_norm, _JudgedOnce):
        module.is_invalid_grad_norm = _JudgedOnce(module.is_invalid_grad_norm)  # type: ignore[attr-defined]
    if engine.zero_optimization_stage() == 3:
        zero._get_norm_groups = partial(_norms_of_partitions, zero, zero._get_norm_groups)
        return
    module.mask_nan_or_inf_with_val_inplace = _mark_invalid_norm  # type: ignore[attr-defined]
    if not zero.cpu_offload:  # there the norms are the host's
        zero.check_overflow = lambda **_: None


class _JudgedOnce:
    """DeepSpeed's ``is_invalid_grad_norm``, which waits for the device, once for each norm."""

    def __init__(self, judge: Callable[[Any], bool]) -> None:
        self._judge, self._norm, self._is_invalid = judge, None, False

    def __call__(self, norm: Any) -> bool:
        if norm is not self._norm:
            self._norm, self._is_invalid = norm, self._judge(norm)
        return self._is_invalid


def _mark_invalid_norm(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """DeepSpeed's ``mask_nan_or_inf_with_val_inplace`` without a tensor from the host."""
    norm.masked_fill_(~norm.isfinite(), val)


def _norms_of_partitions(zero: Any, as_shipped: Callable[[], list[Any]]) -> list[Any]:
    """ZeRO-3's norm of each group of parameters, -1 where it is not finite, as ``get_grad_norm_direct`` gives it."""
    if zero.offload_optimizer:  # computed on the host
        return as_shipped()
    norms = []
    for number, parameters in enumerate(zero.fp16_groups):
        norms_2 = torch._foreach_norm(list(zero.averaged_gradients[number]), 2, dtype=torch.float32)
        total = torch.stack(norms_2).square().sum()
        dist.all_reduce(total, group=_partition_group(parameters[0]))
        norm = total.sqrt()
        _mark_invalid_norm(norm)
        norms.append(norm)
    return norms


def global_gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients, every expert counted once, equal on all ranks (collective where any is sharded)."""
    trained = [p for p in model.parameters() if p.grad is not None]
    dense = _sum_of_squares([p for p in trained if not is_routed(p)])
    for name in sorted({p.group_name for p in trained if is_routed(p)}):  # type: ignore[attr-defined]
        routed = _sum_of_squares([p for p in trained if is_routed(p) and p.group_name == name])  # type: ignore[attr-defined]
        group = expert_parallel_group(int(name.removeprefix(group_name(0)[:-1])))
        dist.all_reduce(routed, group=group)
        dense = dense + routed
    return dense.sqrt()


def _sum_of_squares(parameters: Sequence[nn.Parameter]) -> Tensor:
    if not parameters:
        return torch.zeros(())
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None], 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()
