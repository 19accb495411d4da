"""speed.svg: decode of the 620M model beside llama.cpp on the same weights and threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.pictures.svg import box, line, picture, text

RESULTS = Path(__file__).parent.parent.parent / "bench/results"
LEFT, LABELS, BAR, GAP, ROW = 28.0, 196.0, 400.0, 18.0, 24.0


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def groups() -> list[tuple[str, list[tuple[str, float, str, float | None]]]]:
    """(title, bars) with bars of (label, tokens/s, colour, the roof that memory sets)."""
    bf16, codes = read("compare-620m.json"), read("nvfp4-620m.json")
    pair, four = bf16["with_peer"]["decode"], codes["types"]["q4_0"]["decode"]
    widths = {
        row["width"]: (row["tokens_s"], row["tokens_s"] / row["share_of_roof"])
        for row in bf16["widths"]
    }
    ours = [("width " + name, *widths[name]) for name in ("M", "S")]
    return [
        (
            "bfloat16 weights",
            [
                ("llama.cpp", pair["peer_tokens_s"], "theirs", None),
                ("elastic_infer", pair["tokens_s"], "ours", widths["L"][1]),
            ],
        ),
        ("the same file, narrower", [(name, rate, "ours", roof) for name, rate, roof in ours]),
        (
            "about 4.5 bits a weight",
            [
                ("llama.cpp q4_0", four["peer_tokens_s"], "theirs", None),
                ("elastic_infer NVFP4", four["tokens_s"], "ours", None),
            ],
        ),
    ]


def draw() -> str:
    """The picture as SVG."""
    bf16, codes = read("compare-620m.json"), read("nvfp4-620m.json")
    every = groups()
    most = max(max(rate, roof or 0) for _, bars in every for _, rate, _, roof in bars)
    scale, x, y = BAR / most, LEFT + LABELS, 64.0
    parts = [
        text(
            LEFT,
            32,
            "Decode, tokens per second: 620M parameters, one sequence, 2 CPU cores",
            "ink",
            15,
            bold=True,
        ),
    ]
    for title, bars in every:
        parts.append(text(LEFT, y + 5, title, "dim", 12))
        y += 12
        for label, rate, colour, roof in bars:
            parts.append(text(x - 10, y + 16, label, "ink", 13, "end", bold=colour == "ours"))
            parts.append(box(x, y + 2, rate * scale, ROW - 5, colour))
            end = x + rate * scale
            if roof is not None:
                at = x + roof * scale
                parts.append(line(at, y, at, y + ROW - 1, "ink", 1.4, "2 2"))
                end = max(end, at) if at - end < 40 else end
            parts.append(text(end + 8, y + 16, f"{rate:.0f}", "ink", 13, bold=True))
            y += ROW
        y += GAP
    where = f"{bf16['machine']['processor']}, {bf16['threads']} threads"
    dates = " and ".join(sorted({bf16["date"], codes["date"]}))
    parts += [
        line(LEFT + 2, y - 9, LEFT + 2, y + 4, "ink", 1.4, "2 2"),
        text(
            LEFT + 12,
            y + 2,
            "the ceiling: reading weights and cache alone, measured in the same run",
            "dim",
            12,
        ),
        text(
            LEFT,
            y + 22,
            f"{where}, {dates}; medians of interleaved runs, random weights (bench/results)",
            "dim",
            12,
        ),
    ]
    title = "Tokens per second of a 620M model beside llama.cpp: " + ", ".join(
        f"{label} {rate:.0f}" for _, bars in every for label, rate, _, _ in bars
    )
    return picture(x + BAR + 76, y + 42, title, parts)
