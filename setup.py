"""Builds the native module with CMake; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Path of a build tool: the one installed beside this Python, else the one on PATH."""
    beside = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=beside)
    if found is None:
        raise SystemExit(f"setup: {name} must be installed, got none: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt, the only list of sources, and puts the module in its place."""

    def finalize_options(self) -> None:
        """Remembers whether the module is for this checkout: `run` forgets it."""
        super().finalize_options()
        self.for_checkout = bool(self.inplace)

    def build_extension(self, extension: Extension) -> None:
        """Configures and builds `elastic_infer._C`."""
        import pybind11

        # A checkout keeps its build between runs; a wheel is built in a folder of its own.
        in_place = self.for_checkout or getattr(self, "editable_mode", False)
        folder = ROOT / "build" / "cmake" if in_place else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        configure = [
            tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True, stdout=None if self.verbose else subprocess.DEVNULL)
        subprocess.run([tool("cmake"), "--build", str(folder)], check=True)
        built = folder / target.name
        if not built.is_file():
            raise SystemExit(f"setup: the build must give {target.name}, got none in {folder}")
        note = (folder / "kernels.txt").read_text().strip()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one move, so that a process that has the old module mapped keeps it whole.
        fresh = target.with_suffix(".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)
        print(f"elastic_infer: built with {note}")


setup(ext_modules=[Extension("elastic_infer._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
