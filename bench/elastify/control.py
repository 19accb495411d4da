"""Elastic budget control: one width thinks up to a budget, another one answers.

Points of a grid are {"think", "answer", "policy", "budget"}, then what was measured: accuracy with
its interval, tokens of an average problem, and its latency: "cpu" seconds of one thread on the
miniature (64 sequences at once; time that other work takes on the machine does not count), and
"priced" seconds on the published shapes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.elastify.pareto import Point, best_gains, is_plain, pareto
from bench.elastify.price import Prices
from elastic_infer import Engine
from elastic_infer.reasoner.evaluate import AT_ONCE, evaluate, think_answer
from elastic_infer.reasoner.task import Problem
from elastic_infer.reasoner.vocabulary import encode

LATENCIES = ("cpu", "priced")


def grid(
    widths: Sequence[str], budgets: Sequence[int | None], policies: Sequence[str]
) -> Iterator[Point]:
    """Every pair under every budget; a policy matters only where the widths differ."""
    for think in widths:
        for answer in widths:
            for policy in policies if think != answer else policies[:1]:
                for budget in budgets:
                    yield {"think": think, "answer": answer, "policy": policy, "budget": budget}


def ask(engine: Engine, point: Point, problems: Sequence[Problem], prices: Prices) -> Point:
    """The point with what it scored and took."""
    plan = think_answer(
        point["think"], point["answer"], budget=point["budget"], policy=point["policy"]
    )
    begin = time.process_time()
    found = evaluate(engine, problems, plan=plan)
    spent, count = time.process_time() - begin, len(problems)
    known = {
        **{key: point[key] for key in ("think", "answer", "policy", "budget")},
        **found.score.to_dict(),
        "prompt": sum(len(encode(p.prompt)) for p in problems) / count,
        "tokens": {name: number / count for name, number in found.tokens.items()},
        "again": found.rebuilt_tokens / count,
        "cpu": spent / count,
    }
    return {**known, "priced": prices.seconds(known)}


def measure(
    model: Path,
    problems: Sequence[Problem],
    more: Sequence[Problem],
    budgets: Sequence[int | None],
    policies: Sequence[str],
    prices: Prices,
) -> dict[str, Any]:
    """The whole grid, then its fronts and the full model again with more problems.

    Args:
        model: elastic checkpoint. problems: of a grid point. more: of a point of a front.
        budgets, policies: of the grid. prices: of the published shapes.

    Returns:
        {"points", "again": the points that were asked again, "prices", "measured_prices",
        "gains": {latency: best_gains of the points asked again}}.
    """
    with Engine.from_pretrained(model, threads=1, max_num_seqs=AT_ONCE) as engine:
        todo = list(grid(list(engine.widths), budgets, policies))
        ask(engine, todo[0], problems, prices)  # records the passes, warms the caches
        points = [ask(engine, point, problems, prices) for point in todo]
        chosen = [p for p in points if is_plain(p)]
        for latency in LATENCIES:
            chosen += [p for p in pareto(points, latency) if p not in chosen]
        again = [ask(engine, point, more, prices) for point in chosen]
    gains = {latency: best_gains(again, latency) for latency in LATENCIES}
    return {
        "points": points,
        "again": again,
        "prices": prices.title,
        "measured_prices": prices.measured,
        "gains": gains,
    }


def solved_by_width(model: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    """Problems that every width of a checkpoint solves by greedy decoding."""
    with Engine.from_pretrained(model, threads=1, max_num_seqs=AT_ONCE) as engine:
        return {
            name: evaluate(engine, problems, width=name).score.to_dict() for name in engine.widths
        }
