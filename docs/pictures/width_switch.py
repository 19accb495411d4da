"""width-switch.svg: one sequence whose width changes, over one set of weights and one cache."""

from __future__ import annotations

from docs.pictures.svg import box, line, picture, text

# What is read, in order: text, width that reads it, whether it was generated.
PIECES = (
    ("(48+17)*3-29=", "S", False),
    ("<think>", "S", True),
    ("48+17=65;", "S", True),
    ("65*3=195;", "S", True),
    ("195-29=166", "S", True),
    ("</think>", "L", True),
    ("166", "L", True),
)
LEFT, TOP, FULL, GAP, CHARACTER = 24, 64, 96, 8, 8.4
SHARE = {"S": 0.5, "L": 1.0}


def columns() -> list[tuple[float, float, str, str, bool]]:
    """(x, width, text, reader, generated) of every piece."""
    placed, x = [], float(LEFT)
    for words, width, generated in PIECES:
        wide = len(words) * CHARACTER + 16
        placed.append((x, wide, words, width, generated))
        x += wide + GAP
    return placed


def draw() -> str:
    """The picture as SVG."""
    placed = columns()
    right = placed[-1][0] + placed[-1][1]
    bottom = TOP + FULL
    switch = next(x for x, _, _, width, _ in placed if width == "L") - GAP / 2
    parts = [
        text(LEFT, 30, "weights read per token (not to scale)", "dim"),
        text(LEFT, 52, "S: a prefix of every tensor", "S", bold=True),
        text(right, 52, "L: all of it", "L", anchor="end", bold=True),
    ]
    for x, wide, words, width, generated in placed:
        used = FULL * SHARE[width]
        parts.append(box(x, TOP, wide, FULL, "rest"))
        parts.append(box(x, bottom - used, wide, used, width))
        parts.append(
            text(
                x + wide / 2,
                bottom + 26,
                words,
                width if generated else "ink",
                14,
                "middle",
                bold=generated,
                mono=True,
                length=len(words) * CHARACTER,
            )
        )
        parts.append(line(x + wide / 2, bottom + 34, x + wide / 2, bottom + 56, arrow=True))
    cache = bottom + 58
    parts += [
        box(LEFT, cache, right - LEFT, 44, "note", "line"),
        text(
            (LEFT + switch) / 2,
            cache + 27,
            "one cache: KV pages of the attention layers, one Mamba state",
            size=14,
            anchor="middle",
        ),
        line(switch, TOP - 22, switch, cache + 44, "ink", 1.2, "4 4"),
        text(
            right,
            cache + 68,
            "the width changes here; policy carry reads nothing again",
            anchor="end",
        ),
    ]
    title = (
        "A sequence whose prompt and thinking are read by a narrow width and whose answer is "
        "read by the full one, over the same cache"
    )
    return picture(right + LEFT, cache + 88, title, parts)
