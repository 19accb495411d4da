"""The machine's measured ceilings: streaming reads and matrix products.

    python -m bench.common.roof --threads 1 2

Both move with whatever else the machine does, so a benchmark measures them in its own run, beside
the kernels that are given as fractions of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Runs a block with ``count`` torch threads, then restores the number before it."""
    if count < 1:
        raise ValueError(f"roof: threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(call: Callable[[], object], repeats: int) -> float:
    """Least seconds over ``repeats`` timed calls, after one untimed call."""
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def read_rate(threads: int, gib: float = 2.0, repeats: int = 5) -> float:
    """Bytes per second of reading a large buffer once, from first to last byte.

    Method: one fp32 buffer of ``gib`` GiB, written once before (so that its pages exist), far
    larger than any cache; torch reads all of it and keeps almost nothing, in three ways (sum,
    largest element, product of a [n, 4096] matrix with a vector). The fastest single run of all
    counts: one way alone may be held back by its arithmetic rather than by memory. It is a rate
    that was reached, so the true ceiling is no lower.

    Args:
        threads: int >= 1, torch threads.
        gib: float, size of the buffer in GiB, rounded down to whole rows of 16 KiB; at least 0.25.
        repeats: int, timed runs of each way.

    Returns:
        Bytes per second.

    Raises:
        ValueError: ``threads`` < 1, or a buffer that caches could hold.
    """
    if gib < 0.25:
        raise ValueError(f"roof: gib must be at least 0.25, so that no cache holds it, got {gib}")
    rows = int(gib * 2**30) // (4 * 4096)
    with _threads(threads):
        buffer = torch.empty(rows, 4096).fill_(1.0)
        vector = torch.ones(4096)
        ways = (buffer.sum, buffer.amax, lambda: torch.mv(buffer, vector))
        return buffer.nbytes / min(_best(way, repeats) for way in ways)


def gemm_rate(
    threads: int, dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 3
) -> float:
    """Floating-point operations per second of torch's matrix product.

    Method: ``torch.mm(out=)`` of two [size, size] matrices of standard normal values, 2 size^3
    operations; the fastest of ``repeats`` runs after an untimed one. Which library computes it,
    and whether it has instructions for bf16, is torch's affair: on a CPU without AVX512-BF16 or
    AMX the bf16 figure lies far below the fp32 one and is no ceiling.

    Args:
        threads: int >= 1, torch threads.
        dtype: torch.float32 or torch.bfloat16.
        size: int, rows and columns.
        repeats: int, timed runs.

    Returns:
        Operations per second, a multiplication and an addition counting two.

    Raises:
        ValueError: ``threads`` < 1.
    """
    with _threads(threads):
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(size, size, generator=generator).to(dtype)
        right = torch.randn(size, size, generator=generator).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        return 2 * size**3 / _best(lambda: torch.mm(left, right, out=out), repeats)


def roof(threads: int, gib: float = 2.0) -> dict[str, Any]:
    """All ceilings at one thread count.

    Args:
        threads: int >= 1.
        gib: float, buffer of ``read_rate``.

    Returns:
        ``{"threads", "read_bytes_s", "fp32_flops_s", "bf16_flops_s", "load"}``; ``load`` is the
        machine's load average just before: anything else that ran lowers the figures.
    """
    load = os.getloadavg()[0]
    return {
        "threads": threads,
        "read_bytes_s": read_rate(threads, gib),
        "fp32_flops_s": gemm_rate(threads, torch.float32),
        "bf16_flops_s": gemm_rate(threads, torch.bfloat16),
        "load": load,
    }


def main() -> None:
    """Command line: prints the ceilings as JSON."""
    parser = argparse.ArgumentParser(description="Measure read and matrix-product rates.")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--gib", type=float, default=2.0)
    arguments = parser.parse_args()
    print(json.dumps([roof(count, arguments.gib) for count in arguments.threads], indent=2))


if __name__ == "__main__":
    main()
