"""Drawing tokens on the device: its parameters as tables."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ..device.shared import Sizes


@dataclass(frozen=True)
class Draw:
    """Drawing of a token after a step: arguments of the op `sample` for one row."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


GREEDY = Draw()
DRAW_FIELDS = tuple(f.name for f in fields(Draw))


def draw_tables(rows: int) -> Sizes:
    """Names and sizes of the tables that say how `rows` tokens are drawn (`model.Draw`)."""
    each, f32 = (rows,), torch.float32
    return {
        "seed": (each, torch.int64),
        "position": (each, torch.int64),
        "top_k": each,
        "temperature": (each, f32),
        "top_p": (each, f32),
        "min_p": (each, f32),
    }
