"""Where the checks run: a CUDA device, or the emulator that stands for one in a rehearsal."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_infer.files.writing import write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Setting:
    """emulate: a rehearsal, small sizes on emulated kernels. arch: the one architecture to build
    for, such as "90a"; None asks the card. quick: a few items of every part. commit: of the
    sources, where the checkout itself does not know."""

    emulate: bool = False
    arch: str | None = None
    quick: bool = False
    commit: str = ""

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.emulate else "cuda"

    def arguments(self) -> list[str]:
        """The command line's options that give this setting."""
        chosen = [f"--{name}" for name in ("emulate", "quick") if getattr(self, name)]
        for name in ("arch", "commit"):
            if getattr(self, name):
                chosen += [f"--{name}", getattr(self, name)]
        return chosen


def missing_gpu(index: int = 0) -> str:
    """Why no check can run on a GPU here, in one sentence; empty if one can."""
    import torch

    if not torch.cuda.is_available():
        reason = (
            "this torch was built without CUDA"
            if torch.version.cuda is None
            else "torch finds no CUDA device"
        )
        return f"gpu-check: a CUDA GPU must be present, but {reason}; --emulate rehearses without"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < (8, 0):
        name = torch.cuda.get_device_name(index)
        return f"gpu-check: the GPU must be sm_80 or later, got {name}, sm_{major}{minor}"
    return ""


def native_arch() -> str:
    """The architecture to compile for on this machine's card: its own instructions, where it has
    ones that are its own ("90a", "100f", "120f"), else its number."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {9: "90a", 10: "100f", 12: "120f"}.get(major, f"{major}{minor}")


def about(setting: Setting) -> dict[str, Any]:
    """Facts that every result needs: commit, card, driver, versions and date."""
    import torch

    from bench.common.commit import commit
    from elastic_infer.device.machine import machine, today

    facts = {
        "commit": setting.commit or commit(),
        "date": today(),
        "machine": machine(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "emulated": setting.emulate,
    }
    if setting.emulate or not torch.cuda.is_available():
        return facts | {"card": "emulator" if setting.emulate else "", "driver": None}
    card = torch.cuda.get_device_properties(0)
    return facts | {
        "card": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "cache_bytes": card.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "nvcc": _nvcc(),
    }


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(asked).split("\n")[0] or None


def _nvcc() -> str | None:
    found = re.search(r"release ([\d.]+)", _output(["nvcc", "--version"]))
    return found[1] if found else None


def card_slug(name: str) -> str:
    """A card's name for files: "NVIDIA H200" is "h200"."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").split("-")
    return "-".join(w for w in words if w not in ("nvidia", "geforce", "tesla")) or "gpu"


def default_out(facts: dict[str, Any]) -> Path:
    """Where results go unless told otherwise; those of a rehearsal are no results."""
    if facts["emulated"] or not facts["card"]:
        return ROOT / "build" / f"gpu-check-{facts['card'] or 'no-gpu'}.json"
    return RESULTS / f"gpu-{card_slug(facts['card'])}.json"


def write_json(path: Path, data: Any) -> None:
    """Writes at once or not at all, so that a run that is cut short leaves whole figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(data, indent=1) + "\n")


@contextlib.contextmanager
def native(setting: Setting):
    """The native module that the ops call inside: `_C`, or in a rehearsal the emulator's, which the
    tests know how to put in its place."""
    if not setting.emulate:
        from elastic_infer import _C

        yield _C
        return
    from elastic_infer.model import model  # noqa: F401  (what the emulator replaces must be there)
    from elastic_infer.ops import registry

    registry()
    sys.path.insert(0, str(ROOT / "tests"))
    from support.emulated import built, installed, load

    with installed(load(built())) as module:
        yield module
