"""The time of a training step by part: every operator is timed and laid to the module that it works for.

Forward operators belong to the innermost named module that is running, backward ones to the module in whose forward
pass their graph node was made. In the FFN the activation and the products with its weights are the base's; all
else is the experts', or that of the LoRA which a model has instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ase_dist.moe import MoEFFN
from ase_dist.moe.router import TaskRouter

PARTS = ("data", "patch embedding", "attention", "base FFN", "experts", "routers", "heads", "loss", "optimiser",
         "communication", "other")  # fmt: skip
ACTIVATIONS = ("gelu", "gelu_backward")
NAMED = {"patch_embed": "patch embedding", "attn": "attention", "norm1": "attention", "norm2": "base FFN"}


class PartTracker:
    """Which part of a model is at work: ``current`` of the operator that runs, forward or backward.

    1. hooks name the part while a module's forward runs, and then lay claim to the graph nodes that it made
    2. an operator belongs to the part that is running, or in a backward pass to the owner of the node; in one that a
       node starts itself (an activation's derivative), to the owner of that node

    ``part_of`` gives a module's part from its name and itself, or None for one that belongs to what surrounds it.
    ``outside`` is the part of what runs in no module, ``unowned`` of a backward operator whose node none made.
    """

    def __init__(self, model: nn.Module, part_of: Callable[[str, nn.Module], str | None]) -> None:
        self.outside, self.unowned = "other", "other"
        self._stack: list[str] = []
        self._owner: dict[Any, str] = {}
        self._hooks: list[Any] = []
        self._pass, self._last = -1, ""
        for name, module in model.named_modules():
            part = part_of(name, module)
            if part is not None:
                self._hooks.append(module.register_forward_pre_hook(lambda m, i, part=part: self._stack.append(part)))
                self._hooks.append(module.register_forward_hook(lambda m, i, out: self._leave(out)))

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def current(self) -> str:
        """The part that the operator works for which is dispatched at this moment."""
        node, backward_pass = torch._C._current_autograd_node(), torch._C._current_graph_task_id()
        if backward_pass == -1:
            self._pass = -1
        elif self._pass == -1:
            self._pass = backward_pass
        if node is None:
            return self._stack[-1] if self._stack else self.outside
        if backward_pass == self._pass:
            self._last = self._owner.get(node, self.unowned)
        return self._last

    def _leave(self, output: Any) -> None:
        part = self._stack.pop()
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        while pending:
            node = pending.pop()
            if node is not None and node not in self._owner:
                self._owner[node] = part
                pending.extend(following for following, _ in node.next_functions)


class Parts(TorchDispatchMode):
    """``seconds`` by part of what runs inside; ``enter`` names the part of what has no module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._widths: tuple[int, ...] | None = None
        for name, module in model.named_modules():
            if _part_of(name, module) == "FFN":
                self._widths = _widths(module)
        self._tracker = PartTracker(model, _part_of)
        self._since = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._tracker.close()

    def enter(self, part: str) -> None:
        """What is outside of all modules from now on; "data" is timed by the clock, for it is not operators alone."""
        now = time.perf_counter()
        if self._tracker.outside == "data":
            self.seconds["data"] += now - self._since
        self._since = now
        self._tracker.outside = part
        self._tracker.unowned = "loss" if part == "backward" else "other"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - began
        part = self._tracker.current()
        if part == "FFN":
            part = "base FFN" if self._is_base(func, args) else "experts"
        if part != "data":
            self.seconds[part if part in self.seconds else "other"] += seconds
        return out

    def _is_base(self, func: Any, args: Any) -> bool:
        """The activation, or a product with the base's weight."""
        if func._overloadpacket.__name__ in ACTIVATIONS:
            return True
        return any(tuple(sorted(tensor.shape[-2:])) == self._widths for tensor in args if isinstance(tensor, Tensor))


def _part_of(name: str, module: nn.Module) -> str | None:
    last = name.rsplit(".", 1)[-1]
    if isinstance(module, TaskRouter):
        return "routers"
    if last == "mlp":
        return "FFN"
    if last in NAMED:
        return NAMED[last]
    return "heads" if name == "norm" or (name.startswith("heads.") and name.count(".") == 1) else None


def _widths(ffn: nn.Module) -> tuple[int, ...]:
    fc1 = (ffn.base if isinstance(ffn, MoEFFN) else ffn).fc1  # type: ignore[union-attr]
    return tuple(sorted(getattr(fc1, "base", fc1).weight.shape))
