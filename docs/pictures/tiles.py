"""tiles.svg: one matrix as 64x64 tiles, the prefixes that S and M read, and the rows of a mixed
batch beside it."""

from __future__ import annotations

import json
from pathlib import Path

from docs.pictures.svg import box, line, picture, text

TILE = 64
SIDE = 30.0  # of a drawn tile
LEFT, TOP = 52.0, 96.0
CARD = Path(__file__).parent.parent.parent / "elastic_infer/models/reasoner/config.json"
FULL = {"rows": 512, "columns": 1024}  # an expert's up projection in the 620M model
# Rows of one pass: which width reads them, sorted as the engine sorts them.
ROWS = ("S", "S", "S", "M", "M", "L", "L")


def prefixes() -> dict[str, dict[str, int]]:
    """Rows and columns of every width: the reasoner's share of each axis, in steps of 16, which
    is how the 620M model gets its widths."""
    config = json.loads(CARD.read_text(encoding="utf-8"))
    keys = {"rows": "moe_intermediate_size", "columns": "hidden_size"}
    return {
        name: {
            axis: FULL[axis] * width.get(key, config[key]) // (config[key] * 16) * 16
            for axis, key in keys.items()
        }
        for name, width in config["elastic"]["widths"].items()
    }


def draw() -> str:
    """The picture as SVG."""
    sizes = prefixes()
    full = sizes["L"]
    unit = SIDE / TILE
    high, wide = full["rows"] * unit, full["columns"] * unit
    right, bottom = LEFT + wide, TOP + high
    parts = [
        text(
            LEFT,
            34,
            f"An expert's up projection, {full['rows']} x {full['columns']}, stored once",
            "ink",
            15,
            bold=True,
        ),
        text(
            LEFT,
            54,
            f"as {full['rows'] // TILE} x {full['columns'] // TILE} tiles of "
            f"{TILE} x {TILE}; a width is a prefix of rows and columns",
            "dim",
            12,
        ),
    ]
    for name, opacity in (("L", 0.28), ("M", 0.45), ("S", 0.8)):
        w, h = sizes[name]["columns"] * unit, sizes[name]["rows"] * unit
        parts.append(box(LEFT, TOP, w, h, "paper", corner=0))
        parts.append(box(LEFT, TOP, w, h, name, corner=0, opacity=opacity))
    for column in range(full["columns"] // TILE + 1):
        x = LEFT + column * SIDE
        parts.append(line(x, TOP, x, bottom, "paper", 1))
    for row in range(full["rows"] // TILE + 1):
        y = TOP + row * SIDE
        parts.append(line(LEFT, y, right, y, "paper", 1))
    for name in ("S", "M", "L"):
        w, h = sizes[name]["columns"] * unit, sizes[name]["rows"] * unit
        parts.append(box(LEFT, TOP, w, h, None, name, corner=0))
        parts.append(
            text(LEFT + w, TOP - 7, f"{name}: {sizes[name]['columns']}", name, 12, "end", bold=True)
        )
        parts.append(
            text(LEFT - 6, TOP + h - 2, f"{sizes[name]['rows']}", name, 12, "end", bold=True)
        )
    y = bottom + 40
    parts.append(text(LEFT, y, "Rows of one pass, each zero beyond its own width:", "ink", 13))
    y += 10
    step = 15.0
    for row, name in enumerate(ROWS):
        w = sizes[name]["columns"] * unit
        parts.append(box(LEFT, y + row * step, wide, step - 3, "rest", corner=2, opacity=0.6))
        parts.append(box(LEFT, y + row * step, w, step - 3, name, corner=2, opacity=0.8))
        parts.append(text(LEFT - 8, y + row * step + 11, name, name, 12, "end", bold=True))
    y += len(ROWS) * step + 18
    parts.append(
        text(
            LEFT,
            y,
            "A block of rows runs at its widest row, so the weights are read once for all of them.",
            "dim",
            12,
        )
    )
    title = "A weight matrix in tiles with the nested prefixes of the widths S, M and L"
    return picture(right + 36, y + 22, title, parts)
