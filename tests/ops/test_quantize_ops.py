"""Quantized weights in the ops: the quantizers against numpy, products against float64, and what is
refused by name."""

import numpy as np
import pytest
import torch

from elastic_infer import _C
from elastic_infer.ops import Pool
from elastic_infer.ops._quantized import dequantize, draw_codes
from elastic_infer.ops.fp8_quantize import fp8_quantize
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.nvfp4_quantize import nvfp4_quantize
from elastic_infer.ops.tiles import FP8, NVFP4, ExpertWeights, TiledWeight
from support.quantized import E4M3, nearest, numpy_nvfp4


def matrices():
    """(name, float32 weight, scale or None): ordinary ones and every edge."""
    g = torch.Generator().manual_seed(5)
    normal = torch.randn(33, 208, generator=g)
    yield "normal", normal, None
    yield "heavy tails", normal**5, None
    yield "tiny", normal * 1e-30, None
    yield "subnormal", normal * 1e-41, None
    yield "saturating scales", normal, 2.0**-12
    yield "underflowing scales", normal, 300.0
    yield "scales next to underflow", normal, float(2**-3 * normal.abs().max())
    zeros = normal.clone()
    zeros[:, 16:48], zeros[3], zeros[4] = 0.0, 0.0, -0.0
    yield "zero blocks", zeros, None
    yield "all zero", torch.zeros(2, 16), None
    # Block scale 1 and scale 1: codes of every multiple of 1/8 up to 8, so all halfway points.
    steps = torch.arange(-64, 64).view(16, 8) / 8
    halfway = torch.cat([torch.full((16, 1), 6.0), steps, torch.zeros(16, 7)], 1)
    yield "halfway codes", halfway, 1.0
    # Block maxima at and between all neighbours among the values of E4M3.
    between = np.concatenate([E4M3, (E4M3[1:] + E4M3[:-1]) / 2, [460.0, 500.0, 1e30]])
    blocks = torch.zeros(len(between), 16)
    blocks[:, 5] = torch.tensor(between * 6, dtype=torch.float32)
    yield "halfway scales", blocks, 1.0


MATRICES = {name: (weight, scale) for name, weight, scale in matrices()}


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MATRICES)
def test_nvfp4_is_numpys(name, dtype, isa):
    """Bit-equal to the definition, both levels."""
    weight, scale = MATRICES[name]
    weight = weight.to(dtype)
    N, K = weight.shape
    codes = torch.empty(N, K // 2, dtype=torch.uint8)
    block_scales = torch.empty(N, K // 16, dtype=torch.uint8)
    used = nvfp4_quantize(weight, codes, block_scales, scale=scale, run=Pool(2, isa))
    if scale is None and weight.any():
        assert used == float(np.float32(weight.abs().max().item()) / np.float32(6 * 448))
    want = numpy_nvfp4(weight.float().numpy(), np.float32(used))
    assert np.array_equal(block_scales.numpy(), want[1])
    assert np.array_equal(codes.numpy(), want[0])


@pytest.mark.parametrize("name", MATRICES)
def test_fp8_is_numpys(name):
    weight, scale = MATRICES[name]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    used = fp8_quantize(weight, codes, scale=scale)
    if scale is None and weight.any():
        assert used == float(np.float32(weight.abs().max().item()) / np.float32(448))
    ratio = weight.numpy() / np.float32(used)
    want = nearest(np.abs(ratio), E4M3) | (np.signbit(ratio) * 0x80).astype(np.uint8)
    assert np.array_equal(codes.numpy(), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(bad):
    weight = torch.randn(3, 32)
    weight[2, 17] = bad
    codes, scales = torch.empty(3, 32, dtype=torch.uint8), torch.empty(3, 2, dtype=torch.uint8)
    where = "at row 2, column 17"
    with pytest.raises(ValueError, match=f"nvfp4_quantize: weight must be finite.*{where}"):
        nvfp4_quantize(weight, codes[:, :16].contiguous(), scales)
    with pytest.raises(ValueError, match=f"fp8_quantize: weight must be finite.*{where}"):
        fp8_quantize(weight, codes)
    for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-60):
        with pytest.raises(ValueError, match="fp8_quantize: scale must be positive"):
            fp8_quantize(torch.randn(3, 32), codes, scale=scale)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_every_code_is_exact(form, rows, isa):
    """With one column of x that is not zero, a product is one weight: equal to the definition, for
    every code, every finite block scale and every position in a tile."""
    g = torch.Generator().manual_seed(rows)
    drawn = draw_codes(g, 128, 64, form=form)
    codes, blocks = drawn["codes"], drawn["block_scales"]
    if form == "fp8":
        codes[:, 0] = torch.arange(128, dtype=torch.uint8)
        codes[:, 63] = torch.arange(128, dtype=torch.uint8) + 128
        codes[(codes & 0x7F) == 0x7F] = 0x80
    else:
        blocks[:, 0] = torch.arange(128).clamp(max=126).to(torch.uint8)
    weight = TiledWeight.pack_codes(codes, blocks, torch.ones(1))
    want = dequantize(codes, blocks, 1.0, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for first in range(0, 64, rows):
            x = torch.zeros(rows, 64, dtype=dtype)
            for i in range(min(rows, 64 - first)):
                x[i, first + i] = 1.0
            out = matmul(x, weight, torch.empty(rows, 128), run=Pool(1, isa))
            n = min(rows, 64 - first)
            assert torch.equal(out[:n], want[:, first : first + n].T)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("rows", [1, 30])
def test_weight_only_accuracy(rows, isa):
    """bfloat16 activations within 4e-3 of float64 on the dequantized weights, norm-wise."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(192, 1920, generator=g) * 0.02
    codes = torch.empty(192, 960, dtype=torch.uint8)
    blocks = torch.empty(192, 120, dtype=torch.uint8)
    scale = nvfp4_quantize(weight, codes, blocks)
    x = torch.randn(rows, 1920, generator=g).bfloat16()
    tiled = TiledWeight.pack_codes(codes, blocks, torch.tensor([scale]))
    out = torch.empty(rows, 192, dtype=torch.bfloat16)
    matmul(x, tiled, out, run=Pool(1, isa))
    exact = x.double() @ dequantize(codes, blocks, scale, torch.float64).T
    assert (out.double() - exact).norm() <= 4e-3 * exact.norm()


def test_dtype_follows_from_the_tiles():
    for dtype, size in ((torch.float32, 16384), (torch.bfloat16, 8192), (FP8, 4096), (NVFP4, 2304)):
        weight = TiledWeight.empty([70, 3], 100, dtype)
        assert weight.dtype == dtype and tuple(weight.image.shape) == (3, 2, size)
        assert (weight.scale is None) == (dtype in (torch.float32, torch.bfloat16))
        assert ExpertWeights.empty(2, 70, 100, dtype).dtype == dtype
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float8_e4m3fn"):
        TiledWeight.empty([64], 64, torch.float16)


def test_bad_codes_are_refused():
    drawn = draw_codes(torch.Generator().manual_seed(0), 70, 64, form="nvfp4")
    codes, blocks, scale = drawn["codes"], drawn["block_scales"], torch.ones(1)
    tiled = TiledWeight.empty([70], 64, NVFP4)
    for bad, what in ((0x7F, "0x7f"), (0xFF, "0xff"), (0x90, "0x90")):
        wrong = blocks.clone()
        wrong[69, 2] = bad
        with pytest.raises(
            ValueError,
            match=rf"block_scales must be finite and not negative, got {what} at \[69, 2\]",
        ):
            TiledWeight.pack_codes(codes, wrong, scale)
    for bad in (-1.0, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match="scale must be finite and not negative"):
            tiled.fill(0, codes, block_scales=blocks, scale=bad)
    with pytest.raises(ValueError, match=r"block_scales must have shape \[70, 4\]"):
        TiledWeight.pack_codes(codes, blocks[:, :3].contiguous(), scale)
    with pytest.raises(ValueError, match="block_scales must be given"):
        tiled.fill(0, codes, scale=1.0)
    with pytest.raises(ValueError, match="source must be uint8"):
        tiled.fill(0, codes.float(), block_scales=blocks, scale=1.0)
    with pytest.raises(ValueError, match="K modulo 16 must"):
        TiledWeight.pack_codes(codes[:, :12].contiguous(), blocks[:, :1].contiguous(), scale)
    fp8 = torch.zeros(70, 64, dtype=torch.uint8)
    fp8[1, 2] = 0xFF
    with pytest.raises(ValueError, match=r"source must hold no NaN, got 0xff at \[1, 2\]"):
        TiledWeight.pack_codes(fp8, None, scale)
    with pytest.raises(ValueError, match="block_scales must be absent for FP8 tiles"):
        TiledWeight.empty([70], 64, FP8).fill(0, codes.repeat(1, 2), block_scales=blocks, scale=1.0)
    with pytest.raises(ValueError, match="scale must be None for float32 and bfloat16"):
        TiledWeight.empty([70], 64, torch.float32).fill(0, torch.randn(70, 64), scale=1.0)
    bare = TiledWeight(tiled.image, 64, tiled.segments)
    with pytest.raises((ValueError, TypeError), match="matmul: scale must"):
        matmul(torch.randn(1, 64), bare, torch.empty(1, 70))
