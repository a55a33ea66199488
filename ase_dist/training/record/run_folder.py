"""The output folder of a run: the name and meaning of every file in it; each is written whole or not at all.

``RunFolder`` needs no torch and only ``create`` and the ``write_`` methods touch the disk, so that the launcher, the
report, the study and the deployment of a trained model can ask it where a file is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ase_dist.errors import ExitCode, UserError, file_error
from ase_dist.files import require_room, write_atomic
from ase_dist.json_files import read_object
from ase_dist.overwriting import contains, refuse_foreign
from ase_dist.training.record.appending import recording

MEANINGS = {
    "config.yaml": "the merged settings; --config reads it again",
    "ds_config.json": "DeepSpeed's JSON as the engine got it",
    "env.json": "versions, commit, host, command line",
    "train.log": "the log of rank 0",
    "metrics.jsonl": "every number of the run",
    "summary.json": "results, sizes, times, how it ended",
    "predictions": "image, truth and prediction per task",
    "plots": "the curves and heat maps as PNG",
    "checkpoints": "portable checkpoints: safetensors and a manifest each",
    "evaluation": "what the command evaluate wrote",
    "tensorboard": "settings, scalars and pictures for TensorBoard",
    "wandb": "settings, scalars and pictures for Weights & Biases",
    "mlflow": "settings, scalars and pictures for MLflow",
    "csv": "the scalars as CSV",
    "report.html": "the run as a page",
    "output.log": "what the run wrote to its terminal, where a study started it",
    "run.lock": "who is training here now; gone when the run has ended",
}
_RANK_FILE = re.compile(r"rank_(\d{1,7})\.(log|beat)", re.ASCII)
_RANK_MEANINGS = {"log": "the log of that rank", "beat": "the last sign of life of that rank"}
_PREDICTION = re.compile(r"step_(\d+)\.png", re.ASCII)


class RunFolder:
    """The folder ``path`` of a run. The constructor touches no file; ``create`` makes the folder.

    Only rank 0 calls the ``write_`` methods. They raise RecordError where the file cannot be written; the old one, if
    there is one, is then as it was.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # -----------------------------------------------------------------------------------------------------------------
    # Names

    @property
    def config(self) -> Path:
        """The settings as they were merged, YAML."""
        return self.path / "config.yaml"

    @property
    def ds_config(self) -> Path:
        """DeepSpeed's JSON as the engine got it."""
        return self.path / "ds_config.json"

    @property
    def environment(self) -> Path:
        """Versions, host and command line, see ``ase_dist.training.record.environment``."""
        return self.path / "env.json"

    @property
    def summary(self) -> Path:
        """The result of the run, see ``ase_dist.training.record.reports.summary``."""
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        """Every number, one JSON object a line, see ``ase_dist.training.record.metrics``."""
        return self.path / "metrics.jsonl"

    @property
    def train_log(self) -> Path:
        """A second copy of the log of rank 0."""
        return self.path / "train.log"

    def rank_log(self, rank: int) -> Path:
        """The log of a rank."""
        return self.path / f"rank_{rank}.log"

    def beat(self, rank: int) -> Path:
        """The sign of life of a rank, see ``Watchdog``; removed when the rank ends normally."""
        return self.path / f"rank_{rank}.beat"

    def ranks(self) -> list[int]:
        """The ranks that have a log or a sign of life, in order."""
        found = [_RANK_FILE.fullmatch(path.name) for path in self.path.glob("rank_*")]
        return sorted({int(match[1]) for match in found if match})

    @property
    def lock(self) -> Path:
        """The lock file of the process that is training here, see ``FolderLock``."""
        return self.path / "run.lock"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints; ``CheckpointStore`` makes it."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """The folder of pictures of predictions."""
        return self.path / "predictions"

    def prediction(self, step: int) -> Path:
        """The picture of the evaluation at ``step``."""
        return self.predictions / f"step_{step:06d}.png"

    @staticmethod
    def step_of_prediction(path: Path) -> int | None:
        """The reverse of ``prediction``; None for a picture of another name."""
        match = _PREDICTION.fullmatch(path.name)
        return int(match[1]) if match else None

    @property
    def plots(self) -> Path:
        """The folder of plots."""
        return self.path / "plots"

    @property
    def evaluation(self) -> Path:
        """Where the command evaluate writes unless it is told otherwise."""
        return self.path / "evaluation"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.path / "report.html"

    @property
    def output_log(self) -> Path:
        """What a run that a study started wrote to its terminal."""
        return self.path / "output.log"

    def looks_used(self) -> bool:
        """Whether a run left its settings, numbers, result or environment here."""
        return any(path.is_file() for path in (self.config, self.metrics, self.summary, self.environment))

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def create(self) -> None:
        """Make the folder and its parents.

        Raises UserError where it cannot be made or written to, RunError where there is no room left.
        """
        try:
            require_room(self.path)
        except OSError as error:
            raise file_error(
                error,
                f"output: cannot write to {str(self.path)!r} ({error.strerror or error}); "
                "name a folder that can be written to with output=FOLDER",
            ) from None

    def refuse_used(self, *, resume: str) -> None:
        """Raise UserError where ``resume`` is "never" and a run has already written metrics here.

        With any ``resume``, files of the same names that no run has written are refused too: a run's own folder is
        recognised by env.json, which a run writes first, or by its checkpoints.

        To be called before anything is written, or a rank may find what rank 0 has just written.
        """
        is_environment = contains(b'"git_commit"')
        is_run = (self.environment.is_file() and is_environment(self.environment)) or self.checkpoints.is_dir()
        targets = [self.environment, self.config, self.ds_config, self.summary]
        refuse_foreign(targets, is_own=lambda _: is_run, option="output")
        if resume == "never" and self.metrics.is_file() and self.metrics.stat().st_size > 0:
            raise UserError(
                f"output: {str(self.path)!r} already holds the metrics of a run and resume is 'never'; "
                "name another folder with output=FOLDER, or continue that run with resume=auto"
            )

    def write_config(self, text: str) -> None:
        """Write the whole tree of settings, as YAML."""
        _write(self.config, text)

    def write_ds_config(self, config: Mapping[str, Any]) -> None:
        """Write DeepSpeed's JSON as the engine got it, every "auto" resolved."""
        _write(self.ds_config, _to_json(config))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write versions, host and command line."""
        _write(self.environment, _to_json(environment))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the result of the run; the old one stays until the new one is whole."""
        _write(self.summary, _to_json(summary))

    def read_summary(self) -> dict[str, Any]:
        """The result of the run. Raises OSError where there is none, UserError where it is not JSON."""
        return read_object(self.summary, allow_nan=True)

    def summary_if_done(self) -> dict[str, Any] | None:
        """The result of a run that has reached its end; None for any other, and where it cannot be read."""
        try:
            summary = self.read_summary()
        except (OSError, UserError):
            return None
        return summary if summary.get("exit") == ExitCode.DONE.name.lower() else None


def meaning(name: str) -> str:
    """What a file or folder of this name in a run's folder is for; empty where no run makes it."""
    match = _RANK_FILE.fullmatch(name)
    return _RANK_MEANINGS[match[2]] if match else MEANINGS.get(name, "")


def _write(path: Path, text: str) -> None:
    with recording(path):
        write_atomic(path, text)


def _to_json(value: Mapping[str, Any]) -> str:
    """Indented JSON; a path or another foreign value becomes its text."""
    return json.dumps(value, indent=2, default=str) + "\n"
