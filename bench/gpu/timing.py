"""Times on the device: recorded work, interleaved pairs, and the roofs they are shares of."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.setting import Setting
from bench.gpu.worker import PartBase

Work = Callable[[], Any]


class Clock:
    """Seconds of work: between CUDA events on a device, of the host's clock in a rehearsal."""

    def __init__(self, setting: Setting):
        self.cuda = not setting.emulate
        self.rounds, self.least = (9, 4e-3) if self.cuda else (1, 0.0)
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 0
        self.flushed = 4 * cache  # bytes of distinct problems that leave nothing in the cache

    def seconds(self, work: Work, repeats: int = 1) -> float:
        """Seconds of one call, over `repeats` calls in a row."""
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - begin) / repeats
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def repeats(self, work: Work, at_most: int = 1000) -> int:
        """Calls that take `least` seconds, after warming up."""
        work()
        once = max(self.seconds(work), 1e-7)
        return max(1, min(at_most, math.ceil(self.least / once)))

    def recorded(self, calls: list[Work]) -> tuple[Work, str]:
        """All calls in a row, as one CUDA graph where they can be captured: (work, "graph"), else
        (work, "eager")."""

        def eager() -> None:
            for call in calls:
                call()

        if not self.cuda:
            return eager, "eager"
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            eager()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                eager()
        except RuntimeError:  # it waits for the device, which a graph cannot
            torch.cuda.synchronize()
            return eager, "eager"
        return graph.replay, "graph"

    def pairs(self, ours: Work, theirs: Work | None) -> dict[str, float]:
        """Medians of both sides' seconds, taken in turns, and the median of the turns' ratios."""
        sides = [w for w in (ours, theirs) if w is not None]
        repeats = [self.repeats(w) for w in sides]
        taken: list[list[float]] = [[] for _ in sides]
        for turn in range(self.rounds):
            order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
            for i in order:
                taken[i].append(self.seconds(sides[i], repeats[i]))
        result = {"seconds": statistics.median(taken[0]), "spread": _spread(taken[0])}
        if theirs is not None:
            result["peer_seconds"] = statistics.median(taken[1])
            result["ratio"] = statistics.median(b / a for a, b in zip(*taken))
        return result


def _spread(values: list[float]) -> float:
    """Distance between the quartiles, as a share of the median."""
    if len(values) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def roofs(clock: Clock) -> dict[str, float]:
    """Rates of the device now: bytes per second of a copy (both directions counted) and of
    reading alone, and operations per second of a bfloat16 product. The fastest of several runs of
    the fastest of several ways: a rate that was reached, so the ceiling is no lower."""
    size, n = (2 << 30, 8192) if clock.cuda else (8 << 20, 256)
    device = "cuda" if clock.cuda else "cpu"
    source = torch.ones(size // 4, device=device).view(-1, 1024)
    target, vector = torch.empty_like(source), torch.ones(1024, device=device)
    left, right = (
        torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2)
    )  # zeros would run faster than any real data
    out = torch.empty_like(left)

    def best(*ways: Work) -> float:
        return min(clock.seconds(way, 2) for way in ways for _ in range(6))

    reading = (source.sum, source.amax, lambda: torch.mv(source, vector))
    return {
        "copy_bytes_s": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "read_bytes_s": source.nbytes / best(*reading),
        "bf16_flops_s": 2 * n**3 / best(lambda: torch.mm(left, right, out=out)),
    }


class RoofPart(PartBase):
    """A part whose other rows are shares of the roofs, which its item "roof" shows.

    roof: what `roofs` measured, once in a process.
    """

    def __init__(self, setting: Setting, module: Any):
        super().__init__(setting, module)
        self.clock = Clock(setting)
        self.roof: dict[str, float] = {}

    def run(self, item: str) -> dict[str, Any]:
        """The roofs, or the row of another item."""
        self.roof = self.roof or roofs(self.clock)
        return self.roof if item == "roof" else self.row(item)

    @abstractmethod
    def row(self, item: str) -> dict[str, Any]:
        """The row of an item other than "roof"."""


def floor(moved: float, flops: float, measured: dict[str, float]) -> tuple[str, float]:
    """(what limits, seconds): moving the bytes at the copy's rate, or computing the products."""
    times = {
        "memory": moved / measured["copy_bytes_s"],
        "products": flops / measured["bf16_flops_s"],
    }
    limit = max(times, key=lambda name: times[name])
    return limit, times[limit]


def free_bytes(setting: Setting) -> int:
    """Device memory that can be taken now (all of a rehearsal's needs are small)."""
    if setting.emulate:
        return 1 << 40
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def emptied():
    """Gives a block's memory back to the device afterwards, so that the next finds it whole."""
    yield
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
