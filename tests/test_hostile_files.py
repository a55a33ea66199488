"""What lies in the place of a file: a pipe that never gives anything, a device that never ends. Nothing waits."""

import os
import signal

import pytest

from ase_dist.commands.main import main
from ase_dist.data.cache import locked
from ase_dist.data.folder import list_lines
from ase_dist.errors import ExitCode, UserError
from ase_dist.files import sha256_of
from ase_dist.image_size import ImageSize
from ase_dist.overwriting import contains
from ase_dist.report.ranks import read_ranks
from ase_dist.scenes.make import SceneSet, is_complete
from ase_dist.training.process.watchdog import Watchdog
from ase_dist.training.record.logs import close_logs, open_logs
from ase_dist.training.record.metrics import Recorder, read_metrics
from ase_dist.training.record.records import Records
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint.catalog import read_pointer
from ase_dist.training.state.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.single_gpu


@pytest.fixture(autouse=True)
def deadline():
    """What waits is interrupted, and fails."""

    def fail(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["a named pipe", "a device"])
def put(request, tmp_path):
    """Puts something that is no file at a name in the folder; what the refusal calls it."""

    def at(name):
        os.mkfifo(tmp_path / name) if request.param == "a named pipe" else (tmp_path / name).symlink_to("/dev/zero")
        return request.param

    return at


READERS = {
    "a hash": ("weights.safetensors", sha256_of),
    "the check of overwriting": ("config.yaml", contains(b"x")),
    "metrics": ("metrics.jsonl", read_metrics),
    "metrics that are continued": ("metrics.jsonl", lambda path: Recorder(path, enabled=True)),
    "the log": ("train.log", lambda path: open_logs(RunFolder(path.parent), rank=0)),
    "the log of a rank": ("rank_1.log", lambda path: open_logs(RunFolder(path.parent), rank=1)),
    "the watchdog's log": ("rank_0.log", lambda path: Watchdog(path.parent, timeout=60).__enter__()),
    "a manifest": ("manifest.json", lambda path: read_manifest(path.parent)),
    "the manifest of scenes": (
        "manifest.json",
        lambda path: is_complete(path.parent, SceneSet(train=1, val=1, size=ImageSize(32, 32), seed=0)),
    ),
    "a list of images": ("train.txt", lambda path: list_lines(path, remedy="")),
    "the lock of a cache": (".scenes.lock", lambda path: locked(path.parent / "scenes").__enter__()),
    "a result": ("summary.json", lambda path: RunFolder(path.parent).read_summary()),
}


@pytest.mark.parametrize("what", READERS)
def test_what_is_no_file_is_refused_in_one_sentence(put, tmp_path, what):
    name, read = READERS[what]
    kind = put(name)
    try:
        with pytest.raises(UserError, match=rf"{name}: got {kind}, wanted a regular file") as raised:
            read(tmp_path / name)
    finally:
        close_logs()
    assert "\n" not in str(raised.value)


def test_a_pointer_that_is_no_file_is_not_followed(put, tmp_path, caplog):
    put("latest")
    assert read_pointer(tmp_path, "latest") is None
    assert "it is not followed" in caplog.text


def test_a_report_passes_over_what_is_no_file(put, tmp_path):
    put("rank_0.log")
    put("rank_0.beat")
    (report,) = read_ranks(RunFolder(tmp_path), Records([]))
    assert not report.notices and report.host == ""


DECIDING = {  # by name, what their folder is: commands that look for them
    "dataset.yaml": [
        ["train", "data.root=.", "--print-config"],
        ["train", "data.name=dataset.yaml", "--print-config"],
        ["prepare_data", ".", "--check-only"],
        ["train", "--config", "dataset.yaml", "--print-config"],
    ],
    "config.yaml": [["train", "--resume", "."], ["evaluate", "."], ["export", ".", "out"], ["clean", "."]],
    "export.json": [["predict", ".", "photo.png", "--out", "out"]],
}
PUT = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a link that leads nowhere": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize("name", DECIDING)
def test_a_name_that_decides_what_a_folder_is_must_be_a_files(tmp_path, monkeypatch, capsys, name, kind):
    """Else a data set of one's own would be taken for generated scenes, and a run for no run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").touch()
    PUT[kind](tmp_path / name)
    for words in DECIDING[name]:
        assert main(words) == ExitCode.USAGE, words
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{name}: got {kind}" in said and "wanted a regular file" in said, (words, said)
