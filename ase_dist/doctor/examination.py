"""Runs the probes, each in a process of its own that is ended at its deadline, and writes what they told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ase_dist.doctor.findings import Finding, ProbeResult, Severity
from ase_dist.errors import ExitCode, describe

# In the order in which they are shown; the last is run alone, so that the others do not disturb what it measures.
TITLES = {
    "machine": "Machine",
    "versions": "Versions",
    "devices": "Devices",
    "libraries": "Libraries",
    "compilers": "Compilers",
    "folders": "Folders",
    "data": "Data",
    "network": "Network",
    "launchers": "Launchers",
    "collective": "Two ranks",
}
AT_ONCE = 3  # probes
END_GRACE = 2.0  # seconds for a killed process; the kernel keeps one that waits for a file system
COMMAND = (
    "import sys; sys.path[:] = sys.argv[3:]; from ase_dist.doctor.probes import main; sys.exit(main(sys.argv[1:3]))"
)
BYTES = ("memory", "shared memory", "output folder, disk", "output folder, free")  # how facts in bytes begin


@dataclass(frozen=True)
class Examination:
    """What all probes told."""

    results: Sequence[ProbeResult]

    @property
    def findings(self) -> list[Finding]:
        """All findings, the worst first."""
        found = [finding for result in self.results for finding in result.findings]
        return sorted(dict.fromkeys(found), key=lambda finding: list(Severity).index(finding.severity))

    @property
    def exit_code(self) -> ExitCode:
        """USAGE where nothing would work here, else DONE."""
        is_broken = any(finding.severity is Severity.BROKEN for finding in self.findings)
        return ExitCode.USAGE if is_broken else ExitCode.DONE

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs; sizes in bytes."""
        return {
            "format": 1,
            "exit_code": int(self.exit_code),
            "findings": [{"severity": f.severity.value, "sentence": f.sentence} for f in self.findings],
            "probes": {r.name: {"seconds": round(r.seconds, 2), "facts": r.facts} for r in self.results},
        }

    def as_text(self) -> str:
        """Everything, for people."""
        lines = []
        for result in self.results:
            if not result.facts:
                continue
            width = max(map(len, result.facts))
            lines += [TITLES[result.name], "-" * len(TITLES[result.name])]
            lines += [f"{name:{width}}  {in_words(name, value)}" for name, value in result.facts.items()]
            lines.append("")
        counts = dict.fromkeys(Severity, 0)
        for finding in self.findings:
            counts[finding.severity] += 1
            lines.append(f"{finding.severity.value}: {finding.sentence}")
        if not self.findings:
            lines.append("Nothing would go wrong, as far as it was looked at.")
        elif not counts[Severity.BROKEN]:
            lines.append(f"Runs work here (warnings: {counts[Severity.WARNING]}, notes: {counts[Severity.NOTE]}).")
        else:
            lines.append("No run works here until what is broken is mended.")
        return "\n".join(lines) + "\n"


def in_words(name: str, value: Any) -> str:
    """A fact as the text shows it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.startswith(BYTES):
        return f"{value / 1e9:,.1f} GB"
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def examine(*, output: str, data: Iterable[str] = (), timeout: float) -> Examination:
    """Run all probes, each for at most ``timeout`` seconds; what goes wrong in one becomes its finding."""
    options = {"output": output, "data": list(data), "timeout": timeout}
    *together, alone = TITLES
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(lambda name: run_probe(name, options), together))
    return Examination([*results, run_probe(alone, options)])


def run_probe(name: str, options: dict[str, Any]) -> ProbeResult:
    """What the probe ``name`` tells within ``options["timeout"]`` seconds; a process that is killed keeps its facts."""
    result, began = ProbeResult(name), time.monotonic()
    command = [sys.executable, "-c", COMMAND, name, json.dumps(options), *sys.path]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        result.findings.append(Finding(Severity.BROKEN, f"no process can be started ({describe(error)})"))
        return result
    why = ""
    try:
        told, errors = process.communicate(timeout=options["timeout"])
    except subprocess.TimeoutExpired as late:
        why = f"had not ended after {options['timeout']:g} s"
        told, errors = _text(late.stdout), ""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the ranks that it has started too
        with suppress(subprocess.TimeoutExpired):
            told = process.communicate(timeout=END_GRACE)[0] or told
    except BaseException:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    result.read(told)
    result.seconds = time.monotonic() - began
    if not why and process.returncode:
        code = process.returncode
        last = (errors.strip().splitlines() or ["it says nothing"])[-1]
        why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code} ({last:.300})"
    if why:
        what, severity, advice = result.unfinished or (f"the probe of {name}", Severity.WARNING, "look at it yourself")
        result.findings.append(Finding(severity, f"{what} {why}: {advice}"))
    return result


def _text(told: Any) -> str:
    """What ``TimeoutExpired`` has, as text: it may be bytes where text was asked for."""
    return told.decode("utf-8", errors="replace") if isinstance(told, bytes) else told or ""
