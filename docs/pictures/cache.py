"""cache.svg: the cache after a switch by carry, exact and window, from a recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.pictures.svg import box, line, picture, text

HERE = Path(__file__).parent
LEFT, TOP, CELL, HIGH, LANE = 130.0, 84.0, 12.0, 22.0, 92.0
WORDS = {
    "carry": ("the cache stays as it is", "nothing is read again"),
    "exact": ("rebuilt from the first token", "equal to a fresh sequence, bit for bit"),
    "window": ("the last part is rebuilt", "from a snapshot at least n tokens back"),
}


def lane(y: float, name: str, told: dict[str, Any], prompt: int) -> list[str]:
    """One policy: the cells of the cache by the width that made them, and what was read again."""
    (narrow, before), (wide, after) = told["runs"]
    switch = prompt + before - 1  # the end tag is drawn by the narrow width, read by the wide one
    again = told["rebuilt"]
    # The last token drawn has not been read: it is no part of the cache.
    total = switch + after
    first = switch - again
    title, note = WORDS[name.partition("(")[0]]
    parts = [
        text(LEFT - 14, y + 16, name, "ink", 14, "end", bold=True),
        text(
            LEFT,
            y + HIGH + 18,
            f"{title}: {note}" + (f"; {again} tokens" if again else ""),
            "dim",
            12,
        ),
    ]
    for position in range(total):
        width = narrow if position < first else wide
        faint = 0.45 if position < prompt else None
        parts.append(
            box(LEFT + position * CELL + 0.7, y, CELL - 1.4, HIGH, width, corner=1.5, opacity=faint)
        )
    if again:
        left, right = LEFT + first * CELL, LEFT + switch * CELL
        parts += [
            line(left + 1, y - 7, right - 1, y - 7, wide, 1.5),
            text((left + right) / 2, y - 12, f"read again by {wide}", wide, 11, "middle"),
        ]
    if name.startswith("window"):
        at = LEFT + first * CELL
        parts.append(line(at, y - 4, at, y + HIGH + 4, "ink", 1.5))
        parts.append(text(at - 5, y - 6, "snapshot", "ink", 11, "end"))
    return parts


def draw() -> str:
    """The picture as SVG."""
    run = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))
    prompt, policies = run["prompt_tokens"], run["policies"]
    (narrow, before), (wide, after) = policies["carry"]["runs"]
    switch = LEFT + (prompt + before - 1) * CELL
    right = LEFT + (prompt + before - 1 + after) * CELL
    bottom = TOP + (len(policies) - 1) * LANE + HIGH
    parts = [
        text(
            LEFT,
            30,
            f"The cache after a switch from {narrow} to {wide}, token by token",
            "ink",
            15,
            bold=True,
        ),
        text(LEFT + prompt * CELL / 2, 52, "prompt", "dim", 12, "middle"),
        text(
            LEFT + (prompt + before / 2) * CELL,
            52,
            f"thinking, read by {narrow}",
            "dim",
            12,
            "middle",
        ),
        text(switch + 4, 52, f"by {wide}", "dim", 12),
        line(switch, 42, switch, bottom + 6, "line", 1.2, "4 3"),
    ]
    for number, (name, told) in enumerate(policies.items()):
        parts += lane(TOP + number * LANE, name, told, prompt)
    title = (
        "Three lanes of cache cells: carry keeps what the narrow width made, exact reads all "
        "tokens again, window those since a snapshot"
    )
    return picture(right + 60, bottom + 38, title, parts)
