"""Time of a plan's tokens on the published shapes: 30B, 23B and 12B.

The miniature says how many tokens each width reads and writes; a price list says what one costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Hidden size, Mamba heads, expert size, of 128 experts; 30B from its config, the others inferred
# from the published numbers of parameters. L, M and S of the miniature stand for them.
SHAPES = {"L": (2688, 64, 1856), "M": (2240, 56, 1664), "S": (1920, 56, 960)}
NAMES = {"L": "30B", "M": "23B", "S": "12B"}
NVFP4 = 0.5625  # bytes of a weight: 4 bits, and 8 for every 16 of them
BANDWIDTH = 4.3e12  # bytes/s; ratios between plans do not depend on it


@dataclass(frozen=True)
class Prices:
    """Seconds by width.

    title: where they come from. measured: false for calculated ones. read: width -> seconds of one
    pass over a number of tokens of one sequence; a generated token is a pass over one.
    """

    title: str
    measured: bool
    read: Mapping[str, Callable[[int], float]]

    def seconds(self, point: Mapping[str, Any]) -> float | None:
        """Latency of an average problem, None where a width has no price.

        The prompt in one pass of the thinking width, every generated token in one pass of its
        width, and what switches read again in one pass of the answering width.

        Args:
            point: {"think", "answer", "prompt", "again": tokens, "tokens": {width: tokens}}.
        """
        needed = {point["think"], point["answer"], *point["tokens"]}
        if not needed <= set(self.read):
            return None
        total = self.read[point["think"]](max(1, round(point["prompt"])))
        if point["again"] >= 0.5:
            total += self.read[point["answer"]](round(point["again"]))
        return total + sum(n * self.read[name](1) for name, n in point["tokens"].items())


def pass_bytes(hidden: int, heads: int, expert: int, tokens: int) -> float:
    """Bytes that a pass over `tokens` tokens of one sequence moves at least, weights in NVFP4.

    23 Mamba, 23 expert and 6 attention layers; D = E (1 - (1 - 6/E)^tokens) different experts of
    E = 128; float32 state read and written once; 6144 bytes of K and V a token.
    """
    mamba = hidden * (129 * heads + 2048) + 64 * heads * hidden
    experts = 128 * (1 - (1 - 6 / 128) ** tokens)
    moe = experts * 2 * hidden * expert + 2 * hidden * 3712
    weights = 23 * (mamba + moe) + 6 * 8704 * hidden + 131072 * hidden
    state = 23 * (2 * heads * 8192 * 4 + 12 * (64 * heads + 2048))
    return weights * NVFP4 + 23 * 128 * hidden * 2 + state + tokens * 6144


def calculated() -> Prices:
    """The floor: bytes over bandwidth, nothing else takes time."""

    def of(shape: tuple[int, int, int]) -> Callable[[int], float]:
        return lambda tokens: pass_bytes(*shape, tokens) / BANDWIDTH

    return Prices(
        "calculated floor, not a measurement: the bytes that 30B, 23B and 12B must move in NVFP4, "
        f"at {BANDWIDTH / 1e12:g} TB/s",
        False,
        {name: of(shape) for name, shape in SHAPES.items()},
    )


def from_file(path: Path) -> Prices:
    """Measured prices: {"rows": [{"width", "step_seconds", "prefill_seconds_per_token"}]}.

    Widths are 30B, 23B and 12B; plans with one that is missing have no price. A pass over several
    tokens takes no less than one over a single token.

    Raises:
        KeyError: a row lacks a figure.
        ValueError: there is no row of 30B, which everything is compared with.
    """
    figures = json.loads(path.read_text(encoding="utf-8"))
    letters = {name: letter for letter, name in NAMES.items()}
    read = {}
    for row in figures["rows"]:
        step, many = row["step_seconds"], row["prefill_seconds_per_token"]
        read[letters[row["width"]]] = lambda tokens, step=step, many=many: max(step, tokens * many)
    if "L" not in read:
        names = ", ".join(row["width"] for row in figures["rows"])
        raise ValueError(f"prices: {path} must have a row of 30B, got {names}")
    costs = ", ".join(
        f"{row['width']} {1e3 * row['step_seconds']:.1f} and "
        f"{1e3 * row['prefill_seconds_per_token']:.1f}"
        for row in figures["rows"]
    )
    memory = ", ".join(
        f"{row['read_bytes_s'] / 1e9:.0f}" for row in figures["rows"] if "read_bytes_s" in row
    )
    memory = f"; memory then gave {memory} GB/s" if memory else ""
    title = (
        f"`{path.name}`, measured (ms of a step, and of a token of a long prompt: {costs}{memory})"
    )
    return Prices(title, True, read)
