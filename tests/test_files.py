"""Files are written whole or not at all, and are on disk before their names are."""

import hashlib
import os
import socket
from pathlib import Path

import pytest

from ase_dist import files
from ase_dist.errors import UserError
from ase_dist.files import open_regular, read_bytes, read_text, replacing, sha256_of, write_atomic

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


@pytest.mark.parametrize("read", [open_regular, read_bytes, read_text, files.refuse_irregular])
@pytest.mark.parametrize("kind", ["named pipe", "device", "socket"])
def test_what_would_wait_or_never_end_is_refused_unread(tmp_path, monkeypatch, kind, read):
    monkeypatch.chdir(tmp_path)  # the address of a socket must be short
    path = Path("latest")
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "named pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            listener.bind(str(path))
        with pytest.raises(UserError, match=f"latest: got a {kind}, wanted a regular file"):
            read(path)


def test_a_pipe_that_takes_the_place_of_a_file_after_the_check_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "latest")
    monkeypatch.setattr(files, "refuse_irregular", lambda path: None)
    before = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(UserError, match="a named pipe"):
        open_regular(tmp_path / "latest")
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "note"
    path.write_bytes(b"12345")
    assert read_bytes(path, max_bytes=5) == b"12345"
    with open_regular(path, max_bytes=5) as file:
        assert file.read(2) == b"12"
    for read in (open_regular, read_bytes, read_text):
        with pytest.raises(UserError, match=r"note: got a file of more than 4 bytes"):
            read(path, max_bytes=4)
    with pytest.raises(UserError, match="more than 10 bytes"):  # its size is 0, says the kernel
        read_bytes("/proc/self/status", max_bytes=10)


def test_text_is_utf8_without_the_byte_order_mark(tmp_path):
    (tmp_path / "note").write_bytes("\ufeffgr\u00fcn".encode())
    assert read_text(tmp_path / "note") == "gr\u00fcn"
    (tmp_path / "note").write_bytes("gr\u00fcn".encode("latin-1"))
    with pytest.raises(UserError, match=r"note: byte 2 is not UTF-8 text"):
        read_text(tmp_path / "note")


def test_folders_and_missing_files_are_told_as_open_tells_them(tmp_path):
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "none", FileNotFoundError)):
        with pytest.raises(error) as raised:
            read_bytes(path)
        assert raised.value.filename == str(path)
    files.refuse_irregular(tmp_path / "none")
