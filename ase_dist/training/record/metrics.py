"""metrics.jsonl: every number of a run, one JSON object a line, readable while the run writes and after it was killed.

A line has ``kind``, ``step`` and the keys of its kind; those that ``plots`` draws are:

- ``run``: tasks (names, in the model's order), task_facts {task: its row of the task table}, data (the data set's
  name), shared_experts (their ids); one at every start, with attempt (1 for the first), time, world, ranks
  [{host, pid}], settings (by dotted key), versions, commit and changed (what differs from the checkpoint that the run
  goes on from, as text).
- ``end``: how the start before it ended: exit (the name of its ``ExitCode`` in small letters), why (a sentence), time.
  Missing where the process was killed. ``step`` is the last one taken.
- ``train``: loss, losses {task: loss}; with balancing task_weights {task: mean weight}, which multiply the losses in
  addition to ``train.loss_weights``, and kept_weights, how many steps since the line before found no finite weights and
  took those of the step before (not there where none did); and where there are experts: expert_load
  [layers][tasks][N], the share of the task's tokens for which an expert was active; mean_gates [layers][tasks][N];
  shared_gate [layers][tasks], the mean over tokens of the shared experts' gates together.
- ``conflict``: cosines [tasks][tasks] between the tasks' gradients on the shared experts, cosines_by_layer [layers],
  the mean over pairs of tasks, conflicting, the share of pairs below 0.
- ``eval``: metrics {task: {metric: value}}; trivial, of the same form, for a predictor that learned nothing.

Any other key is kept too (epoch, seconds, lr, images_per_second, memory). NaN and infinities are written as null.
Times are local ones of the first rank's host, as in the logs: 2026-01-31 12:00:00.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ase_dist.errors import UserError
from ase_dist.files import open_regular
from ase_dist.json_files import parse_json
from ase_dist.training.record.appending import LineFile, RecordError, recording
from ase_dist.training.record.logs import TIME_FORMAT

STARTS_AND_ENDS = ("run", "end")  # the history of the attempts, which a resumed run keeps
ARRAY_DIGITS = 5  # significant digits of numbers in arrays; layers x tasks x N of them a line fill disks


class Recorder:
    """Appends lines to the file ``path``, each at once; does nothing unless ``enabled`` (rank 0).

    The constructor drops an incomplete last line, which a killed run may have left. All methods that write raise
    RecordError where the file cannot be written; no line is then half written.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path = path
        self._file: LineFile | None = None
        if enabled:
            if self.path.exists():
                read_metrics(self.path)
                _keep_lines(self.path, lambda record: True)
            self._file = LineFile(self.path)

    def write(self, kind: str, *, step: int, values: Mapping[str, Any]) -> None:
        """Append one line. Tensors and arrays of any device and type become lists; it waits for the device."""
        if self._file is not None:
            self._file.append(_line({"kind": kind, "step": step, **values}))

    def write_start(self, *, step: int, values: Mapping[str, Any]) -> None:
        """Append the "run" line of this start: ``values``, the time and the number of the attempt."""
        if self._file is not None:
            attempt = 1 + sum(record["kind"] == "run" for record in read_metrics(self.path))
            self.write("run", step=step, values={**values, "attempt": attempt, "time": time.strftime(TIME_FORMAT)})

    def write_end(self, *, step: int, exit: str, why: str) -> None:
        """Append the "end" line of this start; the watchdog's thread may call it while ``write`` is stuck.

        An error in writing it is ignored: the error that ends the run must not be lost to a full disk.
        """
        if self._file is not None:
            end = {"kind": "end", "step": step, "exit": exit, "why": why}
            with suppress(RecordError), LineFile(self.path) as file:
                file.append(_line({**end, "time": time.strftime(TIME_FORMAT)}))

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Drop the lines that a run which resumes at ``step`` will write again: those of later steps.

        The evaluation of ``step`` itself is dropped too where its checkpoint was saved before it (``evaluated`` False).
        Starts and ends of attempts are kept, at any step.
        """
        if self._file is None:
            return
        self._file.close()
        read_metrics(self.path)  # raises where a line is damaged: it must not be dropped silently
        _keep_lines(self.path, lambda r: r["kind"] in STARTS_AND_ENDS or self._is_valid(r, step, evaluated))
        self._file = LineFile(self.path)

    @staticmethod
    def _is_valid(record: Mapping[str, Any], step: int, evaluated: bool) -> bool:
        return bool(record["step"] < step or (record["step"] == step and (evaluated or record["kind"] != "eval")))

    def sync(self) -> None:
        """Bring all lines to disk."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Bring all lines to disk if that is possible, and close the file; writing after it does nothing."""
        if self._file is not None:
            with self._file, suppress(RecordError):  # it must not hide the error that ends the run
                self._file.sync()
            self._file = None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; none where there is no file. A last line cut short is left out.

    Raises UserError that names the line where one before the last is broken: that is damage, not a killed run.
    """
    path = Path(path)
    lines = _read_lines(path) if path.exists() else []
    records = [_parse(line) for line in lines]
    for number, record in enumerate(records[:-1], start=1):
        if record is None:
            raise UserError(f"{path}: line {number} is not a record of a run; delete that line to read the rest")
    return [record for record in records if record is not None]


def _read_lines(path: Path) -> list[bytes]:
    """The lines with their ends. Raises UserError where ``path`` is no regular file."""
    with open_regular(path) as file:
        return file.readlines()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record on a line, or None where it is broken."""
    try:
        record = parse_json(line, allow_nan=True)
    except UserError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record else None


def _keep_lines(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Remove the lines that are broken or not to be kept, in place.

    Programs that have the file open, such as ``tail -f``, go on reading the same file; it is not written where no line
    is removed. A crash meanwhile loses at most what follows the first removed line.
    """
    lines = _read_lines(path)
    kept = [line.rstrip(b"\r\n") + b"\n" for line in lines if (record := _parse(line)) is not None and keep(record)]
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(lines, kept, strict=False)))
    if same == len(lines):
        return
    with recording(path), path.open("r+b") as file:
        file.truncate(sum(map(len, lines[:same])))
        file.seek(0, os.SEEK_END)
        file.writelines(kept[same:])
        file.flush()
        os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), allow_nan=False, separators=(",", ":")) + "\n"


def _plain(value: Any, *, in_array: bool = False) -> Any:
    """``value`` in the types of JSON: mappings, lists, numbers, text, null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # a tensor or a numpy array or scalar
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item, in_array=True) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{ARRAY_DIGITS}g}") if in_array else value
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)
