"""The machine and the day, as measurements state them; CPUs that may be used."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The processor's name, the CPUs that this process may use, and the load before measuring."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"processor": name, "cpus": available_cpus(), "load": load}


def today() -> str:
    """The date in ISO form."""
    return datetime.date.today().isoformat()
