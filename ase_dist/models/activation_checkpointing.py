"""Activation checkpointing of the blocks by fairscale's ``checkpoint_wrapper``: recompute, or keep on the host."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ase_dist.errors import UserError, did_you_mean

MODES = ("none", "recompute", "offload")


def checkpoint_block(block: nn.Module, mode: str) -> nn.Module:
    """The same module, which in training keeps its input alone and runs again in the backward pass.

    ``offload`` moves the kept input to the CPU meanwhile. Values and gradients are those of ``none``; random numbers
    (drop path) are drawn again from the same state. Counts may be integers: they come out without a gradient. Call it
    last, when it is settled what is trained; a deep copy of the module would still run the original.
    """
    if mode not in MODES:
        raise UserError(
            f"model.checkpoint_activations: got {mode!r}, wanted one of {list(MODES)}{did_you_mean(mode, MODES)}"
        )
    if mode == "none":
        return block
    from fairscale.nn import checkpoint_wrapper

    # raised for the first block of a frozen stem, and wrong: fairscale sees to the gradients with a dummy input
    warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning, r"fairscale\.")
    # fairscale 0.4.13 asks the *copies* on the CPU whether the input needs a gradient, and they say no: where the
    # block has no trained parameter either, offloading would cut the gradient of everything before it
    trained = any(parameter.requires_grad for parameter in block.parameters())
    wrapped: nn.Module = checkpoint_wrapper(block, offload_to_cpu=mode == "offload" and trained)
    return wrapped


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Let all blocks keep their activations while it is open: fairscale's backward pass refuses torch.autograd.grad."""
    from fairscale.nn.checkpoint.checkpoint_activations import disable_checkpointing

    with disable_checkpointing():
        yield
