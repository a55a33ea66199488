"""Several processes: a fault on one rank is the same error on all, nobody hangs, and killed processes harm nothing.

One world of two ranks goes through all faults that it survives; each test looks at one of them. What is killed gets a
process or a world of its own, all started at once.
"""

import contextlib
import errno
import os
import resource
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ase_dist import files
from ase_dist.training.state.checkpoint import CheckpointStore, SaveError
from ase_dist.training.state.checkpoint import shards as shards_module
from ase_dist.training.state.checkpoint import store as module
from tests.training.conftest import META, entries, flip_byte, groups, loads, save, start_world

pytestmark = pytest.mark.multi_gpu

# ---------------------------------------------------------------------------------------------------------------------
# One world of two


def tensors(rank, step):
    return torch.randn(64, generator=torch.Generator().manual_seed(100 * step + rank))


def shards(rank, step, *, tamper=None):
    """Two files per rank, with a collective before each; ``tamper(index)`` runs between them."""
    for index in range(2):
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 2
        if tamper is not None:
            tamper(index)
        yield f"part{index}_of_{rank}", {f"{index}.{rank}": tensors(rank, step + index)}


def sentence(action, kind):
    """What ``action`` says when it fails with ``kind``, or that it did not."""
    try:
        action()
    except kind as error:
        return str(error)
    return "did not fail"


@contextlib.contextmanager
def small_files(limit):
    """Writing a file beyond ``limit`` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuse(*arguments, **options):
    raise OSError(errno.EROFS, "Read-only file system")


def raise_on(rank, *, where, at):
    def tamper(index):
        if (rank, index) == (where, at):
            raise RuntimeError("out of memory")

    return tamper


def saving_faults(rank, store):
    """Each fault's sentence, as this rank heard it, and what the folder held afterwards."""
    said = {}

    def attempt(name, *, step=2, meta=META, parts=None):
        parts = shards(rank, step) if parts is None else parts
        said[name] = [sentence(lambda: store.save(step, parts, meta=meta), SaveError), entries(store)]
        dist.barrier()  # the next attempt would change what the other rank is listing

    attempt("iterable", parts=shards(rank, 2, tamper=raise_on(rank, where=1, at=1)))
    with small_files(100) if rank == 1 else contextlib.nullcontext():
        attempt("full disk")
    with mock.patch("ase_dist.files.os.replace", refuse):
        attempt("read-only")
    attempt("meta", meta={**META, "seed": rank})
    attempt("step", step=2 + rank)
    attempt("same file", parts=[("same", {f"x{rank}": torch.ones(1)})])
    attempt("same tensor", parts=[(f"file{rank}", {"same": torch.ones(1)})])
    with mock.patch.object(shards_module, "_finish", vanishing) if rank == 1 else contextlib.nullcontext():
        attempt("unseen", parts=[(f"file{rank}", {f"x{rank}": torch.ones(1)})])
    return said


finish = shards_module._finish


def vanishing(path, tensors):
    """The file that this rank has written does not arrive at rank 0, as where the nodes' folders are two."""
    written = finish(path, tensors)
    path.unlink()
    return written


def finding_faults(rank, store):
    """What "auto" finds, or says, after one more file of another rank's share is damaged each time."""
    found = {}
    for step, name in [(4, "part0_of_0.safetensors"), (3, "part1_of_1.safetensors"), (1, "manifest.json")]:
        if rank == 0:
            flip_byte(store.folder / f"step_{step}" / name)
        dist.barrier()
        found[f"without {step}"] = sentence(lambda: found.update(step=store.find("auto").step), ValueError)
        found[f"after {step}"] = found.get("step")
        found[f"path {step}"] = sentence(lambda s=step: store.find(store.folder / f"step_{s}"), ValueError)
    return found


def scenario(rank, folder):
    store = CheckpointStore(folder / "checkpoints", keep=5, patience=0.5)
    store.save(1, shards(rank, 1), meta=META)
    said = saving_faults(rank, store)
    store.save(3, shards(rank, 3), meta=META)
    store.save(4, shards(rank, 4), meta=META)
    with store.find("auto") as saved:
        equal = all(torch.equal(saved.tensor(f"{i}.{r}"), tensors(r, 4 + i)) for i in range(2) for r in range(2))
    dist.barrier()  # both have read it before it is damaged
    return {
        "saving": said,
        "equal": equal,
        "world_size": saved.world_size,
        "finding": finding_faults(rank, store),
        "apart": sentence(lambda: CheckpointStore(folder / f"of_{rank}", keep=1, patience=0.2), ValueError),
        "unwritable": sentence(lambda: CheckpointStore(folder / "rendezvous", keep=1), ValueError),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    ended = start_world(scenario, folder, size=2)()
    assert ended.codes == [0, 0]
    return ended.results


def test_both_ranks_wrote_and_both_read(world):
    assert [result["equal"] for result in world] == [True, True]
    assert [result["world_size"] for result in world] == [2, 2]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("iterable", "rank 1: RuntimeError: out of memory"),
        ("full disk", "rank 1: could not write part0_of_1.safetensors"),
        ("read-only", "rank 0: Read-only file system"),
        ("meta", "meta['seed'] differs between rank 0 and rank 1"),
        ("step", "step differs between rank 0 and rank 1"),
        ("same file", "file 'same.safetensors' was written twice, by rank 0 and rank 1"),
        ("same tensor", "tensor 'same' was written twice, by rank 0 and rank 1"),
        ("unseen", "file1.safetensors was written by another rank but did not arrive"),
    ],
)
def test_a_fault_on_one_rank_is_the_same_error_on_all(world, fault, words):
    (first, there), (second, there_too) = (result["saving"][fault] for result in world)
    assert words in first
    assert there == there_too == ["latest", "step_1"]
    assert first == second


@pytest.mark.parametrize(("damaged", "file"), [(4, "part0_of_0.safetensors"), (3, "part1_of_1.safetensors")])
def test_ranks_reject_alike_and_fall_back(world, damaged, file):
    before = {4: 3, 3: 1}[damaged]
    for result in world:
        assert result["finding"][f"after {damaged}"] == before
        assert f"{file}: its SHA-256 is not the manifest's" in result["finding"][f"path {damaged}"]


def test_ranks_stop_alike_where_none_is_whole(world):
    first, second = (result["finding"]["without 1"] for result in world)
    assert first == second
    assert "none of the 3 checkpoints" in first


def test_a_folder_that_is_not_shared(world):
    first, second = (result["apart"] for result in world)
    assert "rank 1 on" in first and "does not see the folder" in first
    assert "rank 1 on" in second


def test_a_folder_that_cannot_be_made(world):
    assert world[0]["unwritable"] == world[1]["unwritable"]
    assert "cannot write to" in world[0]["unwritable"]


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def rank_one_dies_writing(rank, folder):
    store = CheckpointStore(folder / "checkpoints", keep=5)
    store.save(1, groups(1) if rank == 0 else (), meta=META)

    def parts():
        for name, group in groups(2):
            yield f"{name}{rank}", {f"{key}{rank}": tensor for key, tensor in group.items()}
            if rank == 1:
                die()  # one file is written, the other is not

    return sentence(lambda: store.save(2, parts(), meta=META), RuntimeError)


def dies_at(folder, is_moment, *, steps=(1, 2), keep=5):
    """Save ``steps``; die before the first rename of the last one for which ``is_moment(source, target)``."""
    store, replace = CheckpointStore(folder / "checkpoints", keep=keep), os.replace
    save(store, *steps[:-1])

    def deadly(source, target):
        if is_moment(Path(source).name, Path(target).name):
            die()
        replace(source, target)

    with mock.patch.object(files.os, "replace", deadly):
        save(store, steps[-1])


def dies_writing(folder, name):
    """Save two steps; die before the small file ``name`` of the second is written."""
    store, write = CheckpointStore(folder / "checkpoints", keep=5), module.write_atomic
    save(store, 1)
    deadly = lambda path, data: die() if path.name == name else write(path, data)  # noqa: E731
    with mock.patch.object(module, "write_atomic", deadly):
        save(store, 2)


def dies_before_manifest(rank, folder):
    dies_writing(folder, "manifest.json")


def dies_before_rename(rank, folder):
    dies_at(folder, lambda source, target: target == "step_2")


def dies_before_latest(rank, folder):
    dies_writing(folder, "latest")


def dies_between_two_renames(rank, folder):
    dies_at(folder, lambda source, target: source == ".tmp-step_1", steps=(1, 1))


def dies_while_deleting(rank, folder):
    dies_at(folder, lambda source, target: source == "step_1", keep=1)


DEATHS = {  # worker: (ranks, what the folder holds, the step that loads)
    rank_one_dies_writing: (2, [".tmp-step_2", "latest", "step_1"], 1),
    dies_before_manifest: (1, [".tmp-step_2", "latest", "step_1"], 1),
    dies_before_rename: (1, [".tmp-step_2", "latest", "step_1"], 1),
    dies_before_latest: (1, ["latest", "step_1", "step_2"], 2),
    dies_between_two_renames: (1, [".old-step_1", ".tmp-step_1", "latest"], 1),
    dies_while_deleting: (1, ["latest", "step_1", "step_2"], 2),
}


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    folders = {worker: tmp_path_factory.mktemp(worker.__name__) for worker in DEATHS}
    worlds = {worker: start_world(worker, folders[worker], size=DEATHS[worker][0]) for worker in DEATHS}
    return {worker: (finish(), folders[worker] / "checkpoints") for worker, finish in worlds.items()}


@pytest.mark.parametrize("worker", DEATHS, ids=lambda worker: worker.__name__)
def test_a_killed_process_harms_nothing(deaths, worker):
    (codes, _), folder = deaths[worker]
    assert codes[-1] == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == DEATHS[worker][1]
    store = CheckpointStore(folder, keep=5)
    assert loads(store) == DEATHS[worker][2]
    assert not [name for name in entries(store) if name.startswith(".")]
    save(store, 9)
    assert loads(store) == 9


def test_the_survivor_is_told(deaths):
    (codes, results), _ = deaths[rank_one_dies_writing]
    assert codes[0] == 0 and results[0] != "did not fail"
