"""Quantized images: bytes of a tile, values of codes in plain torch, and what tests draw."""

from __future__ import annotations

import torch

from ..codes import BLOCK, decode_e4m3, unpack_e2m1


def dequantize(
    codes: torch.Tensor, block_scales: torch.Tensor | None, scale, dtype: torch.dtype
) -> torch.Tensor:
    """Values of quantized weights, computed in `dtype`.

    Args:
        codes: [..., N, K/2] (NVFP4) or [..., N, K] (FP8) uint8.
        block_scales: [..., N, K/16] uint8 (NVFP4) or None (FP8).
        scale: float32, broadcast against [..., N, K].

    Returns:
        [..., N, K]; a product of code and block scale is exact in every dtype.
    """
    if block_scales is None:
        values = decode_e4m3(codes)
    else:
        factors = decode_e4m3(block_scales).repeat_interleave(BLOCK, -1)
        values = unpack_e2m1(codes) * factors
    return values.to(dtype) * torch.as_tensor(scale).to(dtype)


def draw_codes(
    generator: torch.Generator, *shape: int, form: str, small: bool = False
) -> dict[str, torch.Tensor]:
    """Random quantized weights: every code, block scales from 1/64 to 4; `small`: the 15 smallest
    block scales, most of them subnormal, alone, so that no larger one hides them.

    Args:
        shape: [..., N, K].
        form: "nvfp4" or "fp8", which has no block scales to be small.

    Returns:
        Codes, block_scales (None for FP8) and scale ([...] float32, so that values are of the size
        of 1/sqrt(K)).
    """
    *head, N, K = shape
    unit = torch.rand(head, generator=generator) + 0.5
    if form == "fp8":
        codes = torch.randint(0, 256, (*head, N, K), generator=generator, dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 1  # a subnormal in the place of NaN
        return {"codes": codes, "block_scales": None, "scale": unit * K**-0.5 / 64}
    codes = torch.randint(0, 256, (*head, N, K // 2), generator=generator, dtype=torch.uint8)
    shape = (*head, N, K // BLOCK)
    if small:
        scales = torch.randint(1, 16, shape, generator=generator, dtype=torch.uint8)
        return {"codes": codes, "block_scales": scales, "scale": unit * K**-0.5 * 64}
    scales = torch.randint(0x20, 0x48, shape, generator=generator, dtype=torch.uint8)
    rare = torch.rand(shape, generator=generator) < 0.1
    scales[rare] >>= 2
    return {"codes": codes, "block_scales": scales, "scale": unit * K**-0.5}
