"""The module that runs the CUDA kernels on an emulated GPU (`make emu` builds it)."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import elastic_infer.ops  # noqa: F401  (the tensor conversion registers with it)
from elastic_infer.ops import registry

BUILD = Path(__file__).parents[1] / "build" / "emu"


def load(folder: Path):
    """The `_emu` module that was built in `folder`."""
    files = sorted(folder.glob("_emu*.so"))
    if not files:
        pytest.fail(f"{folder} holds no _emu module: run `make emu`", pytrace=False)
    spec = importlib.util.spec_from_file_location("_emu", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def installed(module):
    """Inside, the public functions of all ops call `module` instead of the library's own `_C`."""
    packages = [m for name, m in sys.modules.items() if name.startswith("elastic_infer.ops.")]
    replaced = [m for m in packages if hasattr(m, "_C")]
    original = {m: m._C for m in replaced}
    try:
        for m in replaced:
            m._C = module
        yield module
    finally:
        for m, c in original.items():
            m._C = c


emu = load(BUILD)
SPECS = {name: spec for name, spec in registry().items() if emu.has_kernel(name)}
