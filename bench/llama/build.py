"""Builds llama.cpp as a speed peer, and converts checkpoint folders to its file format.

    python -m bench.llama.build build
    python -m bench.llama.build convert build/models/tiny --type f32

The source distribution of ``llama-cpp-python`` holds all of llama.cpp with its converter and the
ctypes bindings; nothing is installed, everything stays in one folder (``build/peer``).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tarfile
from pathlib import Path

from bench.llama.convert import CONVERTED, QUANTIZED, convert
from bench.llama.folder import ROOT, VERSION, library_folder, run, sdist_folder
from elastic_infer.device.machine import available_cpus


def build_peer(root: Path = ROOT, jobs: int | None = None) -> Path:
    """Downloads and compiles llama.cpp for this machine, unless that is done already.

    Takes about ten minutes of one core. Needs cmake, ninja and a C++ compiler on PATH.

    Args:
        root: folder for everything that is downloaded and built.
        jobs: int, compilers at a time; None means one per core.

    Returns:
        The folder with libllama.so and llama-bench.

    Raises:
        RuntimeError: a step failed; the message ends with its output.
    """
    library = library_folder(root)
    if (library / "libllama.so").exists() and (library / "llama-bench").exists():
        return library
    root.mkdir(parents=True, exist_ok=True)
    archive = root / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(root)]
        pip += ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
        run(pip, "download of llama-cpp-python")
    if not sdist_folder(root).exists():
        with tarfile.open(archive) as tar:
            # The filter refuses paths outside root; the oldest supported Pythons may lack it.
            tar.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = sdist_folder(root) / "vendor" / "llama.cpp"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON"]
    options += ["-DLLAMA_CURL=OFF"]
    options += [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "SERVER", "EXAMPLES")]
    build = library.parent
    run(["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *options], "configuration")
    ninja = ["ninja", "-C", str(build), f"-j{jobs or available_cpus()}"]
    run([*ninja, "llama", "llama-bench"], "build of llama.cpp")
    return library


def main() -> None:
    """Command line: ``build``, or ``convert FOLDER --type KIND``; prints the resulting path."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Build llama.cpp; convert checkpoints for it.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build")
    build.add_argument("--jobs", type=int)
    conversion = commands.add_parser("convert")
    conversion.add_argument("folder", type=Path)
    conversion.add_argument("--type", choices=[*CONVERTED, *QUANTIZED], default="bf16")
    arguments = parser.parse_args()
    if arguments.command == "build":
        print(build_peer(jobs=arguments.jobs))
    else:
        print(convert(arguments.folder, arguments.type))


if __name__ == "__main__":
    main()
