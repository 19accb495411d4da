"""demo.svg: a recorded run of the shipped model, one token after another in the colour of its
width, above the share of the weights that each token reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.pictures.svg import box, line, picture, text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LEFT, TOP, CHARACTER, SIZE = 28.0, 92.0, 9.9, 16.5
BARS, FOOT = 96.0, 132.0  # height of a full bar, and where the bars stand below TOP
SECONDS, PAUSE = 6.0, 4.0  # one turn: writing, then standing still


def weight_bytes() -> dict[str, int]:
    """Bytes of weights per token and width, as the demo measured them."""
    rows = json.loads((ROOT / "bench/results/demo.json").read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row["weight_bytes_per_token"] for row in rows if "->" not in row["name"]}


def appear(seconds: float) -> str:
    """Animation: hidden until then, in every turn. A still picture shows all of it."""
    share = seconds / (SECONDS + PAUSE)
    return (
        f'<animate attributeName="opacity" values="0;1" keyTimes="0;{share:.4f}" '
        f'calcMode="discrete" dur="{SECONDS + PAUSE:g}s" repeatCount="indefinite"/>'
    )


def pieces(run: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(text, width that reads it, whether it was generated), token by token."""
    first = run["tokens"][0][1]
    read = [(character, first, False) for character in run["prompt"]]
    return read + [(words, width, True) for words, width in run["tokens"]]


def columns(words: str) -> int:
    """How many characters wide a token stands; the end token has no text, but reads weights."""
    return max(1, len(words))


def legend(sizes: dict[str, int], used: list[str], right: float) -> list[str]:
    """Meaning of the colours, with the bytes behind them."""
    most = max(sizes.values())
    narrow, wide = used[0], used[-1]
    return [
        text(
            LEFT,
            34,
            f"{narrow} thinks: {sizes[narrow] / 1e3:.0f} kB of weights per token "
            f"({sizes[narrow] / most:.0%})",
            narrow,
            14,
            bold=True,
        ),
        text(
            right,
            34,
            f"{wide} answers: {sizes[wide] / 1e3:.0f} kB (all)",
            wide,
            14,
            "end",
            bold=True,
        ),
    ]


def draw() -> str:
    """The picture as SVG."""
    run = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))
    sizes, placed = weight_bytes(), pieces(run)
    most, total = max(sizes.values()), sum(sizes[w] for _, w, made in placed if made)
    right = LEFT + sum(columns(words) for words, _, _ in placed) * CHARACTER
    base = TOP + FOOT
    parts = legend(sizes, list(dict.fromkeys(w for _, w, _ in placed)), right)
    parts.append(line(LEFT, base - BARS, right, base - BARS, "rest", 1))
    parts.append(text(LEFT, base - BARS - 6, "all weights", "dim", 11))
    x, passed, switch = LEFT, 0.0, None
    for words, width, made in placed:
        wide, high = columns(words) * CHARACTER, BARS * sizes[width] / most
        if switch is None and made and width != placed[0][1]:
            switch = x
        # A token takes time in proportion to the weights that it reads.
        inner = appear(SECONDS * passed / total) if made else ""
        passed += sizes[width] if made else 0
        if words:
            parts.append(
                text(
                    x,
                    TOP - 16,
                    words,
                    width if made else "ink",
                    SIZE,
                    bold=made,
                    mono=True,
                    length=wide,
                    inner=inner,
                )
            )
        parts.append(
            box(
                x + 0.8,
                base - high,
                wide - 1.6,
                high,
                width,
                corner=1.5,
                opacity=None if made else 0.45,
                inner=inner,
            )
        )
        x += wide
    parts.append(line(switch, TOP - 40, switch, base + 4, "line", 1.2, "4 3"))
    parts.append(line(LEFT, base, right, base, "line", 1))
    prompt = LEFT + len(run["prompt"]) * CHARACTER / 2
    parts.append(text(prompt, base + 20, "prompt", "dim", 12, "middle"))
    parts.append(
        text((LEFT + 2 * prompt - LEFT + switch) / 2, base + 20, "thinking", "dim", 12, "middle")
    )
    parts.append(text((switch + right) / 2, base + 20, "answer", "dim", 12, "middle"))
    made = [width for _, width, made in placed if made]
    mean = total / len(made)
    parts.append(
        text(
            LEFT,
            base + 46,
            f"{made.count(placed[0][1])} tokens at {placed[0][1]} and "
            f"{made.count(made[-1])} at {made[-1]}, over one cache: {mean / 1e3:.0f} kB each on "
            f"average, {mean / most:.0%} of {made[-1]} alone.",
            "ink",
            13,
            inner=appear(SECONDS),
        )
    )
    title = (
        "A recorded run: the prompt and the thinking are read by a narrow prefix of the weights, "
        "the answer by all of them, over one cache"
    )
    return picture(right + LEFT, base + 66, title, parts)
