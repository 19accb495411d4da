"""Builds the native module for one card with the Python that runs this: nothing is downloaded, no
environment is made. In a rehearsal: the module of emulated kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from bench.gpu.setting import ROOT, missing_gpu, native_arch
from bench.gpu.worker import PartBase
from elastic_infer.device.machine import available_cpus

FOLDER = ROOT / "build" / "gpu"


class Part(PartBase):
    """One item."""

    NATIVE = False

    def items(self) -> list[str]:
        return ["emulator" if self.setting.emulate else "module"]

    def run(self, item: str) -> dict[str, Any]:
        start = time.time()
        if self.setting.emulate:
            options, folder, target = ["-DELASTIC_EMULATE=ON"], ROOT / "build" / "emu", "_emu"
        else:
            arch = self.setting.arch or native_arch()
            options = ["-DELASTIC_CUDA=ON", f"-DELASTIC_CUDA_ARCHS={arch}"]
            options.append(f"-DELASTIC_NVCC={_tool('nvcc')}")
            folder, target = FOLDER, "_C"
        for name in ("cmake", "ninja", "c++", *(() if self.setting.emulate else ("nvcc",))):
            if _tool(name) is None:
                raise RuntimeError(f"{name} must be installed to build, got none on the PATH")
        _run(_configuration(folder, options))
        configured = time.time()
        jobs = str(available_cpus())
        printed = _run([_tool("cmake"), "--build", str(folder), "--target", target, "-j", jobs])
        row = {"configure_s": round(configured - start, 1), "build_s": time.time() - configured}
        row["build_s"] = round(row["build_s"], 1)
        if self.setting.emulate:
            return row
        module = next(folder.glob("_C*.so"))
        row |= {"architectures": arch, "bytes": module.stat().st_size, "note": _note(folder)}
        row["module_architectures"] = _imports(module)
        row["warnings"] = sorted(set(re.findall(r"warning[^\n]*", printed)))[:20]
        row["installed"] = not missing_gpu()
        if row["installed"]:  # a build for a card that is not here leaves this checkout as it is
            place = ROOT / "elastic_infer" / module.name
            fresh = place.with_suffix(".new")  # one move: who has the old one keeps it whole
            shutil.copy2(module, fresh)
            os.replace(fresh, place)
        return row


def _note(folder: Path) -> str:
    """CMake's report of its build."""
    return (folder / "kernels.txt").read_text(encoding="utf-8").strip()


def _tool(name: str) -> str | None:
    """The tool installed beside this Python, else the one on the PATH or in CUDA's usual place."""
    beside = [sysconfig.get_path("scripts"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(beside))


def _configuration(folder: Path, options: list[str]) -> list[str]:
    import pybind11

    fresh = not (folder / "CMakeCache.txt").exists()
    chosen = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"] if fresh else []
    return [
        _tool("cmake"),
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        *chosen,
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    ]


def _run(command: list[str]) -> str:
    """Output of a command. Raises: RuntimeError with the end of it if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    if done.returncode:
        errors = [line for line in printed.splitlines() if "error" in line.lower()]
        end = "\n".join([*errors[:10], *printed.splitlines()[-15:]])
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {done.returncode}:\n{end}")
    return printed


def _imports(module: Path) -> str:
    """Architectures of the fresh module's kernels, asked in a process of its own."""
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('_C', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "print(','.join(module.cuda_architectures()))"
    )
    asked = [sys.executable, "-c", code, str(module)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the built module must import, got {done.stderr[-1500:]}")
    return done.stdout.strip()
