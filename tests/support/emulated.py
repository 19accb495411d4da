"""The module that runs the CUDA kernels on an emulated GPU (`make emu` builds it)."""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import elastic_infer.ops  # noqa: F401  (the tensor conversion registers with it)
from bench.gpu import ptxas
from elastic_infer.codes import dtype_name
from elastic_infer.ops import registry
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.laws import make, one_width, small_cases

ROOT = Path(__file__).resolve().parents[2]
CXX = ["g++", "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
BUILD = ROOT / os.environ.get("EMU_BUILD", "build/emu")
# Of threads within a block, and of blocks. A missing barrier shows in at least one of them.
ORDERS = [
    ("ascending", "ascending"),
    ("descending", "shuffled"),
    ("shuffled", "descending"),
]


def load(file: Path):
    """A `_emu` module."""
    spec = importlib.util.spec_from_file_location("_emu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built() -> Path:
    """The module file in the build folder."""
    files = sorted(BUILD.glob("_emu*.so"))
    if not files:
        pytest.fail(f"{BUILD} holds no _emu module: run `make emu`", pytrace=False)
    return files[0]


def variant(folder: Path, source: Path, *flags: str) -> Path:
    """A `_emu` module in `folder`: the one that was built, but for `source`, compiled anew with
    `flags` in the place of the file of that name."""
    made = folder / "variant.o"
    [csrc] = [p for p in source.parents if p.name == "csrc"]
    defines = ["-DELASTIC_EMULATE=1", f"-I{csrc}", "-w", "-x", "c++"]
    subprocess.run([*CXX, *defines, *flags, "-c", str(source), "-o", str(made)], check=True)
    objects = BUILD.glob("CMakeFiles/_emu.dir/csrc/**/*.o")
    others = [str(o) for o in objects if o.name != f"{source.name}.o"]
    module = folder / built().name
    # The new one first: of an inline function that several objects hold, the linker takes that one.
    subprocess.run([*CXX, "-shared", str(made), *others, "-o", str(module)], check=True)
    return module


def run_alone(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a script in a process of its own that can import the library and the tests."""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=path,
        cwd=ROOT,
    )


@contextmanager
def installed(module):
    """Inside, the library calls `module` instead of its own `_C`: ops run emulated CUDA kernels,
    and engines that are opened there run on the device "emulated"."""
    packages = [m for name, m in sys.modules.items() if name.startswith("elastic_infer.")]
    original = {m: m._C for m in packages if hasattr(m, "_C")}
    try:
        for m in original:
            m._C = module
        yield module
    finally:
        for m, c in original.items():
            m._C = c
        module.configure()
        module.device()


def kernel_names(file: Path) -> dict[int, str]:
    """Readable names of the functions of a module, by their addresses in it."""
    said = subprocess.run(["nm", str(file)], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in said.splitlines() if len(line.split()) == 3]
    found = [(int(address, 16), name) for address, kind, name in rows if kind in "tTwW"]
    return dict(zip((a for a, _ in found), ptxas.readable([n for _, n in found]), strict=True))


def check_orders(module, spec, case, dtype):
    """Law 1, and equal bits in all orders of threads and blocks."""
    arguments = make(spec, case, dtype)
    first = None
    for threads, blocks in ORDERS:
        module.configure(threads=threads, blocks=blocks)
        got = _laws.run(spec, arguments) if first else _laws.check_reference(spec, arguments)
        first = first or got
        assert all(_laws.same_bits(got[n], first[n]) for n in spec.outputs), f"{threads} {blocks}"
    module.configure()


def check_poisons(spec, case, dtype):
    """Law 2, with rows of all widths and with all rows at each one width."""
    arguments = make(spec, case, dtype)
    for given in [arguments, *one_width(arguments)]:
        _laws.check_poison(spec, given)


def check_overlap(module, spec, case):
    """Two different calls, in a step whose launches overlap, have the bits of each at once, and
    every thread waits for the launches ahead before it returns. What one leaves in the workspace is
    wrong for the other."""
    seeds = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    given = [spec.inputs(case, spec.dtypes[-1], seed) for seed in seeds]
    want = [_laws.run(spec, a) for a in given]
    recorded = [_laws.copy(a) for a in given]
    step = module.Step(module.Pool(), dependent_launch=True)
    for a in recorded:
        spec.call(a, step)
    for _ in range(3):  # at once, then as a graph
        for a, original in zip(recorded, given):
            for name in spec.outputs:
                a[name].copy_(original[name])
        step.run()
        for a, expected in zip(recorded, want):
            assert all(_laws.same_bits(a[n], expected[n]) for n in spec.outputs)
    assert step.captures == 1


def kernels(module):
    """The ops that have CUDA kernels."""
    return {name: spec for name, spec in registry().items() if module.has_kernel(name)}


def cells(module, *needs):
    """[(spec, case, dtype)] for every op with CUDA kernels that offers `needs`."""
    return [
        pytest.param(spec, case, dtype, id=f"{spec.name}-{i}-{dtype_name(dtype)}")
        for spec in kernels(module).values()
        if all(getattr(spec, need) is not None for need in needs)
        for i, case in enumerate(small_cases(spec))
        for dtype in spec.dtypes
    ]
