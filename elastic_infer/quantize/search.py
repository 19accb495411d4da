"""Scales for weights that every width shares: the ones of least squared error over all widths.

Blocks of 16 along K lie wholly inside or outside of every width, so the best scale of a block is
the same for all widths that hold it: what they decide together is the scale of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.tensor_files import Selection
from ..codes import BLOCK, E2M1_MAX, E4M3_MAX, Packed, decode_e4m3, encode_e2m1, round_e2m1

__all__ = ["Quantized", "block_importance", "quantize_fp8", "quantize_nvfp4", "quantize_with"]

_STEPS = 8  # scales tried within a factor of two: both formats repeat themselves after it
_NEAR = range(-2, 6)  # E4M3 codes tried around the one that puts a block's largest weight at 6;
#                       about 4 more put it at 4, where the grid is finer
_CLIPPED = 4  # of the FP8 scales, how many let the largest weight saturate
_SAMPLE = 1 << 13  # blocks that the scale of the whole matrix is chosen on
_LEAST = 2.0**-126  # the least normal float32, in place of a step of zero
_PIECE = 1 << 14  # blocks worked on at a time, so that temporaries stay in the cache


class Quantized(NamedTuple):
    """A quantized matrix and how far it is from the one that was given.

    Attributes:
        packed: codes and scales.
        error: [N, K/16] squared error, summed over each block.
        plain: [N, K/16] the same of the scales amax / 6, amax / (6 * 448), without a search.
        energy: [N, K/16] squared weights, summed over each block.
    """

    packed: Packed
    error: Tensor
    plain: Tensor
    energy: Tensor


def block_importance(
    energy: Tensor, kept: Mapping[str, Selection], weights: Mapping[str, float] | None = None
) -> Tensor:
    """Weight of each block's squared error.

    ``sum over widths that hold the block of weight / (squared weights that the width holds)``, so
    that the sum over all blocks is the weighted mean of the widths' relative squared errors.

    Args:
        energy: [N, K/16] sums of squared weights.
        kept: {width: rows and columns of the matrix that it keeps}; a width without the matrix is
            absent.
        weights: {width: how much it counts}, None: all the same.

    Returns:
        [N, K/16] float32.
    """
    out = torch.zeros_like(energy)
    for name, selection in kept.items():
        share = 1.0 if weights is None else weights[name]
        inside = held_blocks(energy.shape, selection)
        total = float((energy.double() * inside).sum())
        if total > 0:
            out += inside * (share / total)
    return out


def held_blocks(shape: torch.Size, kept: Selection) -> Tensor:
    """[N, K/16] float32: 1 for the blocks that a selection of rows and columns holds, else 0."""
    rows = torch.zeros(shape[0], dtype=torch.float32)
    columns = torch.zeros(shape[1] * BLOCK, dtype=torch.float32)
    rows[slice(None) if kept.rows is None else kept.rows] = 1
    columns[slice(None) if kept.cols is None else kept.cols] = 1
    return rows[:, None] * columns[None, ::BLOCK]


def _sampled(values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spread blocks of [n, 16] and their importance."""
    step = max(1, len(values) // _SAMPLE)
    return values[::step], importance[::step]


def _error(values: Tensor, step: Tensor) -> Tensor:
    """Squared error of E2M1 codes of magnitudes [n, 16] at steps [n]; step 0 gives zeros."""
    step = step[:, None]
    got = round_e2m1(values / step.clamp(min=_LEAST)).mul_(step)
    return got.sub_(values).square_().sum(1)


def _nearest(largest: Tensor, scale: float) -> Tensor:
    """E4M3 bits of ``largest / (6 scale)``, as int16."""
    wanted = (largest / (E2M1_MAX * scale)).clamp(max=E4M3_MAX)
    return wanted.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)


def _best_blocks(values: Tensor, largest: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(E4M3 bits [n] of least error, that error) of the blocks' magnitudes [n, 16]."""
    near = _nearest(largest, scale)
    best, found = torch.full_like(largest, float("inf")), torch.zeros_like(near)
    for offset in _NEAR:
        bits = (near + offset).clamp_(0, 126)
        bits[largest == 0] = 0
        step = decode_e4m3(bits.to(torch.uint8)) * scale
        error = _error(values, step)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, bits, found)
    return found.to(torch.uint8), best


def _single(value: float) -> float:
    """The nearest float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def quantize_nvfp4(weight: Tensor, importance: Tensor | None = None) -> Quantized:
    """NVFP4 codes of a matrix with the block scales and the scale of least squared error.

    The scale is chosen on a sample of blocks, among 8 that put the largest block scale between
    224 and 448; then every block gets the best of 8 neighbouring E4M3 scales.

    Args:
        weight: [N, K] float, K a multiple of 16.
        importance: [N, K/16] what the error of each block counts, None: all the same.

    Returns:
        Quantized.
    """
    blocks = weight.float().contiguous().view(-1, BLOCK)
    shape = (weight.shape[0], weight.shape[1] // BLOCK)
    values = blocks.abs()
    largest = values.amax(1)
    energy = values.square().sum(1).view(shape)
    top = float(largest.max())
    if top == 0:
        codes = torch.zeros(shape[0], shape[1] * BLOCK // 2, dtype=torch.uint8)
        zeros = torch.zeros(shape, dtype=torch.uint8)
        return Quantized(Packed(codes, zeros, 0.0), energy, energy, energy)
    base = float(torch.tensor(top, dtype=torch.float32) / (E2M1_MAX * E4M3_MAX))
    alike = torch.ones(len(blocks), dtype=torch.float32)
    flat = alike if importance is None else importance.flatten()
    some, counts = _sampled(values, flat)
    tried = [_single(base * 2 ** (i / _STEPS)) for i in range(_STEPS)]
    errors = [float((_best_blocks(some, some.amax(1), s)[1] * counts).sum()) for s in tried]
    scale = tried[errors.index(min(errors))]
    bits, error, plain = [], [], []
    for part, most in zip(values.split(_PIECE), largest.split(_PIECE)):
        found, rest = _best_blocks(part, most, scale)
        bits.append(found)
        error.append(rest)
        own = _nearest(most, base).to(torch.uint8)
        plain.append(_error(part, decode_e4m3(own) * base))
    scales = torch.cat(bits).view(shape)
    packed = Packed(_codes(weight.float(), scales, scale), scales, scale)
    return Quantized(packed, torch.cat(error).view(shape), torch.cat(plain).view(shape), energy)


def _codes(weight: Tensor, block_scales: Tensor, scale: float) -> Tensor:
    """Packed E2M1 codes of [N, K] at given scales; zeros where the step is zero."""
    step = (decode_e4m3(block_scales) * scale)[..., None]
    blocks = weight.unflatten(-1, (-1, BLOCK))
    ratio = torch.where(step > 0, blocks / step.clamp(min=_LEAST), 0.0)
    return encode_e2m1(ratio.flatten(-2))


def _fp8_error(values: Tensor, scale: float) -> Tensor:
    """Squared error [n] of E4M3 codes of the magnitudes [n, 16]."""
    ratio = (values / scale).clamp(max=E4M3_MAX)
    return (ratio.to(torch.float8_e4m3fn).float() * scale - values).square().sum(1)


def quantize_fp8(weight: Tensor, importance: Tensor | None = None) -> Quantized:
    """FP8 codes of a matrix with the scale of least squared error.

    The scale is chosen on a sample, among 12 from half of amax / 448 (the largest weights
    saturate) to almost twice that.

    Args:
        weight: [N, K] float, K a multiple of 16.
        importance: [N, K/16] what the error of each block counts, None: all the same.

    Returns:
        Quantized; `plain` is the error at amax / 448.
    """
    blocks = weight.float().contiguous().view(-1, BLOCK)
    shape = (weight.shape[0], weight.shape[1] // BLOCK)
    values = blocks.abs()
    energy = values.square().sum(1).view(shape)
    top = float(values.max())
    if top == 0:
        codes = torch.zeros(weight.shape, dtype=torch.uint8)
        return Quantized(Packed(codes, None, 0.0), energy, energy, energy)
    base = float(torch.tensor(top, dtype=torch.float32) / E4M3_MAX)
    alike = torch.ones(len(blocks), dtype=torch.float32)
    flat = alike if importance is None else importance.flatten()
    some, counts = _sampled(values, flat)
    tried = [_single(base * 2 ** (i / _STEPS)) for i in range(-_CLIPPED, _STEPS)]
    errors = [float((_fp8_error(some, s) * counts).sum()) for s in tried]
    scale = tried[errors.index(min(errors))]
    error = torch.cat([_fp8_error(part, scale) for part in values.split(_PIECE)])
    plain = torch.cat([_fp8_error(part, base) for part in values.split(_PIECE)])
    return Quantized(
        Packed(_fp8_codes(weight.float(), scale), None, scale),
        error.view(shape),
        plain.view(shape),
        energy,
    )


def _fp8_codes(weight: Tensor, scale: float) -> Tensor:
    ratio = (weight / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return ratio.to(torch.float8_e4m3fn).view(torch.uint8)


def quantize_with(weight: Tensor, like: Packed) -> Packed:
    """Codes of a matrix at the scales that another one of its shape has.

    Args:
        weight: [N, K] float.
        like: whose scales to take.
    """
    if like.scale == 0:
        return Packed(torch.zeros_like(like.codes), like.block_scales, 0.0)
    if like.block_scales is None:
        return Packed(_fp8_codes(weight.float(), like.scale), None, like.scale)
    codes = _codes(weight.float(), like.block_scales, like.scale)
    return Packed(codes, like.block_scales, like.scale)
