"""Whole decode steps at every width and batch, beside their floor; transformers at one width."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.gpu.floors import step_bytes
from bench.gpu.model import Loaded, fits
from bench.gpu.shapes import alone, sizes
from bench.gpu.timing import RoofPart
from bench.gpu.transformers_peer import Peer
from bench.gpu.worker import PassedOver

CONTEXT, SPARE_TOKENS = 4096, 256
BATCHES = (1, 8, 32, 128, 512)
PEER_CONTEXT = 128  # transformers computes its prompt in full, without kernels of its own


def per_call(loaded: Loaded, work: Callable[[], Any], count: int) -> float:
    """Seconds of each of `count` calls in a row, the host's part included."""
    loaded.device.wait()
    begin = time.perf_counter()
    for _ in range(count):
        work()
    loaded.device.wait()
    return (time.perf_counter() - begin) / count


class Part(RoofPart):
    """Items are "WIDTH B=N"; the peer's come last."""

    def __init__(self, setting, module):
        super().__init__(setting, module)
        self.data = sizes(setting.emulate)
        self.batches = (1, 3) if setting.emulate else BATCHES
        self.context, self.spare = (70, 30) if setting.emulate else (CONTEXT, SPARE_TOKENS)
        self.rounds, self.steps = (1, 1) if setting.emulate else (7, 5)
        self.names = list(reversed(self.data["elastic"]["widths"]))
        self.names.sort(key=lambda n: len(self.data["elastic"]["widths"][n]))  # the full one first
        self.loaded: Loaded | None = None
        self.peer: Peer | None = None

    def items(self) -> list[str]:
        batches = self.batches[:1] if self.setting.quick else self.batches
        own = [f"{name} B={batch}" for batch in batches for name in self.names]
        narrow = self.names[-1]
        return ["roof", *own, *(f"{narrow} B={b} | transformers" for b in batches[:3:2])]

    def row(self, item: str) -> dict[str, Any]:
        name, _, peer = item.partition(" | ")
        width, _, batch = name.partition(" B=")
        return self._beside(width, int(batch)) if peer else self._row(width, int(batch))

    def _drop(self) -> None:
        self.loaded = self.peer = None
        gc.collect()

    def _model(self, width: str, batch: int) -> Loaded:
        """A model that has the width and room for the batch: all widths in one if they fit, with
        room for the largest batch that does, else that width alone."""
        now = self.loaded
        if now and width in now.widths and now.batch >= batch:
            return now
        self._drop()
        length = self.context + self.spare
        for data in (self.data, alone(self.data, width)):
            for size in reversed(self.batches):
                if size >= batch and not fits(self.setting, data, size, length):
                    self.loaded = Loaded(self.setting, self.module, data, size, length)
                    return self.loaded
        lack = fits(self.setting, alone(self.data, width), batch, length)
        raise PassedOver(f"lacks {lack / 1e9:.0f} GB of device memory")

    def _row(self, width: str, batch: int) -> dict[str, Any]:
        loaded = self._model(width, batch)
        with loaded.sequences(batch, self.context, width) as opened:
            widths = [width] * batch
            for _ in range(2):  # the first records the pass
                loaded.step(opened, widths)
            distinct = loaded.distinct_experts(batch)
            taken = [
                per_call(loaded, lambda: loaded.step(opened, widths), self.steps)
                for _ in range(self.rounds)
            ]
            device = self.clock.pairs(loaded.replay(batch), None)["seconds"]
        moved = step_bytes(loaded.config, loaded.widths[width], batch, self.context, distinct)
        seconds = statistics.median(taken)
        floor = moved / self.roof["copy_bytes_s"]
        return {
            "width": width,
            "batch": batch,
            "context": self.context,
            "ms": 1e3 * seconds,
            "device_ms": 1e3 * device,
            "tokens_s": batch / seconds,
            "bytes": moved,
            "percent_of_roof": 100 * floor / seconds,
            "distinct_experts": distinct,
            "served": list(loaded.widths),
            "weight_bytes": loaded.weights.nbytes,
            "captures": loaded.model.captures,
        }

    def _beside(self, width: str, batch: int) -> dict[str, Any]:
        """The same sizes in transformers, in turns with ours, after a short prompt."""
        data, context = alone(self.data, width), min(PEER_CONTEXT, self.context)
        if self.peer is None:
            self._drop()
            largest = self.batches[min(2, len(self.batches) - 1)]
            if lack := 2 * fits(self.setting, data, largest, context + self.spare):
                raise PassedOver(f"lacks {lack / 1e9:.0f} GB of device memory for both")
            self.loaded = Loaded(self.setting, self.module, data, largest, context + self.spare)
            self.peer = Peer(self.setting, data)
        loaded, cache = self.loaded, self.peer.prefill(batch, context)
        with loaded.sequences(batch, context, width) as opened:

            def ours() -> None:
                loaded.step(opened, [width] * batch)

            def theirs() -> None:
                self.peer.step(batch, cache)

            return beside(loaded, ours, theirs, self.rounds, self.steps) | {
                "width": width,
                "batch": batch,
                "context": context,
                "peer": "transformers",
            }


def beside(
    loaded: Loaded, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, count: int
) -> dict[str, Any]:
    """Milliseconds of both in turns, and the median of the turns' ratios (theirs over ours)."""
    ours(), theirs()
    taken: list[list[float]] = [[], []]
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 else (1, 0):
            taken[i].append(per_call(loaded, (ours, theirs)[i], count))
    mine, other = (statistics.median(t) for t in taken)
    ratio = statistics.median(b / a for a, b in zip(*taken))
    return {"ms": 1e3 * mine, "peer_ms": 1e3 * other, "ratio": ratio}
