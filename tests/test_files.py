"""Files are written whole or not at all, and are on disk before their names are."""

import hashlib
import os
from pathlib import Path

import pytest

from ase_dist import files
from ase_dist.files import replacing, sha256_of, write_atomic

pytestmark = pytest.mark.single_gpu


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_hash_is_that_of_all_bytes(tmp_path):
    data = os.urandom(2 * files.BLOCK + 7)
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "deep" / "a"
    write_atomic(path, "old")
    write_atomic(path, b"\xff")
    assert path.read_bytes() == b"\xff" and names(path.parent) == ["a"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_text() == "old" and names(tmp_path) == ["summary.json"]


def test_a_writer_that_fails_half_way_changes_nothing(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="half"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("ne")
        raise ValueError("half way")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_the_data_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """Replacing first and syncing later loses both versions when the power goes."""
    events, real_fsync, real_replace = [], os.fsync, Path.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("replace"), real_replace(a, b))[1])
    write_atomic(tmp_path / "a", "text")
    assert events == ["fsync", "replace", "fsync"]
