"""Whole numbers rounded up: parts of a size that hold a count."""

from __future__ import annotations


def ceil_div(count: int, size: int) -> int:
    """Parts of `size` that hold `count`; the last may be partly empty."""
    return -(-count // size)


def round_up(count: int, step: int) -> int:
    """The least multiple of `step` that is not below `count`."""
    return -(-count // step) * step
