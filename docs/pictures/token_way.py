"""token-way.svg: a token's way over the caller's thread, the engine's thread and the device."""

from __future__ import annotations

from docs.pictures.svg import box, line, picture, text

LEFT, TOP, LANE, WIDE = 124.0, 64.0, 104.0, 752.0
LANES = (
    ("caller's thread", "any number"),
    ("engine's thread", "one"),
    ("device", "CPU pool or GPU"),
)
# (lane, x, width, first line, second line)
STATIONS = (
    (0, 8, 112, "generate", "checks, request"),
    (0, 560, 150, "stream, result", "text as it becomes final"),
    (1, 84, 96, "admit", "slot and pages"),
    (1, 196, 104, "ask the plan", "which width?"),
    (1, 316, 112, "form a batch", "rows of all widths"),
    (1, 590, 120, "append, stop", "ask the plan again"),
    (2, 372, 256, "one pass: a recorded step", "embed, layers, logits, sample"),
)
# From station to station: straight down or up at x, with a word beside it.
ARROWS = (
    (0, 1, 100, "queue"),
    (1, 2, 412, "copy: tables"),
    (2, 1, 604, "copy back: tokens"),
    (1, 0, 650, "token"),
)
BOX = 48.0


def station(lane: int, x: float, wide: float, first: str, second: str) -> list[str]:
    """A box with two lines of words."""
    y = TOP + lane * LANE
    return [
        box(LEFT + x, y, wide, BOX, "paper", "ours" if lane == 1 else "line", corner=5),
        text(LEFT + x + wide / 2, y + 20, first, "ink", 13, "middle", bold=True),
        text(LEFT + x + wide / 2, y + 37, second, "dim", 11, "middle"),
    ]


def draw() -> str:
    """The picture as SVG."""
    parts = [text(24, 32, "A token's way", "ink", 15, bold=True)]
    for number, (name, note) in enumerate(LANES):
        y = TOP + number * LANE
        parts.append(box(16, y - 16, LEFT + WIDE - 24, BOX + 32, "rest", corner=6, opacity=0.35))
        parts.append(text(24, y + 20, name, "ink", 12, bold=True))
        parts.append(text(24, y + 36, note, "dim", 11))
    for one in STATIONS:
        parts += station(*one)
    middle = TOP + LANE + BOX / 2
    for start, end in ((180, 196), (300, 316)):
        parts.append(line(LEFT + start, middle, LEFT + end, middle, arrow=True))
    for first, last, x, words in ARROWS:
        down = last > first
        y1 = TOP + first * LANE + (BOX if down else 0)
        y2 = TOP + last * LANE + (0 if down else BOX)
        parts.append(line(LEFT + x, y1, LEFT + x, y2, arrow=True))
        parts.append(text(LEFT + x + 8, (y1 + y2) / 2 + 4, words, "dim", 11))
    # The loop: after a token the next batch is formed.
    y = TOP + LANE
    parts.append(
        f'<path d="M{LEFT + 620:.0f} {y:.0f} C {LEFT + 600:.0f} {y - 30:.0f}, {LEFT + 400:.0f} '
        f'{y - 30:.0f}, {LEFT + 372:.0f} {y:.0f}" class="s-line" fill="none" stroke-width="1.5" '
        'marker-end="url(#tip)"/>'
    )
    parts.append(text(LEFT + 496, y - 28, "next token", "dim", 11, "middle"))
    bottom = TOP + 2 * LANE + BOX + 36
    parts.append(
        text(
            24,
            bottom,
            "On a GPU a decode step is a copy of the tables, one graph "
            "launch that ends with sampling, and a copy of the tokens back.",
            "dim",
            12,
        )
    )
    title = "A request passes from the caller's thread to the engine's thread and the device"
    return picture(LEFT + WIDE + 8, bottom + 20, title, parts)
