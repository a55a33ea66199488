"""Kept copies of weights are made again when the weights are others, in memory at the same address too."""

import numpy as np
import pytest
import torch
from torch import nn

from ase_dist.ops.joined import JoinedWeight
from ase_dist.ops.origin import Origin
from ase_dist.ops.stacked import Linear, WeightStack

pytestmark = pytest.mark.single_gpu


def test_memory_that_was_freed_and_given_out_again_is_other_memory():
    memory = np.zeros(4, dtype=np.float32)
    first, origin = torch.from_numpy(memory), Origin()
    assert not origin.is_same([first])
    origin.take([first], "fact")
    assert origin.is_same([first.view(4)], "fact") and not origin.is_same([first], "another")
    assert not origin.is_same([first.view(2, 2)], "fact")
    address = first.data_ptr()
    del first
    second = torch.from_numpy(memory)
    assert second.data_ptr() == address and not origin.is_same([second], "fact")
    origin.take([second])
    second.add_(1)
    assert not origin.is_same([second])


def put(linear, memory, value):
    """A new weight, filled with ``value``, at the address of the one before."""
    linear.weight = None
    memory[:] = value
    linear.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)


def test_joined_and_stacked_weights_are_made_again():
    gate, up = (nn.Linear(3, 4, bias=False).requires_grad_(False) for _ in range(2))
    memory, joined, stack = np.zeros((4, 3), dtype=np.float32), JoinedWeight(), WeightStack()
    low_rank = (torch.ones(1, 4, 2), None)
    for value in (1.0, 2.0):
        put(gate, memory, value)
        assert torch.equal(joined.join([gate, up])[0], torch.cat([gate.weight, up.weight]))
        filled, _ = stack.fill(Linear(gate.weight, None), low_rank, beside=True)
        assert torch.equal(filled.weight_OD[:, :3], gate.weight)
