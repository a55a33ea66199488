"""metrics.jsonl: what is written is read back, whatever killed the writer, and a resumed run rewrites its steps."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ase_dist.training.record.metrics import Recorder, read_metrics

pytestmark = pytest.mark.single_gpu
FILE = "metrics.jsonl"


def write_steps(folder: Path, steps: range) -> Path:
    recorder = Recorder(folder / FILE, enabled=True)
    for step in steps:
        recorder.write("train", step=step, values={"loss": step / 3})
    recorder.close()
    return recorder.path


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_values_of_every_form_are_read_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / FILE, enabled=True)
    load = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    values = {
        "epoch": 0.5, "loss": torch.tensor(1.25), "losses": {"edge": np.float32(0.5)}, "expert_load": load,
        "tasks": ("edge", "depth"), "skipped": False, "note": None, "where": tmp_path,
    }  # fmt: skip
    recorder.write("train", step=7, values=values)
    (record,) = read_metrics(recorder.path)  # flushed: readable while the run goes on
    assert (record["kind"], record["step"]) == ("train", 7)
    assert (record["epoch"], record["loss"], record["losses"]) == (0.5, 1.25, {"edge": 0.5})
    np.testing.assert_allclose(record["expert_load"], load, rtol=1e-4)
    assert (record["tasks"], record["skipped"], record["note"]) == (["edge", "depth"], False, None)
    assert record["where"] == str(tmp_path)


def test_what_is_not_finite_is_null_and_the_line_stays_json(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / FILE, enabled=True)
    recorder.write("train", step=0, values={"loss": float("nan"), "load": torch.tensor([1.0, float("inf")])})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(recorder.path.read_text(), parse_constant=refuse)
    assert record["loss"] is None and record["load"] == [1.0, None]


def test_disabled_leaves_the_disk_alone(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "none" / FILE, enabled=False)
    recorder.write("train", step=0, values={"loss": 1.0})
    recorder.truncate_after(0)
    recorder.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 2, 10, 25])
def test_a_line_cut_short_is_skipped_and_not_glued_to_the_next(tmp_path: Path, cut: int) -> None:
    path = write_steps(tmp_path, range(4))
    path.write_bytes(path.read_bytes()[:-cut])
    whole = [0, 1, 2, 3] if cut == 1 else [0, 1, 2]  # without its newline a line is still whole
    assert steps_of(path) == whole
    write_steps(tmp_path, range(4, 6))
    assert steps_of(path) == [*whole, 4, 5]


def test_a_tail_of_zero_bytes_after_a_power_cut_is_skipped(tmp_path: Path) -> None:
    path = write_steps(tmp_path, range(3))
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert steps_of(path) == [0, 1, 2]


def test_damage_before_the_last_line_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = write_steps(tmp_path, range(4))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_truncation_drops_later_steps_and_writing_goes_on(tmp_path: Path) -> None:
    write_steps(tmp_path, range(6))
    recorder = Recorder(tmp_path / FILE, enabled=True)
    recorder.truncate_after(3)
    assert steps_of(recorder.path) == [0, 1, 2, 3]
    recorder.write("eval", step=4, values={})
    recorder.close()
    assert steps_of(recorder.path) == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_reader_that_has_the_file_open_goes_on_reading_the_same_one(tmp_path: Path) -> None:
    path = write_steps(tmp_path, range(6))
    with path.open("rb") as reader:
        assert len(reader.readlines()) == 6
        whole = path.stat()
        recorder = Recorder(path, enabled=True)
        recorder.truncate_after(5)
        assert path.stat().st_mtime_ns == whole.st_mtime_ns, "nothing to take out, nothing written"
        recorder.truncate_after(3)
        recorder.write("train", step=4, values={"again": True})
        recorder.close()
        reader.seek(0)
        assert [json.loads(line)["step"] for line in reader] == [0, 1, 2, 3, 4]
    assert path.stat().st_ino == whole.st_ino


def test_starts_and_ends_are_kept_whatever_step_a_resumed_run_goes_back_to(tmp_path: Path) -> None:
    for step, exit_word in ((0, "failed"), (4, "stopped")):
        recorder = Recorder(tmp_path / FILE, enabled=True)
        recorder.truncate_after(step)
        recorder.write_start(step=step, values={"world": 2})
        recorder.write("train", step=step + 4, values={})
        recorder.write_end(step=step + 4, exit=exit_word, why="a reason")
        recorder.close()
    recorder = Recorder(tmp_path / FILE, enabled=True)
    recorder.truncate_after(2)
    recorder.close()
    found = [(r["kind"], r["step"], r.get("attempt"), r.get("exit")) for r in read_metrics(recorder.path)]
    assert found == [("run", 0, 1, None), ("end", 4, None, "failed"), ("run", 4, 2, None), ("end", 8, None, "stopped")]


def test_an_end_is_written_while_a_line_is_under_way_and_an_error_of_the_disk_is_no_new_one(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / FILE, enabled=True)
    recorder.write("train", step=1, values={"loss": 1.0})
    threading.Thread(target=lambda: recorder.write_end(step=1, exit="silent", why="stuck")).start()
    recorder.write("train", step=2, values={"loss": 1.0})
    while len(read_metrics(recorder.path)) < 3:
        time.sleep(0.01)
    assert sorted(record["kind"] for record in read_metrics(recorder.path)) == ["end", "train", "train"]
    recorder.path.unlink()
    recorder.path.mkdir()
    recorder.write_end(step=2, exit="failed", why="cannot be written")


def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped_too(tmp_path: Path) -> None:
    write_steps(tmp_path, range(4))
    recorder = Recorder(tmp_path / FILE, enabled=True)
    for step in (1, 3):
        recorder.write("eval", step=step, values={})
    recorder.truncate_after(3)
    assert [record["step"] for record in read_metrics(recorder.path) if record["kind"] == "eval"] == [1, 3]
    recorder.truncate_after(3, evaluated=False)
    assert [record["step"] for record in read_metrics(recorder.path) if record["kind"] == "eval"] == [1]
    recorder.close()


def test_writing_after_close_does_nothing_and_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    recorder = Recorder(tmp_path / FILE, enabled=True)
    recorder.close()
    recorder.write("train", step=1, values={})
    assert read_metrics(recorder.path) == []
