"""The results of bench/elastify.py as one JSON file, a table in Markdown and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = (
    ("a", "router", "nested, learnt sizes"),
    ("b", "uniform", "nested, hand-picked sizes"),
    ("c", "cut", "prefix, not distilled"),
    ("d", "scratch", "alone, from scratch"),
    ("e", "alone", "alone, distilled"),
)


def share(values: dict[str, Any]) -> str:
    """Solved problems with their interval, tokens, and parameters."""
    low, high = values["interval"]
    size = f" of {values['parameters'] / 1e3:.0f}k" if "parameters" in values else ""
    solved = f"{values['solved']:.1%} ({low:.1%} to {high:.1%})"
    return f"{solved}, tokens {values['tokens_right']:.1%}{size}"


def pareto(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other one beats in both latency and accuracy, fastest first."""
    best, front = -1.0, []
    for point in sorted(points, key=lambda p: (p["seconds"], -p["accuracy"])):
        if point["accuracy"] > best:
            best = point["accuracy"]
            front.append(point)
    return front


def best_gains(points: list[dict[str, Any]]) -> dict[str, float] | None:
    """Best gains over the full model alone, at latency or accuracy no worse than its own.

    Returns {"accuracy": points gained at equal or lower latency, "latency": times faster at equal
    or higher accuracy}, over all its thinking budgets; None where it never solves anything.
    """
    plain = [p for p in points if p["think"] == p["answer"] == "L" and p["accuracy"] > 0]
    if not plain:
        return None
    gain, faster = 0.0, 1.0
    for base in plain:
        for point in points:
            if point["seconds"] <= base["seconds"]:
                gain = max(gain, point["accuracy"] - base["accuracy"])
            if point["accuracy"] >= base["accuracy"]:
                faster = max(faster, base["seconds"] / point["seconds"])
    return {"accuracy": gain, "latency": faster}


def table(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    lines = []
    rows = dict(results)
    if "order" in results:
        rows["cut"] = {"widths": results["order"]["orders"]["importance"], "tokens": 0}
    lines += ["| | way | L | M | S | tokens of the family |", "|---|---|---|---|---|---|"]
    dense = results["parent"]
    lines.append(f"| | parent | {share(dense['widths']['L'])} | | | {dense['tokens']:,} |")
    for letter, part, title in ROWS:
        if part in rows:
            cells = [
                share(rows[part]["widths"][name]) if name in rows[part]["widths"] else ""
                for name in ("L", "M", "S")
            ]
            lines.append(f"| {letter} | {title} | {' | '.join(cells)} | {rows[part]['tokens']:,} |")
    if "order" in results:
        lines += ["", "| order, before training | M | S |", "|---|---|---|"]
        for name, widths in results["order"]["orders"].items():
            cells = [f"{share(widths[w])}, KL {widths[w]['divergence']:.3f}" for w in ("M", "S")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if "depth" in results:
        depth = results["depth"]
        lines += ["", "| at the parameters of M | cut | distilled alone |", "|---|---|---|"]
        lines.append(
            f"| depth: without layers {depth['removed']} | {share(depth['cut'])} | "
            f"{share(depth['distilled'])} |"
        )
        if "alone" in results and "order" in results:
            cut = results["order"]["orders"]["importance"]["M"]
            lines.append(f"| width | {share(cut)} | {share(results['alone']['widths']['M'])} |")
    if "similarity" in results:
        lines += ["", "Cosine of caches on the same text (published: 0.89 to 0.96):", "",
                  "| widths | K | V | state |", "|---|---|---|---|"]  # fmt: skip
        for pair, parts in results["similarity"]["cosine"].items():
            lines.append(f"| {pair} | {parts['K']:.3f} | {parts['V']:.3f} | {parts['state']:.3f} |")
    if "control" in results:
        gains = best_gains(results["control"]["points"])
        lines += ["", "Pareto front of budget control, asked again with more problems:", "",
                  "| think | answer | policy | budget | accuracy | ms a problem |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for p in results["control"]["front"]:
            budget = "none" if p["budget"] is None else p["budget"]
            solved = f"{p['accuracy']:.1%} ({p['low']:.1%} to {p['high']:.1%})"
            lines.append(
                f"| {p['think']} | {p['answer']} | {p['policy']} | {budget} | {solved} | "
                f"{1000 * p['seconds']:.2f} |"
            )
        lines += ["", "Budget control, measured on the miniature (not compared with the paper): "
                  + ("the full model alone solves nothing, so there is nothing to compare."
                     if gains is None else
                     f"{gains['accuracy']:+.1%} accuracy at equal latency, "
                     f"{gains['latency']:.2f}x latency at equal accuracy, over the full model "
                     "alone.")]  # fmt: skip
    return "\n".join(lines)


def draw(out: Path, points: list[dict[str, Any]]) -> None:
    """Accuracy against latency, a colour per pair of widths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    pairs: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        pairs.setdefault(f"{point['think']} → {point['answer']}", []).append(point)
    for pair, group in pairs.items():
        axes.scatter([1000 * p["seconds"] for p in group], [p["accuracy"] for p in group], s=18,
                     label=pair)  # fmt: skip
    front = pareto(points)
    axes.plot([1000 * p["seconds"] for p in front], [p["accuracy"] for p in front], color="0.6")
    axes.set(xlabel="ms a problem", ylabel="accuracy")
    axes.legend(fontsize="small")
    figure.savefig(out, dpi=120)


def write_report(out: Path, head: dict[str, Any], results: dict[str, Any]) -> str:
    """Writes results.json, results.md and control.png into the folder; returns the table."""
    data = {**head, "results": results}
    if "control" in results:
        draw(out / "control.png", results["control"]["points"])
    (out / "results.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    text = table(results)
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    return text
