"""Runs the items of a part in processes of their own, within a time limit.

The worker appends to a journal, one JSON object a line: {"begin": item} before an item, {"item",
"seconds", "row" or "error"} after it, {"left_out": [...]} when time is up. If it dies or hangs, the
parent notes the item that was under way and starts another worker for those that follow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.gpu.setting import ROOT, Setting, native

GRACE = 5.0  # seconds beyond its limit that a worker gets before it is stopped
# Shares of the time for all parts, in seconds; here, because importing a part needs the build.
PARTS = {
    "build": 130.0,
    "laws": 55.0,
    "sanitize": 65.0,
    "ops": 120.0,
    "decode": 75.0,
    "prefill": 45.0,
    "graphs": 35.0,
}
FATAL = ("CUDA error", "CUDA kernel launch", "device-side assert", "illegal memory")


class PassedOver(Exception):
    """An item that cannot run here, and why."""


class PartBase(ABC):
    """A part of the check. NATIVE: whether it calls the native module, which must be built by then.
    A part keeps what its items share between them.

    setting: where it runs. module: the native module, None unless NATIVE.
    """

    NATIVE = True

    def __init__(self, setting: Setting, module: Any):
        self.setting, self.module = setting, module

    @abstractmethod
    def items(self) -> list[str]:
        """Names of what there is to do, the most important first."""

    def estimate(self, item: str) -> float:
        """Seconds that `item` will take; 0 for as long as the one before."""
        return 0.0

    @abstractmethod
    def run(self, item: str) -> Any:
        """Does it. Returns: its row of figures. Raises: PassedOver where it cannot run here."""


def part_class(name: str) -> type[PartBase]:
    """The class `Part` of bench/gpu/<name>.py."""
    return import_module(f"bench.gpu.{name}").Part


def run_items(part: PartBase, skip: set[str], until: float, say: Callable[[dict], None]) -> bool:
    """Runs a part's items but those in `skip`; stops when the next one would probably not end by
    `until` (its own estimate, else as long as the last one took).

    Returns: False if the process is of no further use.
    """
    items = [item for item in part.items() if item not in skip]
    last = 0.0
    for i, item in enumerate(items):
        if time.time() + (part.estimate(item) or last) > until:
            say({"left_out": items[i:]})
            return True
        say({"begin": item})
        start = time.time()
        entry: dict[str, Any] = {"item": item}
        try:
            entry["row"] = part.run(item)
        except PassedOver as reason:
            entry["passed_over"] = str(reason)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        last = entry["seconds"] = round(time.time() - start, 3)
        say(entry)
        if any(sign in entry.get("error", "") for sign in FATAL):
            return False
    return True


def work(name: str, setting: Setting, journal: Path, until: float) -> int:
    """The worker's main function. Returns: the exit status."""
    done = {e["begin"] for e in read(journal) if "begin" in e}
    with journal.open("a", encoding="utf-8") as file:

        def say(entry: dict) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        make = part_class(name)
        surround = native(setting) if make.NATIVE else contextlib.nullcontext()
        with surround as module:
            good = run_items(make(setting, module), done, until, say)
    if not good:
        os._exit(3)  # with a broken context, an orderly end may hang
    return 0


def read(journal: Path) -> list[dict]:
    """The entries that were written whole."""
    entries = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def supervise(name: str, setting: Setting, limit: float) -> dict[str, Any]:
    """Runs one part in workers for at most about `limit` seconds.

    Returns: {"seconds", "limit", "rows": {item: row}, "failed": {item: why}, "passed_over": {item:
    why}, "left_out": [items], "item_seconds"}.
    """
    start = time.time()
    until = start + limit
    with tempfile.TemporaryDirectory() as folder:
        journal, log = Path(folder) / "journal", Path(folder) / "log"
        result = {"failed": {}, "worker": ""}
        while True:
            before = len(read(journal))
            status = _one_worker(name, setting, journal, log, until)
            entries = read(journal)
            open_items = _open_items(entries)
            if not open_items and status in (0, 3):
                if status == 0 or time.time() > until:
                    break
                continue
            why = _why(status, log, time.time() >= until)
            for item in open_items:
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"item": item, "error": why}) + "\n")
            if len(entries) == before or time.time() > until:
                if not open_items:
                    result["worker"] = why
                break
        entries = read(journal)
    result |= {"seconds": round(time.time() - start, 1), "limit": round(limit, 1)}
    for kind, field in (("rows", "row"), ("failed", "error"), ("passed_over", "passed_over")):
        result[kind] = {e["item"]: e[field] for e in entries if field in e}
    result["left_out"] = [item for e in entries for item in e.get("left_out", ())]
    result["item_seconds"] = {e["item"]: e["seconds"] for e in entries if "seconds" in e}
    return result


def _open_items(entries: list[dict]) -> list[str]:
    ended = {e["item"] for e in entries if "item" in e}
    return [e["begin"] for e in entries if "begin" in e and e["begin"] not in ended]


def _one_worker(name: str, setting: Setting, journal: Path, log: Path, until: float) -> int:
    """Exit status of one worker; its whole process group is ended when it outlasts its time."""
    command = [sys.executable, "-m", "bench.gpu.run", "--worker", name]
    command += ["--journal", str(journal), "--until", repr(until), *setting.arguments()]
    with log.open("w") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return child.wait(max(1.0, until + GRACE - time.time()))
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _why(status: int, log: Path, late: bool) -> str:
    """Known facts about a worker that ended on its own or was stopped."""
    if late and status == -signal.SIGKILL:
        return "stopped: it ran past its time"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the process ended with status {status}: {' | '.join(lines[-4:])[-1500:]}"
