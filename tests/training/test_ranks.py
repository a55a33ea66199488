"""Devices by name, and a process that no launcher started."""

import pytest
import torch
import torch.distributed as dist

from ase_dist.training.ranks import find_device, join

pytestmark = pytest.mark.single_gpu


def test_alone_there_is_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join(device="cpu") as world:
        assert (world.rank, world.size, world.local_size, world.device) == (0, 1, 1, torch.device("cpu"))
        assert world.is_first and not dist.is_initialized()


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
