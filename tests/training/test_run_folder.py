"""The output folder: atomic files, plain refusals, logs per rank, surroundings without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from ase_dist.training.record import run_folder
from ase_dist.training.record.run_folder import LOGGER, RunFolder, close_logs, environment, hide_secrets

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
    folder.write_environment({"accelerator": "cpu", "world_size": 2})
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
        RunFolder(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_read_only_folder_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:  # root may write everywhere, so the mode of a folder would not test this
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        RunFolder(tmp_path / "a")


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
        folder.open_logs(rank=rank)
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
    assert run_folder._git_commit(tmp_path) is None
