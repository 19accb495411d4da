"""The two quantized weight formats: what their bytes mean, in plain torch.

NVFP4: value = E2M1 code * E4M3 scale of its block of 16 along K * float32 scale of the matrix.
FP8: value = E4M3 code * float32 scale of the matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "E2M1_MAX",
    "E4M3_MAX",
    "FORMATS",
    "Packed",
    "bits_per_weight",
    "decode_e4m3",
    "dtype_name",
    "encode_e2m1",
    "round_e2m1",
    "unpack_e2m1",
]

FORMATS = ("nvfp4", "fp8")
BLOCK = 16  # weights along K that share an NVFP4 block scale
E2M1_MAX, E4M3_MAX = 6.0, 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def bits_per_weight(name: str) -> float:
    """Bits that a weight takes in a format or dtype, block scales included.

    Args:
        name: "nvfp4" (4.5), "fp8" (8), or a dtype such as "bfloat16".
    """
    if name == "nvfp4":
        return 4 + 8 / BLOCK
    return 8.0 if name == "fp8" else 8.0 * getattr(torch, name).itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as config files and messages write it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def decode_e4m3(bits: Tensor) -> Tensor:
    """Float32 values of E4M3 bit patterns (uint8, any shape); 0x7f and 0xff are NaN."""
    return bits.view(torch.float8_e4m3fn).float()


_EXPONENT = 0x7F800000  # of float32 bits
_ROUND = 0.75 * 2.0**23  # times a power of two: what leaves one bit behind the leading one


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 to each magnitude, ties to the even code.

    Adding and taking away 1.5 * 2^23 steps rounds to whole steps; a step is half of the power of
    two below the value, and 0.5 at least.

    Args:
        values: float32, any shape, not negative; above 6 saturates.
    """
    power = (values.view(torch.int32) & _EXPONENT).view(torch.float32)
    power.clamp_(1.0, 4.0).mul_(_ROUND)
    return (values + power).sub_(power).clamp_(max=E2M1_MAX)


def encode_e2m1(values: Tensor) -> Tensor:
    """Packed codes [..., K/2] uint8 of float32 values [..., K], the low nibble for even k.

    Bit 3 is the sign, which zero also keeps; magnitudes are rounded by `round_e2m1`.
    """
    steps = torch.tensor(_E2M1, dtype=torch.float32, device=values.device)
    codes = torch.searchsorted(steps, round_e2m1(values.abs())).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_e2m1(codes: Tensor) -> Tensor:
    """Float32 values [..., K] of packed codes [..., K/2] uint8, low nibble first."""
    both = [*_E2M1, *(-v for v in _E2M1)]
    table = torch.tensor(both, dtype=torch.float32, device=codes.device)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return table[nibbles.long()]


class Packed(NamedTuple):
    """A quantized matrix [N, K].

    Attributes:
        codes: uint8 [N, K/2], two E2M1 codes a byte, low nibble = even k (NVFP4); or [N, K], E4M3
            bits (FP8).
        block_scales: uint8 [N, K/16], E4M3 bits; None for FP8.
        scale: of the whole matrix.
    """

    codes: Tensor
    block_scales: Tensor | None
    scale: float

    @property
    def format(self) -> str:
        """Name of the format, "nvfp4" or "fp8"."""
        return "fp8" if self.block_scales is None else "nvfp4"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.codes.shape
        return rows, columns if self.block_scales is None else 2 * columns

    def dequantize(self) -> Tensor:
        """Float32 values [N, K]; code times block scale is exact, times scale is rounded once."""
        if self.block_scales is None:
            return decode_e4m3(self.codes) * self.scale
        values = unpack_e2m1(self.codes).unflatten(-1, (-1, BLOCK))
        values *= decode_e4m3(self.block_scales)[..., None]
        return values.flatten(-2) * self.scale
