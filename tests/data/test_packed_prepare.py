"""Packing: nothing is written into the source, nothing done twice, and whoever was interrupted goes on."""

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ase_dist.data.packed import jobs, prepare, shard
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.errors import ExitCode, RunError
from tests.data.packing import ALL, command, contents, packed_names, request, start, state

pytestmark = pytest.mark.single_gpu


# --- where it is packed to -------------------------------------------------------------------------------------------


def test_nothing_is_written_into_the_source_and_nothing_else_replaced(six, pack, tmp_path, one_sentence):
    before = state(six.root)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    for out in (six.root, six.root / "packed", six.root.parent, tmp_path / "mine"):
        with pytest.raises(ValueError, match="--out") as raised:
            pack(six.root, out=out)
        one_sentence(raised, out)
    pack(six.root)
    assert state(six.root) == before
    assert (tmp_path / "mine/thesis.tex").exists()


def test_the_default_place_is_in_the_cache_and_another_sources_is_another(six, pack, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = pack(six.root, out=None)
    assert first.parent == tmp_path / "cache/ase_dist"
    assert first.name.startswith("pascal_context-")
    assert pack(six.root, out=None) == first
    second = shutil.copytree(six.root, tmp_path / "copy")
    assert pack(second, out=None).parent == first.parent
    assert pack(second, out=None) != first


def test_another_sources_place_is_not_taken(six, pack, tmp_path, one_sentence):
    place = pack(six.root)
    before = state(place)
    second = shutil.copytree(six.root, tmp_path / "second")
    assert pack(second) == place  # times and all: the same data in another folder
    (second / "sal_distill/t0.png").touch()
    with pytest.raises(ValueError, match="was packed from") as raised:
        pack(second)
    one_sentence(raised, place, six.root, second)
    assert state(place) == before


def test_a_full_disk_is_one_sentence_and_what_was_packed_is_kept(six, pack, tmp_path, monkeypatch, one_sentence):
    add = shard._Writer.add

    def full(self, record, *rest):
        if record.name == "t3":
            raise OSError(28, "No space left on device")
        add(self, record, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shard._Writer, "add", full)
        with pytest.raises(RunError, match="No space left on device") as raised:
            pack(six.root)
    assert raised.value.exit_code == ExitCode.NOT_SAVED
    one_sentence(raised, six.root, tmp_path / "packed", "goes on")
    assert sorted(path.name for path in (tmp_path / ".packed.packing").iterdir()) == ["train-000.bin", "train-000.json"]
    assert packed_names(pack(six.root)) == [f"t{i}" for i in range(5)]


def test_a_place_that_cannot_be_written(six, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert command(six.root, "--subset", "--out", tmp_path / "file/packed") == 2
    said = capsys.readouterr().err
    assert "Not a directory" in said or "File exists" in said


# --- again -----------------------------------------------------------------------------------------------------------


def test_an_unchanged_source_is_not_packed_again(six, pack, counted, caplog):
    place = pack(six.root)
    before = state(place)
    counted.clear()
    with caplog.at_level(logging.INFO):
        assert pack(six.root) == place
    assert not counted
    assert "has not changed" in caplog.text
    assert state(place) == before


def test_a_changed_source_is_noticed_and_only_its_part_packed_again(six, pack, counted, caplog):
    place = pack(six.root)
    open_before = PackedDataset(place, "train", ALL, data="pascal_context")
    first = open_before[2].labels["semseg"].copy()
    six.semseg("t2", np.full((12, 16), 7))
    counted.clear()
    with caplog.at_level(logging.INFO):
        pack(six.root)
    assert "has changed since it was packed" in caplog.text
    assert counted == ["train-001.bin"]
    assert (PackedDataset(place, "train", ALL, data="pascal_context")[2].labels["semseg"] == 7).all()
    np.testing.assert_array_equal(open_before[2].labels["semseg"], first)  # a run in progress keeps its files
    assert not list(place.parent.glob(".packed.*old*"))


def test_without_links_everything_is_packed_again(six, pack, counted, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    place = pack(six.root)
    wanted = contents(place)
    six.path("sal_distill/v0.png").touch()
    monkeypatch.setattr(prepare.os, "link", no_links)
    counted.clear()
    pack(six.root)
    assert len(counted) == 4
    assert {name: content for name, content in contents(place).items() if name.endswith(".bin")} == {
        name: content for name, content in wanted.items() if name.endswith(".bin")
    }


@pytest.mark.parametrize("options", [{"tasks": ("edge",)}, {"pictures": "files"}])
def test_other_options_pack_again(six, pack, options):
    place = pack(six.root)
    pack(six.root, **options)
    manifest = json.loads((place / "packed.json").read_text())
    assert manifest["tasks"] == list(options.get("tasks", [task.name for task in ALL]))
    assert manifest["pictures"] == options.get("pictures", "pixels")


def test_a_fewer_images_leave_no_old_files(six, pack):
    place = pack(six.root)
    six.path("ImageSets/Context/train.txt").write_text("t0\n")
    pack(six.root)
    assert sorted(contents(place)) == ["train-000.bin", "train-000.json", "val-000.bin", "val-000.json"]


# --- interrupted, and several at once --------------------------------------------------------------------------------


def test_an_interrupted_packing_goes_on(six, pack, monkeypatch, counted, tmp_path):
    reference = contents(pack(six.root, out=tmp_path / "reference"))
    counted.clear()
    whole = shard._Writer.finish

    def dies(self, fingerprint):
        if "train-001" in self._target.name:
            raise KeyboardInterrupt
        whole(self, fingerprint)

    with monkeypatch.context() as patch:
        patch.setattr(shard._Writer, "finish", dies)
        with pytest.raises(KeyboardInterrupt):
            pack(six.root)
    assert not (tmp_path / "packed").exists()
    (tmp_path / ".packed.packing/.train-001.bin.99.tmp").write_bytes(b"half")
    assert contents(pack(six.root)) == reference
    assert counted == ["train-000.bin", "train-001.bin", "train-001.bin", "train-002.bin", "val-000.bin"]


@pytest.fixture
def many(pascal):
    """600 images: three files of the usual size, which several processes pack."""
    pascal.add("v0", split="val")
    pascal.add("t0")
    names = [f"t{i}" for i in range(600)]
    for first in [path for path in pascal.root.rglob("t0.*") if path.suffix != ".txt"]:
        for name in names[1:]:
            os.link(first, first.with_name(f"{name}{first.suffix}"))
    pascal.path("ImageSets/Context/train.txt").write_text("\n".join(names))
    return pascal


def test_two_at_once_pack_it_once(six, tmp_path):
    place = tmp_path / "packed"
    both = [start(six.root, "--subset", "--out", place) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("packed 6 images" in text for text in said) == 1
    assert sum("has not changed" in text for text in said) == 1
    assert packed_names(place) == [f"t{i}" for i in range(5)]


def children(process):
    return [
        int(pid) for found in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in found.read_text().split()
    ]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find processes")
def test_a_killed_packing_leaves_no_process_and_goes_on(many, tmp_path):
    place, making = tmp_path / "packed", tmp_path / ".packed.packing"
    process, workers = start(many.root, "--subset", "--out", place, "--workers", "2"), []
    try:
        wait_until(lambda: list(making.glob("*.json")) or process.poll() is not None)
        workers = children(process)
        process.kill()
        process.wait()
        assert len(workers) >= 2
        wait_until(lambda: not any(alive(pid) for pid in workers), seconds=20)
    finally:
        for pid in (process.pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    done = {path: path.stat().st_mtime_ns for path in making.glob("*.json")}
    assert done and not place.exists()
    prepare.prepare(request(many.root), place)
    assert {path: (place / path.name).stat().st_mtime_ns for path in done} == done
    assert contents(place) == contents(prepare.prepare(request(many.root), tmp_path / "alone"))


class Deadly(shard.ShardJob):
    """Ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_that_dies_is_told_in_a_sentence(one_sentence, tmp_path):
    job = Deadly("pascal_context", tmp_path, "train", ("a",) * 100, ("semseg",), "pixels", tmp_path / "train-000.bin")
    with pytest.raises(RunError, match="ended early") as raised:
        jobs.run_jobs([(job, None)] * 2, 2, doing="checking", did="checked", where="nowhere")
    one_sentence(raised, "the same command goes on", "--workers")
