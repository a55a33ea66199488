"""Devices by name, and a process that no launcher started."""

import os

import pytest
import torch
import torch.distributed as dist

from ase_dist.training.process.ranks import find_device, join
from tests.conftest import LAUNCHER
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu


def alone(rank, folder):
    for name in LAUNCHER:
        os.environ.pop(name, None)
    with join(device="cpu") as world:
        return [world.rank, world.size, world.local_size, str(world.device), world.is_first, dist.is_initialized()]


def test_alone_there_is_no_group(tmp_path):
    assert start_world(alone, tmp_path)().results == [[0, 1, 1, "cpu", True, False]]


def test_a_ranks_own_gpu_is_taken_where_none_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device(None, local_rank=2) == find_device("cuda", local_rank=2) == torch.device("cuda", 2)
    assert find_device("cuda:3", local_rank=2) == torch.device("cuda", 3)
    assert find_device("cpu", local_rank=2) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cuda:x"])
def test_devices_that_are_not_here_are_told(name):
    with pytest.raises(ValueError, match=r"--device: "):
        find_device(name)
