"""How many floating-point operations a model takes, counted while it runs on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm.layers
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ase_dist.config import Settings
from ase_dist.models.build import build_model
from ase_dist.models.multitask_resnet import MultiTaskModel


class Flops(NamedTuple):
    """FLOPs of one image with all its tasks: two per multiply-add of matrix products, convolutions and attention."""

    forward: float
    backward: float


def bare_model(settings: Settings) -> MultiTaskModel:
    """The model of ``settings`` on the meta device: shapes only, no weights are read.

    Raises UserError as ``build_model`` does.
    """
    model = settings.model.model_copy(update={"pretrained": "none", "checkpoint_activations": "none"})
    with torch.device("meta"):
        return build_model(
            settings.model_copy(update={"model": model}),
            settings.chosen_tasks(),
            expert_layer="plain",
        )


@contextmanager
def on_fake_tensors(
    settings: Settings, *, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[MultiTaskModel, Tensor]]:
    """The model of ``settings`` and one image [1, 3, H, W] as fake tensors: code inside computes shapes only."""
    model = bare_model(settings)
    with FakeTensorMode():
        for module in model.modules():  # fake CPU tensors instead of meta ones, for which autocast does not work
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=dtype)
                setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        yield model, torch.empty(1, 3, *settings.data.size, dtype=dtype)


def count_flops(settings: Settings) -> Flops:
    """Count one image through the model of ``settings``, forward and backward (without activation checkpointing).

    LoRA experts compute in the form that costs a CPU less (``ase_dist.moe.forms``); of feed-forward experts only the
    active k are counted. The formulas are torch's, which leave out norms, activations, biases and gates.
    """
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)  # for models built from here on: the counter does not see fused attention
    try:
        with on_fake_tensors(settings) as (model, image):
            with FlopCounter() as forward:
                output = model(image)
                total = torch.stack([p.sum() for p in output.predictions.values()]).sum() + output.aux_loss
            with FlopCounter() as backward:
                total.backward()
    finally:
        timm.layers.set_fused_attn(bool(fused))
    return Flops(forward.total, backward.total)


def _grouped_mm_flops(a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> float:
    """Each of M rows meets one matrix: [M, K] times n stacked [K, O], or [O, M] times [M, K] group by group."""
    rows = a_shape[0] if len(b_shape) == 3 else a_shape[1]
    return 2.0 * rows * b_shape[-1] * (a_shape[1] if len(b_shape) == 3 else a_shape[0])


def _onednn_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * x.numel() * weight.shape[0]


def _bmm_flops(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> float:
    """[b, M, K] times [b, K, N]; torch 2.11's own takes an ``out_dtype`` for the shape of its output."""
    return 2.0 * a_shape.numel() * b_shape[-1]


_FORMULAS = {  # for which torch (2.14) has none, or did not have a right one
    torch.ops.aten.bmm: shape_wrapper(_bmm_flops),
    "mkldnn::_linear_pointwise": _onednn_flops,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._grouped_mm: shape_wrapper(_grouped_mm_flops),
}


def operator_flops(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> float:
    """FLOPs of one operator that was dispatched; 0 for one without a formula.

    An operator of an extension declares its own by ``torch.utils.flop_counter.register_flop_formula``.
    """
    packet = func._overloadpacket
    formula = _FORMULAS.get(packet) or _FORMULAS.get(func._schema.name) or flop_registry.get(packet)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


class FlopCounter(TorchDispatchMode):
    """Adds up torch's formulas; its own ``FlopCounterMode`` (2.14) fails where a backward pass calls autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += operator_flops(func, args, kwargs or {}, out)
        return out
