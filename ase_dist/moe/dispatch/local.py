"""Expert parallel size 1: every expert is on this rank, nothing travels."""

from __future__ import annotations

from torch import Tensor

from ase_dist.moe.dispatch.base import FeedForward, Routed, full_ffn, joined, lora_ffn
from ase_dist.moe.experts import FFNExperts, LoRAExperts
from ase_dist.ops.lowrank import Activation


class LocalDispatch:
    """Computes with this rank's banks as they are."""

    def lora(self, tokens: Routed, base: FeedForward, routed: LoRAExperts, shared: LoRAExperts | None) -> Tensor:
        """See ``Dispatch.lora``."""
        return lora_ffn(tokens, base, joined(routed.tensors(), shared), routed.places)

    def ffn(self, tokens: Routed, act: Activation, routed: FFNExperts, shared: FFNExperts | None) -> Tensor:
        """See ``Dispatch.ffn``."""
        return full_ffn(tokens, act, routed.tensors(), None if shared is None else shared.tensors())
