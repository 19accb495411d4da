"""Memory of a model: weights in few large blocks, caches and buffers that cost when used."""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import _C
from ..rounding import round_up

BLOCK = 32 << 20  # bytes taken at a time
HUGE_PAGE = 2 << 20
ALIGNMENT = 64


class WeightMemory:
    """Hands out uninitialized memory from large blocks.

    Weights are read from first to last byte for every token; with small pages, address translation
    takes a fifth of that time. Blocks start at a large page's address, and tensors lie side by side
    in them, so nothing is lost between tensors. A block lives as long as any tensor in it.

    Args:
        place: the torch device of the memory.
    """

    def __init__(self, place: torch.device | None = None) -> None:
        self._place = place or torch.device("cpu")
        self._block = torch.empty(0, dtype=torch.uint8, device=self._place)

    def empty(self, *shape: int) -> torch.Tensor:
        """A uint8 tensor of this shape, its first element at a multiple of 64 bytes."""
        count = math.prod(shape)
        if count > self._block.numel():
            size = max(count, BLOCK)
            if self._place.type == "cpu":
                memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
                self._block = _aligned(memory, size, HUGE_PAGE)
            else:
                self._block = torch.empty(size, dtype=torch.uint8, device=self._place)
        tensor = self._block[:count].view(shape)
        self._block = self._block[round_up(count, ALIGNMENT) :]
        return tensor


def _aligned(memory: torch.Tensor, size: int, alignment: int) -> torch.Tensor:
    """`size` bytes of `memory` from a multiple of `alignment` on; large pages, if that is one."""
    memory = memory[-memory.data_ptr() % alignment :][:size]
    if alignment == HUGE_PAGE:
        _C.advise_huge_pages(memory)
    return memory


def lazy_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that take no memory until they are written, unlike those of `torch.zeros`; then, where
    there are as many, by the large page: states are streamed like weights.

    Under another default device (sizes are computed on "meta") it is `torch.zeros`.
    """
    if torch.get_default_device().type != "cpu":
        return torch.zeros(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    alignment = HUGE_PAGE if size >= HUGE_PAGE else ALIGNMENT
    memory = torch.from_numpy(np.zeros(size + alignment, np.uint8))
    return _aligned(memory, size, alignment).view(dtype).view(shape)
