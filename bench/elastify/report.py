"""The results of the miniature as tables, which docs/elastify.md shows, and as plots.

Every table is made from results.json: {"machine", "date", "scale", "results": {part:
{seed: result}}}, each result with the commit and the date that it was made at. It raises KeyError
where a part is not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.elastify.pareto import pareto
from bench.elastify.tables import NARROW, TABLES, WAYS, Figures, first


def _canvas(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_control(out: Path, control: Figures) -> None:
    """Accuracy against both latencies: a colour per pair of widths, a line along the front."""
    figure, panels = _canvas(11, 4.5, 2)
    for axes, latency in zip(panels, ("cpu", "priced")):
        pairs: dict[str, list[Figures]] = {}
        for point in control["points"]:
            if point[latency] is not None:
                pairs.setdefault(f"{point['think']} → {point['answer']}", []).append(point)
        for pair, group in pairs.items():
            axes.scatter(
                [1000 * p[latency] for p in group], [p["accuracy"] for p in group], s=14, label=pair
            )
        front = pareto(control["points"], latency)
        axes.plot(
            [1000 * p[latency] for p in front],
            [p["accuracy"] for p in front],
            color="0.6",
            zorder=0,
        )
        plain = pareto([p for p in control["points"] if p["think"] == p["answer"] == "L"], latency)
        axes.plot(
            [1000 * p[latency] for p in plain],
            [p["accuracy"] for p in plain],
            color="0.2",
            linestyle="--",
            zorder=0,
            label="L, plain budget",
        )
        title = {"cpu": "miniature: CPU ms a problem", "priced": "priced: ms a problem"}[latency]
        axes.set(xlabel=title, ylabel="accuracy", ylim=(0, 1.02))
    panels[1].legend(fontsize="small", loc="lower right")
    figure.savefig(out, dpi=100)


def draw_widths(out: Path, results: Figures) -> None:
    """Solved problems of M and S by every way, with their intervals."""
    figure, panels = _canvas(9, 3.2, 2)
    for axes, name in zip(panels, NARROW):
        ways = [w for w in WAYS if w[1] in results]
        for place, (_, part, _) in enumerate(ways):
            for run in results[part].values():
                score = run["widths"][name]
                low, high = score["interval"]
                axes.plot([place, place], [low, high], color="0.6", zorder=0)
                axes.plot(place, score["solved"], "o", color=f"C{place}")
        axes.set_xticks(range(len(ways)), [f"({w[0]}) {w[1]}" for w in ways])
        axes.set(title=name, ylabel="solved", ylim=(-0.02, 1.02))
    figure.savefig(out, dpi=100)


def write_report(out: Path, head: Figures, results: Figures) -> str:
    """Writes results.json, results.md and the plots into a folder; returns the tables."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {**head, "results": results}
    if "control" in results:
        draw_control(out / "control.png", first(results, "control"))
    if any(part in results for _, part, _ in WAYS):
        draw_widths(out / "widths.png", results)
    text = json.dumps(figures, indent=1) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")
    parts = []
    for make in TABLES.values():
        try:
            parts.append(make(figures))
        except KeyError:  # of parts that were not asked for
            continue
    text = "\n\n".join(parts)
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    return text
