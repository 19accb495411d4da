"""compute-sanitizer on small cases of every op: out of bounds, races, divergent barriers.

Device memory is taken one tensor at a time (no caching), so that the tool knows where each ends.
Each tool first has to find nothing in a sound op; memcheck also has to find a planted fault (an
index far outside a table), or its silence about the others would mean nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import Any

from bench.gpu.setting import ROOT
from bench.gpu.worker import PartBase, PassedOver
from elastic_infer.ops import registry

TOOLS = ("memcheck", "racecheck", "synccheck")
PLANTED = "memcheck finds a planted fault"


class Part(PartBase):
    """Items are "tool: op"; the ops of one tool share a process that is asked for one at a time."""

    NATIVE = False

    def __init__(self, setting, module):
        super().__init__(setting, module)
        names = list(registry())
        self.groups = _groups(names, 2 if setting.quick else 4)

    def items(self) -> list[str]:
        tools = TOOLS[:1] if self.setting.quick else TOOLS
        groups = self.groups[:1] if self.setting.quick else self.groups
        named = [f"{tool}: {' '.join(group)}" for group in groups for tool in tools]
        return named if self.setting.emulate else [PLANTED, *named]

    def run(self, item: str) -> dict[str, Any]:
        if item == PLANTED:
            return self._planted()
        tool, _, ops = item.partition(": ")
        status, printed = self._under(tool, ops.split())
        found = errors_of(printed)
        if status and not found:
            raise RuntimeError(f"ended with {status}: {printed[-1500:]}")
        if found:
            raise RuntimeError(f"{tool} reports {len(found)}: {' | '.join(found)[:1500]}")
        return {"errors": 0, "ops": len(ops.split())}

    def _planted(self) -> dict[str, Any]:
        status, printed = self._under("memcheck", ["planted"])
        found = errors_of(printed)
        if not status or not found:
            raise RuntimeError(f"memcheck must report the planted fault, got {printed[-1500:]}")
        return {"errors": len(found), "first": found[0]}

    def _under(self, tool: str, ops: list[str]) -> tuple[int, str]:
        command = [sys.executable, "-m", "bench.gpu.sanitizer_cases", *ops]
        if self.setting.emulate:
            command.append("--emulate")
        else:
            found = shutil.which("compute-sanitizer") or shutil.which(
                "compute-sanitizer", path="/usr/local/cuda/bin"
            )
            if found is None:
                raise PassedOver("compute-sanitizer is not installed")
            command = [found, "--tool", tool, "--error-exitcode", "9", *command]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        printed = done.stdout + done.stderr
        if done.returncode and refused(printed):
            raise PassedOver(f"{tool} is refused here: {printed[-300:]}")
        return done.returncode, printed


def _groups(names: list[str], count: int) -> list[list[str]]:
    """Names dealt into `count` hands."""
    return [names[i::count] for i in range(count)]


def errors_of(printed: str) -> list[str]:
    """The distinct reports of a run of compute-sanitizer, without its own bookkeeping."""
    lines = re.findall(r"^=========\s(.*)$", printed, re.M)
    signs = ("Invalid ", "Error:", "Race reported", "Barrier error", "Program hit", "hazard")
    reports = [line.strip() for line in lines if any(sign in line for sign in signs)]
    return list(dict.fromkeys(r for r in reports if "0 errors" not in r and "0 hazards" not in r))


def refused(printed: str) -> bool:
    """True if the tool could not work on this machine at all."""
    lines = [line for line in printed.splitlines() if line.startswith("=========")]
    return any("not supported" in line or "Failed to initialize" in line for line in lines)
