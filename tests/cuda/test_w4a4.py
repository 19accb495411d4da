"""NVFP4 activations with NVFP4 weights, on the emulated GPU: the matrix instruction against its
manual's tables, the quantized rows against numpy, products against float64, and who is refused."""

import numpy as np
import pytest
import torch

from elastic_infer.ops import registry
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.moe_matmul import moe_matmul, moe_workspace_bytes
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.shapes import NATIVE
from elastic_infer.ops.tiles import ExpertWeights, TiledWeight
from support.emulated import (
    built,
    check_orders,
    check_overlap,
    check_poisons,
    installed,
    load,
)
from support.quantized import dequantize, e4m3, identity, numpy_nvfp4
from support.w4a4 import (
    CASES,
    EXPERTS,
    MATMUL,
    MOE,
    check_poison,
    check_products,
    make,
    reference,
    run,
    spec_of,
)

emu = load(built())
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        emu.device(compute_capability=120)
        yield


# -- the instruction, from the tables of "Matrix Fragments for mma.m16n8k64" -------------------


def a_place(lane, i):
    """(row, column) of element i of 32 of a lane's a."""
    row = lane >> 2 if i < 8 or 16 <= i < 24 else (lane >> 2) + 8
    return row, (lane & 3) * 8 + (i & 7) + (32 if i >= 16 else 0)


def b_place(lane, i):
    """(row, column) of element i of 16 of a lane's b."""
    return (lane & 3) * 8 + (i & 7) + (32 if i >= 8 else 0), lane >> 2


def d_place(lane, i):
    """(row, column) of element i of 4 of a lane's d."""
    return (lane >> 2) + (0 if i < 2 else 8), (lane & 3) * 2 + (i & 1)


def words(places, codes, count):
    """Registers of all lanes: eight codes to a word, the first in the lowest bits."""
    lanes = [[0] * (count // 8) for _ in range(32)]
    for lane in range(32):
        for i in range(count):
            lanes[lane][i // 8] |= int(codes[places(lane, i)]) << 4 * (i % 8)
    return [word for lane in lanes for word in lane]


@pytest.mark.parametrize("pair, quarter", [(p, q) for p in (0, 1) for q in range(4)])
def test_fragments_and_scales_are_where_the_manual_has_them(pair, quarter):
    """Scales in lanes that the selectors leave out are NaN."""
    g = np.random.default_rng(pair * 4 + quarter)
    a, b = g.integers(0, 16, (16, 64)), g.integers(0, 16, (64, 8))
    scale_a, scale_b = g.integers(1, 127, (16, 4)), g.integers(1, 127, (4, 8))
    word_a, word_b = [0x7F7F7F7F] * 32, [0x7F7F7F7F] * 32
    for m in range(16):
        word_a[4 * (m % 8) + 2 * pair + m // 8] = sum(
            int(s) << 8 * j for j, s in enumerate(scale_a[m])
        )
    for n in range(8):
        word_b[4 * n + quarter] = sum(int(s) << 8 * j for j, s in enumerate(scale_b[:, n]))
    got = emu.multiply_add_nvfp4(
        words(a_place, a, 32), words(b_place, b, 16), word_a, word_b, pair, quarter
    )
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    want = (values[a] * np.repeat(e4m3(scale_a), 16, 1)) @ (
        values[b] * np.repeat(e4m3(scale_b), 16, 0)
    )
    for lane in range(32):
        for i in range(4):
            there = want[d_place(lane, i)]
            assert abs(got[lane * 4 + i] - there) <= 1e-5 * np.abs(want).max(), (lane, i)


# -- rows of x ---------------------------------------------------------------------------------


def edges():
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(9, 96, generator=g)
    zeros = normal.clone()
    zeros[2], zeros[:, 16:32] = 0.0, -0.0
    tail = normal.clone()
    tail[:, 90] = 1e4
    return {
        "normal": normal,
        "heavy tails": normal**5,
        "tiny": normal * 1e-30,
        "zeros": zeros,
        "one large value": tail,
        "wide rows": torch.cat([normal] * 20, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", edges())
def test_rows_are_quantized_as_numpy_does(name, dtype):
    """Weights that are the identity give the quantized values back, to the last bit."""
    x = edges()[name].to(dtype)
    K = x.shape[1]
    weight = TiledWeight.pack_codes(*identity(K), torch.ones(1))
    got = matmul(x, weight, torch.empty(len(x), K), activation_quantization="nvfp4").numpy()
    for r, values in enumerate(x.float().numpy()):
        g = np.float32(np.abs(values).max() / np.float32(6 * 448))
        if g == 0:
            assert not got[r].any()
            continue
        exact = dequantize(*numpy_nvfp4(values[None], g), 1.0)[0].astype(np.float32)
        assert np.array_equal(got[r], exact * g), f"row {r}"


def test_rows_that_are_not_finite_give_nan_and_others_are_as_before():
    a = make(CASES[1], BF16)
    want = run(a)
    for bad in (torch.nan, torch.inf):
        a["x"][4, 3] = bad
        got = run(a)
        k, n = int(a["k_sizes"][a["row_width"][4]]), int(a["n_sizes"][a["row_width"][4], 0])
        assert k > 3 and torch.isnan(got[4, :n]).all()
        rest = torch.arange(len(got)) != 4
        assert _laws.same_bits(got[rest], want[rest])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_experts_that_are_not_finite_give_nan(bad):
    """Rows that share their experts keep their bits."""
    a = make(EXPERTS[5], BF16)
    want = run(a)
    a["x"][4, 3] = bad
    got = run(a)
    k = int(a["k_sizes"][a["row_width"][4]])
    assert k > 3 and torch.isnan(got[4, :k]).all() and not got[4, k:].any()
    rest = torch.arange(len(got)) != 4
    assert _laws.same_bits(got[rest], want[rest])


def test_the_accuracy_benchmark_quantizes_alike(monkeypatch):
    """`bench/cpu/activations.py` does in torch what the kernel does."""
    from bench.cpu.activations import quantize

    for x in edges().values():
        got = quantize(x).numpy()
        for r, values in enumerate(x.numpy()):
            g = np.float32(np.abs(values).max() / np.float32(6 * 448)) or np.float32(1)
            exact = dequantize(*numpy_nvfp4(values[None], g), 1.0)[0].astype(np.float32)
            assert np.array_equal(got[r], exact * g)


def test_the_accuracy_benchmark_multiplies_experts_alike(monkeypatch):
    from bench.cpu.activations import quantizing_experts

    a = make(EXPERTS[5], torch.float32)
    want, given = reference(a), _laws.copy(a)
    for name in ("up", "down"):
        parts = [given.pop(f"{name}_{p}") for p in ("codes", "block_scales", "scale")]
        given[name] = ExpertWeights.pack_codes(*parts)
    got = quantizing_experts(run=None, **given).double()
    for r, width in enumerate(a["row_width"].tolist()):
        k = int(a["k_sizes"][width])
        assert (got[r, :k] - want[r, :k]).norm() <= 1e-5 * want[r].norm()


# -- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("case", CASES + EXPERTS, ids=str)
def test_products_are_those_of_quantized_rows(case, dtype):
    """Against float64 on dequantized weights and rows, in three orders of threads and blocks."""
    check_products(emu, make(case, dtype))


@pytest.mark.parametrize("case", CASES + EXPERTS, ids=str)
def test_poison_beyond_the_prefixes_changes_nothing(case):
    """Law 2: rows of all widths, and all at each one width. A row has the scale of its own prefix,
    also where larger values follow."""
    arguments = make(case, BF16)
    _laws.check_inputs_unchanged(spec_of(arguments), arguments)
    check_poison(arguments)


@pytest.mark.parametrize("case", CASES + EXPERTS, ids=str)
def test_a_prefix_equals_a_copy_of_it(case):
    """Law 3, bit for bit where as many rows share the launch."""
    for given in _laws.one_width(make(case, BF16)):
        assert _laws.check_slice(spec_of(given), given, exact=False) >= 1


@pytest.mark.parametrize(
    "name, case",
    [(n, c) for n in ("nvfp4 activations", "nvfp4 experts") for c in NATIVE[n].cases],
    ids=str,
)
def test_laws_with_the_op_s_own_oracle(name, case):
    """What a GPU is held to as well."""
    spec, dtype = registry()[NATIVE[name].op], NATIVE[name].dtype
    check_orders(emu, spec, case, dtype)
    check_poisons(spec, case, dtype)
    for given in _laws.one_width(_laws.make(spec, case, dtype)):
        assert _laws.check_slice(spec, given, exact=False) >= 1


def test_batch_invariant_rows_keep_their_bits():
    """Law 5, where it is asked for: rows alone, and few of them, beside all."""
    emu.device(compute_capability=120, batch_invariant=True)
    a = make(CASES[5], torch.float32)
    want = run(a)
    for first, count in ((0, 1), (60, 9), (100, 40)):
        part = {n: a[n][first : first + count] for n in ("x", "out", "row_width")}
        assert _laws.same_bits(run(a | part), want[first : first + count])


@pytest.mark.parametrize("rows", [9, 70])
def test_replay_and_output_dtype(rows):
    """A recorded call has room of its own for the codes; bfloat16 x may give float32 logits."""
    a = make({**CASES[2], "R": rows}, BF16)
    a["out"] = torch.full((rows, a["out"].shape[1]), torch.nan)
    step = emu.Step(emu.Pool())
    given = _laws.copy(a)
    MATMUL.call(given, step)
    step.run()
    first = given["out"].clone()
    step.run()
    assert _laws.same_bits(first, given["out"]) and _laws.same_bits(first, run(a))
    want = reference(a)
    assert (first.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("case", [EXPERTS[0], EXPERTS[2], EXPERTS[7]], ids=str)
def test_experts_at_once_recorded_and_overlapping(case, dtype):
    """Law 7: a step has room of its own for the codes, and keeps the launches of a call apart from
    those before."""
    _laws.check_repeat(MOE, make(case, dtype), emu.Step(emu.Pool()))
    check_overlap(emu, MOE, {**case, "weights": "nvfp4"})


# -- who is refused ----------------------------------------------------------------------------


def tiled(form):
    a = _laws.make(registry()["matmul"], {**CASES[0], "weights": form}, BF16)
    return TiledWeight.pack_codes(a["codes"], a["block_scales"], a["scale"], list(a["segments"]))


def tiled_experts(form):
    a = _laws.make(registry()["moe_matmul"], {**EXPERTS[1], "weights": form}, BF16)
    return [
        ExpertWeights.pack_codes(*(a[f"{name}_{p}"] for p in ("codes", "block_scales", "scale")))
        for name in ("up", "down")
    ]


REFUSALS = pytest.mark.parametrize(
    "form, capability, requested, message",
    [
        ("nvfp4", 90, "nvfp4", "be none: the device has compute capability 9.0, 12.x needed, got"),
        ("nvfp4", 100, "nvfp4", "be none: the device has compute capability 10.0, 12.x needed"),
        ("fp8", 120, "nvfp4", "be none for a FP8 image, got nvfp4"),
        ("nvfp4", 120, "fp8", "be none, int8 or nvfp4, got fp8"),
        ("nvfp4", 120, "int8", "be none or nvfp4 on a GPU, got int8"),
    ],
)


@REFUSALS
def test_other_cards_and_weights_are_refused(form, capability, requested, message):
    emu.device(compute_capability=capability)
    weight = tiled(form)
    x, out = torch.zeros(1, weight.columns, dtype=BF16), torch.zeros(1, weight.rows, dtype=BF16)
    with pytest.raises(ValueError, match=f"^matmul: activation_quantization must {message}"):
        matmul(x, weight, out, activation_quantization=requested)


@REFUSALS
def test_other_cards_and_experts_are_refused(form, capability, requested, message):
    emu.device(compute_capability=capability)
    up, down = tiled_experts(form)
    x = torch.zeros(2, up.columns, dtype=BF16)
    ids, weights = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3)
    room = moe_workspace_bytes(2, 3, up.experts, up.columns, up.rows, BF16)
    with pytest.raises(ValueError, match=f"^moe_matmul: activation_quantization must {message}"):
        moe_matmul(
            x,
            up,
            down,
            ids,
            weights,
            torch.empty_like(x),
            activation_quantization=requested,
            workspace=torch.zeros(room, dtype=torch.uint8),
        )


def test_rows_at_odd_places_are_refused():
    """By both kernels, which read 16 bytes at a time."""
    for case, name in ((CASES[0], "x"), (EXPERTS[1], "x"), (EXPERTS[1], "shared")):
        a = make(case, BF16)
        odd = torch.zeros(a[name].shape[0], a[name].shape[1] + 1, dtype=BF16)[:, 1:]
        a[name] = odd.copy_(a[name])
        with pytest.raises(ValueError, match=f"{name} must have rows that start at multiples of"):
            spec_of(a).call(a, None)


@pytest.mark.parametrize("case", [CASES[0], EXPERTS[0]], ids=str)
def test_newer_cards_of_the_family_may(case):
    emu.device(compute_capability=121)
    assert run(make(case, BF16)).abs().sum() > 0
