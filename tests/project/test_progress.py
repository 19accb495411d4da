"""Builds show their progress in a few lines, and everything when they fail."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "progress.py")


def build(code: str):
    """Runs a program as if it were a build; returns the finished process."""
    command = [sys.executable, TOOL, "the module", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True)


NINJA, MAKE = "f'[{i}/77] Building CXX object {i}.o'", "f'[{i * 100 // 77:3}%] Building'"


@pytest.mark.parametrize("style", [NINJA, MAKE])
def test_a_build_takes_a_few_lines(style):
    done = build(f"for i in range(1, 78): print({style})")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 6
    assert lines[0] == "the module …" and lines[-1].startswith("the module: done in ")
    shares = [int(line.split()[-1].rstrip("%")) for line in lines[1:-1]]
    assert shares == sorted(shares) and shares


def test_nothing_to_build_prints_nothing():
    assert build("print('ninja: no work to do.')").stdout == ""


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "print('a.cpp:1: warning: unused')"])
def test_a_build_that_fails_or_warns_shows_what_it_printed(end):
    done = build(f"print('[1/2] Building'); print('a.cpp:1: detail'); {end}")
    assert "a.cpp:1: detail" in done.stdout
    assert done.returncode == (3 if "Exit" in end else 0)
