"""Whole prompts at every width, beside their floor; transformers at one width."""

from __future__ import annotations

import gc
import statistics
from typing import Any

from bench.gpu.decode import beside, per_call
from bench.gpu.floors import prefill_flops, step_bytes
from bench.gpu.model import Loaded, fits
from bench.gpu.shapes import alone, sizes
from bench.gpu.timing import RoofPart
from bench.gpu.transformers_peer import Peer
from bench.gpu.worker import PassedOver
from elastic_infer.rounding import ceil_div

ROWS = 4096  # tokens of one pass


class Part(RoofPart):
    """Items are "WIDTH T=N"; the peer's comes last."""

    def __init__(self, setting, module):
        super().__init__(setting, module)
        self.data = sizes(setting.emulate)
        self.lengths, self.rows = ((24, 70), 64) if setting.emulate else ((ROWS, 8 * ROWS), ROWS)
        self.rounds = 1 if setting.emulate else 5
        self.names = sorted(
            self.data["elastic"]["widths"], key=lambda n: len(self.data["elastic"]["widths"][n])
        )  # the full one first
        self.loaded: Loaded | None = None

    def items(self) -> list[str]:
        short, long = self.lengths
        own = [f"{name} T={short}" for name in self.names]
        further = [] if self.setting.quick else [f"{name} T={long}" for name in self.names]
        return ["roof", *own, f"{self.names[-1]} T={short} | transformers", *further]

    def row(self, item: str) -> dict[str, Any]:
        name, _, peer = item.partition(" | ")
        width, _, tokens = name.partition(" T=")
        return self._beside(width, int(tokens)) if peer else self._row(width, int(tokens))

    def _model(self, width: str) -> Loaded:
        if self.loaded is None or width not in self.loaded.widths:
            self.loaded = None
            gc.collect()
            for data in (self.data, alone(self.data, width)):
                if not fits(self.setting, data, 1, self.lengths[1]):
                    self.loaded = Loaded(
                        self.setting, self.module, data, 1, self.lengths[1], self.rows
                    )
                    break
            else:
                raise PassedOver("the model and its cache do not fit into device memory")
        return self.loaded

    def _once(self, loaded: Loaded, width: str, tokens: int) -> None:
        with loaded.sequences(1, 0, width) as (sequence,):
            loaded.prefill(sequence, tokens, width)

    def _row(self, width: str, tokens: int) -> dict[str, Any]:
        loaded = self._model(width)
        self._once(loaded, width, tokens)
        rounds = self.rounds if tokens == self.lengths[0] else min(2, self.rounds)
        seconds = statistics.median(
            per_call(loaded, lambda: self._once(loaded, width, tokens), 1) for _ in range(rounds)
        )
        config, sized = loaded.config, loaded.widths[width]
        flops = prefill_flops(config, sized, tokens)
        passes = ceil_div(tokens, self.rows)  # every pass reads the weights
        moved = passes * step_bytes(config, sized, min(tokens, self.rows), 0)
        floors = (flops / self.roof["bf16_flops_s"], moved / self.roof["copy_bytes_s"])
        return {
            "width": width,
            "tokens": tokens,
            "ms": 1e3 * seconds,
            "tokens_s": tokens / seconds,
            "flops": flops,
            "tflop_s": flops / seconds / 1e12,
            "percent_of_roof": 100 * max(floors) / seconds,
            "roof": "products" if floors[0] > floors[1] else "memory",
        }

    def _beside(self, width: str, tokens: int) -> dict[str, Any]:
        data = alone(self.data, width)
        self.loaded = None
        gc.collect()
        if lack := 2 * fits(self.setting, data, 1, self.lengths[1]):
            raise PassedOver(f"lacks {lack / 1e9:.0f} GB of device memory for both")
        loaded = Loaded(self.setting, self.module, data, 1, self.lengths[1], self.rows)
        self.loaded = loaded
        peer = Peer(self.setting, data)
        row = beside(
            loaded,
            lambda: self._once(loaded, width, tokens),
            lambda: peer.prefill(1, tokens),
            self.rounds,
            1,
        )
        return row | {"width": width, "tokens": tokens, "peer": "transformers"}
