"""Activations as products with NVFP4 weights take them on request, in plain torch."""

from __future__ import annotations

import torch

from ..codes import BLOCK
from ._quantized import dequantize
from .nvfp4_quantize import nvfp4_scale, reference as nvfp4

LEAST = 2.0**-100  # a block of int8 whose values are all smaller counts as zero


def int8(x: torch.Tensor) -> torch.Tensor:
    """``round(x * (127 / amax)) * (amax / 127)`` for every 16 values of a row, amax the largest of
    their absolute values; ties to even, steps in float32.

    Args:
        x: [..., K] floating, finite; K a multiple of 16.

    Returns:
        The values, in the shape and dtype of x.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    some = amax >= LEAST
    # A number over a tensor would round twice: torch multiplies it with the reciprocal.
    codes = (blocks * (amax.new_tensor(127.0) / torch.where(some, amax, 1.0))).round()
    codes = torch.where(some, codes, 0.0)
    half = torch.where(some, amax, 0.0) * amax.new_tensor(0.5 / 127.0)
    return (codes.to(x.dtype) * half.to(x.dtype) * 2).flatten(-2)


def quantized(form: str, x: torch.Tensor) -> torch.Tensor:
    """Rows as they are multiplied.

    Args:
        form: "none", "int8" or "nvfp4", as of :func:`matmul`'s `activation_quantization`.
        x: [R, K], each row's own prefix and nothing else.

    Returns:
        The values, in the shape and dtype of x.
    """
    if form == "none":
        return x
    if form == "int8":
        return int8(x)
    rows = []
    for row in x:
        scale = nvfp4_scale(row[None])
        made = nvfp4({"weight": row[None], "scale": scale})
        rows.append(dequantize(made["codes"], made["block_scales"], scale, x.dtype))
    return torch.cat(rows) if rows else x
