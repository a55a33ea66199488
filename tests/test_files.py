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


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def folder_with(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_folder_replaces_another_and_leaves_nothing_else(tmp_path):
    target = folder_with(tmp_path / "data", "old")
    new = folder_with(files.temporary_for(target), "new")
    files.put_in_place(new, target)
    assert names(tmp_path) == ["data"] and (target / "file").read_text() == "new"
    files.put_in_place(folder_with(files.temporary_for(tmp_path / "first"), "x"), tmp_path / "first")
    assert names(tmp_path) == ["data", "first"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path):
    target = folder_with(tmp_path / "data", "old")
    with pytest.raises(OSError, match="missing"):
        files.put_in_place(tmp_path / "missing", target)
    assert names(tmp_path) == ["data"] and (target / "file").read_text() == "old"


def test_a_kill_between_the_renames_is_recovered_from(tmp_path, monkeypatch):
    """Also where it came after both, and the old folder was left set aside."""
    target, replace = folder_with(tmp_path / "data", "old"), os.replace
    new = folder_with(files.temporary_for(target), "new")

    def die(source, where):
        if Path(where) == target:
            raise KeyboardInterrupt
        replace(source, where)

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        files.put_in_place(new, target)
    monkeypatch.undo()
    assert not target.exists()
    files.recover(target)
    assert (target / "file").read_text() == "old"
    folder_with(tmp_path / ".old-data", "older")
    files.put_in_place(new, target)
    assert names(tmp_path) == ["data"] and (target / "file").read_text() == "new"
    folder_with(tmp_path / ".old-data", "older")
    files.recover(target)
    assert names(tmp_path) == ["data"] and (target / "file").read_text() == "new"


def test_sweeping_takes_what_is_temporary_and_nothing_else(tmp_path):
    folder_with(tmp_path / ".tmp-a", "half")
    folder_with(tmp_path / ".trash-b", "half")
    folder_with(tmp_path / ".old-c", "whole")
    folder_with(tmp_path / "d", "whole")
    (tmp_path / ".latest.7.tmp").write_text("half")
    (tmp_path / ".lock").write_text("")
    files.sweep(tmp_path)
    assert names(tmp_path) == [".lock", "c", "d"]


def test_emptying_and_removing_a_link_leave_what_it_leads_to(tmp_path):
    elsewhere = folder_with(tmp_path / "elsewhere", "mine")
    (tmp_path / "link").symlink_to(elsewhere)
    files.make_empty(tmp_path / "link")
    (tmp_path / "second").symlink_to(elsewhere)
    files.remove(tmp_path / "second")
    assert (elsewhere / "file").read_text() == "mine" and names(tmp_path) == ["elsewhere", "link"]


def test_waiting_ends_with_the_condition_or_with_patience():
    answers = iter([False, False, True])
    assert files.wait_until(lambda: next(answers), patience=5, pause=0)
    assert not files.wait_until(lambda: False, patience=0, pause=0)
