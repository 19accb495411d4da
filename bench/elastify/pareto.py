"""Which points of a grid are worth having, and what they gain over the full model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.elastify.price import Prices

Point = dict[str, Any]


def pareto(points: Sequence[Point], latency: str) -> list[Point]:
    """The points that no other one beats in both latency and accuracy, fastest first."""
    best, front = -1.0, []
    known = [p for p in points if p[latency] is not None]
    for point in sorted(known, key=lambda p: (p[latency], -p["accuracy"])):
        if point["accuracy"] > best:
            best = point["accuracy"]
            front.append(point)
    return front


def is_plain(point: Point) -> bool:
    """True if the full model does everything: the base of all gains."""
    return point["think"] == point["answer"] == "L"


def best_gains(points: Sequence[Point], latency: str) -> dict[str, Any]:
    """Best gains over the full model with a plain budget.

    Returns:
        {"accuracy": share gained at no more latency than some plain point, "latency": times faster
        at no less accuracy than some plain point, and the two pairs of points}; plain points that
        solve nothing do not count, and without any {} is returned.
    """
    known = [p for p in points if p[latency] is not None]
    plain = [p for p in known if is_plain(p) and p["accuracy"] > 0]
    if not plain:
        return {}
    gains = [
        (p["accuracy"] - b["accuracy"], i, j)
        for i, b in enumerate(plain)
        for j, p in enumerate(known)
        if p[latency] <= b[latency]
    ]
    ratios = [
        (b[latency] / p[latency], i, j)
        for i, b in enumerate(plain)
        for j, p in enumerate(known)
        if p["accuracy"] >= b["accuracy"]
    ]
    out: dict[str, Any] = {}
    for name, pairs in (("accuracy", gains), ("latency", ratios)):
        value, base, other = max(pairs)
        out[name] = {"gain": value, "plain": plain[base], "by": known[other]}
    return out


def price_again(control: dict[str, Any], prices: Prices) -> None:
    """Gives the points of a grid other prices, in place; what was measured stays, also which points
    were asked again: "chosen_by" says by what prices their front was found."""
    control.setdefault("chosen_by", control["prices"])
    for point in (*control["points"], *control["again"]):
        point["priced"] = prices.seconds(point)
    control["prices"], control["measured_prices"] = prices.title, prices.measured
    control["gains"]["priced"] = best_gains(control["again"], "priced")


def near_gain(points: Sequence[Point], latency: str) -> Point:
    """The fastest point that cannot be told from the full model at its best.

    Returns:
        {"gain": times faster, "plain": the full model's best point, "by": the fastest point whose
        accuracy lies in that one's 95 % interval or above}.
    """
    known = [p for p in points if p[latency] is not None]
    plain = max((p for p in known if is_plain(p)), key=lambda p: (p["accuracy"], -p[latency]))
    by = min((p for p in known if p["accuracy"] >= plain["low"]), key=lambda p: p[latency])
    return {"gain": plain[latency] / by[latency], "plain": plain, "by": by}
