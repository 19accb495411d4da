"""The checkout that a measurement is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The checkout's commit, marked where files differ from it; empty outside of one."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True)
    except OSError:  # no git at all
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
