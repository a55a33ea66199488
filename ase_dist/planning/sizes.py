"""What a plan needs to know about a model, from shapes alone: no weight is read or allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ase_dist.config import Settings
from ase_dist.models import parameter_groups
from ase_dist.moe import MoEFFN
from ase_dist.moe.dispatch import LayerShape
from ase_dist.moe.experts import LoRAExperts
from ase_dist.moe.sharding import Shard
from ase_dist.planning.activations import measure_activations
from ase_dist.planning.flops import bare_model, count_flops
from ase_dist.training.loop.engine import trained_groups
from ase_dist.training.record.traffic import layer_tokens, tokens_per_image

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class ModelSizes:
    """What a plan needs to know about a model that is not sharded.

    ``frozen`` and ``dense`` (trained, without the routed experts) count elements; ``layers`` are the MoE layers at
    expert-parallel size 1 in the run's type; ``width`` is the bytes of a weight; tokens are those of all tasks in the
    first block. FLOPs
    and ``activations`` (bytes kept for the backward pass) are per image. ``forwards`` is how often a micro-step runs
    the blocks forward: 2 with activation checkpointing. ``num_experts`` is N with the shared ones, ``exchanges`` how
    often a token that travels goes to its experts and back in a forward pass (each adapted linear), and
    ``optimizer_groups`` the optimiser's groups without routed experts.
    """

    frozen: int
    dense: int
    layers: tuple[LayerShape, ...]
    width: int
    tokens_per_image: int
    forward_flops: float
    backward_flops: float
    activations: int = 0
    forwards: int = 1
    tasks: int = 0
    num_experts: int = 0
    exchanges: int = 0
    optimizer_groups: int = 2

    def sharded(self, ep_size: int) -> tuple[LayerShape, ...]:
        """The MoE layers with their routed experts in ``ep_size`` shards."""
        return tuple(
            replace(layer, ranks=ep_size, slots=Shard(layer.routed, count=ep_size).slots) for layer in self.layers
        )


def measure(settings: Settings) -> ModelSizes:
    """The sizes of the model of ``settings``, built on the meta device; bf16 where ``train.bf16`` is not false.

    Raises UserError as ``build_model`` does.
    """
    model = bare_model(settings)
    width = BF16 if settings.train.bf16 else FP32
    groups = parameter_groups(model)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    experts = [module for module in model.modules() if isinstance(module, MoEFFN)]
    tokens = tokens_per_image(model)
    layers = [
        replace(layer.layer_shape(), element_bytes=width, share=count / tokens)
        for layer, count in layer_tokens(model)
        if layer.shard.routed
    ]
    optimised = trained_groups(model, settings.train)
    dense = {id(p) for name, p in model.named_parameters() if groups[name] != "routed"}
    flops = count_flops(settings)
    return ModelSizes(
        frozen=sum(p.numel() for p in model.parameters()) - sum(trained.values()),
        dense=sum(count for name, count in trained.items() if groups[name] != "routed"),
        layers=tuple(layers),
        width=width,
        tokens_per_image=len(model.task_names) * tokens,
        forward_flops=flops.forward,
        backward_flops=flops.backward,
        activations=measure_activations(settings, width=width).kept(settings.model.checkpoint_activations),
        forwards=1 if settings.model.checkpoint_activations == "none" else 2,
        tasks=len(model.task_names),
        num_experts=experts[0].num_experts if experts else 0,
        exchanges=_exchanges(experts[0]) if experts else 0,
        optimizer_groups=sum(any(id(p) in dense for p in group["params"]) for group in optimised),
    )


def _exchanges(layer: MoEFFN) -> int:
    return len(layer.routed.linears) if isinstance(layer.routed, LoRAExperts) else 1
