"""DeepSpeed's engine: the model with its optimiser and schedule, through ``deepspeed.initialize``."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ase_dist import collectives
from ase_dist.config import TrainSettings
from ase_dist.errors import UserError, first_problem
from ase_dist.models import MultiTaskModel, parameter_groups
from ase_dist.moe import deepspeed_compat
from ase_dist.training.ds_config import ResolvedConfig
from ase_dist.training.loop.schedule import schedule_lambda
from ase_dist.training.process.runtime import World
from ase_dist.training.record.traffic import layer_tokens

LOGGER = logging.getLogger("ase_dist")
FUSED = ("cuda", "xpu")  # devices with torch's fused Adam that training runs on
NO_DECAY_DIMS = 1  # biases, norms and scales are not decayed


def initialize(model: MultiTaskModel, config: ResolvedConfig, world: World, *, total_steps: int) -> Any:
    """DeepSpeed's engine for ``model``: its optimiser with groups for experts, learning rate scheduled per step."""
    import deepspeed

    train = config.settings.train
    if train.compile:
        compile_blocks(model, config)
    optimizer = build_optimizer(model, config, world)
    scheduler = LambdaLR(optimizer, schedule_lambda(train, total=total_steps))
    deepspeed_compat.import_muon()
    try:
        engine, *_ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=world.device.index or 0),  # else it takes the GPU of index LOCAL_RANK
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_compat.without_monitors(config.deepspeed),  # see ``training.record.monitor``
            dist_init_required=False,
        )
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(f"DeepSpeed JSON: {problem.where}: got {problem.got!r}; {problem.why}") from None
    collectives.limit_all_groups(config.settings.guard.timeout)  # DeepSpeed's new ones too
    decide_dispatch(model, images=train.batch_size)
    deepspeed_compat.undo_trial_step(engine)
    deepspeed_compat.use_true_gradient_norm(engine)
    deepspeed_compat.skip_non_finite_zero_steps(engine)
    deepspeed_compat.wait_once_in_a_step(engine)
    return engine


def compile_blocks(model: nn.Module, config: ResolvedConfig) -> None:
    """torch.compile each block in place (a model without blocks as a whole), when it first runs; names stay.

    Raises UserError with ZeRO 3 or activation checkpointing, which change the blocks while they run.
    """
    mode = config.settings.model.checkpoint_activations
    if config.zero_stage == 3 or mode != "none":
        what = "ZeRO 3" if config.zero_stage == 3 else f"model.checkpoint_activations={mode}"
        raise UserError(f"train.compile: got true with {what}, which changes the blocks as they run; use one of them")
    for module in getattr(model, "blocks", ()) or [model]:
        module.compile()


def build_optimizer(model: nn.Module, config: ResolvedConfig, world: World) -> torch.optim.Optimizer:
    """``train.optimizer`` over the trained parameters.

    Where it is offloaded to the host, Adam is DeepSpeed's CPU version; DeepSpeed has no SGD, so torch's steps there.
    """
    train = config.settings.train
    groups = trained_groups(model, train)
    if config.zero_stage < 3 and any(deepspeed_compat.is_routed(p) for p in model.parameters()):
        groups = deepspeed_compat.optimizer_groups(groups)
    offload = isinstance(config.deepspeed["zero_optimization"].get("offload_optimizer"), dict)
    if train.optimizer == "sgd":
        if offload and world.rank == 0:
            LOGGER.info("train.optimizer=sgd is offloaded with torch's SGD on the host; DeepSpeed has none of its own")
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.sgd.momentum, nesterov=train.sgd.nesterov)
    is_decoupled = train.optimizer == "adamw"  # from the gradient, to which Adam adds the weight decay
    options: dict[str, Any] = {"lr": train.lr, "betas": train.adam.betas, "eps": train.adam.eps}
    if offload and world.device.type != "cpu" and deepspeed_compat.has_compiler():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=is_decoupled, **options)
    fused = world.device.type in FUSED and not offload  # one kernel for all parameters; the step counter is on the GPU
    kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    return kind(groups, fused=fused or None, **options)


def trained_groups(model: nn.Module, train: TrainSettings) -> list[dict[str, Any]]:
    """Trained parameters with and without weight decay; separate groups for a backbone with its own learning rate."""
    kinds = parameter_groups(model)
    trained = [(kinds[name], p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise UserError("model: nothing is trained; enable experts, LoRA or model.tune=full")
    shared_rate = train.backbone_lr_factor == 1
    groups = []
    for prefix, factor, part in (
        ("", 1.0, [p for kind, p in trained if shared_rate or kind != "backbone"]),
        ("backbone_", train.backbone_lr_factor, [p for kind, p in trained if not shared_rate and kind == "backbone"]),
    ):
        decay = [p for p in part if p.dim() > NO_DECAY_DIMS]
        rest = [p for p in part if p.dim() <= NO_DECAY_DIMS]
        lr = train.lr * factor
        groups.append({"name": f"{prefix}decay", "params": decay, "weight_decay": train.weight_decay, "lr": lr})
        groups.append({"name": f"{prefix}no_decay", "params": rest, "weight_decay": 0.0, "lr": lr})
    return [group for group in groups if group["params"]]


def decide_dispatch(model: MultiTaskModel, *, images: int) -> None:
    """Decide ``model.moe.dispatch=auto`` for micro-steps of ``images`` on each rank, before the first forward pass."""
    from ase_dist.moe import ASEMoE

    for layer, tokens in layer_tokens(model):
        if isinstance(layer, ASEMoE):
            layer.decide_dispatch(images * layer.num_tasks * tokens)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on an accelerator, or the peak resident size of this process on a CPU."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().max_memory_allocated(device.index))
