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
from ase_dist.training.record.environment import (
    KEYS,
    OPTIONS,
    environment,
    git_commit,
    harmless_command,
    harmless_ds_config,
    harmless_environment,
)
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
    def refuse(
        self: Path, data: bytes
    ) -> None:  # root may write everywhere, so the mode of a folder would not test this
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
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
    monkeypatch.setattr("sys.argv", ["/elsewhere/code/launch/train.py", "train.lr=1e-4", "--api-key", "s3cr3t"])
    found = environment()
    text = json.dumps(found)
    assert "wandb-secret-value" not in text and "s3cr3t" not in text and "/elsewhere/code" not in text
    assert found["command"] == ["launch/train.py", "train.lr=1e-4"]
    monkeypatch.setattr("sys.argv", ["/x/ase_dist/__main__.py", "train", "seed=1"])
    assert environment()["command"] == ["-m", "ase_dist", "train", "seed=1"]
    assert found["memory_bytes"] > 0 and found["cores_logical"] >= 1
    assert set(found["packages"]) >= {"torch", "deepspeed", "timm", "ase-dist"}
    assert {*found, "world_size", "device", "torch_threads"} == set(KEYS)


SECRET = "hunter2"
SECRETS = (
    *(f"{name}={SECRET}" for name in ("token", "auth", "pass", "pwd", "passphrase", "credentials", "bearer", "cookie")),
    *(f"{name}={SECRET}" for name in ("sas", "data.token", "model.moe.key", "DATA.ROOT")),
    f"data.root=https://x.blob.core/c?sig={SECRET}",
    f"data.root=s3://me:p@{SECRET}@host/data",
    f"data.root=https://me:p/{SECRET}@host/data",
    f"output=runs/x\n{SECRET}",
    f"output=runs/token={SECRET}",
    f"model.backbone_args={{token: {SECRET}}}",
    f"tasks={{token: {SECRET}}}",
    f"--password={SECRET}",
    f"--api-key {SECRET}",
    f"-p {SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"--config https://me:{SECRET}@host/x.yaml",
    f"--config=https://me:{SECRET}@host/x.yaml",
    SECRET,
)


@pytest.mark.parametrize("script", ["launch/train.py", "/x/ase_dist/__main__.py train", "my_script.py"])
@pytest.mark.parametrize("given", SECRETS)
def test_only_what_is_known_to_be_harmless_is_kept_of_a_command_line(given: str, script: str) -> None:
    option, _, value = given.partition(" ") if given.startswith("-") else (given, "", "")
    words = harmless_command([*script.split(), "seed=1", option, *([value] if value else []), "train.lr=0.1"])
    assert SECRET not in " ".join(words)
    assert words == [] if script == "my_script.py" else {"seed=1", "train.lr=0.1"} <= set(words)
    old = harmless_environment({"command": ["launch/train.py", option, value], "note": SECRET, "python": "3.11"})
    assert SECRET not in json.dumps(old) and old["python"] == "3.11"


def test_the_command_of_a_run_stays_whole() -> None:
    words = ["launch/train.py", "--config", "scenes", "--deepspeed_config=ds_configs/z2.json", "--baseline", "mtl_vit",
             "tasks=[semseg, edge]", "output=runs/exp #2", "data.root=/data/P_MT-1.0", "train.lr=1e-4"]  # fmt: skip
    assert harmless_command(words) == words == harmless_command(harmless_command(words))
    started = [*words[:1], "--local_rank=0", *words[1:], "--max-restarts", "3"]
    assert harmless_command(started) == words


def test_the_options_are_those_of_the_command() -> None:
    from ase_dist.commands.train import parser

    own = {option for action in parser()._actions for option in action.option_strings if action.nargs is None}
    others = {"--local_rank", "--local-rank", "--max-restarts", "--row"}  # a launcher's, its own, an old name
    assert own - others == set(OPTIONS)


def test_what_a_monitor_logs_in_with_is_not_written() -> None:
    config = {
        "zero_optimization": {"stage": 2},
        "comet": {"enabled": True, "api_key": SECRET, "project": "p", "experiment_key": SECRET},
        "wandb": {"enabled": False, "key": SECRET},
    }
    shown = harmless_ds_config(config)
    assert SECRET not in json.dumps(shown)
    assert shown == {
        "zero_optimization": {"stage": 2},
        "comet": {"enabled": True, "project": "p"},
        "wandb": {"enabled": False},
    }


def test_a_commit_is_named_only_for_a_checkout_of_this_package(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


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
