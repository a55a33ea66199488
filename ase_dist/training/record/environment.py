"""The environment of a run, for env.json: versions, commit, host, cores, memory and the command line."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ase_dist.versions import PACKAGES, version_of

_SECRET_VALUE = re.compile(r"(?i)^(.*?(?:key|token|password|passwd|secret)[^=]*=).*$")
_SECRET_FLAG = re.compile(r"(?i)^--?[\w.-]*(?:key|token|password|passwd|secret)[\w.-]*$")
_URL_LOGIN = re.compile(r"(://)[^/@\s]+@")


def environment() -> dict[str, Any]:
    """What is needed to repeat or explain a run: versions, host, cores, memory, the command; no environment variables.

    Memory is in bytes, ``git_commit`` None outside a checkout of this package; *** replaces secrets in the command.
    """
    script, *others = sys.argv
    is_module = Path(script).parts[-2:] == ("ase_dist", "__main__.py")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "git_commit": _git_commit(Path(__file__).parent),
        "hostname": platform.node(),
        "platform": platform.platform(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "command": hide_secrets(["-m", "ase_dist", *others] if is_module else [script, *others]),
    }


def hide_secrets(arguments: Sequence[str]) -> list[str]:
    """The command line with stars for what follows a name such as key, token or password, and for logins in URLs."""
    shown: list[str] = []
    for i, argument in enumerate(arguments):
        is_value = i > 0 and _SECRET_FLAG.match(arguments[i - 1]) is not None
        text = "***" if is_value else _SECRET_VALUE.sub(r"\1***", argument)
        shown.append(_URL_LOGIN.sub(r"\1***@", text))
    return shown


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
