"""The output folder: atomic files, plain refusals, logs per rank, surroundings without secrets."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ase_dist.errors import UserError
from ase_dist.training.record.environment import _git_commit, environment, hide_secrets
from ase_dist.training.record.logs import LOGGER, close_logs, format_line, open_logs, parse_line
from ase_dist.training.record.run_folder import RunFolder, meaning

pytestmark = pytest.mark.single_gpu


@pytest.fixture(autouse=True)
def _closed_logs() -> Iterator[None]:
    yield
    close_logs()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_file_is_written_and_reads_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.write_config("seed: 0\n")
    folder.write_ds_config({"zero_optimization": {"stage": 2}})
    folder.write_environment({**environment(), "accelerator": "cpu", "world_size": 2})
    folder.write_summary({"step": 3, "checkpoint": tmp_path})
    assert names(folder.path) == ["config.yaml", "ds_config.json", "env.json", "summary.json"]
    assert (folder.path / "config.yaml").read_text() == "seed: 0\n"
    assert json.loads((folder.path / "ds_config.json").read_text())["zero_optimization"] == {"stage": 2}
    assert json.loads((folder.path / "summary.json").read_text()) == {"step": 3, "checkpoint": str(tmp_path)}
    written = json.loads((folder.path / "env.json").read_text())
    assert written["accelerator"] == "cpu" and written["packages"]["torch"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output: cannot write to .*output=FOLDER") as caught:
        RunFolder(tmp_path / name).create()
    assert "\n" not in str(caught.value)


def test_a_read_only_folder_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:  # root may write everywhere, so the mode of a folder would not test this
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        RunFolder(tmp_path / "a").create()


def test_resume_never_refuses_a_folder_with_metrics(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.refuse_used(resume="never")
    folder.metrics.write_text('{"kind":"train","step":1}\n')
    with pytest.raises(ValueError, match=r"output=FOLDER.*resume=auto"):
        folder.refuse_used(resume="never")
    folder.refuse_used(resume="auto")


@pytest.mark.parametrize(("rank", "files"), [(0, ["rank_0.log", "train.log"]), (3, ["rank_3.log"])])
def test_log_lines_carry_the_rank_and_are_appended(tmp_path: Path, rank: int, files: list[str]) -> None:
    folder = RunFolder(tmp_path)
    for message in ("first", "second"):  # a run and its continuation
        open_logs(folder, rank=rank)
        logging.getLogger("ase_dist.training.loop").info(message)
        close_logs()
    assert names(tmp_path) == files
    for name in files:
        lines = (tmp_path / name).read_text().splitlines()
        assert [line.split(f"[rank {rank}] INFO ")[1] for line in lines] == ["first", "second"]
    assert not LOGGER.handlers


def test_environment_names_versions_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "wandb-secret-value")
    monkeypatch.setattr("sys.argv", ["train.py", "train.lr=1e-4", "--api-key", "s3cr3t"])
    found = environment()
    text = json.dumps(found)
    assert "wandb-secret-value" not in text and "s3cr3t" not in text
    assert found["command"] == ["train.py", "train.lr=1e-4", "--api-key", "***"]
    monkeypatch.setattr("sys.argv", ["/x/ase_dist/__main__.py", "train", "seed=1"])
    assert environment()["command"] == ["-m", "ase_dist", "train", "seed=1"]
    assert found["memory_bytes"] > 0 and found["cores_logical"] >= 1
    assert set(found["packages"]) >= {"torch", "deepspeed", "timm", "ase-dist"}


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("token=abc=def", "token=***"),
        ("--hub.api_key=abc", "--hub.api_key=***"),
        ("data.root=https://me:pw@host/data", "data.root=https://***@host/data"),
        ("tasks=[semseg,edge]", "tasks=[semseg,edge]"),
        ("output=runs/monkey", "output=runs/monkey"),
    ],
)
def test_secrets_on_the_command_line_are_starred(argument: str, shown: str) -> None:
    assert hide_secrets(["train.py", argument]) == ["train.py", shown]


def test_a_commit_is_named_only_for_a_checkout_of_this_package(tmp_path: Path) -> None:
    assert _git_commit(tmp_path) is None


def test_naming_the_files_of_a_run_makes_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    program = """
import sys
from ase_dist.training.record.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
print(folder.metrics, folder.prediction(7), folder.beat(3), folder.ranks(), folder.looks_used())
assert "torch" not in sys.modules and "deepspeed" not in sys.modules
"""
    place = tmp_path / "not yet"
    done = subprocess.run([sys.executable, "-c", program, str(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named = [place / "metrics.jsonl", place / "predictions" / "step_000007.png", place / "rank_3.beat"]
    assert done.stdout.strip() == f"{' '.join(map(str, named))} [] False"
    assert not place.exists()


def test_pictures_and_ranks_are_found_by_the_names_that_they_were_given(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [folder.step_of_prediction(folder.prediction(step)) for step in (0, 12, 1_234_567)] == [0, 12, 1_234_567]
    assert folder.step_of_prediction(tmp_path / "mine.png") is None
    for path in (folder.rank_log(2), folder.beat(10), folder.rank_log(10), tmp_path / "rank_x.log"):
        path.touch()
    assert folder.ranks() == [2, 10]


def test_every_file_of_a_run_has_a_meaning(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    files = [value.fget(folder) for value in vars(RunFolder).values() if isinstance(value, property)]
    assert len(files) > 10
    assert [path.name for path in [*files, folder.rank_log(3), folder.beat(12)] if not meaning(path.name)] == []
    assert meaning("rank_x.log") == meaning("notes.txt") == ""


def test_a_line_that_bypasses_logging_reads_like_one_of_its_own(tmp_path: Path) -> None:
    open_logs(RunFolder(tmp_path), rank=5)
    LOGGER.critical("the end: %s", 7)
    close_logs()
    for line in ((tmp_path / "rank_5.log").read_text(), format_line(5, "CRITICAL", "the end: 7")):
        found = parse_line(line.rstrip("\n"))
        assert found is not None and found[1:] == (5, "CRITICAL", "the end: 7")
    assert parse_line("Traceback (most recent call last):") is None


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json", "summary.json", "env.json"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_files_that_no_run_has_written_are_refused(name: str, resume: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / name).write_text("mine: 1\n")
    with pytest.raises(UserError, match=rf"^output: '\S*{name}' would be replaced"):
        folder.refuse_used(resume=resume)
    (tmp_path / name).unlink()
    folder.write_environment(environment())
    folder.write_config("seed: 0\n")
    folder.refuse_used(resume=resume)
