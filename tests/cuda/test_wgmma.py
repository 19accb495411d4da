"""The asynchronous products of warpgroups, on the emulated GPU: descriptors and sums against the
manual's layouts, the laws of matmul, and who is refused."""

import numpy as np
import pytest
import torch

from elastic_infer.ops import registry
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.testing import laws as _laws
from elastic_infer.ops.testing.shapes import NATIVE
from elastic_infer.ops.tiles import TiledWeight
from support.emulated import built, check_orders, check_poisons, installed, load

emu = load(built())
BF16, SPEC = torch.bfloat16, registry()["matmul"]
CASES = NATIVE["wgmma"].cases


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        emu.device(compute_capability=90)
        yield


# -- matrices in shared memory, by their descriptors ---------------------------------------------


def descriptor(start, leading, stride, mode):
    """The fields of "Matrix Descriptor Format", each number without its lowest four bits."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def place_128(row, column, stride):
    """Byte of a value under 128-byte swizzling, K-major: 8 rows of 8 chunks of 16 bytes; in row r
    chunk c is where c xor r is."""
    chunk, rest = divmod(column, 8)
    return row // 8 * stride + row % 8 * 128 + (chunk ^ row % 8) * 16 + rest * 2


def place_plain(row, column, leading, stride):
    """Byte of a value without swizzling: core matrices of 8 rows of 16 bytes."""
    return row // 8 * stride + column // 8 * leading + row % 8 * 16 + column % 8 * 2


def stored(matrix, place, size):
    memory = np.full(size // 2, 0x7FC0, np.uint16)  # NaN
    bits = torch.from_numpy(matrix).to(BF16).view(torch.uint16).numpy()
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            memory[place(row, column) // 2] = bits[row, column]
    return memory


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("first", [0, 16, 48])
def test_swizzled_matrices_and_sums_are_where_the_manual_has_them(columns, first):
    """a [64, 64] and b [columns, 64], of which 16 columns are multiplied."""
    g = np.random.default_rng(columns + first)
    a, b = (g.integers(-8, 9, (n, 64)).astype(np.float32) for n in (64, columns))
    memory = np.concatenate(
        [
            stored(a, lambda r, c: place_128(r, c, 1024), 64 * 128),
            stored(b, lambda r, c: place_128(r, c, 1024), columns * 128),
        ]
    )
    got = emu.multiply_add_async(
        memory.tolist(),
        descriptor(first * 2, 16, 1024, 1),
        descriptor(64 * 128 + first * 2, 16, 1024, 1),
        columns,
    )
    want = a[:, first : first + 16] @ b[:, first : first + 16].T
    each = columns // 2
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(each):
            row = warp * 16 + (lane >> 2) + 8 * (i // 2 % 2)
            column = i // 4 * 8 + (lane & 3) * 2 + i % 2
            assert got[thread * each + i] == want[row, column], (thread, i)


def test_plain_matrices_take_both_offsets():
    g = np.random.default_rng(1)
    a, b = (g.integers(-8, 9, (n, 16)).astype(np.float32) for n in (64, 128))
    memory = np.concatenate(
        [
            stored(a, lambda r, c: place_plain(r, c, 128, 256), 64 * 32),
            stored(b, lambda r, c: place_plain(r, c, 2048, 128), 128 * 32),
        ]
    )
    got = emu.multiply_add_async(
        memory.tolist(), descriptor(0, 128, 256, 0), descriptor(64 * 32, 2048, 128, 0), 128
    )
    want = a @ b.T
    assert got[0] == want[0, 0] and got[4 * 64 + 3] == want[9, 1]
    assert sorted(got) == sorted(want.flatten().tolist())


def test_kernels_make_the_descriptor_of_the_manual():
    assert emu.matrix_descriptor(3, 16) == descriptor(3 * 1024 + 32, 16, 1024, 1)


def test_mistakes_show():
    """Sums that are used before they were waited for, matrices that are written too early."""
    assert emu.selftest("products") == "ok"
    assert emu.selftest("products_early") == "at 0: nan instead of 16.000000"
    assert emu.selftest("products_overwritten") == "at 0: 64.000000 instead of 16.000000"


# -- the kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_laws(case):
    """Laws 1, 2, 3, 7 and 8."""
    check_orders(emu, SPEC, case, BF16)
    check_poisons(SPEC, case, BF16)
    arguments = _laws.make(SPEC, case, BF16)
    _laws.check_inputs_unchanged(SPEC, arguments)
    for given in _laws.one_width(arguments):
        assert _laws.check_slice(SPEC, given) >= 1


def test_rows_keep_their_bits_in_any_batch():
    """Law 5: one order of summation, also across the two shapes."""
    a = _laws.make(SPEC, CASES[-1], BF16)
    assert len(a["x"]) > 128
    _laws.check_batch(SPEC, a)


def test_float32_output():
    g = torch.Generator().manual_seed(2)
    x, w = (torch.randn(n, 96, generator=g).to(BF16) for n in (40, 100))
    got = matmul(x, TiledWeight.pack(w), torch.empty(40, 100), kernel="wgmma")
    want = x.double() @ w.double().T
    assert (got.double() - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize(
    "capability, x, w, kernel, message",
    [
        (80, BF16, BF16, "wgmma", "be auto: the device has compute capability 8.0, 9.0 needed"),
        (100, BF16, BF16, "wgmma", "be auto: the device has compute capability 10.0, 9.0 needed"),
        (90, torch.float32, BF16, "wgmma", "be auto unless x and w are bfloat16, got wgmma"),
        (90, BF16, BF16, "mma", "be auto or wgmma, got mma"),
    ],
)
def test_other_cards_and_types_are_refused(capability, x, w, kernel, message):
    emu.device(compute_capability=capability)
    weight, out = TiledWeight.pack(torch.zeros(16, 32, dtype=w)), torch.zeros(1, 16, dtype=BF16)
    with pytest.raises(ValueError, match=f"^matmul: kernel must {message}"):
        matmul(torch.zeros(1, 32, dtype=x), weight, out, kernel=kernel)
