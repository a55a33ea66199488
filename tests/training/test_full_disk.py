"""A full disk while a run records: it saves, ends with 74 and one sentence, and goes on when there is room again."""

import re
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import pytest

from ase_dist.errors import ExitCode, exit_code_of
from ase_dist.training.process.restarts import FINAL_CODES
from ase_dist.training.record.appending import LineFile, RecordError, recording
from ase_dist.training.record.logs import LogFile
from ase_dist.training.record.metrics import Recorder, read_metrics
from ase_dist.training.record.plots import draw_all
from ase_dist.training.record.run_folder import RunFolder
from tests.disks import no_space, small_disk
from tests.training.conftest import start_world
from tests.training.tiny_runs import checkpoint, metric_lines, same_bits, tiny_run

# saved at the end and after the best evaluations
REAL = "really_full"
ONCE = ("checkpoint.every=0", "train.batch_size=2", "eval.every=2", "eval.pictures=1")


@pytest.mark.single_gpu
def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=8) as disk, LineFile(disk / "lines") as file:
        line = "x" * 999 + "\n"
        for _ in range(7):
            file.append(line)
        with pytest.raises(RecordError, match=r"lines cannot be written \(No space left on device\)") as raised:
            file.append("y" * 2000 + "\n")  # there is room for a part of it
        assert raised.value.exit_code == ExitCode.NOT_SAVED
        file.append(line)
        assert (disk / "lines").read_text() == 8 * line


@pytest.mark.single_gpu
@pytest.mark.parametrize(
    ("error", "code"), [(no_space(), 74), (OSError(5, "Input/output error"), 71), (PermissionError(13, "no"), 74)]
)
def test_records_have_an_exit_code(tmp_path, error, code):
    sentence = re.escape(f"{tmp_path} cannot be written ({error.strerror})")
    with pytest.raises(RecordError, match=sentence) as raised, recording(tmp_path):
        raise error
    assert raised.value.exit_code == code


def full_disk():
    """An open file that takes nothing."""
    return Path("/dev/full").open("ab", buffering=0)


def full_log(name):
    """The log of this name is on a full disk."""
    real = LogFile.__init__

    def init(handler, path, *, rank):
        real(handler, path, rank=rank)
        if path.name == name:
            handler.file._file = full_disk()

    return mock.patch.object(LogFile, "__init__", init)


def full_from(step):
    """The metrics are on a full disk from ``step`` on."""
    real = Recorder.write

    def write(recorder, kind, *, step, values):
        if recorder._file is not None and kind == "train" and step == begin:
            recorder._file._file = full_disk()
        real(recorder, kind, step=step, values=values)

    begin = step
    return mock.patch.object(Recorder, "write", write)


def ended(folder, name, *options):
    """The exit code of a run, its sentence, and the checkpoints that it left."""
    try:
        code, sentence = tiny_run(Path((folder / "scenes").read_text()), folder / name, *ONCE, *options), ""
    except Exception as error:
        code, sentence = exit_code_of(error), str(error)
    return code, sentence, [path.name for path in sorted((folder / name / "checkpoints").glob("step_*"))]


def recorded_on_full_disks(rank, folder):
    """Two ranks, of which one has the full disk; by what is full, how the run ended."""
    found = {}
    with full_from(step=3):
        found["metrics"] = ended(folder, "metrics")
    for name, file in (("log", "train.log"), ("rank_log", "rank_1.log")):
        with full_log(file):
            found[name] = ended(folder, name)
    with mock.patch("ase_dist.pictures.grid.write_atomic", side_effect=no_space()):
        found["picture"] = ended(folder, "picture")
    with mock.patch("ase_dist.training.record.run_folder.write_atomic", side_effect=no_space()):
        found["settings"] = ended(folder, "settings")
    with mock.patch.object(RunFolder, "write_summary", side_effect=RecordError("x", exit_code=ExitCode.NOT_SAVED)):
        found["summary"] = ended(folder, "summary")
    for name in ("metrics", "picture"):
        found[f"{name} again"] = ended(folder, name)
    found["undisturbed"] = ended(folder, "undisturbed")
    if (folder / REAL).is_mount():
        found[REAL] = ended(folder, REAL, "train.max_steps=3")
    return found


@pytest.fixture(scope="module")
def pair(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    (folder / "scenes").write_text(str(scenes))
    with ExitStack() as disks:
        with suppress(pytest.skip.Exception):  # where mounting is not allowed
            disks.enter_context(small_disk(folder / REAL, kilobytes=120))
        world = start_world(recorded_on_full_disks, folder, size=2, seconds=120)()
    assert world.codes == [0, 0]
    return folder, world.results


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("name", "file", "step"),
    [
        ("metrics", "metrics.jsonl", 4),
        ("log", "train.log", 1),
        ("rank_log", "rank_1.log", 1),
        ("picture", "predictions/step_000002.png", 3),
    ],
)
def test_a_run_that_cannot_record_saves_and_all_ranks_end_with_one_sentence(pair, name, file, step):
    folder, (first, second) = pair
    assert first[name] == second[name]
    code, sentence, checkpoints = first[name]
    assert code == ExitCode.NOT_SAVED and code in FINAL_CODES
    assert f"{folder / name / file} cannot be written (No space left on device); step {step} is saved" in sentence
    assert "\n" not in sentence
    assert f"step_{step}" in checkpoints
    end = read_metrics(folder / name / "metrics.jsonl")[-1]
    if name not in ("metrics", "picture"):
        assert (end["kind"], end["exit"]) == ("end", "not_saved")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["metrics", "picture"])
def test_with_room_again_it_goes_on_as_if_nothing_had_happened(pair, name):
    folder, results = pair
    assert [found[f"{name} again"][:2] for found in results] == [[0, ""]] * 2
    assert same_bits(checkpoint(folder / name, 6), checkpoint(folder / "undisturbed", 6)) == []
    lost = {3, 4} if name == "metrics" else set()
    wanted = {step: line for step, line in metric_lines(folder / "undisturbed").items() if step not in lost}
    assert metric_lines(folder / name) == wanted


@pytest.mark.multi_gpu
def test_nothing_waits_for_a_rank_that_cannot_write_at_the_start_or_at_the_end(pair):
    folder, results = pair
    assert {found["settings"][0] for found in results} == {found["summary"][0] for found in results} == {74}
    assert (
        f"{folder / 'settings' / 'env.json'} cannot be written (No space left on device)" in results[1]["settings"][1]
    )


@pytest.mark.multi_gpu
def test_a_disk_that_is_really_full_ends_both_ranks_with_one_sentence(pair):
    """Nothing fits any more: the save that the full disk makes due fails too, and what ends the run is that."""
    _, results = pair
    if REAL not in results[0]:
        pytest.skip("mounting is not allowed here")
    assert results[0][REAL] == results[1][REAL]
    code, sentence, checkpoints = results[0][REAL]
    assert (code, checkpoints) == (ExitCode.NOT_SAVED, []) and code in FINAL_CODES
    assert re.match(r"the checkpoint of step \d was not saved: .*No space left on device", sentence), sentence
    assert "\n" not in sentence


def pictures_and_scalars_on_small_disks(rank, folder):
    """Real ones, of one or two pages, under the run's folders."""
    found = {}
    with small_disk(folder / "everything", kilobytes=120):
        found["everything"] = ended(folder, "everything", "train.max_steps=3")
    with ExitStack() as disks:
        for name, pages in (("predictions", 1), ("tensorboard", 3), ("csv", 8)):
            disk = disks.enter_context(small_disk(folder / name / name, kilobytes=4 * pages))
            (disk / "filling").write_bytes(b"x" * 4096)
            on = [f"monitor.{name}=true"] if name in ("tensorboard", "csv") else []
            found[name] = ended(folder, name, "train.max_steps=60", "eval.every=20", *on)
    return found


@pytest.mark.single_gpu
def test_pictures_and_scalars_on_real_small_disks(scenes, tmp_path, capfd):
    (tmp_path / "scenes").write_text(str(scenes))
    world = start_world(pictures_and_scalars_on_small_disks, tmp_path, seconds=120)()
    assert world.codes == [0]
    code, sentence, checkpoints = world.results[0]["everything"]
    assert (code, checkpoints) == (ExitCode.NOT_SAVED, [])
    assert re.match(r"the checkpoint of step \d was not saved: .*No space left on device", sentence), sentence
    for name, file in (("predictions", "predictions/predictions/step_000020.png"), ("tensorboard", "tensorboard"),
                       ("csv", "csv")):  # fmt: skip
        code, sentence, checkpoints = world.results[0][name]
        assert code == ExitCode.NOT_SAVED
        assert sentence.startswith(f"{tmp_path / file} cannot be written (No space left on device"), sentence
        assert f"{re.search(r'step ([0-9]+) is saved', sentence)[1]}" in checkpoints[-1]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.single_gpu
def test_plots_on_a_full_disk(tmp_path):
    folder = RunFolder(tmp_path)
    recorder = Recorder(folder.metrics, enabled=True)
    recorder.write("train", step=1, values={"loss": 1.0, "losses": {}})
    recorder.close()
    with small_disk(folder.plots, kilobytes=8):
        with pytest.raises(RecordError, match=r"losses\.png cannot be written \(No space left on device\)") as raised:
            draw_all(folder)
        assert raised.value.exit_code == ExitCode.NOT_SAVED
