"""Which device a rank takes, and the arithmetic and the time limits that are set once for a process."""

import os
import signal
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from unittest import mock

import deepspeed.accelerator
import pytest
import torch
import torch.distributed as dist

from ase_dist import collectives
from ase_dist.cores import share_of_cores
from ase_dist.errors import ExitCode, UserError
from ase_dist.models import build_model
from ase_dist.read_config import load_settings
from ase_dist.tasks import select_tasks
from ase_dist.training.ds_config import resolve
from ase_dist.training.loop import engine
from ase_dist.training.process import device as devices
from ase_dist.training.process import runtime, watchdog
from ase_dist.training.process.device import device_index, find_device, has_native_bf16, set_arithmetic
from ase_dist.training.process.runtime import World
from tests.training.conftest import start_world
from tests.training.tiny_runs import TINY

# ---------------------------------------------------------------------------------------------------------------------
# The device


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("visible", "local_rank", "local_size", "index"),
    [(8, 0, 8, 0), (8, 5, 8, 5), (4, 1, 2, 1), (1, 0, 1, 0), (1, 3, 4, 0), (1, 1, 1, 0)],
)
def test_a_rank_takes_its_own_device(visible, local_rank, local_size, index):
    assert device_index(visible=visible, local_rank=local_rank, local_size=local_size) == index


@pytest.mark.single_gpu
@pytest.mark.parametrize("local_rank", [0, 3])
def test_too_few_devices_are_told_on_every_rank_of_the_host(local_rank, one_sentence):
    with pytest.raises(UserError) as raised:
        device_index(visible=2, local_rank=local_rank, local_size=4)
    one_sentence(raised, "2 accelerators", "4 ranks", "--gpus-per-task=1")


@pytest.mark.single_gpu
def test_a_ranks_own_gpu_is_taken_where_none_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device(None, local_rank=2) == find_device("cuda", local_rank=2) == torch.device("cuda", 2)
    assert find_device("cuda:3", local_rank=2) == torch.device("cuda", 3)
    assert find_device("cpu", local_rank=2) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(None) == torch.device("cpu")


@pytest.mark.single_gpu
@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cuda:x"])
def test_devices_that_are_not_here_are_told(name):
    with pytest.raises(ValueError, match=r"--device: "):
        find_device(name)


class Accelerator:
    """DeepSpeed's for CUDA, as far as a start asks it; it records which device is set."""

    def __init__(self, *, count, native_bf16):
        self.count, self.set, self.native = count, [], native_bf16

    def device_name(self, index=None):
        return "cuda" if index is None else f"cuda:{index}"

    def device_count(self):
        return self.count

    def set_device(self, index):
        assert index < self.count, "invalid device ordinal"
        self.set.append(index)

    def communication_backend_name(self):
        return "gloo"

    def is_bf16_supported(self):
        return True  # DeepSpeed's answer takes emulation for support


@pytest.fixture
def cuda_start(monkeypatch):
    """Start as rank 3 of 4 on a host with GPUs, without a group; gives world, accelerator and the group's arguments."""

    def begin(*, count, native_bf16=True, **options):
        accelerator, joined = Accelerator(count=count, native_bf16=native_bf16), {}
        place = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**place, "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: accelerator)
        monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.update(options))
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
        monkeypatch.setattr(collectives, "limit_all_groups", lambda seconds: joined.update(limited=seconds))
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native_bf16
        )
        return runtime.start(timeout=5, threads=None, **options), accelerator, joined

    return begin


@pytest.fixture(autouse=True)
def same_arithmetic():
    threads, workspace = torch.get_num_threads(), os.environ.pop(devices.WORKSPACE[0], None)
    yield
    set_arithmetic(tf32=False, deterministic=False)
    torch.set_num_threads(threads)
    os.environ.pop(devices.WORKSPACE[0], None)
    if workspace is not None:
        os.environ[devices.WORKSPACE[0]] = workspace


@pytest.mark.single_gpu
@pytest.mark.parametrize(("count", "index"), [(4, 3), (1, 0)])
def test_a_start_sets_the_device_binds_the_group_to_it_and_limits_the_threads(cuda_start, count, index):
    torch.set_num_threads(7)
    world, accelerator, joined = cuda_start(count=count)
    assert world.device == joined["device_id"] == torch.device("cuda", index) and accelerator.set == [index]
    assert torch.get_num_threads() == share_of_cores(4)
    assert joined["timeout"] == timedelta(seconds=5) and joined["limited"] == 5


@pytest.mark.single_gpu
def test_a_start_with_too_few_devices_is_refused_before_the_group(cuda_start):
    with pytest.raises(UserError, match="3 accelerators are visible to 4 ranks"):
        cuda_start(count=3)


@pytest.mark.single_gpu
@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_native_where_it_is_not_emulated(cuda_start, native):
    assert cuda_start(count=4, native_bf16=native)[0].native_bf16 is native


@pytest.mark.single_gpu
def test_a_cpu_has_no_native_bf16_and_other_accelerators_say_so_themselves():
    for name, supported, expected in (("cpu", True, False), ("xpu", True, True), ("npu", False, False)):
        accelerator = SimpleNamespace(device_name=lambda name=name: name, is_bf16_supported=lambda s=supported: s)
        assert has_native_bf16(accelerator) is expected


@pytest.mark.single_gpu
def test_two_ranks_on_one_gpu_are_told_in_a_sentence(monkeypatch, one_sentence):
    def refuse(*_, **__):
        raise RuntimeError("NCCL error ... ncclInvalidUsage\nDuplicate GPU detected : rank 1 and rank 0 both on 50")

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(UserError) as raised:
        runtime._join_group("nccl", device=torch.device("cuda", 0), timeout=1)
    one_sentence(raised, "rank 1", "more ranks than GPUs")


class InitializedError(Exception):
    """In place of an engine."""


@pytest.mark.single_gpu
def test_deepspeed_is_told_the_device_and_takes_it(monkeypatch):
    """By itself it would take the GPU of index LOCAL_RANK, which is not there."""
    given, accelerator = {}, Accelerator(count=1, native_bf16=True)

    def initialize(**options):
        given.update(options)
        raise InitializedError

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    settings = load_settings(None, TINY)
    model = build_model(settings, select_tasks("scenes"), expert_layer="plain")
    world = World(3, 4, 3, 4, torch.device("cuda", 0), native_bf16=True)
    with pytest.raises(InitializedError):
        engine.initialize(model, resolve(settings, {}, world=4, native_bf16=True), world, total_steps=1)
    assert given["optimizer"].defaults["fused"] is True
    monkeypatch.setattr(deepspeed.runtime.engine, "get_accelerator", lambda: accelerator)
    fake = SimpleNamespace(get_world_size=lambda: 4, get_rank=lambda: 3)
    monkeypatch.setattr(deepspeed.runtime.engine, "dist", fake)
    made = SimpleNamespace(local_rank=3)
    deepspeed.DeepSpeedEngine._set_distributed_vars(made, given["args"])
    assert accelerator.set == [0] and made.device == torch.device("cuda", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.single_gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_products_and_convolutions_have_one_setting(cuda_start, tf32):
    cuda_start(count=4, tf32=tf32)
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32


@pytest.mark.single_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms_are_asked_for(cuda_start, deterministic):
    cuda_start(count=4, deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled() is torch.backends.cudnn.deterministic is deterministic
    assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8") is deterministic


@pytest.mark.single_gpu
def test_a_step_repeats_bit_for_bit_on_this_device(device):
    """What deterministic algorithms promise of the operations in question: sums with atomics otherwise."""
    set_arithmetic(tf32=False, deterministic=True)
    images, label = torch.randn(2, 5, 14, 14, device=device), torch.randint(5, (2, 56, 56), device=device)
    found = []
    for _ in range(3):
        x = images.clone().requires_grad_()
        large = torch.nn.functional.interpolate(x, size=(56, 56), mode="bilinear")
        torch.nn.functional.cross_entropy(large, label, reduction="none").sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ---------------------------------------------------------------------------------------------------------------------
# Time limits


def waits_for_nobody(rank, folder):
    """The group that another library has made without a limit; rank 1 does not come to its collective."""
    group = dist.new_group([0, 1])
    collectives.limit_all_groups(1.0)
    dist.barrier()
    if rank == 1:
        time.sleep(4)
        return None
    began = time.monotonic()
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        return time.monotonic() - began


@pytest.mark.multi_gpu
def test_groups_of_other_libraries_get_the_limit_too(tmp_path):
    seconds = start_world(waits_for_nobody, tmp_path, size=2)().results[0]
    assert 0.5 < seconds < 3.5


@pytest.mark.single_gpu
def test_nccl_waits_longer_than_the_watchdog(monkeypatch):
    limits = {}
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map={"a": 0, "b": 0}))
    monkeypatch.setattr(dist, "get_backend", {"a": "gloo", "b": "nccl"}.get)
    with mock.patch.object(dist, "set_timeout", lambda limit, group: limits.update({group: limit}), create=True):
        collectives.limit_all_groups(1800.0)
    assert limits == {"a": timedelta(seconds=1800), "b": timedelta(seconds=1860)}


def dies_under_nccl(rank, folder):
    """Rank 1 is killed before a collective that rank 0 waits for: long before NCCL's limit the watchdog ends rank 0."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(
        {name: str(value) for name, value in place.items()} | {"MASTER_PORT": (folder / "port").read_text()}
    )
    world = runtime.start(timeout=300, threads=1)
    with mock.patch.object(watchdog, "PEER_GRACE", 2.0), watchdog.Watchdog(folder, timeout=300) as dog:
        collectives.barrier()
        time.sleep(12)  # both are seen alive
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dog.beat("a sum of step 1")
        collectives.all_reduce_sum(torch.ones(1, device=world.device)).item()


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants two GPUs")
def test_under_nccl_a_dead_neighbour_ends_the_wait(tmp_path):
    (tmp_path / "port").write_text(str(runtime.free_port()))
    began = time.monotonic()
    started = [start_world(partial(as_rank, rank, tmp_path), tmp_path / str(rank), seconds=120) for rank in (0, 1)]
    codes = [finish().codes[0] for finish in started]
    assert codes == [ExitCode.SILENT, -signal.SIGKILL] and time.monotonic() - began < 100
    assert "rank 1 on" in (tmp_path / "rank_0.log").read_text()


def as_rank(number, folder, rank, place):
    """A world of its own for each rank, as ``runtime.start`` makes the group."""
    return dies_under_nccl(number, folder)
