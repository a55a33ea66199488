"""Damaged checkpoints: named, passed over, never taken for nothing; nothing that is read may lead out of the folder."""

import errno
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import pytest

from ase_dist import errors, files
from ase_dist.training.state.checkpoint import SaveError, manifest, open_checkpoint
from ase_dist.training.state.checkpoint.manifest import read_manifest
from tests.training.conftest import flip_byte, loads, save, truncate

pytestmark = pytest.mark.single_gpu


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


DAMAGES = {
    "truncated": truncate,
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": flip_byte,
    "deleted": Path.unlink,
    "pickled": lambda path: path.write_bytes(pickle.dumps(Bomb(path.with_name("bang")))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_damage_is_named_and_the_one_before_is_taken(store, caplog, name, damage):
    save(store, 10, 20)
    DAMAGES[damage](store.folder / "step_20" / name)
    assert loads(store) == 10
    assert "step_20 is damaged" in caplog.text and name in caplog.text
    with pytest.raises(ValueError, match=re.escape(name)):
        store.find(store.folder / "step_20")
    assert not list(store.folder.rglob("bang")), "the pickle was executed"


def test_sizes_are_compared_before_anything_is_hashed(store, monkeypatch):
    save(store, 10)
    truncate(store.folder / "step_10" / "weights.safetensors")
    monkeypatch.setattr(
        "ase_dist.training.state.checkpoint.verify.sha256_of", lambda path: pytest.fail(f"hashed {path}")
    )
    monkeypatch.setattr(
        "ase_dist.training.state.checkpoint.verify.share", lambda files, **where: files[1:]
    )  # weights alone
    with pytest.raises(ValueError, match=r"weights\.safetensors: \d+ bytes, the manifest says \d+"):
        store.find(store.folder / "step_10")


def test_every_flipped_byte_of_a_manifest_is_found(store):
    save(store, 1)
    path = store.folder / "step_1" / "manifest.json"
    data, whole, harmless = path.read_bytes(), read_manifest(path.parent), 0
    for position in range(len(data) - 1):  # the last is the newline after the JSON
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            assert read_manifest(path.parent) == whole
            harmless += 1
        except ValueError as error:
            assert str(error).startswith("manifest.json: ")
    assert harmless == 1  # the 17th digit of 0.1 + 0.2, with which it is the same number


def forge(folder, **changes):
    """Change the first file's entry in a manifest whose own hash is right again."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    tree["files"][0].update(changes)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**tree, "sha256": hashlib.sha256(canonical).hexdigest()}))


@pytest.mark.parametrize(
    "name",
    [
        "../step_10/weights.safetensors",
        "/tmp/x.safetensors",
        "a/b.safetensors",
        "..safetensors",
        "a.pt",
        "a.safetensors\n",
    ],
)
def test_a_manifest_cannot_name_a_file_elsewhere(store, name):
    save(store, 10, 20)
    forge(store.folder / "step_20", name=name)
    with pytest.raises(ValueError, match=r"files\.0\.name"):
        store.find(store.folder / "step_20")
    assert loads(store) == 10


def test_a_pickle_with_the_right_hash_is_refused_unopened(store, tmp_path):
    save(store, 10, 20)
    data = pickle.dumps(Bomb(tmp_path / "bang"))
    (store.folder / "step_20" / "optimizer.safetensors").write_bytes(data)
    forge(store.folder / "step_20", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: not a safetensors file"):
        store.find(store.folder / "step_20")
    assert loads(store) == 10 and not (tmp_path / "bang").exists()


def test_a_manifest_of_a_newer_format_says_so_and_is_never_deleted(store):
    save(store, 1)
    path = store.folder / "step_1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(ValueError, match="written in format 2"):
        store.find("auto")
    save(store, 2, 3, 4)
    assert (store.folder / "step_1").is_dir()


def test_never_afresh_in_silence(store):
    assert store.find("auto") is None
    save(store, 10, 20)
    assert store.find("never") is None
    for step in (10, 20):
        (store.folder / f"step_{step}" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints .* is whole"):
        store.find("auto")


def test_a_path_that_is_no_checkpoint(store):
    save(store, 10)
    with pytest.raises(
        ValueError, match=r"manifest\.json: missing; name one of the checkpoints in it, such as 'step_10'"
    ):
        store.find(store.folder)
    with pytest.raises(ValueError, match="nowhere"):
        store.find(str(store.folder / "nowhere"))


def test_reading_changes_nothing(store):
    save(store, 10)
    (store.folder / ".tmp-step_20").mkdir()
    assert open_checkpoint(store.folder / "step_10").step == 10
    assert (store.folder / ".tmp-step_20").is_dir(), "who only reads must not sweep away what a run is writing"


@pytest.mark.parametrize("text", ["", "step_99\n", "../elsewhere", "../checkpoints/step_10", "step_10\x00", "\xff"])
def test_latest_is_not_trusted(store, caplog, text):
    save(store, 10, 20)
    (store.folder / "latest").write_text(text, encoding="latin-1")
    (store.folder.parent / "elsewhere").mkdir()
    assert loads(store) == 20
    assert "which is no checkpoint in this folder" in caplog.text


def test_latest_that_names_another_is_reported(store, caplog):
    save(store, 10, 20)
    (store.folder / "latest").write_text("step_10\n")
    assert loads(store) == 20
    assert "names step_10, but step_20 was saved last" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# A file system that fails for a moment says nothing about the checkpoint


def fails_for_a_moment(monkeypatch, method, name, code):
    """Let this method of Path, or function that opens or reads, raise for the file ``name`` of step_20."""
    owner = {"read_bytes": manifest, "open_regular": files, "stat": Path}[method]
    real = getattr(owner, method)

    def failing(path, *arguments, **options):
        if path.parent.name == "step_20" and path.name == name:
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)

    monkeypatch.setattr(owner, method, failing)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize(
    ("method", "name"),
    [("open_regular", "weights.safetensors"), ("stat", "weights.safetensors"), ("read_bytes", "manifest.json")],
)
def test_a_file_that_cannot_be_read_at_the_moment_is_not_damaged(store, caplog, monkeypatch, method, name, code):
    save(store, 10, 20)
    with monkeypatch.context() as moment:
        fails_for_a_moment(moment, method, name, code)
        for resume in ("auto", store.folder / "step_20"):
            with pytest.raises(errors.RunError, match=os.strerror(code)) as raised:
                store.find(resume)
            assert errors.exit_code_of(raised.value) is errors.ExitCode.IO_ERROR
    assert "damaged" not in caplog.text
    assert loads(store) == 20


def test_what_cannot_be_looked_at_for_a_moment_is_not_deleted(store, monkeypatch):
    save(store, 10, 20)
    with monkeypatch.context() as moment:
        fails_for_a_moment(moment, "stat", "weights.safetensors", errno.EIO)
        with pytest.raises(SaveError) as raised:
            save(store, 30)
        assert raised.value.exit_code is errors.ExitCode.IO_ERROR
    assert loads(store) == 20


def test_a_change_of_meta_that_fails_for_a_moment(store, monkeypatch):
    save(store, 20)
    fails_for_a_moment(monkeypatch, "read_bytes", "manifest.json", errno.ESTALE)
    with pytest.raises(SaveError, match="was not updated") as raised:
        store.update_meta(20, {"seed": 1})
    assert raised.value.exit_code is errors.ExitCode.IO_ERROR
