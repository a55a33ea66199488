"""Generated data sets on disk: PASCAL_MT's files, made once whoever asks, and nothing half-made after a failure."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from ase_dist import workers
from ase_dist.commands import make_scenes
from ase_dist.data.decode import NORMALS_IDS
from ase_dist.data.pascal_context import PascalContext
from ase_dist.errors import ExitCode, RunError, UserError
from ase_dist.scenes import make
from ase_dist.scenes.classes import CONTEXT, NORMALS_VALID, PARTS, VOC
from ase_dist.scenes.layout import VAL_START, scene_id
from ase_dist.scenes.make import SceneSet, ensure_scenes
from ase_dist.scenes.render import render_scene
from ase_dist.scenes.sheet import boundaries, contact_sheet
from ase_dist.tasks import PASCAL_TASKS, voc_color

pytestmark = pytest.mark.single_gpu
WANTED = {"train": 5, "val": 2, "size": 48, "seed": 4}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ensure_scenes(tmp_path_factory.mktemp("scenes"), **WANTED, workers=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scenes():
    numbers = [*range(WANTED["train"]), *range(VAL_START, VAL_START + WANTED["val"])]
    return {scene_id(4, number): render_scene(seed=4, index=number, size=48) for number in numbers}


def start(code: str) -> subprocess.Popen:
    """A script without a main guard, as a user would write it."""
    preamble = "import logging; logging.basicConfig(level=20); from ase_dist.scenes.make import ensure_scenes\n"
    command = [sys.executable, "-c", preamble + code]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def test_the_files_decode_to_the_scenes_labels(folder: Path) -> None:
    seen = scenes()
    assert {one.has_person for one in seen.values()} == {True, False}
    for name, one in seen.items():
        photo = np.asarray(Image.open(folder / f"JPEGImages/{name}.jpg"), np.float32)
        assert np.abs(photo - one.image).mean() < 6
        semseg = Image.open(folder / f"semseg/VOC12/{name}.png")
        assert semseg.mode == "P" and semseg.getpalette()[45:48] == list(voc_color(15))
        assert np.array_equal(semseg, one.semseg)
        assert np.array_equal(loadmat(folder / f"pascal-context/trainval/{name}.mat")["LabelMap"], one.label_map)
        assert np.array_equal(Image.open(folder / f"sal_distill/{name}.png"), one.saliency)
        normals = 2 * np.asarray(Image.open(folder / f"normals_distill/{name}.png"), np.float32) / 255 - 1
        assert np.abs(normals - one.normals).max() <= 1.01 / 255


def test_human_parts_have_the_nested_struct_of_pascal_part(folder: Path) -> None:
    for name, one in scenes().items():
        anno = loadmat(folder / f"human_parts/{name}.mat")["anno"]
        assert anno[0][0][0][0] == name
        parts, semseg = np.zeros_like(one.parts), np.zeros_like(one.semseg)
        objects = anno[0][0][1]
        for thing in objects[0] if objects.size else []:
            class_id = int(thing[1][0][0])
            semseg[thing[2] > 0] = class_id
            assert VOC[thing[0][0]] == class_id
            assert (class_id == VOC["person"]) == (thing[3].size > 0)
            for part in thing[3][0] if thing[3].size else []:
                parts[part[1] > 0] = PARTS[part[0][0]]
        assert np.array_equal(parts, one.parts) and np.array_equal(semseg, one.semseg)


def test_the_loader_of_pascal_context_reads_them(folder: Path) -> None:
    for split, count in (("train", 5), ("val", 2)):
        records = PascalContext(folder, split, tuple(PASCAL_TASKS.values()))
        assert len(records) == count
        for record, (name, one) in zip(records, list(scenes().items())[0 if split == "train" else 5 :], strict=False):
            assert record.name == name and np.array_equal(record.labels["semseg"], one.semseg)
            wanted = one.parts if one.has_person else np.full_like(one.parts, 255)
            assert np.array_equal(record.labels["human_parts"], wanted)


def test_normals_are_valid_where_the_loader_takes_them() -> None:
    assert set(CONTEXT.values()) & set(NORMALS_IDS) == NORMALS_VALID


def test_a_made_data_set_is_not_made_again(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(make, "_make", lambda *_: pytest.fail("made again"))
    assert ensure_scenes(folder.parent, **WANTED) == folder
    assert json.loads((folder / "manifest.json").read_text())["renderer"] == make.RENDERER_VERSION


def test_workers_make_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(make, "STARTUP", 1)
    made = ensure_scenes(tmp_path, **WANTED, workers=2)
    assert contents(made) == contents(folder)
    assert {path.name for path in tmp_path.iterdir()} == {made.name, f".{made.name}.lock"}


def test_two_processes_that_ask_at_once_make_it_once(tmp_path: Path) -> None:
    call = f"ensure_scenes({str(tmp_path)!r}, train=12, val=1, size=48, seed=0, workers=1)"
    asking = [start(call) for _ in range(2)]
    logs = [process.communicate(timeout=120)[1] for process in asking]
    assert [process.returncode for process in asking] == [0, 0], logs
    assert sum("rendered 13 scenes" in log for log in logs) == 1
    assert len(list(tmp_path.glob("scenes-*/JPEGImages/*"))) == 13


def test_a_daemon_may_ask(tmp_path: Path) -> None:
    process = start(
        "import multiprocessing\n"
        f"child = multiprocessing.get_context('fork').Process(target=ensure_scenes, args=({str(tmp_path)!r},), "
        "kwargs=dict(train=15, val=2, size=32, seed=0, workers=2), daemon=True)\n"
        "child.start(); child.join(); raise SystemExit(child.exitcode)"
    )
    assert (process.communicate(timeout=120), process.returncode)[1] == 0
    assert len(list(tmp_path.glob("scenes-*/JPEGImages/*"))) == 17


def test_a_killed_maker_leaves_no_lock_and_its_rest_is_removed(tmp_path: Path) -> None:
    wanted = {"train": 20, "val": 1, "size": 32, "seed": 0}
    process = start(f"ensure_scenes({str(tmp_path)!r}, **{wanted}, workers=1)")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tmp-*/JPEGImages/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob(".tmp-*"))
    made = ensure_scenes(tmp_path, **wanted, workers=1)
    assert not list(tmp_path.glob(".tmp-*"))
    assert len(list(made.glob("JPEGImages/*"))) == 21


def test_a_folder_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    place = tmp_path / SceneSet(1, 1, 32, 0).folder
    (place / "JPEGImages").mkdir(parents=True)
    (place / "JPEGImages/stale.jpg").write_bytes(b"")
    assert ensure_scenes(tmp_path, train=1, val=1, size=32, seed=0) == place
    assert not (place / "JPEGImages/stale.jpg").exists()
    assert (place / "manifest.json").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch, one_sentence) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(make, "write_scene", full)
    with pytest.raises(RunError) as raised:
        ensure_scenes(tmp_path, **WANTED, workers=1)
    assert raised.value.exit_code == ExitCode.NOT_SAVED
    one_sentence(raised, "No space left on device", tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, one_sentence) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as raised:
        ensure_scenes(tmp_path / "file/cache", **WANTED)
    one_sentence(raised, "cannot make the generated scenes", tmp_path / "file/cache")


def test_errors_and_deaths_of_workers_are_raised(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(make, "STARTUP", 1)
    with monkeypatch.context() as patch:
        patch.setattr(make, "make_folders", lambda folder: (folder / "ImageSets/Context").mkdir(parents=True))
        with pytest.raises(UserError, match=r"cannot make the generated scenes in .*: No such file or directory"):
            ensure_scenes(tmp_path, **WANTED, workers=2)
    monkeypatch.setattr(workers.sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match=r"cannot make the generated scenes in .*: a worker process ended early"):
        ensure_scenes(tmp_path, **WANTED, workers=2)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"train": 0}, "train"), ({"val": -1}, "val"), ({"size": 16}, "size"), ({"seed": -1}, "seed"),
     ({"workers": 0}, "workers"), ({"train": 2.5}, "train")],
)  # fmt: skip
def test_wrong_settings_are_named(wrong: dict, word: str, tmp_path: Path, one_sentence) -> None:
    with pytest.raises(ValueError) as raised:
        ensure_scenes(tmp_path, **{**WANTED, **wrong})
    one_sentence(raised, word, *wrong.values())
    assert not list(tmp_path.iterdir())


def test_the_contact_sheet_shows_pictures_beside_labels(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", indices=[0, 3], seed=4, size=48)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (18 + 2 * 52 - 4, 6 * 52 - 4, 3)
    one = render_scene(seed=4, index=3, size=48)
    assert np.array_equal(sheet[-48:, :48], one.image)
    assert np.array_equal(sheet[-48:, 156:204, 0], one.saliency)
    assert np.array_equal(sheet[-48:, 208:256, 0] == 0, boundaries(one.label_map))
    with pytest.raises(ValueError, match="no scenes"):
        contact_sheet(tmp_path / "none.png", indices=[])


def test_the_command_makes_both_and_names_mistakes(tmp_path: Path, capsys) -> None:
    assert make_scenes.main([str(tmp_path), "--train", "1", "--val", "1", "--size", "32", "--workers", "1"]) == 0
    assert len(list(tmp_path.glob("scenes-*/JPEGImages/*"))) == 2
    assert make_scenes.main(["--contact-sheet", str(tmp_path / "s.png"), "--size", "32", "--scenes", "0"]) == 0
    assert (tmp_path / "s.png").exists()
    assert make_scenes.main([str(tmp_path), "--train", "0"]) == 2
    assert "train" in capsys.readouterr().err
