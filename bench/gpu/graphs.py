"""Cost of one captured graph for all widths: against single launches, when widths change from
step to step, and when they differ within a batch."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.decode import CONTEXT, SPARE_TOKENS, per_call
from bench.gpu.model import Loaded, fits
from bench.gpu.shapes import sizes
from bench.gpu.worker import PartBase, PassedOver
from elastic_infer.model.model import Model


class Part(PartBase):
    """Every row has `ratio`: the time it is compared with over its own."""

    def __init__(self, setting, module):
        super().__init__(setting, module)
        self.data = sizes(setting.emulate)
        self.context, self.spare = (70, 40) if setting.emulate else (CONTEXT, SPARE_TOKENS)
        self.batch = 3 if setting.emulate else 32
        self.rounds, self.steps = (1, 2) if setting.emulate else (7, 6)
        self.loaded: Loaded | None = None

    def items(self) -> list[str]:
        return [
            "graph against launches B=1",
            "carry switch every step B=1",
            f"mixed widths B={self.batch}",
            "overlapping launches B=1",
        ]

    def run(self, item: str) -> dict[str, Any]:
        if self.loaded is None:
            length = self.context + self.spare
            if lack := fits(self.setting, self.data, self.batch, length):
                gc.collect()
                raise PassedOver(f"lacks {lack / 1e9:.0f} GB of device memory")
            self.loaded = Loaded(self.setting, self.module, self.data, self.batch, length)
        kind = item.split()[0]
        return {
            "graph": self._graph,
            "carry": self._carry,
            "mixed": self._mixed,
            "overlapping": self._overlapping,
        }[kind]()

    def _turns(self, sides: list[Callable[[], Any]]) -> list[list[float]]:
        """Seconds per call of every side, in turns."""
        taken: list[list[float]] = [[] for _ in sides]
        for turn in range(self.rounds):
            order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
            for i in order:
                taken[i].append(per_call(self.loaded, sides[i], self.steps))
        return taken

    def _graph(self) -> dict[str, Any]:
        return self._against(self.loaded.model, self.loaded.variant(graphs=False))

    def _overlapping(self) -> dict[str, Any]:
        """Launches that begin before the one ahead has ended, against the usual ones."""
        return self._against(self.loaded.variant(dependent_launch=True), self.loaded.model)

    def _against(self, model: Model, other: Model) -> dict[str, Any]:
        loaded = self.loaded
        full = list(loaded.widths)[-1]
        with loaded.sequences(1, self.context, full) as opened:
            sides = [lambda m=m: loaded.step(opened, [full], m) for m in (model, other)]
            for side in sides:
                side(), side()
            mine, others = self._turns(sides)
        return {
            "ms": 1e3 * statistics.median(mine),
            "other_ms": 1e3 * statistics.median(others),
            "ratio": statistics.median(b / a for a, b in zip(mine, others)),
            "captures": model.captures,
        }

    def _carry(self) -> dict[str, Any]:
        """Steps that alternate between the widths against as many steady ones of each."""
        loaded = self.loaded
        narrow, full = next(iter(loaded.widths)), list(loaded.widths)[-1]
        with loaded.sequences(1, self.context, full, track=True) as opened:
            for width in (narrow, full):
                loaded.step(opened, [width]), loaded.step(opened, [width])
            before, held = loaded.model.captures, self._held()
            alternating: list[float] = []
            steady: list[float] = []
            for _ in range(self.rounds):
                turn = iter([narrow, full] * self.steps)
                alternating.append(
                    per_call(loaded, lambda t=turn: loaded.step(opened, [next(t)]), 2 * self.steps)
                )
                alone = [
                    per_call(loaded, lambda w=w: loaded.step(opened, [w]), self.steps)
                    for w in (narrow, full)
                ]
                steady.append(sum(alone) / 2)
            after = loaded.model.captures
        return {
            "ms": 1e3 * statistics.median(alternating),
            "other_ms": 1e3 * statistics.median(steady),
            "ratio": statistics.median(b / a for a, b in zip(alternating, steady)),
            "captures": after - before,
            "extra_bytes": self._held() - held,
        }

    def _mixed(self) -> dict[str, Any]:
        """A batch whose rows have all widths against the same batch all at the widest."""
        loaded, names = self.loaded, list(self.loaded.widths)
        mixed = [names[i * len(names) // self.batch] for i in range(self.batch)]
        with loaded.sequences(self.batch, self.context, names[-1]) as opened:
            sides = [lambda w=w: loaded.step(opened, w) for w in (mixed, names[-1:] * self.batch)]
            for side in sides:
                side(), side()
            together, widest = self._turns(sides)
            distinct = loaded.distinct_experts(self.batch)
        return {
            "ms": 1e3 * statistics.median(together),
            "other_ms": 1e3 * statistics.median(widest),
            "ratio": statistics.median(b / a for a, b in zip(together, widest)),
            "captures": loaded.model.captures,
            "distinct_experts": distinct,
        }

    def _held(self) -> int:
        """Bytes of device memory in use; 0 in a rehearsal."""
        return 0 if self.setting.emulate else torch.cuda.memory_allocated()
