"""TensorBoard, Weights & Biases, MLflow, and DeepSpeed's CSV and Comet monitors: what a run shows elsewhere.

Scalars, settings and pictures go to them in addition to metrics.jsonl and the run's folder, on rank 0 only. They are
a convenience: one that fails, at its start or later, is told in one sentence and is off from then on, and the run goes
on; but for a full disk, which would cost the run more than its curves. DeepSpeed's engine gets none of them: its own
monitors end a run where they fail, and count images where everything here counts steps, which Weights & Biases does
not take (0.19.8).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ase_dist.errors import ExitCode, describe, exit_code_of
from ase_dist.moe import deepspeed_compat
from ase_dist.printable import printable
from ase_dist.training.record.appending import RecordError
from ase_dist.training.record.run_folder import RunFolder

LOGGER = logging.getLogger("ase_dist")
Event = tuple[str, float, int]  # name, value, step
Section = Mapping[str, Any]
PARAMETERS = 100  # that MLflow takes at once
LONGEST_PARAMETER = 500  # characters, of old servers of MLflow


class Monitor:
    """One of them, open. Every method may raise any exception; ``Monitors`` tells it."""

    def __init__(self, section: Section, run: RunFolder) -> None:
        raise NotImplementedError

    def scalars(self, events: list[Event]) -> None:
        """Show numbers, in the order of their steps."""
        raise NotImplementedError

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Show the settings of the run, by dotted key; once, before anything else."""

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Show an RGB picture, such as a grid of predictions."""

    def close(self, *, failed: bool) -> None:
        """Bring what is left to its place; nothing is shown after it. ``failed``: an error has ended the run."""


class TensorBoard(Monitor):
    """Event files in ``output_path/job_name``, each write brought to disk at once."""

    def __init__(self, section: Section, run: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(section.get("output_path", ""), section.get("job_name", "DeepSpeedJobName"))
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(log_dir=str(folder))

    def scalars(self, events: list[Event]) -> None:
        """As curves."""
        for name, value, step in events:
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def settings(self, settings: Mapping[str, Any]) -> None:
        """As a table under Text."""
        rows = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in settings.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        self._writer.flush()

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Under Images, with a slider over the steps."""
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """End the writer's thread."""
        self._writer.close()


class WandB(Monitor):
    """A run of Weights & Biases called as the run's folder; what it keeps here lies in that folder.

    ``WANDB_MODE=offline`` and ``disabled`` and the other variables of wandb hold.
    """

    def __init__(self, section: Section, run: RunFolder) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=section.get("project", "deepspeed"),
            group=section.get("group"),
            entity=section.get("team"),
            name=run.path.absolute().name,
            dir=str(run.path),
            settings=wandb.Settings(console="off"),  # the log of a run is train.log
        )

    def scalars(self, events: list[Event]) -> None:
        """All of a step at once."""
        for step in dict.fromkeys(step for _, _, step in events):
            self._run.log({name: value for name, value, at in events if at == step}, step=step)

    def settings(self, settings: Mapping[str, Any]) -> None:
        """As the run's config, by which runs are grouped and filtered."""
        self._run.config.update(dict(settings), allow_val_change=True)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """As media."""
        self._run.log({name: self._image(picture)}, step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until everything is sent, or written where it is offline."""
        self._run.finish(exit_code=int(failed))


class MLflow(Monitor):
    """A run of MLflow called as the run's folder, at ``MLFLOW_TRACKING_URI`` or, without one, in the run's folder."""

    def __init__(self, section: Section, run: RunFolder) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else 3.7 and later refuse folders
        from mlflow import MlflowClient, entities

        self._entities = entities
        where = os.environ.get("MLFLOW_TRACKING_URI") or (run.path / "mlflow").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=where)
        name = str(section.get("experiment", "ase_dist"))
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id: str = self._client.create_run(number, run_name=run.path.absolute().name).info.run_id

    def scalars(self, events: list[Event]) -> None:
        """In one request."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value, step in events]
        self._client.log_batch(self._id, metrics=metrics)

    def settings(self, settings: Mapping[str, Any]) -> None:
        """As parameters, cut where they are long, and whole in settings.json."""
        texts = {key: str(value)[:LONGEST_PARAMETER] for key, value in settings.items()}
        parameters = [self._entities.Param(key, text) for key, text in texts.items()]
        for start in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(self._id, params=parameters[start : start + PARAMETERS])
        self._client.log_dict(self._id, dict(settings), "settings.json")

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """As an artifact of its step."""
        self._client.log_image(self._id, picture, f"{name}/step_{step:06d}.png")

    def close(self, *, failed: bool) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class OfDeepSpeed(Monitor):
    """A monitor that is DeepSpeed's own and takes scalars only."""

    kind: ClassVar[str]

    def __init__(self, section: Section, run: RunFolder) -> None:
        self._monitor = deepspeed_compat.open_monitor(self.kind, section)

    def scalars(self, events: list[Event]) -> None:
        """As DeepSpeed writes them."""
        self._monitor.write_events(events)


class CSV(OfDeepSpeed):
    """A file for each scalar."""

    kind = "csv_monitor"


class Comet(OfDeepSpeed):
    """comet.com."""

    kind = "comet"


# by the section of DeepSpeed's JSON; mlflow is this package's own
MONITORS: dict[str, type[Monitor]] = {
    "tensorboard": TensorBoard,
    "csv_monitor": CSV,
    "wandb": WandB,
    "comet": Comet,
    "mlflow": MLflow,
}
INSTALL = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}  # what pip is to install: an extra, or a package


class Monitors:
    """All monitors whose section in ``config``, DeepSpeed's JSON, is enabled; none where not ``enabled`` (rank 0).

    They are opened at once, and what is shown is brought to its place at once. No method raises an error of a monitor;
    ``failure`` is the first full disk, for which the run is to be saved and ended.
    """

    def __init__(self, config: Mapping[str, Any], run: RunFolder, *, enabled: bool) -> None:
        self._run = run
        self._open: dict[str, Monitor] = {}
        self.failure: RecordError | None = None
        for name, kind in MONITORS.items():
            section = config.get(name, {})
            if enabled and section.get("enabled"):
                with self._telling(name, "cannot be started"):
                    self._open[name] = kind(section, run)

    @property
    def take_pictures(self) -> bool:
        """Whether any is there that shows pictures."""
        return any(not isinstance(monitor, OfDeepSpeed) for monitor in self._open.values())

    def write_scalars(self, events: list[Event]) -> None:
        """Show numbers."""
        self._all(lambda monitor: monitor.scalars(events))

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Show the settings, by dotted key."""
        self._all(lambda monitor: monitor.settings(settings))

    def write_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Show a picture."""
        self._all(lambda monitor: monitor.picture(name, picture.convert("RGB"), step))

    def close(self, *, failed: bool = False) -> None:
        """End all; nothing is shown after it, and a second call does nothing."""
        self._all(lambda monitor: monitor.close(failed=failed))
        self._open.clear()

    def _all(self, show: Callable[[Monitor], None]) -> None:
        for name, monitor in list(self._open.items()):
            with self._telling(name, "failed"):
                show(monitor)

    @contextmanager
    def _telling(self, name: str, what: str) -> Iterator[None]:
        """Of an error say that this monitor is off from now on."""
        try:
            yield
        except Exception as error:  # of any library, for any reason
            self._open.pop(name, None)
            if exit_code_of(error) is ExitCode.NOT_SAVED:
                sentence = f"{self._run.path} cannot be written ({describe(error)})"
                self.failure = self.failure or RecordError(sentence, exit_code=ExitCode.NOT_SAVED)
                LOGGER.warning("the monitor %s %s (%s)", name, what, printable(describe(error)))
                return
            why = describe(error)
            if isinstance(error, ImportError) and name in INSTALL:
                extra = INSTALL[name]
                why = f"{why}; pip install {extra if '_' in extra else repr(f'ase-dist[{extra}]')}"
            LOGGER.warning(
                "the monitor %s %s (%s) and is off; the run goes on, and all its numbers are in %s",
                name,
                what,
                printable(why),
                self._run.metrics,
            )


@contextmanager
def writer_errors_told_once() -> Iterator[None]:
    """Keep TensorBoard's thread from printing the traceback of a full disk: the next write raises the error too."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            previous(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous
