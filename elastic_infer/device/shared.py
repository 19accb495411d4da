"""Small tables that host and device share, and values read back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..rounding import round_up
from .device import Device

Table = tuple[tuple[int, ...], torch.dtype]
Sizes = dict[str, tuple[int, ...] | Table]
LINE = 64  # tables start at multiples of so many bytes


def _typed(sizes: Sizes) -> dict[str, Table]:
    return {n: s if s and isinstance(s[0], tuple) else (s, torch.int32) for n, s in sizes.items()}


def _lines(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return round_up(math.prod(shape) * dtype.itemsize, LINE)


class Shared:
    """Small tables that the host fills and the device reads, in one block: one copy brings all of
    them over. On a CPU both sides are the same memory.

    Args:
        sizes: {name: shape} of int32 tables, or {name: (shape, dtype)}. Each is an attribute: the
            device's tensor; `host[name]` is the host's side as a numpy array, which takes small
            values ten times faster than a tensor.
        sides: how many of these there are, so that one can be filled while another may still be
            copied; `side` is the number of the one that `host` shows.
    """

    def __init__(self, device: Device, sizes: Sizes, sides: int = 1):
        self.device, self.side = device, 0
        total, sides = self.nbytes(sizes), 1 if device.is_cpu else sides
        self._memory = [device.host_zeros(total, dtype=torch.uint8) for _ in range(sides)]
        self._there = self._memory[0] if device.is_cpu else device.zeros(total, dtype=torch.uint8)
        self._hosts = [{} for _ in range(sides)]
        self._copied, self._ends, at = [None] * sides, {}, 0
        for name, (shape, dtype) in _typed(sizes).items():
            end = at + math.prod(shape) * dtype.itemsize
            for host, memory in zip(self._hosts, self._memory):
                host[name] = memory[at:end].view(dtype).view(shape).numpy()
            setattr(self, name, self._there[at:end].view(dtype).view(shape))
            self._ends[name] = end
            at += _lines(shape, dtype)
        self.host = self._hosts[0]

    @staticmethod
    def nbytes(sizes: Sizes) -> int:
        """Bytes of such a block on the device."""
        return sum(_lines(*table) for table in _typed(sizes).values())

    def write(self, name: str, values: list[int]) -> None:
        """Fills the beginning of a table on the host's side."""
        self.host[name][: len(values)] = values

    @property
    def sides(self) -> int:
        """Number of the host's sides: one on a CPU."""
        return len(self._hosts)

    def turn(self) -> None:
        """Goes to the next side of the host, which holds what was written there last."""
        self.side = (self.side + 1) % len(self._hosts)
        self.host = self._hosts[self.side]
        self.settle()

    def settle(self) -> None:
        """Waits until the last upload no longer reads this side of the host."""
        if self._copied[self.side] is not None:
            self._copied[self.side].synchronize()
            self._copied[self.side] = None

    def upload(self, last: str) -> None:
        """Copies all tables up to and including `last`, in the order of `sizes`."""
        memory = self._memory[self.side]
        if self._there is not memory:
            end = self._ends[last]
            self.device.copy(self._there[:end], memory[:end])
            self._copied[self.side] = self.device.mark()


class ReadBack:
    """int32 values on their way from the device to the host. Two may be on their way at once.

    Args:
        count: the most values.
    """

    def __init__(self, device: Device, count: int):
        self._device, self._side = device, 0
        self._memory = [device.host_zeros(count, dtype=torch.int32) for _ in range(2)]

    def begin(self, values: torch.Tensor) -> Callable[[], list[int]]:
        """Copies `values` as they are at this point of the stream. Returns: what waits for the copy
        and gives them, until the next but one begins."""
        self._side = 1 - self._side
        host = self._memory[self._side][: len(values)]
        self._device.copy(host, values)
        copied = self._device.mark()

        def wait() -> list[int]:
            if copied is not None:
                copied.synchronize()
            return host.tolist()

        return wait
