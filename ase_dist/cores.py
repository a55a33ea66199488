"""CPU cores that this process may compute on: physical ones, less what its affinity or its container withholds."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Physical cores, at most as many as affinity and the container's CPU quota (rounded up) allow; at least 1."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    quota = cpu_quota(cgroup)
    return max(1, min(physical, allowed, physical if quota is None else math.ceil(quota)))


def share_of_cores(processes: int) -> int:
    """Of ``usable_cores``, the share of one of ``processes`` alike on this machine; at least 1."""
    return max(1, usable_cores() // processes)


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Processors' worth of time that the control group grants; None where there is no limit. Versions 1 and 2."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except (OSError, ValueError):
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
