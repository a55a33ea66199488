"""One process: what goes in comes out, streamed; which checkpoints stay; a save that fails leaves no trace."""

import errno
import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from ase_dist import files
from ase_dist.training.state.checkpoint import CheckpointStore, SaveError, catalog, open_checkpoint, shards
from tests.training.conftest import META, entries, flip_byte, groups, loads, save, truncate

pytestmark = pytest.mark.single_gpu


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


def test_every_type_shape_and_layout_comes_back(store):
    flat = torch.arange(24, dtype=torch.float32)
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bf16": torch.randn(3, 4).bfloat16(),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "first_half": flat[:12].view(3, 4),
        "overlapping": flat[6:],
        "trained": torch.nn.Parameter(torch.randn(2, 2)),
    }
    path = store.save(7, [("all", tensors)], meta=META)
    found = store.find("auto")
    assert (found.step, found.world_size, found.files) == (7, 1, ("all.safetensors",))
    assert found.meta == META and found.path == path == store.folder / "step_7"
    assert found.names() == sorted(tensors)
    for name, tensor in tensors.items():
        back = found.tensor(name)
        assert back.dtype == tensor.dtype and found.shape(name) == tuple(tensor.shape)
        assert torch.equal(back, tensor.detach())


def test_a_part_of_a_tensor(store):
    tensor = torch.randn(9, 4, 3)
    store.save(1, [("one", {"bank": tensor})], meta={})
    found = store.find("auto")
    assert torch.equal(found.tensor("bank", part=slice(2, 5)), tensor[2:5])
    whole = slice(None)
    assert torch.equal(found.tensor("bank", part=(whole, slice(1, 2))), tensor[:, 1:2])


def test_a_tensor_that_was_read_is_ones_own(store):
    save(store, 1)
    with store.find("auto") as found:
        first = found.tensor("w")
        part = found.tensor("w", part=slice(0, 2))
        first.zero_()
        part.zero_()
        again = found.tensor("w")
    shutil.rmtree(store.folder)
    assert torch.equal(again, next(groups(1))[1]["w"])


def test_an_unknown_tensor_is_named_with_the_nearest(store):
    save(store, 1)
    with pytest.raises(ValueError, match=r"no tensor 'w.exp_avk', did you mean 'w.exp_avg'"):
        store.find("auto").tensor("w.exp_avk")


def test_one_group_is_in_memory_at_a_time(store):
    alive = []

    def watched():
        for index in range(4):
            assert not any(reference() is not None for reference in alive), "an earlier group is still held"
            tensor = torch.full((8,), float(index))
            alive.append(weakref.ref(tensor))
            group = {f"t{index}": tensor}
            del tensor
            yield f"group{index}", group
            del group

    store.save(1, watched(), meta={})
    assert len(alive) == 4


def test_the_files_are_readable_without_this_code(store):
    save(store, 3)
    manifest = json.loads((store.folder / "step_3" / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["world_size"] == 1 and manifest["versions"]["torch"] == torch.__version__
    for entry in manifest["files"]:
        data = (store.folder / "step_3" / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert (store.folder / "latest").read_text() == "step_3\n"


# ---------------------------------------------------------------------------------------------------------------------
# Retention and order


def test_the_newest_and_the_best_are_kept(store):
    save(store, 10)
    store.mark_best(10)
    save(store, 20, 30, 40)
    assert entries(store) == ["best", "latest", "step_10", "step_30", "step_40"]
    assert store.best == store.folder / "step_10"
    store.mark_best(40)
    save(store, 50)
    assert entries(store) == ["best", "latest", "step_40", "step_50"]


def test_the_meta_of_a_checkpoint_changes_without_its_tensors_or_its_place(store):
    save(store, 10, 20)
    files = {path: path.stat().st_ino for path in store.folder.glob("step_10/*.safetensors")}
    store.update_meta(10, {"best": 0.75, "new": [1]})
    with open_checkpoint(store.folder / "step_10") as found:
        assert dict(found.meta) == {**META, "best": 0.75, "new": [1]}
    assert {path: path.stat().st_ino for path in files} == files and loads(store) == 20


def test_a_change_of_meta_that_fails_leaves_the_checkpoint_as_it_was(store):
    save(store, 10)
    before = (store.folder / "step_10" / "manifest.json").read_bytes()
    for step, changes, words in ((10, {"x": float("nan")}, "not plain JSON"), (30, {"x": 1}, "missing")):
        with pytest.raises(SaveError, match=rf"the checkpoint of step {step} was not updated: .*{words}.*as it was"):
            store.update_meta(step, changes)
    assert (store.folder / "step_10" / "manifest.json").read_bytes() == before
    assert entries(store) == ["latest", "step_10"]


def test_only_what_is_saved_can_be_best(store):
    with pytest.raises(ValueError, match="holds no step_3"):
        store.mark_best(3)
    assert store.best is None and not store.holds(3)


def test_a_mark_that_is_taken_away(store):
    save(store, 10)
    store.mark_best(10)
    assert store.holds(10)
    store.mark_best(None)
    store.mark_best(None)
    assert store.best is None
    save(store, 20, 30)
    assert entries(store) == ["latest", "step_20", "step_30"]


def test_a_mark_that_cannot_be_written(store, monkeypatch):
    save(store, 10, 20)
    store.mark_best(10)

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ase_dist.training.state.checkpoint.store.write_atomic", refuse)
    with pytest.raises(SaveError, match=r"step 20 was not marked as the best: .*No space left"):
        store.mark_best(20)
    assert store.best == store.folder / "step_10"


def test_newest_is_what_was_saved_last(store):
    save(store, 100, 200, 20)  # went back to an earlier step: the branch that was left must not win, nor push out
    assert loads(store) == 20
    save(store, 30)
    assert entries(store) == ["latest", "step_20", "step_30"]
    assert loads(store) == 30


@pytest.mark.parametrize("damage", [truncate, flip_byte])
def test_damaged_ones_do_not_push_out_the_newest_whole_one(store, damage):
    save(store, 10, 20)
    damage(store.folder / "step_20" / "weights.safetensors")
    assert loads(store) == 10
    save(store, 30)  # keep is 2: 30 and 10, not 30 and the damaged 20
    flip_byte(store.folder / "step_30" / "weights.safetensors")
    assert loads(store) == 10


def test_a_step_that_exists_is_replaced(store):
    save(store, 10)
    flip_byte(store.folder / "step_10" / "weights.safetensors")
    store.save(10, [("other", {"x": torch.ones(2)})], meta={})
    assert store.find("auto").names() == ["x"]
    assert entries(store) == ["latest", "step_10"]


def test_deletion_begins_with_a_rename(store, monkeypatch):
    save(store, 10, 20)

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        files.remove(store.folder / "step_10")
    monkeypatch.undo()
    assert entries(store) == [".trash-step_10", "latest", "step_20"]
    (store.folder / ".latest.123.tmp").write_text("step_")
    assert entries(CheckpointStore(store.folder, keep=2)) == ["latest", "step_20"]


# ---------------------------------------------------------------------------------------------------------------------
# Saving that fails


def fails(store, *, step=20, shards=None, meta=META):
    """The sentence of a save that must fail; nothing of it may stay, and what was there must load."""
    before = entries(store)
    with pytest.raises(SaveError) as caught:
        store.save(step, groups(step) if shards is None else shards, meta=meta)
    assert entries(store) == before
    assert loads(store) == 10
    assert str(caught.value).endswith("what was saved before is untouched") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("place", ["weights", "flush", "manifest", "rename"])
def test_a_full_or_read_only_disk(store, monkeypatch, place, code):
    save(store, 10)

    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code), "some/file")

    if place == "weights":
        monkeypatch.setattr(shards, "save_file", refuse)
    elif place == "flush":
        monkeypatch.setattr(shards, "fsync", refuse)
    elif place == "manifest":
        monkeypatch.setattr("ase_dist.training.state.checkpoint.store.write_atomic", refuse)
    else:
        real = os.replace
        monkeypatch.setattr(files.os, "replace", lambda a, b: refuse() if Path(b).name == "step_20" else real(a, b))
    assert os.strerror(code) in fails(store)


def test_a_failed_replacement_brings_the_old_one_back(store, monkeypatch):
    save(store, 10)
    real = os.replace

    def refuse_new(source, target):
        if Path(source).name.startswith(".tmp-"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", refuse_new)
    assert "Input/output error" in fails(store, step=10)


def test_a_failure_after_the_rename_is_no_failure(store, monkeypatch, caplog):
    save(store, 10)

    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ase_dist.training.state.checkpoint.store.checkpoints_to_delete", refuse)
    save(store, 20)
    assert loads(store) == 20 and "step 20 is saved, but" in caplog.text


def test_an_error_in_the_iterable(store):
    save(store, 10)

    def broken():
        yield from groups(20)
        raise KeyError("no such parameter")

    assert "KeyError" in fails(store, shards=broken())


def test_after_a_failed_write_the_iterable_is_drained(store):
    save(store, 10)
    seen = []

    def shards_with_collectives():
        for name in ["good", "../bad", "after"]:
            yield name, {name: torch.ones(1)}
            seen.append(name)

    assert "'../bad.safetensors' is not a plain file name" in fails(store, shards=shards_with_collectives())
    assert seen == ["good", "../bad", "after"]
    assert not (store.folder / "bad.safetensors").exists()


@pytest.mark.parametrize(
    ("twice", "sentence"),
    [
        ([("a", {"x": torch.ones(1)}), ("b", {"x": torch.ones(1)})], "tensor 'x' was written twice"),
        ([("a", {"x": torch.ones(1)}), ("a", {"y": torch.ones(1)})], r"file 'a.safetensors' was written twice"),
    ],
)
def test_one_owner_each(store, twice, sentence):
    save(store, 10)
    assert sentence in fails(store, shards=twice)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.ones(1), {1: 2}, b"x", (1, 2)])
def test_meta_is_plain_json(store, bad):
    save(store, 10)
    assert "meta" in fails(store, meta={"bad": {"inside": bad}})


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint.keep: got 0"):
        CheckpointStore(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to"):
        CheckpointStore(tmp_path / "file", keep=1)
    with pytest.raises(ValueError, match="cannot write to"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1)
    with pytest.raises(ValueError, match="step: got -1"):
        catalog.checkpoint_name(-1)
