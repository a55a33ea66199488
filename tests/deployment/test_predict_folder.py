"""``launch/predict.py``: every image once under its own name, what cannot be read skipped, nothing half written."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ase_dist.commands.predict import main
from ase_dist.deployment import predict_folder
from ase_dist.deployment.predict_folder import find_sources
from ase_dist.errors import ExitCode
from ase_dist.files import sha256_of

from .conftest import photo

pytestmark = pytest.mark.single_gpu
TASKS = ("semseg", "human_parts", "saliency", "edge", "normals")
ENDS_EDGE = ("_edge.png", "_sheet.png")
ENDINGS = {".npz", "_sheet.png", *(f"_{task}.png" for task in TASKS)}


@pytest.fixture
def predict():
    return main


@pytest.fixture
def photos(tmp_path):
    """Two folders with a name in common, a file that is none, and one of another form."""
    for i, name in enumerate(("a/one.png", "a/two.jpg", "a/deep/one.png", "b/one.png", "b/ONE.jpg")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(30 + i, 44, seed=i)).save(path)
    (tmp_path / "in" / "a" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "in"


def index(out):
    return json.loads((out / predict_folder.INDEX).read_text())


def test_every_image_gets_its_pictures_and_arrays(export, model, photos, tmp_path, predict, capsys):
    out = tmp_path / "out"
    arguments = [
        str(export),
        str(photos / "a"),
        str(photos / "b"),
        "--out",
        str(out),
        "--batch",
        "2",
        "--device",
        "cpu",
    ]
    assert predict(arguments) == 3  # one was skipped
    listed = index(out)
    names = {entry["name"]: Path(entry["source"]) for entry in listed["images"]}
    assert {name: path.relative_to(photos.resolve()).as_posix() for name, path in names.items()} == {
        "one": "a/one.png", "two": "a/two.jpg", "deep/one": "a/deep/one.png",
        "ONE_2": "b/ONE.jpg", "one_3": "b/one.png",
    }  # fmt: skip
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {f"{name}{ending}" for name in names for ending in ENDINGS} | {predict_folder.INDEX}
    assert [Path(entry["source"]).name for entry in listed["skipped"]] == ["broken.jpg"]
    assert "skipped" in capsys.readouterr().err
    for name, source in names.items():
        expected = model.predict([source])[0]
        with np.load(out / f"{name}.npz") as stored:
            assert list(stored) == list(TASKS)
            for task in TASKS:
                half = stored[task].dtype == np.float16
                assert half == (task in ("saliency", "edge", "normals")) and stored[task].shape == expected[task].shape
                np.testing.assert_allclose(stored[task].astype(float), expected[task].astype(float), atol=1e-3)
        with Image.open(out / f"{name}_semseg.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected["semseg"])


def test_all_fine_is_exit_code_0_and_chosen_tasks_alone_are_written(export, photos, tmp_path, predict):
    out = tmp_path / "out"
    arguments = [str(export), str(photos / "b"), "--out", str(out), "--tasks", "edge,semseg", "--device", "cpu"]
    assert predict(arguments) == 0
    assert {path.name for path in out.glob("one_2*")} == {
        "one_2.npz",
        "one_2_sheet.png",
        "one_2_edge.png",
        "one_2_semseg.png",
    }
    assert [task["name"] for task in index(out)["tasks"]] == ["edge", "semseg"]
    assert len(index(out)["tasks"][1]["palette"]) == 21 and index(out)["step"] == 7


def test_output_inside_the_input_is_not_predicted_again(export, photos, tmp_path, predict):
    arguments = [
        str(export),
        str(photos / "b"),
        "--out",
        str(photos / "b" / "out"),
        "--tasks",
        "edge",
        "--device",
        "cpu",
    ]
    assert predict(arguments) == predict(arguments) == 0
    assert len(index(photos / "b" / "out")["images"]) == 2


def hashes(folder):
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def edge_only(export, *sources, out):
    return [str(export), *map(str, sources), "--out", str(out), "--tasks", "edge", "--device", "cpu"]


@pytest.mark.parametrize("foreign", ["ONE_edge.png", "ONE_sheet.png", "ONE.npz", "one_2.npz", predict_folder.INDEX])
@pytest.mark.parametrize("kind", ["file", "dangling link", "folder"])
def test_nothing_is_replaced_that_predict_did_not_write(foreign, kind, export, photos, predict, capsys):
    mine = photos / "b" / foreign
    {"file": lambda: mine.write_bytes(b'{"format": "my own"}'), "folder": mine.mkdir,
     "dangling link": lambda: mine.symlink_to("nowhere")}[kind]()  # fmt: skip
    before = hashes(photos)
    assert predict(edge_only(export, photos / "b", out=photos / "b")) == 2
    assert hashes(photos) == before and (mine.is_symlink() or mine.exists())
    assert re.search(rf"error: --out: '\S*{re.escape(foreign)}' would be replaced", capsys.readouterr().err)


def test_a_folder_may_be_source_and_place_again_and_again(export, photos, predict, caplog):
    out = photos / "b"
    assert predict(edge_only(export, out, out=out)) == 0
    first = hashes(out)
    assert predict(edge_only(export, out, out=out)) == 0
    assert predict(edge_only(export, *sorted(out.iterdir()), out=out)) == 0  # as a shell gives ``*``
    assert predict(edge_only(export, photos / "b", out=photos / "other")) == 0  # nor are they sources for elsewhere
    assert {entry["name"] for entry in index(photos / "other")["images"]} == {"ONE", "one_2"}
    assert set(hashes(out)) == set(first)


def test_a_changed_prediction_is_the_user_s_own(export, photos, predict, capsys):
    out = photos / "b"
    assert predict(edge_only(export, out, out=out)) == 0
    Image.fromarray(photo(20, 20)).save(out / "one_2_edge.png")
    before = hashes(out)
    assert predict(edge_only(export, out, out=out)) == 2 and hashes(out) == before
    assert predict(edge_only(export, out, out=photos / "other")) == 0  # and an image like others
    assert "one_2_edge" in {entry["name"] for entry in index(photos / "other")["images"]}


class Killed(BaseException):
    """What no command catches."""


def test_an_interrupted_command_goes_on_over_its_own_files(export, photos, tmp_path, predict, monkeypatch):
    out, calls = tmp_path / "out", []

    def killed(*arguments, **_):
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        real(*arguments)

    real = predict_folder._write
    with monkeypatch.context() as patch:
        patch.setattr(predict_folder, "_write", killed)
        with pytest.raises(Killed):
            predict(edge_only(export, photos / "b", out=out))
    assert (out / "ONE_edge.png").exists() or (out / "one_2_edge.png").exists()
    assert not (out / predict_folder.INDEX).exists()
    assert predict(edge_only(export, photos / "b", out=out)) == 0
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_files_of_an_earlier_command_stay_known(export, photos, tmp_path, predict):
    out = tmp_path / "out"
    for source in ("a/one.png", "a/two.jpg", "a/one.png"):
        assert predict(edge_only(export, photos / source, out=out)) == 0
    assert set(index(out)["files"]) == {f"{name}{end}" for name in ("one", "two") for end in (*ENDS_EDGE, ".npz")}


def test_an_index_of_earlier_versions_names_its_files(export, photos, tmp_path, predict):
    out = tmp_path / "out"
    assert predict(edge_only(export, photos / "b", out=out)) == 0
    tree = index(out)
    del tree["files"]
    (out / predict_folder.INDEX).write_text(json.dumps(tree))
    assert predict(edge_only(export, photos / "b", out=out)) == 0


def test_a_bug_while_reading_is_no_skipped_file(export, photos, tmp_path, predict, monkeypatch, capsys):
    def read_with_bug(path):
        raise ValueError("a bug, not an unreadable file")

    monkeypatch.setattr(predict_folder, "read_rgb", read_with_bug)
    assert predict(edge_only(export, photos / "b", out=tmp_path / "out")) == ExitCode.FAILED
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("links", [1, 2, 5])
def test_links_to_folders_above_end(links, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    Image.fromarray(photo()).save(tmp_path / "deep" / "b.png")
    for i in range(links):
        (tmp_path / f"loop{i}").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "deep" / f"up{i}").symlink_to("..", target_is_directory=True)
    (tmp_path / "itself.png").symlink_to("itself.png")
    found = find_sources([tmp_path], out=tmp_path / "out")
    assert [source.name for source in found] == ["a", "deep/b", "itself"]


def test_a_linked_folder_is_searched_under_its_first_name(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in").mkdir()
    Image.fromarray(photo()).save(tmp_path / "elsewhere" / "x.png")
    for name in ("p", "q"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert [source.name for source in find_sources([tmp_path / "in"], out=tmp_path / "out")] == ["p/x"]


def test_a_file_named_twice_is_predicted_once(photos, tmp_path):
    found = find_sources([photos / "b" / "one.png", photos / "b", photos / "a" / ".." / "b"], out=tmp_path)
    assert [source.name for source in found] == ["one", "ONE_2"]


def test_a_name_that_looks_numbered_is_not_taken_twice(tmp_path):
    for name in ("x.png", "x.jpg", "x_2.png"):
        Image.fromarray(photo()).save(tmp_path / name)
    found = find_sources([tmp_path / name for name in ("x.png", "x.jpg", "x_2.png")], out=tmp_path / "out")
    assert [source.name for source in found] == ["x", "x_2", "x_2_2"]


def test_a_name_too_long_for_its_predictions_is_skipped_and_listed(export, tmp_path, predict):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a" * 250, "b" * 225, "c"):
        Image.new("RGB", (40, 40)).save(source / f"{name}.png")
    assert predict([str(export), str(source), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 3
    listed = index(tmp_path / "out")
    assert [entry["name"] for entry in listed["images"]] == ["b" * 225, "c"]
    (skipped,) = listed["skipped"]
    assert skipped["source"] == str(source / f"{'a' * 250}.png") and "rename it" in skipped["reason"]


def test_nothing_readable_at_all_is_told_and_listed(export, tmp_path, predict):
    (tmp_path / "x.png").write_bytes(b"")
    assert predict([str(export), str(tmp_path / "x.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 3
    assert index(tmp_path / "out")["images"] == [] and len(index(tmp_path / "out")["skipped"]) == 1


def test_an_error_while_writing_leaves_no_half_file(export, photos, tmp_path, predict, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict_folder.np, "savez_compressed", full)
    out = tmp_path / "out"
    assert predict([str(export), str(photos / "b"), "--out", str(out), "--device", "cpu"]) == 74
    assert "error: --out: cannot write to" in capsys.readouterr().err
    assert not [*out.rglob("*.npz"), *out.rglob("*.tmp")] and not (out / predict_folder.INDEX).exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["EXPORT", "nowhere.png"], r"'nowhere.png': no such file or folder"),
        (["EXPORT", "EMPTY"], r"there is no image in "),
        (["EMPTY", "PHOTOS"], r"no export, there is no export.json"),
        (["EXPORT", "PHOTOS", "--tasks", "edges"], r"--tasks: the model has no 'edges'.*did you mean 'edge'"),
        (["EXPORT", "PHOTOS", "--tasks", "edge,edge"], r"--tasks: got 'edge,edge', wanted .* each at most once"),
        (["EXPORT", "PHOTOS", "--batch", "0"], r"--batch: got 0"),
        (["EXPORT", "PHOTOS", "--device", "gpu"], r"--device: got 'gpu'"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(arguments, sentence, export, photos, tmp_path, predict, capsys):
    (tmp_path / "empty").mkdir()
    places = {"EXPORT": export, "EMPTY": tmp_path / "empty", "PHOTOS": photos}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    assert predict([*arguments, "--out", str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(sentence, errors[0])
    assert not (tmp_path / "out").exists()
