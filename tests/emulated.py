"""The module that runs the CUDA kernels on an emulated GPU (`make emu` builds it)."""

import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_ops import assert_close, check_poison, copy, make, run, same_bits, small_cases, wide

import elastic_infer.ops  # noqa: F401  (the tensor conversion registers with it)
from elastic_infer.ops import registry

BUILD = Path(__file__).parents[1] / os.environ.get("EMU_BUILD", "build/emu")
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


@contextmanager
def installed(module):
    """Inside, the public functions of all ops call `module` instead of the library's own `_C`."""
    packages = [m for name, m in sys.modules.items() if name.startswith("elastic_infer.ops.")]
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


def check_orders(module, spec, case, dtype):
    """Law 1, and equal bits in all orders of threads and blocks."""
    arguments = make(spec, case, dtype)
    exact = spec.reference(wide(spec, copy(arguments)))
    plain = spec.reference(copy(arguments))
    first = None
    for threads, blocks in ORDERS:
        module.configure(threads=threads, blocks=blocks)
        got = run(spec, arguments)
        for name in spec.outputs:
            assert_close(f"{spec.name}: {name}", got[name], exact[name], plain[name])
        first = first or got
        assert all(same_bits(got[n], first[n]) for n in spec.outputs), f"{threads} {blocks}"
    module.configure()


def one_width(spec, case, dtype):
    """The case's arguments with all rows at one width, for each width there is."""
    base = make(spec, case, dtype)
    picker = "row_width" if "row_width" in base else "seq_width"
    if base.get(picker) is None:
        return [base]
    found = []
    for w in range(max(base[picker].tolist()) + 1):
        arguments = copy(base)
        arguments[picker].fill_(w)
        found.append(arguments)
    return found


def check_poisons(spec, case, dtype):
    """Law 2, with rows of all widths and with all rows at each one width."""
    for arguments in [make(spec, case, dtype), *one_width(spec, case, dtype)]:
        check_poison(spec, arguments, None)


def kernels(module):
    """The ops that have CUDA kernels."""
    return {name: spec for name, spec in registry().items() if module.has_kernel(name)}


def cells(module, *needs):
    """[(spec, case, dtype)] for every op with CUDA kernels that offers `needs`."""
    return [
        pytest.param(spec, case, dtype, id=f"{spec.name}-{i}-{str(dtype)[6:]}")
        for spec in kernels(module).values()
        if all(getattr(spec, need) is not None for need in needs)
        for i, case in enumerate(small_cases(spec))
        for dtype in spec.dtypes
    ]


def _products():
    """Three widths on both sides, two segments, rows that end inside a tile."""
    base = {"K": 208, "segments": (144, 72), "k": (64, 144, 208),
            "n": ((40, 8), (144, 72), (130, 72)), "act": "none"}  # fmt: skip
    for rows in (2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 129):
        yield base | {"R": rows}
    yield base | {"R": 12, "act": "relu2"}
    for rows in (1, 6):
        yield base | {"R": rows, "K": 2688, "k": (1920, 2688, 1936)}


def _experts():
    """2 to 90 entries of an expert, and experts with more than one block of them."""
    for R, E, J in (
        (4, 12, 3), (5, 12, 3), (40, 14, 2), (20, 9, 3), (40, 4, 2), (60, 3, 2), (90, 2, 2)
    ):  # fmt: skip
        yield {"R": R, "E": E, "J": J, "D": 144, "F": 80, "k": (80, 144), "f": (48, 80),
               "shared": True}  # fmt: skip


# Sizes of real models, and those at which another kernel takes over.
SHAPES = {
    "matmul": list(_products()),
    "moe_matmul": list(_experts()),
    "ssm_scan": [
        {"lengths": (150, 64, 1), "H": 2, "P": 64, "N": 128, "G": 1, "widths": (2, 1)},
        {"lengths": (70,), "H": 1, "P": 80, "N": 144, "G": 1, "widths": (1,)},  # beyond chunks
    ],
    "ssm_step": [
        {"lengths": (1, 1), "H": 4, "P": 64, "N": 128, "G": 2, "widths": (2, 4), "step": True},
        {"lengths": (1,), "H": 1, "P": 16, "N": 256, "G": 1, "widths": (1,), "step": True},
    ],
    "attention_decode": [
        {"lengths": (200, 64), "Hq": 32, "Hkv": 2, "K": 128, "widths": (32, 16)},
        {"lengths": (70,), "Hq": 2, "Hkv": 1, "K": 192, "widths": None},
    ],
    "attention_prefill": [
        {"tokens": (9, 30), "context": (128, 3), "Hq": 16, "Hkv": 2, "K": 128, "widths": (8, 16)},
        {"tokens": (5,), "context": (64,), "Hq": 2, "Hkv": 1, "K": 192, "widths": None},
    ],
    "moe_route": [
        {"R": 9, "D": 2688, "E": 128, "J": 6, "k": (1920, 2688), "e": (128, 100), "ties": False}
    ],
    "rms_norm": [{"R": 2, "D": 2688, "widths": (1920, 2688), "delta": True}],
    "gated_norm": [{"R": 2, "H": 64, "P": 64, "G": 8, "widths": (56, 64)}],
    "causal_conv": [
        {"lengths": (30, 4, 31, 1, 33, 2, 1, 65), "x": 96, "bc": 32, "widths": (48, 96)}
    ],
}
