"""Reporting what a check found: every file by name, in a report where there are many, and one error at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ase_dist.data.folder import FolderDataset
from ase_dist.data.packed.shard import Findings
from ase_dist.errors import UserError
from ase_dist.files import write_atomic
from ase_dist.printable import printable

log = logging.getLogger(__name__)

LONG = 20  # lines; more go into a report


def report_path(place: Path) -> Path:
    """The report next to the packed data set ``place``."""
    return place.with_name(f"{place.name}.report.txt")


def conclude(found: Sequence[Findings], root: Path, place: Path, *, kind: type[FolderDataset], partial: bool) -> None:
    """Name every file that cannot be used and every label of another size; UserError where there is one of the first.

    Up to 20 lines are logged; more are written to ``report_path(place)``, which is otherwise removed.
    """
    problems = list(dict.fromkeys(problem for findings in found for problem in findings.problems))
    resized = list(dict.fromkeys(line for findings in found for line in findings.resized))
    lines = [f"missing  {problem.line}" for problem in problems if problem.what == "missing"]
    lines += [f"unusable {problem.line}" for problem in problems if problem.what == "unusable"]
    lines += [f"resized  {line}" for line in resized]
    report, where = report_path(place), ""
    if len(lines) > LONG:
        write_atomic(report, "".join(f"{printable(line)}\n" for line in lines))
        where = f" (all are named in {report})"
    else:
        report.unlink(missing_ok=True)
        for line in lines:
            log.warning("%s", line)
    if resized:
        log.warning("%d labels are of another size than their image and are resized to it%s", len(resized), where)
    if problems:
        missing = sum(problem.what == "missing" for problem in problems)
        advice = "" if partial or not missing else ", or accept images without some labels with --partial"
        raise UserError(
            f"{root}: {missing} of the files that the lists need are missing and {len(problems) - missing} cannot be "
            f"used{where or ' (they are named above)'}; {kind.origin}{advice}, after which the same command goes on "
            "from here"
        )
