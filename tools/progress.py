"""Runs a build and shows its progress in a few lines; its output when it fails or warns.

python tools/progress.py "the emulated kernels" cmake --build build/emu
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

# Ninja counts files, make tells per cent.
COUNTED = re.compile(r"^\[(\d+)/(\d+)\]")
SHARE = re.compile(r"^\[\s*(\d+)%\]")
LINES = 5  # at most so many lines of progress where the output is no terminal


def share(line: str) -> float | None:
    """Returns how much of the build is done after a line of its output, 0 to 1; None if the line
    does not say."""
    if found := COUNTED.match(line):
        return int(found[1]) / int(found[2])
    if found := SHARE.match(line):
        return int(found[1]) / 100
    return None


def run(title: str, command: list[str], cwd: Path | None = None, show=None) -> int:
    """Runs a build command and shows its progress.

    Args:
        title: the thing that is compiled.
        command: program and arguments.
        cwd: folder to run it in.
        show: function of one line of text; None prints. On a terminal one line counts up, elsewhere
            there are at most LINES of them.

    Returns:
        The exit status. The output of a build that failed or warned has been printed.
    """
    terminal = show is None and sys.stdout.isatty()
    show = show or (lambda text: print(text, flush=True))
    printed, told, began = [], 0.0, time.monotonic()
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as build:
        for line in build.stdout:
            printed.append(line)
            done = share(line)
            if done is None:
                continue
            if terminal:
                print(f"\r{title}: {done:4.0%}", end="", flush=True)
            elif done < 1 and (told == 0 or done >= told + 1 / (LINES - 1)):
                show(f"{title}: {done:.0%}" if told else f"{title} …")
                told = max(done, 1e-9)
    if terminal and any(share(line) is not None for line in printed):
        print(f"\r{title}: {time.monotonic() - began:.0f} s")
    elif told:
        show(f"{title}: done in {time.monotonic() - began:.0f} s")
    if build.returncode or any("warning:" in line for line in printed):
        show("".join(printed).rstrip())
    return build.returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
