"""Builds llama.cpp as a speed peer, and converts checkpoint folders to its file format.

    python bench/peer_build.py build
    python bench/peer_build.py convert build/models/tiny --type f32

The source distribution of ``llama-cpp-python`` holds all of llama.cpp with its converter and the
ctypes bindings; nothing is installed, everything stays in one folder (``build/peer``).
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

log = logging.getLogger(__name__)

VERSION = "0.3.36"
ROOT = Path(__file__).resolve().parent.parent / "build" / "peer"

# Types the converter writes, and those made from the bf16 file (enum llama_ftype).
CONVERTED = ("f32", "bf16", "q8_0")
QUANTIZED = {"q4_0": 2, "q4_k": 14, "iq4_nl": 25, "iq4_xs": 30, "nvfp4": 39}

# Run by the converter's own interpreter: its command line with one change, see ``convert``.
_CONVERT = """
import sys
sys.path.insert(0, sys.argv[1] + "/gguf-py")
sys.path.insert(0, sys.argv[1])
from conversion.nemotron import NemotronHModel

def no_vocabulary(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

NemotronHModel.set_vocab = no_vocabulary
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py"] + sys.argv[2:]
convert_hf_to_gguf.main()
"""


def sdist_folder(root: Path = ROOT) -> Path:
    """Where the unpacked source distribution lies."""
    return root / f"llama_cpp_python-{VERSION}"


def library_folder(root: Path = ROOT) -> Path:
    """Where libllama.so and llama-bench lie."""
    return root / "llama-build" / "bin"


def _run(command: list[str], what: str, cwd: Path | None = None) -> None:
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
        _run(pip, "download of llama-cpp-python")
    if not sdist_folder(root).exists():
        with tarfile.open(archive) as tar:
            # The filter refuses paths outside root; the oldest supported Pythons may lack it.
            tar.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = sdist_folder(root) / "vendor" / "llama.cpp"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON"]
    options += ["-DLLAMA_CURL=OFF"]
    options += [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "SERVER", "EXAMPLES")]
    build = library.parent
    _run(["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *options], "configuration")
    ninja = ["ninja", "-C", str(build), f"-j{jobs or os.cpu_count() or 1}"]
    _run([*ninja, "llama", "llama-bench"], "build of llama.cpp")
    return library


def _write_gguf(folder: Path, kind: str, target: Path, root: Path) -> None:
    """Writes one file from the checkpoint, or from the bf16 file for quantized types."""
    if kind in CONVERTED:
        source = sdist_folder(root) / "vendor" / "llama.cpp"
        command = [sys.executable, "-c", _CONVERT, str(source), str(folder)]
        command += ["--outtype", kind, "--outfile", str(target)]
        _run(command, f"conversion of {folder.name} to {kind}")
        return
    from peer_llama import Peer

    base = convert(folder, "bf16", root)
    with Peer(None, root=root) as peer:
        peer.quantize(base, target, QUANTIZED[kind])


def convert(folder: str | Path, kind: str = "bf16", root: Path = ROOT) -> Path:
    """The checkpoint as a GGUF file, written by llama.cpp's own converter.

    The converter insists on a tokenizer, which a random checkpoint has not; it is told to write
    the "none" vocabulary and the vocabulary's size instead. Experts stay one tensor per layer.

    Args:
        folder: checkpoint folder (full width; the elastic table is ignored).
        kind: str, ``f32``, ``bf16`` or ``q8_0``, or a key of ``QUANTIZED``: then every matrix that
            llama.cpp quantizes has that type (its ``pure`` option), embeddings and head included.
        root: folder that ``build_peer`` filled.

    Returns:
        ``<folder>/peer-<kind>.gguf``; an existing file newer than the weights is kept.

    Raises:
        ValueError: another kind, or no checkpoint there.
        RuntimeError: the converter failed.
    """
    folder = Path(folder)
    if kind not in CONVERTED and kind not in QUANTIZED:
        raise ValueError(f"peer: type must be one of {[*CONVERTED, *QUANTIZED]}, got {kind!r}")
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ValueError(f"peer: folder must hold model.safetensors, got {folder}")
    target = folder / f"peer-{kind}.gguf"
    if target.exists() and target.stat().st_mtime >= weights.stat().st_mtime:
        return target
    partial = folder / f"partial-{kind}.gguf"
    _write_gguf(folder, kind, partial, root)
    partial.replace(target)
    return target


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
