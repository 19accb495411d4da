"""CUDA kernels round where they are written to: nvcc fuses no product with a sum by itself.

So two kernels that share a function give equal bits however a compiler inlines it, and the
emulator, compiled without contraction too, has the arithmetic of a GPU.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
import torch

from bench.gpu import ptxas
from elastic_infer.ops import registry
from elastic_infer.ops.causal_conv import causal_conv
from elastic_infer.ops.ssm_scan import ssm_scan
from elastic_infer.ops.ssm_step import ssm_step
from elastic_infer.ops.testing import laws as _laws
from support.emulated import ORDERS, ROOT, built, installed, load

emu = load(built())
FLAG = "--fmad=false"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        yield


# -- the rule --------------------------------------------------------------------------------------


def test_record_was_made_with_the_flags_of_the_build():
    record = json.loads((ROOT / "bench" / "results" / "ptxas.json").read_text())
    assert FLAG in ptxas.FLAGS and record["flags"] == " ".join(ptxas.FLAGS)
    assert FLAG in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.slow
@needs_nvcc
def test_build_passes_the_flag_to_every_file_of_kernels(tmp_path):
    options = [
        "-DELASTIC_CUDA=ON",
        "-DELASTIC_CUDA_ARCHS=90a",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    cmake = Path(sys.executable).parent / "cmake"
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    cuda = [c for c in commands if c["file"].endswith(".cu")]
    assert {c["file"] for c in cuda} >= {str(s) for s in ptxas.sources()}
    assert all(FLAG in c["command"] for c in cuda)


KERNEL = """
#include "cuda/prim.cuh"
using namespace ei::cuda;
__global__ void apart(float* x) { x[0] = x[1] * x[2] + x[3]; }
__global__ void together(float* x) { x[0] = fused(x[1], x[2], x[3]); }
"""


@pytest.mark.slow
@needs_nvcc
def test_products_are_fused_where_a_kernel_says_so_and_nowhere_else(tmp_path):
    source, made = tmp_path / "one.cu", tmp_path / "one.ptx"
    source.write_text(KERNEL)
    flags = [f for f in ptxas.FLAGS if f not in ("-Xptxas", "-v", "-cubin")]
    command = ["nvcc", *flags, "-ptx", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", "-o", made, source]
    subprocess.run(command, check=True)
    bodies = dict(re.findall(r"\.entry \w*?(apart|together)\w*\((.*?)\n}", made.read_text(), re.S))
    # Without ".rn" the assembler might still fuse a product with a sum.
    pattern = re.compile(r"\b((?:mul|add|sub|fma)(?:\.rn)?)\.f32")
    assert {name: pattern.findall(body) for name, body in bodies.items()} == {
        "apart": ["mul.rn", "add.rn"],
        "together": ["fma.rn"],
    }


# -- kernels that share a function have equal bits -------------------------------------------------


@pytest.mark.parametrize("N, P", [(32, 16), (128, 64), (256, 16)])
def test_reading_float32_tokens_at_once_is_step_by_step(N, P):
    """The scan of float32 rows and the step share the recurrence; so do all calls of the
    convolution."""
    H, G, T = 2, 1, 7
    channels = H * P + 2 * G * N
    g = torch.Generator().manual_seed(N)
    x, dt = torch.randn(T, channels, generator=g), torch.randn(T, H, generator=g)
    weight, bias = torch.randn(channels, 4, generator=g), torch.randn(channels, generator=g)
    heads = [torch.rand(H, generator=g), *torch.randn(2, H, generator=g)]
    slots = torch.tensor([1], dtype=torch.int32)

    def read(cuts):
        conv, state, outs = torch.zeros(2, channels, 3), torch.zeros(2, H, P, N), []
        for first, last in cuts:
            mixed, y = torch.empty(last - first, channels), torch.empty(last - first, H * P)
            cu = torch.tensor([0, last - first], dtype=torch.int32)
            causal_conv(
                x[first:last],
                weight,
                bias,
                conv,
                mixed,
                cu_seqlens=cu,
                slots=slots,
                x_channels=H * P,
            )
            given = (*mixed.split([H * P, G * N, G * N], 1), dt[first:last], *heads, state, y)
            ssm_step(*given, slots=slots) if last - first == 1 else ssm_scan(
                *given, cu_seqlens=cu, slots=slots
            )
            outs.append(y)
        return torch.cat(outs), conv, state

    want = read([(0, T)])
    for threads, blocks in ORDERS:
        emu.configure(threads=threads, blocks=blocks)
        got = read([(t, t + 1) for t in range(T)])
        assert all(_laws.same_bits(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("K", [80, 6400, 7008])
@pytest.mark.parametrize("weights", [{}, {"weights": "nvfp4"}])
def test_a_float32_row_has_its_bits_in_every_block(K, weights):
    """One row, some of a block of 4, and rows so long that a block has one: each launches another
    kernel over the same sums."""
    spec = registry()["matmul"]
    case = {"R": 6, "K": K, "segments": (16,), "k": (K, K - 16), "n": ((16,), (8,)), "act": "none"}
    _laws.check_batch(spec, _laws.make(spec, case | weights, torch.float32))


def test_a_width_of_float32_rows_is_its_slice():
    """Law 3 bit for bit, also where the slice has fewer rows than the batch it was cut from."""
    spec = registry()["matmul"]
    case = {
        "R": 9,
        "K": 208,
        "segments": (72, 8),
        "k": (64, 208),
        "n": ((40, 4), (72, 8)),
        "act": "none",
    }
    for arguments in _laws.one_width(_laws.make(spec, case, torch.float32)):
        assert _laws.check_slice(spec, arguments, exact=True)
