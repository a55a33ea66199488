"""The loaders of a run: the same batches for any workers and world, positions that count what the loop has taken."""

import itertools
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ase_dist.data.batch import Batch, EvalBatch
from ase_dist.data.loader import build_eval_loader, build_train_loader, data_fingerprint, first_images, open_dataset
from ase_dist.data.prefetch import _why_lost
from ase_dist.errors import ExitCode, UserError
from ase_dist.read_config import build_settings
from ase_dist.stopping import STOPPING
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

ALL = select_tasks("pascal_context")
SIZE = 16
TRAIN, VAL = 5, 3


@pytest.fixture
def folder(pascal):
    for i in range(TRAIN):
        pascal.add(f"train_{i}", shape=(12 + 3 * (i % 2), 16))
    for i in range(VAL):
        pascal.add(f"val_{i}", split="val", shape=(12, 16 + 4 * i))
    return pascal


@pytest.fixture
def settings(folder):
    def build(*, batch=2, name="pascal_context", root=folder.root, **data):
        tree = {
            "seed": 3,
            "data": {"name": name, "root": str(root), "size": SIZE, **data},
            "train": {"batch_size": batch},
        }
        return build_settings(tree)

    return build


def train(settings, *, rank=0, world=1):
    return build_train_loader(settings, ALL, rank=rank, world_size=world)


def evaluation(settings, *, rank=0, world=1):
    return build_eval_loader(settings, ALL, rank=rank, world_size=world)


def take(loader, steps):
    return [next(loader) for _ in range(steps)]


def joined(batches):
    """The ranks' batches of one step as one."""
    labels = {task: torch.cat([batch.labels[task] for batch in batches]) for task in batches[0].labels}
    images, indices = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "indices"))
    return Batch(images, labels, indices, [name for batch in batches for name in batch.names])


def assert_equal(one, other):
    assert one.names == other.names
    for name in ("images", "indices"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert list(one.labels) == list(other.labels)
    for task, label in one.labels.items():
        pairs = (
            [(label, other.labels[task])]
            if isinstance(label, torch.Tensor)
            else zip(label, other.labels[task], strict=True)
        )
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


# --- training --------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_forms_of_the_task_table(settings):
    loader = train(settings())
    batch = next(loader)
    assert batch.images.shape == (2, 3, SIZE, SIZE)
    assert batch.images.dtype == torch.float32
    for task in ("semseg", "human_parts", "saliency", "edge"):
        assert batch.labels[task].shape == (2, SIZE, SIZE)
        assert batch.labels[task].dtype == torch.uint8
    assert batch.labels["normals"].shape == (2, 3, SIZE, SIZE)
    assert batch.labels["normals"].dtype == torch.float32
    assert batch.indices.dtype == torch.int64
    assert batch.names == [f"train_{i}" for i in batch.indices.tolist()]
    assert loader.steps_per_epoch == 3
    moved = batch.to("cpu")
    assert_equal(moved, batch)
    loader.close()


def test_every_image_once_per_epoch_and_augmented_anew(settings):
    loader = train(settings(batch=1))
    batches = take(loader, 2 * TRAIN)
    epochs = [{batch.names[0]: batch for batch in half} for half in (batches[:TRAIN], batches[TRAIN:])]
    assert set(epochs[0]) == set(epochs[1]) == {f"train_{i}" for i in range(TRAIN)}
    assert loader.epoch == 2
    assert all(not torch.equal(epochs[0][name].images, epochs[1][name].images) for name in epochs[0])
    loader.close()


def test_loader_processes_give_the_same_batches(settings):
    threaded, processes = train(settings()), train(settings(workers=1))
    state, handler = torch.random.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    assert_equal(next(threaded), next(processes))
    for child, number in itertools.product(multiprocessing.active_children(), STOPPING):
        os.kill(child.pid, number)  # as a scheduler or a terminal does; the training process wants to save first
    for one, other in zip(take(threaded, 7), take(processes, 7), strict=True):
        assert_equal(one, other)
    assert threaded.state_dict() == processes.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "a loader must leave the global generator alone"
    again = train(settings())
    position = {"epoch": 0, "consumed": 2, "length": TRAIN}
    for loader in (again, processes):
        loader.load_state_dict(position)
    assert_equal(next(again), next(processes))
    for child in multiprocessing.active_children():
        child.kill()
    for one, other in zip(take(again, 7), take(processes, 7), strict=True):
        assert_equal(one, other)
    assert again.state_dict() == processes.state_dict() and not multiprocessing.active_children()
    assert again.failure is None and processes.failure.exit_code is ExitCode.IO_ERROR
    assert "a loader process has died (exit code -9)" in str(processes.failure)
    assert signal.getsignal(signal.SIGCHLD) == handler, "torch's would raise an error wherever the main thread is"
    for loader in (threaded, processes, again):
        loader.close()


def test_a_limit_of_open_files_is_told():
    error = RuntimeError("Too many open files. Communication with the workers is no longer possible.")
    told = _why_lost(error, [])
    assert isinstance(told, UserError) and re.search(r"this process may open \d+; .*ulimit -n", str(told))
    assert _why_lost(RuntimeError("a bug"), [multiprocessing.current_process()]) is None


class Unsharable(Batch):
    """A batch that finds no room in shared memory, which a container may have little of."""

    def __reduce_ex__(self, protocol):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")


class SharesOnce:
    """What cannot be shared is the first batch, or those after it."""

    def __init__(self, fetch, *, first):
        self.fetch, self.first = fetch, first

    def __call__(self, draws):
        batch = self.fetch(draws)
        is_shared = not self.first and draws[0].epoch == 0
        return batch if is_shared else Unsharable(**batch.__dict__)


@pytest.mark.parametrize("first", [True, False])
def test_shared_memory_that_is_too_small_is_told_and_nothing_hangs(settings, first):
    threaded, processes = train(settings(batch=TRAIN)), train(settings(workers=1, batch=TRAIN))
    processes._prefetcher._fetch = SharesOnce(processes._prefetcher._fetch, first=first)
    if first:
        with pytest.raises(UserError, match=r"data\.workers: a loader process cannot share memory .*No space left"):
            next(processes)
        processes.close()
        return
    for one, other in zip(take(threaded, 3), take(processes, 3), strict=True):
        assert_equal(one, other)
    assert isinstance(processes.failure, UserError) and "/dev/shm" in str(processes.failure)
    for loader in (threaded, processes):
        loader.close()


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 2), (6, 1)])
def test_worlds_give_the_same_global_batches(settings, world, batch):
    alone = train(settings(batch=6))
    ranks = [train(settings(batch=batch), rank=rank, world=world) for rank in range(world)]
    for _ in range(3):
        assert_equal(joined([next(rank) for rank in ranks]), next(alone))
    for loader in (alone, *ranks):
        loader.close()


def test_the_state_counts_batches_taken_and_resumes_there(settings):
    uninterrupted = train(settings())
    expected = take(uninterrupted, 6)
    for stop in range(1, 6):
        loader = train(settings())
        take(loader, stop)
        state = loader.state_dict()
        assert (state["epoch"] * TRAIN + state["consumed"]) == 2 * stop
        loader.close()
        resumed = train(settings())
        next(resumed)  # already running: what it has prepared ahead must go
        resumed.load_state_dict(state)
        for batch, wanted in zip(take(resumed, 6 - stop), expected[stop:], strict=True):
            assert_equal(batch, wanted)
        resumed.close()
    uninterrupted.close()


def test_closing_ends_the_thread_and_the_loader_goes_on_where_it_was(settings):
    before = threading.active_count()
    loader, reference = train(settings()), train(settings())
    expected = take(reference, 3)
    reference.close()
    batches = take(loader, 2)
    assert any(thread.name.startswith("ase-data") for thread in threading.enumerate())
    loader.close()
    assert threading.active_count() == before
    assert_equal(next(loader), expected[2])
    assert_equal(batches[1], expected[1])
    loader.close()


UNCLOSED = """
import sys
from ase_dist.read_config import build_settings
from ase_dist.data.loader import build_train_loader
from ase_dist.tasks import select_tasks

if __name__ == "__main__":
    loaders = []
    for workers in (0, 1):
        tree = {"data": {"name": "pascal_context", "root": sys.argv[1], "size": 16, "workers": workers}}
        loaders.append(build_train_loader(build_settings(tree), select_tasks("pascal_context"), rank=0, world_size=1))
        next(loaders[-1])
    sys.exit(7)
"""


def test_a_program_that_ends_without_closing_its_loaders_does_end(folder, tmp_path):
    script = tmp_path / "unclosed.py"
    script.write_text(UNCLOSED)
    command = [sys.executable, str(script), str(folder.root)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (7, "")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_told_in_the_loop(folder, settings, one_sentence, workers):
    path = folder.root / "JPEGImages/train_3.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    loader = train(settings(workers=workers, batch=1))
    with pytest.raises(ValueError, match=r"train_3\.jpg") as raised:
        take(loader, TRAIN)
    one_sentence(raised, "unreadable", "wanted a picture")
    assert "Traceback" not in str(raised.value)
    state = loader.state_dict()
    path.write_bytes(whole)
    assert next(loader).names == ["train_3"]  # once repaired, the same batch comes
    assert loader.state_dict()["consumed"] == state["consumed"] + 1 or loader.epoch == state["epoch"] + 1
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_shows_where_it_is(settings, workers):
    loader = train(settings(workers=workers))
    loader._prefetcher._fetch = Failing()
    with pytest.raises(ZeroDivisionError, match="a bug") as raised:
        next(loader)
    assert "test_loader.py" in str(raised.value) or raised.traceback[-1].path == Path(__file__)
    loader.close()


class Failing:
    def __call__(self, draws):
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_pages_are_locked_for_an_accelerator_alone(settings, monkeypatch, device):
    """A run on the CPU of a host with GPUs must not touch them: each process would open a context on GPU 0."""
    chosen, pinned = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    loader = build_train_loader(settings(), ALL, rank=0, world_size=1, device=torch.device(device))
    next(loader)
    loader.close()
    assert chosen == ([] if device == "cpu" else [torch.device("cuda", 1)])
    assert bool(pinned) is (device != "cpu")


def test_without_augmentation_epochs_are_alike(settings):
    loader = train(settings(batch=1, augmentation="none", limit_train=1, cache_in_memory=True))
    first, second = take(loader, 2)
    assert_equal(first, second)
    assert loader.epoch == 2
    loader.close()


@pytest.mark.parametrize("limit", [3, TRAIN + 2])
def test_the_first_images_are_unchanged_and_decoded_once(settings, folder, limit):
    chosen = settings(cache_in_memory=True)
    loader = train(chosen)
    wanted = list(build_eval_loader(chosen, ALL, rank=0, world_size=1, split="train"))
    first = first_images(loader, chosen, limit=limit, rank=0, world_size=1)
    assert [name for batch in first for name in batch.names] == loader.dataset.names[: min(limit, TRAIN)]
    for file in folder.root.glob("JPEGImages/train_*"):
        file.unlink()  # what has been decoded is in memory
    images, expected = (torch.cat([batch.images for batch in batches]) for batches in (first, wanted))
    assert torch.equal(images, expected[:limit])
    if limit > TRAIN:
        assert len(next(loader).names) == 2
    for each in (first, loader):
        each.close()


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_labels_have_their_own_sizes(settings):
    loader = evaluation(settings())
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    assert [name for batch in batches for name in batch.names] == ["val_0", "val_1", "val_2"]
    assert [tuple(label.shape) for batch in batches for label in batch.labels["semseg"]] == [
        (12, 16),
        (12, 20),
        (12, 24),
    ]
    assert batches[1].labels["normals"][0].shape == (3, 12, 24)
    for one, other in zip(batches, loader, strict=True):
        assert_equal(one, other)  # a second pass is the same


def test_evaluation_over_ranks_and_processes(settings):
    alone = {name: batch for batch in evaluation(settings(batch=1)) for name in batch.names}
    seen = []
    for rank in range(4):
        loader = evaluation(settings(workers=int(rank == 1)), rank=rank, world=4)
        batches = list(loader)
        assert len(batches) == len(loader) == 1
        for batch in batches:
            assert batch.images.shape == (len(batch.names), 3, SIZE, SIZE)
            assert {len(labels) for labels in batch.labels.values()} == {len(batch.names)}
            assert set(batch.labels) == {task.name for task in ALL}
            seen += batch.names
            if batch.names:
                assert_equal(batch, alone[batch.names[0]])
        loader.close()
    assert sorted(seen) == ["val_0", "val_1", "val_2"]


def test_an_evaluation_batch_travels_as_few_tensors():
    rng = np.random.default_rng(0)
    labels = {
        "semseg": [torch.from_numpy(rng.integers(0, 9, (h, 4), dtype=np.uint8)) for h in (2, 5, 3)],
        "normals": [torch.from_numpy(rng.random((3, h, 4))) for h in (2, 5, 3)],
    }
    batch = EvalBatch(torch.zeros(3, 3, 2, 2), labels, torch.arange(3), ["a", "b", "c"])
    assert sum(isinstance(value, torch.Tensor) for value in batch.__getstate__()["labels"].values()) == 2
    assert_equal(pickle.loads(pickle.dumps(batch)), batch)
    empty = EvalBatch(torch.zeros(0, 3, 2, 2), {"semseg": [], "normals": []}, torch.arange(0), [])
    assert_equal(pickle.loads(pickle.dumps(empty)), empty)
    assert_equal(batch.to("cpu"), batch)


# --- which data set --------------------------------------------------------------------------------------------------


def test_limits_and_the_fingerprint(settings):
    whole = open_dataset(settings(), ALL, split="train")
    first = open_dataset(settings(limit_train=2, limit_val=1), ALL, split="train")
    assert (len(whole), len(first)) == (TRAIN, 2)
    assert len(open_dataset(settings(limit_train=2, limit_val=1), ALL, split="val")) == 1
    assert data_fingerprint(whole) != data_fingerprint(first)
    assert data_fingerprint(whole) == data_fingerprint(open_dataset(settings(cache_in_memory=True), ALL, split="train"))


def test_nyud_by_name(nyud):
    nyud.add(
        "7",
        semseg=np.ones((20, 24)),
        depth=np.full((20, 24), 2.0),
        normals=np.zeros((20, 24, 3)),
        edge=np.zeros((20, 24)),
    )
    tree = {"data": {"name": "nyud", "root": str(nyud.root), "size": SIZE}, "train": {"batch_size": 1}}
    loader = build_train_loader(build_settings(tree), select_tasks("nyud"), rank=0, world_size=1)
    batch = next(loader)
    assert {task: tuple(label.shape) for task, label in batch.labels.items()} == {
        "semseg": (1, SIZE, SIZE),
        "depth": (1, 1, SIZE, SIZE),
        "normals": (1, 3, SIZE, SIZE),
        "edge": (1, SIZE, SIZE),
    }
    loader.close()


def test_scenes_are_made_where_the_settings_say(folder, settings, monkeypatch, tmp_path):
    asked = []

    def ensure_scenes(root, **options):
        asked.append((root, options))
        return folder.root

    monkeypatch.setattr("ase_dist.scenes.dataset.ensure_scenes", ensure_scenes)
    wanted = {"train_images": 7, "val_images": 4, "size": 48, "seed": 5}
    tree = settings(name="scenes", root=tmp_path, scenes=wanted)
    assert len(open_dataset(tree, ALL, split="val")) == VAL
    assert asked == [(tmp_path, {"train": 7, "val": 4, "size": (48, 48), "seed": 5})]


@pytest.mark.parametrize(("size", "warns"), [([32, 16], True), ([16, 32], False), (16, False)])
def test_a_size_across_the_images_is_told(nyud, size, warns, caplog):
    """The images are wider than high."""
    wide = (20, 24)
    nyud.add("7", semseg=np.ones(wide), depth=np.full(wide, 2.0), normals=np.zeros((*wide, 3)), edge=np.zeros(wide))
    tree = {"data": {"name": "nyud", "root": str(nyud.root), "size": size}, "train": {"batch_size": 1}}
    settings = build_settings(tree)
    with caplog.at_level(logging.WARNING, logger="ase_dist"):
        loader = build_train_loader(settings, settings.chosen_tasks(), rank=0, world_size=1)
    assert next(loader).images.shape == (1, 3, *settings.data.size)
    loader.close()
    told = [record.getMessage() for record in caplog.records if "data.size" in record.getMessage()]
    assert len(told) == warns and all("perhaps data.size=16x32 is meant" in sentence for sentence in told)
