"""Memory for weights: few large blocks, backed by large pages where the system has them."""

from __future__ import annotations

import math

import torch

from . import _C

BLOCK = 32 << 20  # bytes taken at a time
HUGE_PAGE = 2 << 20
ALIGNMENT = 64


class WeightMemory:
    """Hands out uninitialised memory from large blocks.

    Weights are read from first to last byte for every token; with small pages, address translation
    takes a fifth of that time. Blocks start at a large page's address, and tensors lie side by side
    in them, so nothing is lost between tensors. A block lives as long as any tensor in it.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int) -> torch.Tensor:
        """A uint8 tensor of this shape, its first element at a multiple of 64 bytes."""
        count = math.prod(shape)
        if count > self._block.numel():
            self._block = _aligned(max(count, BLOCK))
        tensor = self._block[:count].view(shape)
        self._block = self._block[-(-count // ALIGNMENT) * ALIGNMENT :]
        return tensor


def _aligned(size: int) -> torch.Tensor:
    """`size` bytes that start at a large page's address."""
    memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % HUGE_PAGE :][:size]
    _C.advise_huge_pages(memory)
    return memory
