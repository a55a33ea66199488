"""What a probe tells: facts and findings, as lines of JSON that are there even if the probe's process is then killed.

Nothing that may be a secret is told: no environment variable but the few of ``HARMLESS_VARIABLES``, no address of this
machine, the home folder as ~, and no user or password of a URL in the text of an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TextIO

from ase_dist.errors import describe
from ase_dist.printable import printable

# Their values are numbers, names of devices and interfaces; every other variable may hold anything.
HARMLESS_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HF_HUB_OFFLINE"),
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
)
_CREDENTIALS = re.compile(r"//[^/\s@]+@")


class Severity(str, Enum):
    """How bad a finding is."""

    BROKEN = "broken"  # no run can work
    WARNING = "warning"  # something that many runs do would go wrong
    NOTE = "note"  # only what asks for it would go wrong


@dataclass(frozen=True)
class Finding:
    """One sentence: what would go wrong, why, what to do."""

    severity: Severity
    sentence: str


@dataclass
class ProbeResult:
    """What the probe ``name`` has told within ``seconds``; ``facts`` by name in order, values as JSON has them."""

    name: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    unfinished: tuple[str, Severity, str] | None = None  # of ``Teller.doing``

    def read(self, lines: str) -> None:
        """Take in what a ``Teller`` has written; a last line cut short is left out."""
        for line in lines.splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if "fact" in told:
                self.facts[told["fact"]] = told["value"]
            elif "finding" in told:
                self.findings.append(Finding(Severity(told["severity"]), told["finding"]))
            elif "doing" in told:
                self.unfinished = (told["doing"], Severity(told["severity"]), told["advice"]) if told["doing"] else None


class Teller:
    """Writes what a probe finds to ``stream``, a line each, at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def fact(self, name: str, value: Any) -> None:
        """Tell a fact; None stands for what is not there."""
        self._write({"fact": name, "value": _harmless(value)})

    def find(self, severity: Severity, sentence: str) -> None:
        """Tell what would go wrong."""
        self._write({"finding": str(_harmless(sentence)), "severity": severity.value})

    @contextmanager
    def doing(self, what: str, *, advice: str, severity: Severity = Severity.WARNING) -> Iterator[None]:
        """Around what may fail, hang or kill the process: ``what`` is a clause such as "importing torch".

        An exception becomes the finding "``what`` failed (why): ``advice``", as the other two ways to end do.
        """
        self._write({"doing": what, "severity": severity.value, "advice": advice})
        try:
            yield
        except (Exception, SystemExit) as error:
            self.find(severity, f"{what} failed ({describe(error)}): {advice}")
        finally:
            self._write({"doing": "", "severity": severity.value, "advice": ""})

    def _write(self, told: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(told) + "\n")
        self._stream.flush()


def _harmless(value: Any) -> Any:
    """``value`` with ~ for the home folder, without the credentials of URLs, in printable text."""
    if isinstance(value, str):
        home = os.path.expanduser("~")  # noqa: PTH111  (pathlib raises where there is none)
        if len(home) > 1 and home != "~":
            value = re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", value)
        return printable(_CREDENTIALS.sub("//***@", value))
    if isinstance(value, Mapping):
        return {str(key): _harmless(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_harmless(item) for item in value]
    return value
