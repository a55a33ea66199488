"""What a person sees: one bar or one line per report, warnings only from other ranks."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ase_dist.training.record import console
from ase_dist.training.record.console import StepProgress, clock, close_console, set_up_logging
from ase_dist.training.record.logs import LOGGER, close_logs, open_logs
from ase_dist.training.record.run_folder import RunFolder

pytestmark = pytest.mark.single_gpu


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_console()
    close_logs()


def test_rank_0_shows_everything_and_the_others_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        assert set_up_logging(rank=rank, terminal=False) is None
        LOGGER.info("news of %d", rank)
        LOGGER.warning("trouble of %d", rank)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.findall(r"\[rank (\d)\] (\w+) (.*)", err) == [
        ("0", "INFO", "news of 0"),
        ("0", "WARNING", "trouble of 0"),
        ("1", "WARNING", "trouble of 1"),
    ]


def test_setting_up_twice_shows_lines_once_and_closing_restores(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        set_up_logging(rank=0, terminal=False)
    LOGGER.info("once")
    assert capsys.readouterr().err.count("once") == 1
    close_console()
    assert LOGGER.handlers == [] and LOGGER.propagate


def test_without_a_terminal_each_report_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen = set_up_logging(rank=0, terminal=False)
    with StepProgress("train", total=20, start=10, console=screen) as progress:
        for step in range(11, 21):
            progress.advance(step)
            if step % 5 == 0:
                progress.report(step, {"loss": 1 / 3, "images/s": 12.0})
        with progress.inner("evaluate", total=2) as tick:
            tick()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "train 15/20  loss 0.3333  images/s 12  eta 0:00:0" in lines[0]
    assert "train 20/20" in lines[1] and lines[1].endswith("eta 0:00:00")


def test_on_a_terminal_the_bar_replaces_the_lines_which_files_still_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    fake = Console(file=stream, force_terminal=True, width=120)
    monkeypatch.setattr(console, "Console", lambda stderr: fake)
    assert set_up_logging(rank=0) is fake
    open_logs(RunFolder(tmp_path), rank=0)
    with StepProgress("train", total=4, console=fake) as progress:
        LOGGER.info("an event")
        progress.advance(1)
        progress.report(2, {"loss": 0.5, "lr": 1e-3, "images/s": 3.0})
        with progress.inner("evaluate", total=2) as tick:
            tick()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "an event" in shown and "2/4" in shown and "loss 0.5  images/s 3" in shown
    assert "lr 0.001" not in shown
    logged = (tmp_path / "train.log").read_text()
    assert "an event" in logged and "train 2/4  loss 0.5  lr 0.001  images/s 3  eta" in logged


def test_the_time_left_counts_this_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 100.0, 110.0, 110.0])  # made, entered, asked
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with StepProgress("train", total=100, start=50) as progress:
        assert progress.seconds_left(55) == pytest.approx(10 / 5 * 45)
        assert clock(progress.seconds_left(50)) == "-"
    assert clock(3725.4) == "1:02:05"


def test_messages_are_not_read_as_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda stderr: Console(file=stream, force_terminal=True, width=120))
    set_up_logging(rank=0)
    logging.getLogger("ase_dist").info("tasks=[semseg] and [/bold]")
    assert "[semseg]" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
