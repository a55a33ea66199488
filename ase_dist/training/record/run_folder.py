"""The output folder of a run: settings, surroundings, logs and result, each file written whole or not at all.

Layout: config.yaml, ds_config.json, env.json, summary.json, metrics.jsonl (see ``recorder``), train.log, rank_N.log,
predictions/*.png, checkpoints/, and the plots beside them.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ase_dist.errors import UserError
from ase_dist.files import write_atomic

LOGGER = logging.getLogger("ase_dist")
PACKAGES = ("ase-dist", "torch", "torchvision", "deepspeed", "timm", "numpy", "safetensors")
LOG_FORMAT = "%(asctime)s [rank {rank}] %(levelname)s %(message)s"
_LOG_FILE = "ase_dist log file"  # the handlers' name

_SECRET_VALUE = re.compile(r"(?i)^(.*?(?:key|token|password|passwd|secret)[^=]*=).*$")
_SECRET_FLAG = re.compile(r"(?i)^--?[\w.-]*(?:key|token|password|passwd|secret)[\w.-]*$")
_URL_LOGIN = re.compile(r"(://)[^/@\s]+@")


class RunFolder:
    """The folder ``path``, made with its parents where it does not exist.

    Only rank 0 calls the ``write_`` methods; every rank may open its log. Raises UserError with one sentence where the
    folder cannot be made or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _probe(self.path)
        except OSError as error:
            raise UserError(
                f"output: cannot write to {str(self.path)!r} ({error.strerror or error}); "
                "name a folder that can be written to with output=FOLDER"
            ) from None

    @property
    def metrics(self) -> Path:
        """The log of numbers, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints; whoever saves makes it."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """The folder of pictures of predictions; ``write_atomic`` makes it."""
        return self.path / "predictions"

    def refuse_used(self, *, resume: str) -> None:
        """Raise UserError where ``resume`` is "never" and a run has already written metrics here.

        To be called before anything is written, or a rank may find what rank 0 has just begun.
        """
        if resume == "never" and self.metrics.is_file() and self.metrics.stat().st_size > 0:
            raise UserError(
                f"output: {str(self.path)!r} already holds the metrics of a run and resume is 'never'; "
                "name another folder with output=FOLDER, or continue that run with resume=auto"
            )

    def write_config(self, text: str) -> None:
        """Keep the whole tree of settings, as YAML."""
        write_atomic(self.path / "config.yaml", text)

    def write_ds_config(self, config: Mapping[str, Any]) -> None:
        """Keep the DeepSpeed JSON as the engine got it, every "auto" resolved."""
        write_atomic(self.path / "ds_config.json", _to_json(config))

    def write_environment(self, extra: Mapping[str, Any] | None = None) -> None:
        """Keep ``environment()`` and what the caller knows beside it (accelerator, world size)."""
        write_atomic(self.path / "env.json", _to_json({**environment(), **(extra or {})}))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep the result of the run; the old one stays until the new one is whole."""
        write_atomic(self.path / "summary.json", _to_json(summary))

    def open_logs(self, *, rank: int) -> None:
        """Send this process's log lines to rank_N.log, and rank 0's to train.log too; both are appended to."""
        for name in ["train.log", "rank_0.log"] if rank == 0 else [f"rank_{rank}.log"]:
            handler = logging.FileHandler(self.path / name, encoding="utf-8")
            handler.name = _LOG_FILE
            handler.setFormatter(logging.Formatter(LOG_FORMAT.format(rank=rank)))
            LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)


def close_logs() -> None:
    """Close every log file that a ``RunFolder`` opened in this process."""
    for handler in [handler for handler in LOGGER.handlers if handler.name == _LOG_FILE]:
        LOGGER.removeHandler(handler)
        handler.close()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _probe(folder: Path) -> None:
    """Raise OSError where no file can be made in ``folder``: better now than after the first epoch."""
    probe = folder / f".probe.{platform.node()}.{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def _to_json(value: Mapping[str, Any]) -> str:
    """Indented JSON; a path or another foreign value becomes its text."""
    return json.dumps(value, indent=2, default=str) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Surroundings


def environment() -> dict[str, Any]:
    """What a stranger needs to repeat or explain a run: versions, host, cores, memory, the command. No variables.

    Memory is in bytes, ``git_commit`` None outside a checkout of this package; secrets on the command line are starred.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(Path(__file__).parent),
        "hostname": platform.node(),
        "platform": platform.platform(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "command": hide_secrets(_command()),
    }


def _command() -> list[str]:
    """How this process was started, in words for ``python``."""
    script, *others = sys.argv
    started_as_module = Path(script).parts[-2:] == ("ase_dist", "__main__.py")
    return ["-m", "ase_dist", *others] if started_as_module else [script, *others]


def hide_secrets(arguments: Sequence[str]) -> list[str]:
    """The command line with stars for what follows a name such as key, token or password, and for logins in URLs."""
    shown: list[str] = []
    for i, argument in enumerate(arguments):
        is_value = i > 0 and _SECRET_FLAG.match(arguments[i - 1]) is not None
        text = "***" if is_value else _SECRET_VALUE.sub(r"\1***", argument)
        shown.append(_URL_LOGIN.sub(r"\1***@", text))
    return shown


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """The commit of the checkout that this package runs from, "+changes" where tracked files differ from it."""
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # not a checkout, or one of something else that only contains an installed copy
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
