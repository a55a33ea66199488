"""The environment of a run, for env.json: versions, commit, host, cores, memory and the command line."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from ase_dist.config import ALIASES, setting_keys
from ase_dist.versions import PACKAGES, version_of

KEYS = (  # of env.json: those of ``environment``, and what a run adds
    *("started", "python", "packages", "git_commit", "hostname", "platform", "cores_physical", "cores_logical"),
    *("memory_bytes", "command", "world_size", "device", "torch_threads"),
)
HIDDEN = "***"
# The options of train that take the name of a config or a path; all others take none, or are the launcher's.
OPTIONS = ("--config", "--baseline", "--resume", "--deepspeed_config")
SCRIPT, PROGRAM = ("launch", "train.py"), "ase-dist"
# A number, a name, a list of them, a path: no second =, nothing of a URL (: @ ? &), no mapping, no control character.
_HARMLESS_VALUE = re.compile(r"[\w ./,+~\[\]#'-]*")
MONITORS = {  # sections of DeepSpeed's JSON, with what is known to be no secret in them; mlflow is this package's own
    "tensorboard": ("enabled", "output_path", "job_name"),
    "csv_monitor": ("enabled", "output_path", "job_name"),
    "wandb": ("enabled", "group", "team", "project"),
    "mlflow": ("enabled", "experiment"),
    "comet": ("enabled", "samples_log_interval", "project", "workspace", "experiment_name", "online", "mode"),
}


def environment() -> dict[str, Any]:
    """What is needed to repeat or explain a run: versions, host, cores, memory, the command; no environment variables.

    Memory is in bytes, ``git_commit`` None outside a checkout of this package. Of the command line there is what
    ``harmless_command`` knows.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "hostname": platform.node(),
        "platform": platform.platform(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "command": harmless_command(sys.argv),
    }


def harmless_command(arguments: Sequence[str]) -> list[str]:
    """The words of a command line that are known to be harmless: this package's own command, options and settings.

    Anything else is left out, as the whole command is if it is not this package's; a value that may hold more than a
    name, a number or a path is ``HIDDEN``. Words that are harmless stay as they are, so that the result of an earlier
    call is not changed.
    """
    script, *others = arguments or [""]
    if [script, *others[:2]] == ["-m", "ase_dist", "train"]:
        command, words = ["-m", "ase_dist", "train"], others[2:]
    elif (Path(script).parts[-2:] == ("ase_dist", "__main__.py") or Path(script).name == PROGRAM) and others[:1] == [
        "train"
    ]:
        command, words = ["-m", "ase_dist", "train"], others[1:]
    elif Path(script).parts[-2:] == SCRIPT:
        command, words = ["/".join(SCRIPT)], others
    else:
        return []
    option = ""
    for word in words:
        if option:
            command += [option, _shown(word)]
            option = ""
        elif word in OPTIONS:
            option = word
        elif word.startswith(tuple(f"{name}=" for name in OPTIONS)):
            name, _, value = word.partition("=")
            command.append(f"{name}={_shown(value)}")
        else:
            command += harmless_settings([word])
    return command


def harmless_settings(words: Iterable[str]) -> list[str]:
    """Those of ``words`` that are ``key=value`` of a setting; a value as in ``harmless_command``."""
    keys = {*setting_keys(), *ALIASES}
    pairs = [word.partition("=") for word in words]
    return [f"{key}={_shown(value)}" for key, separator, value in pairs if separator and key in keys]


def _shown(value: str) -> str:
    return value if _HARMLESS_VALUE.fullmatch(value) else HIDDEN


def harmless_environment(found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``environment`` writes, of an env.json that another version may have written."""
    kept = {key: value for key, value in found.items() if key in KEYS}
    if isinstance(kept.get("command"), list):
        kept["command"] = harmless_command([str(word) for word in kept["command"]])
    return kept


def harmless_ds_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's JSON without what a monitor is given to log in with, such as Comet's api_key."""
    return {
        section: {key: item for key, item in value.items() if key in MONITORS[section]}
        if section in MONITORS and isinstance(value, Mapping)
        else value
        for section, value in config.items()
    }


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
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
