"""Draws docs/width-switch.svg: one sequence whose width changes, over one set of weights and one
cache.

    python docs/picture.py            # writes the file
    python docs/picture.py --check    # fails if the file is another
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parent / "width-switch.svg"
NARROW, WIDE = "#0e7490", "#a21caf"
INK, FAINT, PAPER = "#1f2937", "#d1d5db", "#ffffff"
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
COLOUR = {"S": NARROW, "L": WIDE}


def text(x: float, y: float, words: str, size: int = 13, fill: str = INK, **more: str) -> str:
    """One line of text."""
    extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
    head = f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{fill}"{extra}>'
    return f"{head}{escape(words)}</text>"


def box(x: float, y: float, w: float, h: float, fill: str, stroke: str = "none") -> str:
    """A rectangle with soft corners."""
    return (f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="4" '
            f'fill="{fill}" stroke="{stroke}"/>')  # fmt: skip


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
    total, bottom = right + LEFT, TOP + FULL
    first_wide = next(x for x, _, _, width, _ in placed if width == "L")
    switch = first_wide - GAP / 2
    parts = [
        text(LEFT, 30, "weights read per token", fill="#6b7280"),
        text(LEFT, 52, "S: a prefix of every tensor", fill=NARROW, font_weight="bold"),
        text(right, 52, "L: all of it", fill=WIDE, font_weight="bold", text_anchor="end"),
    ]
    for x, wide, words, width, generated in placed:
        used = FULL * SHARE[width]
        parts.append(box(x, TOP, wide, FULL, "#f3f4f6", FAINT))
        parts.append(box(x, bottom - used, wide, used, COLOUR[width]))
        parts.append(text(
            x + wide / 2, bottom + 26, words, 14, COLOUR[width] if generated else INK,
            font_family="monospace", text_anchor="middle",
            font_weight="bold" if generated else "normal",
        ))  # fmt: skip
        parts.append(f'<path d="M{x + wide / 2:.0f} {bottom + 34} v16" stroke="{COLOUR[width]}" '
                     'stroke-width="2" marker-end="url(#tip)"/>')  # fmt: skip
    cache = bottom + 58
    parts += [
        box(LEFT, cache, right - LEFT, 44, "#fef9c3", "#ca8a04"),
        text((LEFT + switch) / 2, cache + 27,
             "one cache: KV pages of the attention layers, one Mamba state", 14,
             text_anchor="middle"),
        f'<path d="M{switch:.0f} {TOP - 22} V{cache + 44}" stroke="{INK}" stroke-dasharray="4 4"/>',
        text(right, cache + 68, "the width changes here; policy carry reads nothing again",
             text_anchor="end"),
    ]  # fmt: skip
    height = cache + 88
    tip = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="5" '
           'markerHeight="5" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#6b7280"/></marker>'
           "</defs>")  # fmt: skip
    title = (
        "A sequence whose prompt and thinking are read by a narrow width and whose answer is "
        "read by the full one, over the same cache"
    )
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {total:.0f} {height:.0f}" role="img" '
            'font-family="sans-serif">')  # fmt: skip
    return "\n".join([
        head, f"<title>{escape(title)}</title>", tip,
        box(0, 0, total, height, PAPER), *parts, "</svg>\n",
    ])  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    if parser.parse_args().check:
        if not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != draw():
            sys.exit(f"{PICTURE.name} must be what this script draws; run it without --check")
        return
    PICTURE.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
