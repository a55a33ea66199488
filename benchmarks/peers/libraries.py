"""Plain LoRA by peft, and the libraries that bring a layer of LoRA experts, or one that such experts fit into.

Each by its own classes. Where a library has no shared experts its k is our k + S, so that as many experts are active
per token. Dropout, which two of them insist on, is taken out, in their favour.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from peers.common import Case, LoRAFFN, Side, UnavailableError, fill, rows_of
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Peer:
    """A library: ``build`` its side; ``linear_wise`` where experts sit on the linears, as ours, and not round the FFN.

    ``most`` experts are as many as it manages in minutes; ``few_tokens`` where its memory is quadratic in tokens, or
    holds a copy of them per expert.
    """

    name: str
    build: Callable[[Case], Side]
    linear_wise: bool
    few_tokens: bool = False
    most: int = 128

    def side(self, case: Case) -> Side:
        """Raises ``UnavailableError`` with the reason."""
        if case.experts.count > self.most:
            raise UnavailableError(f"more than {self.most} experts would take it minutes a step")
        try:
            return self.build(case)
        except (ImportError, AttributeError, TypeError) as error:  # not there, or not with this torch
            raise UnavailableError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None


def join_group() -> None:
    """A world of one process, which some of them cannot do without."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def deepspeed_moe(case: Case) -> Side:
    """``deepspeed.moe.layer.MoE``, nothing dropped; an expert is the whole FFN with its pairs, k of them per token."""
    from deepspeed.moe.layer import MoE

    from ase_dist.moe import deepspeed_compat

    deepspeed_compat.skip_cpu_communication_build()
    join_group()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    layer = MoE(case.dim, LoRAFFN(case.base, case.experts.rank), num_experts=case.experts.count, ep_size=1,
                k=case.experts.active, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False)  # fmt: skip
    layer.set_deepspeed_parallelism()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y, loss, _ = layer(x)
        return y, loss

    return Side(layer, forward)


def fairscale_moe(case: Case) -> Side:
    """fairscale's ``MOELayer`` with its top-2 gate: two of the FFNs per token, tokens over capacity dropped."""
    from fairscale.nn.moe import MOELayer, Top2Gate

    join_group()
    count = case.experts.count
    experts = nn.ModuleList(LoRAFFN(case.base, case.experts.rank) for _ in range(count))
    layer = MOELayer(Top2Gate(case.dim, count), experts)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, -len(rows) % count)).unflatten(0, (count, -1))  # it wants multiples of N
        return layer(padded).flatten(0, 1)[: len(rows)].view_as(x), layer.l_aux

    return Side(layer, forward)


def mola(case: Case) -> Side:
    """MoE-PEFT's MoLA: experts and a router on each linear, as ours has experts; softmax, top-k, renormalised."""
    from moe_peft.adapters.mola import MolaConfig
    from moe_peft.adapters.mola.model import MolaSparseMoe
    from moe_peft.common import Linear
    from moe_peft.common.config import LLMBatchConfig, LLMModelInput

    config = MolaConfig(adapter_name="a", top_k_=case.experts.active, num_experts_=case.experts.count, lora_r_=4,
                        router_init_range_=5.0, lora_init_="original", lora_alpha_=case.experts.rank,
                        lora_dropout_=0.5, target_modules_={})  # fmt: skip
    config.lora_r_ = case.experts.rank
    trained = nn.ModuleList()
    linears = [_mola_linear(fc, config, Linear, MolaSparseMoe, trained) for fc in (case.base.fc1, case.base.fc2)]
    batch = LLMModelInput(batch_configs_=[LLMBatchConfig("a", 0, 1)])

    def forward(x: Tensor) -> tuple[Tensor, None]:
        h = case.base.act(linears[0](rows_of(x), batch))
        return linears[1](h, batch).view_as(x), None

    return Side(trained, forward)


def _mola_linear(fc: nn.Linear, config: Any, linear_class: Any, moe_class: Any, trained: nn.ModuleList) -> Any:
    linear = linear_class(fc, "cpu")
    for i in range(config.num_experts_):
        linear.init_lora_weight(config, (None, None), f"moe.a.experts.{i}")
    linear.moes_["a"] = _Router(moe_class, fc.in_features, config)
    for lora in linear.loras_.values():
        lora.dropout_ = nn.Identity()
        parts = nn.ModuleList([lora.lora_a_, lora.lora_b_])
        fill(parts)
        trained.append(parts)
    trained.append(linear.moes_["a"].moe.gate_)
    return linear


class _Router:
    """MoLA's block with its fields set after the plain base class's, which needs no ``nn.Module``."""

    def __init__(self, moe_class: Any, width: int, config: Any) -> None:
        self.moe = moe_class(width, torch.device("cpu"), config)

    def forward(self, **inputs: Any) -> Tensor:
        result: Tensor = self.moe.forward(**inputs)
        return result


def mixlora(case: Case) -> Side:
    """MixLoRA's block: fc1 once, then per expert its pairs, the activation and the frozen fc2 on its tokens."""
    from mixlora.config import MixLoraConfig
    from mixlora.lora_linear import LoraLinear
    from mixlora.model import MixLoraSparseMoe

    config = MixLoraConfig(lora_r_=case.experts.rank, lora_alpha_=case.experts.rank, lora_dropout_=0.5,
                           lora_init_="original", use_rslora_=False, use_dora_=False, dtype_=torch.float32,
                           num_experts_=case.experts.count, top_k_=case.experts.active, act_fn_=case.base.act,
                           jitter_noise_=0.0, model_type_="phi")  # fmt: skip
    block = MixLoraSparseMoe(case.base, config)
    gate = nn.Linear(case.dim, case.experts.count, bias=False)
    block.gate_ = gate.weight
    trained = nn.ModuleList([gate])
    for name in ("fc1", "fc2"):
        for i in range(case.experts.count):
            lora = LoraLinear(getattr(case.base, name), config)
            lora.dropout_ = nn.Identity()
            parts = nn.ModuleList([lora.lora_A, lora.lora_B])
            fill(parts)
            trained.append(parts)
            block.experts_[f"experts.{i}.{name}"] = lora
    return Side(trained, lambda x: (block(rows_of(x)).view_as(x), None))


def plain_lora(case: Case) -> Side:
    """One LoRA pair per linear by peft, of the rank of the model's other LoRA, 4."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=4, lora_alpha=4)
    fc1, fc2 = (Linear(fc, "default", config=config, r=4, lora_alpha=4) for fc in (case.base.fc1, case.base.fc2))
    module = nn.ModuleList([fc1, fc2])
    for name, parameter in module.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.02)
    return Side(module, lambda x: (fc2(case.base.act(fc1(x))), None))


def xlora(case: Case) -> Side:
    """peft's X-LoRA layers: every expert on every token, scaled by a softmax over all of them, top-k kept."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from peft.tuners.xlora.config import XLoraConfig
    from peft.tuners.xlora.layer import XLoraLinearLayer

    names = [str(i) for i in range(case.experts.count)]
    rank = case.experts.rank
    config = XLoraConfig(hidden_size=case.dim, adapters={}, top_k_lora=case.experts.active)
    router = nn.Linear(case.dim, case.experts.count, bias=False)
    trained, layers = nn.ModuleList([router]), []
    for number, fc in enumerate((case.base.fc1, case.base.fc2)):
        lora_config = LoraConfig(r=rank, lora_alpha=rank)
        target = Linear(fc, names[0], config=lora_config, r=rank, lora_alpha=rank)
        for name in names[1:]:
            target.update_layer(name, r=rank, lora_alpha=rank, config=lora_config)
        target.set_adapter(names)
        trained.extend([target.lora_A, target.lora_B])
        model = SimpleNamespace(disabled=False)
        layers.append(XLoraLinearLayer(model, target, target.forward, number, config))
    fill(trained)

    def forward(x: Tensor) -> tuple[Tensor, None]:
        rows = rows_of(x)
        scalings = router(rows).softmax(dim=-1).unsqueeze(2).expand(-1, -1, 2, -1)
        h = case.base.act(layers[0].forward(rows, scalings=scalings))
        return layers[1].forward(h, scalings=scalings).view_as(x), None

    return Side(trained, forward)


def tutel_moe(case: Case) -> Side:
    """Tutel's ``moe_layer`` is installed from its repository alone; where that was done its name is importable."""
    from tutel import moe

    join_group()
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": case.experts.active, "capacity_factor": 0.0},
        experts={"type": "custom", "module": _TutelExperts, "num_experts_per_device": case.experts.count, "case": case},
        model_dim=case.dim,
    )

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = layer(rows_of(x))
        return y.view_as(x), layer.l_aux

    return Side(layer, forward)


class _TutelExperts(nn.Module):
    """Its experts see [N, capacity, D] at once."""

    def __init__(self, *, case: Case, num_experts_per_device: int, **_: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList(LoRAFFN(case.base, case.experts.rank) for _ in range(num_experts_per_device))

    def forward(self, x: Tensor, _context: Any) -> Tensor:
        """Row n by expert n."""
        return torch.stack([expert(rows) for expert, rows in zip(self.experts, x, strict=True)])


PLAIN_LORA = Peer("plain LoRA, peft", plain_lora, linear_wise=True)
PEERS = (
    Peer("MoE-PEFT MoLA", mola, linear_wise=True),
    Peer("MixLoRA", mixlora, linear_wise=False),
    Peer("peft X-LoRA", xlora, linear_wise=True, few_tokens=True, most=32),
    Peer("DeepSpeed MoE", deepspeed_moe, linear_wise=False, few_tokens=True, most=32),
    Peer("fairscale MOELayer", fairscale_moe, linear_wise=False, few_tokens=True, most=64),
    Peer("Tutel", tutel_moe, linear_wise=False, few_tokens=True, most=32),
)
