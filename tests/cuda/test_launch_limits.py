"""Every launch that the shapes of models lead to is one that a driver takes, on each architecture.

The emulator lists launches without running them: the kernel, its threads, its dynamic shared
memory. What the kernel's static objects and registers add is the assembler's word
(bench/results/ptxas.json). Beyond what a block may have, a driver refuses the launch whatever the
arguments are, which no test without a GPU would see otherwise.
"""

import json

import pytest
import torch

from elastic_infer.ops import registry
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.moe_matmul import moe_matmul, moe_workspace_bytes
from elastic_infer.ops.moe_route import moe_route
from elastic_infer.ops.testing.laws import small_cases
from elastic_infer.ops.testing.shapes import NATIVE, SHAPES
from elastic_infer.ops.tiles import ExpertWeights, TiledWeight
from support.emulated import ROOT, built, installed, kernel_names, kernels, load

emu = load(built())
BF16, F32 = torch.bfloat16, torch.float32
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024, 300_000)
# Shared memory of a block and registers of a multiprocessor, on the smallest card of each binary:
# sm_80 also runs on 8.6 and 8.9.
LIMITS = {"sm_80": 99 * 1024, "sm_90a": 227 * 1024, "sm_100f": 227 * 1024, "sm_120f": 99 * 1024}
UNTOLD = 48 * 1024


@pytest.fixture(autouse=True)
def listing():
    with installed(emu):
        emu.take_list(only=True)
        yield
        emu.take_list()


@pytest.fixture(scope="module")
def assembled():
    """Rows of the record by file of kernels, kernel and architecture."""
    rows = json.loads((ROOT / "bench" / "results" / "ptxas.json").read_text())["kernels"]
    return {(k["op"], k["kernel"], k["arch"]): k for k in rows}


@pytest.fixture(scope="module")
def seen():
    """(file of kernels, kernel) of every launch that a test here has listed."""
    return set()


NAMES = kernel_names(built())


def architectures(source: str) -> list[str]:
    """Those whose kernels of a file are ever launched."""
    one = {"matmul_wgmma": "sm_90a", "matmul_w4a4": "sm_120f", "moe_matmul_w4a4": "sm_120f"}
    return [one[source]] if source in one else list(LIMITS)


def check_launches(op, assembled, seen):
    """Of what `op` launched since the last call."""
    # Tiles of weights are made by matmul's own kernels, whatever op takes them.
    sources = {source for source, _, _ in assembled if source.startswith(op)} | {"matmul"}
    for place, threads, dynamic, told in emu.take_list(only=True):
        name = NAMES[place]
        [source] = {s for s in sources if (s, name, "sm_120f") in assembled}
        seen.add((source, name))
        for arch in architectures(source):
            kernel = assembled[source, name, arch]
            shared = dynamic + kernel["static_shared_bytes"]
            assert shared <= (LIMITS[arch] if told else UNTOLD), (arch, name, dynamic, told)
            assert -(-kernel["registers"] // 8) * 8 * threads <= 65536, (arch, name)


def rows_of(count, columns, dtype):
    """A matrix whose rows are one in memory: there may be as many as one likes."""
    return torch.empty(1, columns, dtype=dtype).expand(count, columns)


def product(rows, K, N, x_dtype, w_dtype, out=None, **given):
    weight = TiledWeight.empty([N], K, w_dtype)
    matmul(rows_of(rows, K, x_dtype), weight, rows_of(rows, N, out or x_dtype), **given)


def experts(rows, D, F, x_dtype, w_dtype, E=128, J=6, **given):
    up, down = (ExpertWeights.empty(E, *shape, w_dtype) for shape in ((F, D), (D, F)))
    ids = torch.zeros(1, J, dtype=torch.int32).expand(rows, J)
    room = torch.empty(moe_workspace_bytes(rows, J, E, D, F, x_dtype), dtype=torch.uint8)
    moe_matmul(
        rows_of(rows, D, x_dtype),
        up,
        down,
        ids,
        rows_of(rows, J, F32),
        rows_of(rows, D, x_dtype),
        workspace=room,
        **given,
    )


FP8, NVFP4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
FORMATS = [
    (BF16, BF16),
    (BF16, FP8),
    (BF16, NVFP4),
    (F32, F32),
    (F32, BF16),
    (F32, FP8),
    (F32, NVFP4),
]
invariant = pytest.mark.parametrize("invariant", [False, True])


@invariant
@pytest.mark.parametrize("x_dtype, w_dtype", FORMATS)
def test_products_of_any_length_and_number_of_rows(x_dtype, w_dtype, invariant, assembled, seen):
    """K from one step to the widest feed-forward layer there is; up to a whole prompt of rows."""
    emu.device(132, invariant)
    for rows in ROWS:
        for K in (64, 2688, 20480, *(range(80, 20480, 208) if rows <= 8 else ())):
            for out in (BF16, F32):
                product(rows, K, 80, x_dtype, w_dtype, out)
    for source in (BF16, F32):
        if w_dtype in (BF16, F32):
            TiledWeight.empty([16], 16, w_dtype).fill(0, torch.zeros(16, 16, dtype=source))
    check_launches("matmul", assembled, seen)


@invariant
@pytest.mark.parametrize("x_dtype, w_dtype", FORMATS)
def test_experts_of_any_size_and_number_of_rows(x_dtype, w_dtype, invariant, assembled, seen):
    """Few experts and many; what falls to one expert ranges from a part of a row to 100,000."""
    emu.device(132, invariant)
    for rows in ROWS:
        experts(rows, 64, 48, x_dtype, w_dtype)
        experts(rows, 64, 48, x_dtype, w_dtype, E=8, J=2)
        if rows <= 1024:
            experts(rows, 2688, 1856, x_dtype, w_dtype)
    check_launches("moe_matmul", assembled, seen)


def test_experts_too_long_for_a_block_take_another_kernel_or_are_refused(assembled, seen):
    """J rows of expert channels that no block can hold."""
    for w_dtype in (BF16, FP8, NVFP4):
        experts(3, 2688, 2688, BF16, w_dtype, J=22)
    with pytest.raises(ValueError, match=r"^moe_matmul: ids must need at most \d+ bytes of shared"):
        experts(3, 2688, 2688, F32, BF16, J=22)
    check_launches("moe_matmul", assembled, seen)


@invariant
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_routing_of_any_length_and_number_of_rows(dtype, invariant, assembled, seen):
    emu.device(132, invariant)
    for rows in ROWS:
        for D in (64, 2688, 8192):
            gate = TiledWeight.empty([128], D, F32)
            moe_route(
                rows_of(rows, D, dtype),
                gate,
                torch.zeros(128),
                torch.empty(rows, 6, dtype=torch.int32),
                torch.empty(rows, 6),
                scaling_factor=1.0,
            )
    check_launches("moe_route", assembled, seen)


@invariant
@pytest.mark.parametrize("op", registry())
def test_shapes_of_models(op, invariant, assembled, seen):
    spec = kernels(emu)[op]
    emu.device(132, invariant)
    for case in [*small_cases(spec), *SHAPES.get(op, ())]:
        for dtype in spec.dtypes:
            if case.get("activation_quantization") == "int8":
                continue  # the CPU's
            given = spec.inputs(case, dtype, torch.Generator().manual_seed(1))
            spec.call(given, None)
            if op in ("rms_norm", "gated_norm"):  # weights of either dtype
                for weight_dtype in (F32, BF16):
                    spec.call(given | {"weight": given["weight"].to(weight_dtype)}, None)
    check_launches(op, assembled, seen)


@pytest.mark.parametrize("kind", NATIVE)
def test_kernels_of_single_architectures(kind, assembled, seen):
    native = NATIVE[kind]
    for rows in ROWS[:-1]:
        for invariant in (False, True):
            emu.device(132, invariant, native.capability)
            if kind == "wgmma":
                for out in (BF16, F32):
                    product(rows, 2688, 80, BF16, BF16, out, kernel="wgmma")
                continue
            given = {"activation_quantization": "nvfp4"}
            for dtype in (BF16, F32):
                if native.op == "matmul":
                    for out in (BF16, F32):
                        product(rows, 2688, 80, dtype, NVFP4, out, **given)
                else:
                    experts(rows, 2688, 1856, dtype, NVFP4, **given)
                    experts(rows, 64, 48, dtype, NVFP4, E=8, J=2, **given)
    check_launches(native.op, assembled, seen)


def test_every_kernel_was_launched(assembled, seen):
    """By the tests above: one that is run alone says nothing."""
    if len(seen) < 100:
        pytest.skip("the tests above did not run")
    assert sorted({(source, name) for source, name, _ in assembled} - seen) == []
