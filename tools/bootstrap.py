"""Prepares the environment that `make` runs everything in, and builds the native module.

Needs nothing but a Python 3.10-3.13 and a C++ compiler. An active environment that has
torch >= 2.11 is used as it is; otherwise .venv is made and torch is installed there. What is
already there is kept, so a second run takes about a second. The path of the Python to use is
written to build/env/python.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import progress

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "env"
TORCH = "2.13.0"
OLDEST_TORCH = (2, 11)
PYTHONS = ((3, 10), (3, 13))
OLDEST_GCC = 11
BUILD_TOOLS = ("setuptools>=77", "wheel", "pybind11>=2.12,<4", "cmake>=3.18", "ninja")
TORCH_SIZE = (
    "about 0.2 GB to download and 0.7 GB on disk as a CPU build; up to 3 GB to download and 6 GB "
    "on disk with CUDA libraries (your pip index decides which)"
)


def stop(problem: str, debian: str = "", fedora: str = "") -> None:
    """Ends with one message that names the remedy."""
    lines = [f"bootstrap: {problem}"]
    if debian:
        lines.append(f"  Debian, Ubuntu:  sudo apt-get install {debian}")
    if fedora:
        lines.append(f"  Fedora, RHEL:    sudo dnf install {fedora}")
    raise SystemExit("\n".join(lines))


def say(text: str) -> None:
    """Progress, at once even when the output is a file."""
    print(text, flush=True)


# What the system must have -----------------------------------------------------------------------


def check_python() -> None:
    """Refuses a Python that the library is not made for, and one without its headers."""
    version = sys.version_info[:2]
    low, high = PYTHONS
    if not low <= version <= high:
        stop(
            f"python must be {low[0]}.{low[1]} to {high[0]}.{high[1]}, got "
            f"{version[0]}.{version[1]} ({sys.executable}); choose another with "
            "`make PYTHON=python3.12 ...`"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        stop(
            f"Python.h must be installed, got none at {header}",
            f"python{version[0]}.{version[1]}-dev",
            "python3-devel",
        )


def check_compiler() -> None:
    """Refuses a machine without a C++ compiler, or with a g++ that is too old."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name) or (None if "CXX" in os.environ else shutil.which("clang++"))
    if path is None:
        stop(f"a C++ compiler must be installed, got no {name}", "g++", "gcc-c++")
    if "clang" in Path(path).name:
        return
    asked = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True)
    found = re.match(r"(\d+)", asked.stdout.strip())
    if found and int(found.group(1)) < OLDEST_GCC:
        stop(
            f"g++ must be {OLDEST_GCC} or newer, got {asked.stdout.strip()} at {path}",
            "g++-12 && export CXX=g++-12",
            "gcc-toolset-12-gcc-c++",
        )


# The environment ---------------------------------------------------------------------------------


def active_python() -> Path | None:
    """The Python of the active virtual or conda environment, if there is one."""
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        prefix = os.environ.get(variable)
        if prefix and (Path(prefix) / "bin" / "python").exists():
            return Path(prefix) / "bin" / "python"
    return None


def ask(python: Path, code: str) -> str:
    """Output of a short program in another Python; empty when it fails."""
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def torch_version(python: Path) -> str:
    """Version of the torch that `python` has, without importing it; empty for none."""
    return ask(python, "from importlib.metadata import version; print(version('torch'))")


def is_new_enough(version: str) -> bool:
    """True if a torch version is at least the oldest that works."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return bool(numbers) and (int(numbers.group(1)), int(numbers.group(2))) >= OLDEST_TORCH


def choose_environment() -> Path:
    """The Python to use: the active environment's if its torch will do, else .venv's."""
    own = ROOT / ".venv" / "bin" / "python"
    active = active_python()
    if active is not None and active.resolve() != own.resolve():
        version = torch_version(active)
        if is_new_enough(version):
            say(f"bootstrap: using the active environment, which has torch {version}: {active}")
            return active
        found = f"torch {version}" if version else "no torch"
        oldest = ".".join(map(str, OLDEST_TORCH))
        say(f"bootstrap: using .venv: torch must be >= {oldest}, the active one has {found}")
    if not own.exists():
        say("bootstrap: making .venv")
        made = subprocess.run(
            [sys.executable, "-m", "venv", str(ROOT / ".venv")], capture_output=True, text=True
        )
        if made.returncode != 0:
            shutil.rmtree(ROOT / ".venv", ignore_errors=True)
            detail = (made.stdout + made.stderr).strip()
            if "ensurepip" in detail or "No module named venv" in detail:
                version = f"{sys.version_info[0]}.{sys.version_info[1]}"
                stop(
                    "the venv module must be installed, got a Python without it",
                    f"python{version}-venv",
                    "python3",
                )
            stop(f"making .venv must succeed, got: {detail}")
    return own


def pip(python: Path, *arguments: str) -> None:
    """Runs pip; its own message says what went wrong."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode != 0:
        stop(f"pip must succeed, got an error (above) from: pip {' '.join(arguments)}")


def prepare(python: Path, extras: str) -> None:
    """Installs torch where there is none, compiles the native module, and installs what
    pyproject.toml asks for; never another torch."""
    version = torch_version(python)
    if not is_new_enough(version):
        say(f"bootstrap: installing torch {TORCH}: {TORCH_SIZE}")
        pip(python, "install", "-q", f"torch=={TORCH}")
        version = torch_version(python)
    # The names of what pyproject.toml asks for decide whether pip has anything to do.
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "setup.py").read_text()
    wanted = f"{python} {version} {extras} {hashlib.sha256(text.encode()).hexdigest()}"
    stamp = STATE / "installed"
    installed = stamp.is_file() and stamp.read_text() == wanted
    constraint = STATE / "constraints.txt"
    if not installed:
        say("bootstrap: installing the build tools")
        constraint.write_text(f"torch=={version}\n")
        pip(python, "install", "-q", "-c", str(constraint), *BUILD_TOOLS)
    build_module(python)  # before pip does it, which shows no progress
    if not installed:
        say("bootstrap: installing the packages that pyproject.toml lists")
        pip(
            python,
            "install",
            "-q",
            "-c",
            str(constraint),
            "--no-build-isolation",
            "-e",
            f"{ROOT}[{extras}]",
        )
        stamp.write_text(wanted)


def build_module(python: Path) -> None:
    """Compiles what has changed. The first time takes one to two minutes."""
    note = ROOT / "build" / "cmake" / "kernels.txt"
    first = not note.is_file()
    command = [str(python), "setup.py", "--quiet", "build_ext", "--inplace"]
    if progress.run("bootstrap: compiling the native module", command, ROOT) != 0:
        stop("the native module must compile, got the errors above")
    if first:
        say(f"bootstrap: compiled, with {note.read_text().strip()}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", default="test", help="extras of pyproject.toml to install")
    extras = parser.parse_args().extras
    check_python()
    check_compiler()
    STATE.mkdir(parents=True, exist_ok=True)
    python = choose_environment()
    prepare(python, extras)
    (STATE / "python").write_text(f"{python}\n")


if __name__ == "__main__":
    main()
