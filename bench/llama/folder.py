"""Where llama.cpp lies, and how its commands are run."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

log = logging.getLogger(__name__)
VERSION = "0.3.36"
ROOT = Path(__file__).resolve().parents[2] / "build" / "peer"


def sdist_folder(root: Path = ROOT) -> Path:
    """Where the unpacked source distribution lies."""
    return root / f"llama_cpp_python-{VERSION}"


def library_folder(root: Path = ROOT) -> Path:
    """Where libllama.so and llama-bench lie."""
    return root / "llama-build" / "bin"


def run(command: list[str], what: str, cwd: Path | None = None) -> None:
    """Runs a command at low priority; its output is shown only when it fails."""
    log.info("peer: %s", what)
    result = subprocess.run(
        ["nice", "-n", "10", *command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode != 0:
        raise RuntimeError(f"peer: {what} failed ({result.returncode}):\n{result.stdout[-4000:]}")
